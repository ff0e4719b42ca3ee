"""What `recipe_table.py` does after it has read its options."""

import argparse
from pathlib import Path

from d_emo.common.files import written_whole
from d_emo.common.locks import output_folder
from d_emo.common.output import say
from d_emo.eval.recipes.reading import OWN_RECIPES, Recipe, read_recipes
from d_emo.eval.recipes.report import plot, table
from d_emo.eval.recipes.study import Study, Terms

# Without --minutes and --steps.
MINUTES = 2.0


def run(options: argparse.Namespace) -> None:
    """Measure, train, score, print."""
    recipes = chosen(read_recipes(Path(options.recipes) if options.recipes else OWN_RECIPES), options.only)
    if len(set(options.seeds)) < len(options.seeds):
        raise ValueError(f"--seeds {' '.join(map(str, options.seeds))}: one is named twice; name each once.")
    folder = Path(options.output_dir)
    with output_folder(folder):
        study = Study(folder, terms_of(options), recipes, options.seeds, options.cpu_threads)
        study.measure()
        study.run()
        text = table(study)
        with written_whole(folder / "table.md") as partial:
            partial.write_text(text + "\n", encoding="utf-8")
        plot(study, folder / "curves.png")
    print(text)
    say(f"table.md, curves.png and results.json in {folder}")


def chosen(recipes: list[Recipe], names: list[str] | None) -> list[Recipe]:
    """Some of the recipes, in the order that they are named in.

    Raises:
        ValueError: there is none of that name, or one is named twice.
    """
    known = {recipe.name: recipe for recipe in recipes}
    for place, name in enumerate(names or []):
        if name not in known:
            raise ValueError(f"--only {name} is no recipe of the file; it has {', '.join(known)}.")
        if name in (names or [])[:place]:
            raise ValueError(f"--only {name}: it is named twice; name each once.")
    return [known[name] for name in names] if names else recipes


def terms_of(options: argparse.Namespace) -> Terms:
    """What all runs have in common."""
    trainer = ["--config", options.config]
    for name in ("dataset", "train_data_dir", "cpu_threads"):
        value = getattr(options, name)
        trainer += [] if value is None else [f"--{name.replace('_', '-')}", str(value)]
    data = options.dataset or options.train_data_dir
    minutes = options.minutes if options.minutes or options.steps else MINUTES
    return Terms(
        trainer=tuple(trainer),
        minutes=minutes,
        steps=options.steps,
        probe_steps=options.probe_steps,
        rounds=options.rounds,
        reference=options.reference or data or "digits",
        features=options.features,
        num_images=options.num_images,
        curve_points=options.curve_points,
        curve_images=options.curve_images,
        digits=data is None,
    )
