"""The table of recipes: what a file of recipes may say, equal time, what is done once, and what the table shows."""

import csv
import json
from itertools import pairwise
from pathlib import Path

import pytest
from helpers.training import run_here

from d_emo.eval import recipe_table
from d_emo.eval.fid import scoring
from d_emo.eval.recipes import study as studies
from d_emo.eval.recipes.reading import OWN_RECIPES, Phase, read_recipes
from d_emo.train.diffusion.config import parse_config

BATCH = 8


class Commands:
    """Stands for the trainer and the evaluator: writes what they would, and remembers what it was asked for.

    Attributes:
        called: module and options of every call.
        fail_after: calls after which the machine "stops".
    """

    def __init__(self):
        self.called: list[tuple[str, dict[str, str]]] = []
        self.fail_after = 1000

    def __call__(self, study, module, words, name):
        if len(self.called) == self.fail_after:
            raise KeyboardInterrupt
        options = {word: value for word, value in pairwise(words) if word.startswith("--")}
        self.called.append((module, options))
        folder = Path(options["--output-dir"])
        folder.mkdir(parents=True)
        if module.endswith("evaluate_fid"):
            seed = int(folder.parent.name.removeprefix("seed-"))
            scores = {"values": {"fid": 10.0 + seed + 3 * name.startswith("slow")}}
            (folder / "scores.json").write_text(json.dumps(scores))
            return
        (folder / "model_index.json").write_text("{}")
        (folder / "run.json").write_text(json.dumps({"global_batch_size": BATCH}))
        last, every = int(options["--max-train-steps"]), int(options["--log-every"])
        with (folder / "train_log.csv").open("w", newline="") as file:
            log = csv.writer(file)
            log.writerow(("step", "loss", "images_per_second"))
            for step in sorted({*range(every, last, every), last}):
                log.writerow((step, 1 / step, BATCH * (2 if name.startswith("slow") else 4)))


@pytest.fixture
def commands(monkeypatch):
    stand_in = Commands()
    monkeypatch.setattr(studies.Study, "_call", lambda *arguments: stand_in(*arguments))
    monkeypatch.setattr(studies, "read_right", lambda samples: 0.9)
    monkeypatch.setattr(
        scoring, "load_scores", lambda path: scoring.Scores(values=json.loads(path.read_text())["values"])
    )
    return stand_in


@pytest.fixture
def recipes(tmp_path):
    path = tmp_path / "recipes.yaml"
    path.write_text('plain: ""\nslow: --optimizer muon\ntwo: {train: ["", --learning-rate 1], shares: [0.75, 0.25]}\n')
    return path


def compared(capsys, tmp_path, recipes, *more):
    return run_here(
        capsys, "--recipes", recipes, "--output-dir", tmp_path / "out", "--curve-points", "0", *more,
        main=recipe_table.main,
    )  # fmt: skip


def test_every_recipe_gets_the_same_time(capsys, tmp_path, recipes, commands):
    code, printed = compared(capsys, tmp_path, recipes, "--minutes", "5", "--seeds", "0", "1")
    assert code == 0, printed
    results = json.loads((tmp_path / "out/results.json").read_text())
    assert results["steps"] == {"plain": [1200], "slow": [600], "two": [900, 300]}
    assert all(run["seconds"] == pytest.approx(300) for run in results["runs"].values())
    trained = [options for module, options in commands.called if module.endswith("train_dit")]
    second = [options for options in trained if options["--output-dir"].endswith("phase-2")]
    assert all(Path(options["--init-from"]).name == "phase-1" for options in second)
    assert not any("--init-from" in options for options in trained if options not in second)
    assert {options["--seed"] for options in trained} == {"0", "1"}
    # 10 and 11 against 13 and 14: three more, of seeds that are one apart
    assert "| slow | 600 | 5 | 13.5 | 13 to 14 | +3, beyond seeds | 90.0% |" in printed
    assert "| plain | 1,200 | 5 | 10.5 | 10 to 11 | - | 90.0% |" in printed
    assert "| two | 900 + 300 | 5 | 10.5 | 10 to 11 | +0, within seeds |" in printed
    assert (tmp_path / "out/table.md").read_text() in printed
    assert (tmp_path / "out/curves.png").stat().st_size > 1000


