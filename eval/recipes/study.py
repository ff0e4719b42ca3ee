"""A comparison of recipes: speeds, steps for equal time, runs and scores, all in one folder that is gone on with."""

import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from d_emo.common.commands import CommandError
from d_emo.common.files import make_folder, read_json, remove, write_json
from d_emo.common.messages import shown
from d_emo.common.output import duration, say
from d_emo.eval.compare_runs import read_columns
from d_emo.eval.recipes.reading import Phase, Recipe

RESULTS_FILE, LOG_FILE, OPTIONS_FILE = "results.json", "train_log.csv", "run.json"
# Lines of a run's log, and of those that measure speed, whose first line is left out: caches are cold then.
LINES, PROBE_LINES = 40, 4


@dataclass(frozen=True, kw_only=True)
class Terms:
    """What all runs of a comparison have in common.

    Attributes:
        trainer: flags of the trainer.
        minutes: of training for each run; None where `steps` says how long.
        steps: optimizer steps for each run; None for equal time.
        probe_steps: optimizer steps of a measurement of speed.
        rounds: measurements of each recipe, in turns.
        reference: what samples are compared with.
        features: of the distance.
        num_images: samples of a run.
        curve_points: distances on the way; 0 for none.
        curve_images: samples of each of these.
        digits: whether samples are read as digits.
    """

    trainer: tuple[str, ...]
    minutes: float | None
    steps: int | None
    probe_steps: int
    rounds: int
    reference: str
    features: str
    num_images: int
    curve_points: int
    curve_images: int
    digits: bool

    def as_json(self) -> dict[str, Any]:
        """What must not change while a comparison goes on."""
        return {**vars(self), "trainer": list(self.trainer)}