def test_what_is_done_is_not_done_again(capsys, tmp_path, recipes, commands):
    commands.fail_after = 9  # speeds take 4 calls a turn: in the first run
    code, _ = compared(capsys, tmp_path, recipes, "--rounds", "2")
    assert code
    before = len(commands.called)
    commands.fail_after = 1000
    code, printed = compared(capsys, tmp_path, recipes, "--rounds", "2")
    assert code == 0, printed
    again = [options["--output-dir"] for _, options in commands.called[before:]]
    assert not any("speed" in folder or folder.endswith("plain/seed-0/phase-1") for folder in again)
    assert len(again) == 6  # a score; a run and a score; two phases and a score
    compared(capsys, tmp_path, recipes, "--rounds", "2")
    assert len(commands.called) == before + 6
    compared(capsys, tmp_path, recipes, "--rounds", "2", "--seeds", "0", "1", "--only", "slow")
    assert len(commands.called) == before + 8


def test_another_comparison_is_not_mixed_in(capsys, tmp_path, recipes, commands):
    assert compared(capsys, tmp_path, recipes, "--steps", "8")[0] == 0
    code, printed = compared(capsys, tmp_path, recipes, "--steps", "9")
    assert code and "holds a comparison with steps=8, not 9; choose another --output-dir" in printed
    recipes.write_text("plain: --optimizer muon\n")
    code, printed = compared(capsys, tmp_path, recipes, "--steps", "8")
    assert code and "holds a recipe plain of other flags" in printed


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[1]", "expected `name: flags` lines"),
        ("a/b: ''", "'a/b' is no name"),
        ("a: 3", "a: train=3 is no text of flags"),
        ("a: {flags: x}", "'flags' is unknown; it has train, shares and sample"),
        ("a: {train: [x, y], shares: [0.5, 0.6]}", "is not a list of one number above 0 a phase"),
        ("a: {train: [x, y], shares: [1]}", "is not a list of one number above 0 a phase"),
        ("a: '--seed 3'", "--seed is decided by the comparison"),
        ("a: --max_train_steps=3", "is decided by the comparison"),
        ("a: {sample: --num-images 3}", "--num-images is decided by the comparison"),
        ('a: "it''s"', "cannot be split into words"),
        ("a: [", "cannot be read as YAML"),
    ],
)  # fmt: skip
def test_bad_recipes_are_refused_before_anything_is_made(capsys, tmp_path, recipes, text, said):
    recipes.write_text(text.replace("its", "it's"))
    code, printed = compared(capsys, tmp_path, recipes)
    assert code and said in printed
    assert not (tmp_path / "out").exists()


def test_names_that_are_not_there(capsys, tmp_path, recipes):
    code, printed = compared(capsys, tmp_path, recipes, "--only", "adam")
    assert code and "--only adam is no recipe of the file; it has plain, slow, two" in printed
    code, printed = compared(capsys, tmp_path, recipes, "--seeds", "1", "1")
    assert code and "one is named twice" in printed


def test_own_recipes_are_taken_by_the_trainer():
    recipes = read_recipes(OWN_RECIPES)
    assert recipes[0].name == "plain" and recipes[0].phases == (Phase((), 1.0),)
    for recipe in recipes:
        for phase in recipe.phases:
            parse_config(["--config", "train/configs/digits.yaml", *phase.flags])


@pytest.mark.slow
def test_real_commands(capsys, tmp_path):
    recipes = tmp_path / "recipes.yaml"
    flow_map = "[--model D-EMOv2-N-8, --objective flow-map --ema-decay 0.9]"
    recipes.write_text(f"two: {{train: {flow_map}, sample: --sampler own --steps 2}}\n")
    code, printed = run_here(
        capsys, "--recipes", recipes, "--minutes", "0.05", "--rounds", "1", "--probe-steps", "4", "--cpu-threads", "1",
        "--num-images", "20", "--curve-points", "2", "--curve-images", "20", "--output-dir", tmp_path / "out",
        main=recipe_table.main,
    )  # fmt: skip
    assert code == 0, printed
    run = json.loads((tmp_path / "out/results.json").read_text())["runs"]["two/seed-0"]
    assert run["scores"]["distance"] > 0 and 0 <= run["scores"]["read right"] <= 1
    assert (tmp_path / "out/two/seed-0/phase-2/fid").is_dir()