class Study:
    """A comparison in its folder. What is in `results.json` is not done again.

    Args:
        folder: of it.
        terms: of all runs.
        recipes: the first is what the others are compared with.
        seeds: of the runs of each recipe.
        threads: of the evaluator on a CPU; None for its own choice.

    Raises:
        ValueError: the folder holds a comparison on other terms, or one with other flags under the same name.
    """

    def __init__(
        self, folder: Path, terms: Terms, recipes: Sequence[Recipe], seeds: Sequence[int], threads: int | None
    ):
        self.folder, self.terms, self.recipes, self.seeds, self.threads = folder, terms, recipes, seeds, threads
        self.results: dict[str, Any] = {"terms": terms.as_json(), "recipes": {}, "speeds": {}, "steps": {}, "runs": {}}
        if (folder / RESULTS_FILE).exists():
            self._go_on()
        self.results["recipes"] |= {recipe.name: recipe.as_json() for recipe in recipes}

    def _go_on(self) -> None:
        path, remedy = self.folder / RESULTS_FILE, "choose another --output-dir"
        stored = read_json(path, f"delete it, or {remedy}")
        if set(stored) != set(self.results) or not all(isinstance(value, dict) for value in stored.values()):
            raise ValueError(f"{path} holds no comparison of recipes; delete it, or {remedy}.")
        for name, value in self.terms.as_json().items():
            if stored["terms"].get(name) != value:
                was = shown(stored["terms"].get(name))
                raise ValueError(f"{self.folder} holds a comparison with {name}={was}, not {shown(value)}; {remedy}.")
        for recipe in self.recipes:
            if stored["recipes"].get(recipe.name, recipe.as_json()) != recipe.as_json():
                raise ValueError(f"{self.folder} holds a recipe {recipe.name} of other flags; rename it, or {remedy}.")
        self.results = stored

    def save(self) -> None:
        """Write what is known by now."""
        make_folder(self.folder)
        write_json(self.folder / RESULTS_FILE, self.results)

    def measure(self) -> None:
        """Steps of every phase: measured speed times its share of the time, or its share of --steps.

        Recipes take turns, so that what else the machine does meets all of them; the fastest turn of each counts, which
        it disturbed least.
        """
        fresh = [recipe for recipe in self.recipes if recipe.name not in self.results["steps"]]
        speeds: dict[str, list[list[float]]] = {recipe.name: [] for recipe in fresh}
        if self.terms.minutes is not None:
            for turn in range(self.terms.rounds):
                for recipe in fresh:
                    say(f"speed of {recipe.name}, turn {turn + 1} of {self.terms.rounds}")
                    speeds[recipe.name].append(self._probe(recipe))
        for recipe in fresh:
            if self.terms.steps is not None:
                steps = [max(1, round(phase.share * self.terms.steps)) for phase in recipe.phases]
            else:
                assert self.terms.minutes is not None
                best = [max(turns) for turns in zip(*speeds[recipe.name], strict=True)]
                seconds = [60 * self.terms.minutes * phase.share for phase in recipe.phases]
                steps = [max(1, round(time * speed)) for time, speed in zip(seconds, best, strict=True)]
                self.results["speeds"][recipe.name] = best
            self.results["steps"][recipe.name] = steps
        self.save()

    def _probe(self, recipe: Recipe) -> list[float]:
        """Optimizer steps a second of every phase, in a run that is thrown away."""
        folder, speeds = self.folder / "speed", []
        remove(folder)
        for number in range(len(recipe.phases)):
            self._train(recipe, number, folder, seed=0, steps=self.terms.probe_steps, lines=PROBE_LINES, curve=False)
            speeds.append(max(steps_a_second(folder / f"phase-{number + 1}")[1:]))
        remove(folder)
        return speeds

    def run(self) -> None:
        """Train and score what is missing, seed after seed, so that a comparison which is cut short has all recipes."""
        todo = [
            (recipe, seed)
            for seed in self.seeds
            for recipe in self.recipes
            if "scores" not in self.results["runs"].get(run_name(recipe, seed), {})
        ]
        for done, (recipe, seed) in enumerate(todo):
            say(f"{recipe.name}, seed {seed}: run {done + 1} of {len(todo)}{self._left(len(todo) - done)}")
            folder = self.folder / run_name(recipe, seed)
            steps = self.results["steps"][recipe.name]
            for number, count in enumerate(steps):
                if not finished(folder / f"phase-{number + 1}", count):
                    self._train(recipe, number, folder, seed, count, LINES, curve=self.terms.curve_points > 0)
            seconds = [training_seconds(folder / f"phase-{number + 1}") for number in range(len(steps))]
            scores = self._score(recipe, folder, folder / f"phase-{len(steps)}")
            self.results["runs"][run_name(recipe, seed)] = {"seconds": sum(seconds), "scores": scores}
            self.save()
            told = ", ".join(f"{name} {value:.4g}" for name, value in scores.items())
            say(f"{recipe.name}, seed {seed}: {told}; trained for {duration(sum(seconds))}")

    def _left(self, runs: int) -> str:
        """How long the runs that are left will take, scores aside; nothing where that is not known yet."""
        known = [run["seconds"] for run in self.results["runs"].values()]
        if self.terms.minutes is None and not known:
            return ""
        each = 60 * self.terms.minutes if self.terms.minutes is not None else mean(known)
        return f", {duration(runs * each)} of training left"

    def _train(self, recipe: Recipe, number: int, folder: Path, seed: int, steps: int, lines: int, curve: bool) -> None:
        """A phase of a recipe, from its newest checkpoint on."""
        phase: Phase = recipe.phases[number]
        before = ("--init-from", str(folder / f"phase-{number}")) if number else ()
        way: tuple[str, ...] = ("--fid-every", "0")
        if curve:
            every = max(1, steps // max(1, round(phase.share * self.terms.curve_points)))
            way = (
                "--fid-every", str(every), "--fid-images", str(self.terms.curve_images),
                "--fid-features", self.terms.features, "--fid-reference", self.terms.reference,
            )  # fmt: skip
        fixed = (
            "--seed", str(seed), "--max-train-steps", str(steps), "--log-every", str(max(1, steps // lines)),
            "--sample-every", "0", "--checkpoint-every", str(max(1, -(-steps // 5))), "--keep-checkpoints", "1",
            "--report-to", "none", "--resume-from", "latest", "--output-dir", str(folder / f"phase-{number + 1}"),
        )  # fmt: skip
        self._call("d_emo.train.train_dit", (*self.terms.trainer, *way, *phase.flags, *before, *fixed), recipe.name)

    def _score(self, recipe: Recipe, folder: Path, model: Path) -> dict[str, float]:
        """The distance of a run's samples, and for digits the share that is read as asked for."""
        from d_emo.eval.fid.evaluation import SCORES_FILE
        from d_emo.eval.fid.scoring import load_scores

        place = folder / "evaluation"
        words = (
            "--model", str(model), "--preset", "quick", "--num-images", str(self.terms.num_images), "--labels",
            "balanced", "--reference", self.terms.reference, "--features", self.terms.features, "--metrics", "fid",
            "--output-dir", str(place), *recipe.sample,
        )  # fmt: skip
        self._call("d_emo.eval.evaluate_fid", words, recipe.name)
        scores = {"distance": load_scores(place / SCORES_FILE).values["fid"]}
        return scores | ({"read right": read_right(place / "samples")} if self.terms.digits else {})

    def _call(self, module: str, words: Sequence[str], name: str) -> None:
        """Another command, in a process of its own, whose lines go to a file.

        Raises:
            CommandError: it did not end well; the message has its last line.
        """
        log = self.folder / "logs" / f"{name}.txt"
        make_folder(self.folder)
        make_folder(log.parent)
        with log.open("a", encoding="utf-8") as file:
            file.write(f"$ python -m {module} {' '.join(words)}\n")
            file.flush()
            code = subprocess.run(
                [sys.executable, "-m", module, *words], stdout=file, stderr=file, check=False, env=self._environment()
            ).returncode
        if code:
            lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
            raise CommandError(f"{name}: {lines[-1].strip()} (all of it in {log})")

    def _environment(self) -> dict[str, str]:
        """What the other commands find in their environment."""
        return {**os.environ, **({} if self.threads is None else {"OMP_NUM_THREADS": str(self.threads)})}


def run_name(recipe: Recipe, seed: int) -> str:
    """The folder of a run within the comparison's."""
    return f"{recipe.name}/seed-{seed}"


def log_rows(folder: Path) -> list[tuple[int, float, float]]:
    """Step, loss and images a second of every line that a run logged."""
    return [(int(step), loss, speed) for step, loss, speed in read_columns(
        folder / LOG_FILE, "step", "loss", "images_per_second")]  # fmt: skip


def batch_of(folder: Path) -> int:
    """Images an optimizer step of a run."""
    return int(read_json(folder / OPTIONS_FILE, "run it again")["global_batch_size"])


def steps_a_second(folder: Path) -> list[float]:
    """Of every line that a run logged: pauses for samples, scores and checkpoints aside."""
    batch = batch_of(folder)
    return [speed / batch for _, _, speed in log_rows(folder)]


def training_seconds(folder: Path) -> float:
    """What a run's steps took, such pauses and interruptions aside."""
    batch, seconds, last = batch_of(folder), 0.0, 0
    for step, _, speed in log_rows(folder):
        seconds, last = seconds + (step - last) * batch / speed, step
    return seconds


def finished(folder: Path, steps: int) -> bool:
    """Whether a run came to its end: its log did, and its pipeline is there, which is written after that."""
    if not (folder / "model_index.json").is_file() or not (folder / LOG_FILE).is_file():
        return False
    rows = log_rows(folder)
    return bool(rows) and rows[-1][0] >= steps


def read_right(samples: Path) -> float:
    """The share of drawn digits that `digits_report`'s classifier of real digits reads as asked for."""
    import numpy as np

    from d_emo.eval.digits_report import real_digits, score_digits
    from d_emo.eval.fid.image_sets import from_shards

    drawn = from_shards(samples)
    assert drawn.labels is not None
    pixels = drawn.read(0, len(drawn)).reshape(len(drawn), -1).astype(np.float32) / 127.5 - 1
    real, classes = real_digits(drawn.shape[1])
    return score_digits(pixels, drawn.labels, real, classes).requested_class
