"""Every command of the package: what begins it, a command line that works, and the options that its parser knows."""

import argparse
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState

from d_emo.common.command_line import parser_of
from d_emo.common.files import LOCK_FILE
from d_emo.common.options import TRUE
from d_emo.kernels import use_backend
from d_emo.kernels.dispatch import chosen_backend
from helpers.classifiers import TINY as TINY_CLASSIFIER
from helpers.masks import TINY as TINY_SEGMENTER
from helpers.object_files import TINY as TINY_DETECTOR
from helpers.training import TINY, uncounted_but_for_plans
from helpers.video_training import TINY as TINY_VIDEO

# Characters of a line that still helps.
LONGEST = 700
# Lines on stderr, with those that libraries print and what a command says before it fails.
LINES = 3


class Reached(BaseException):
    """A command came to its work: its options were accepted. No error that a command would catch."""


@dataclass(frozen=True)
class SweptCommand:
    """A command.

    Attributes:
        name: of it.
        module: that has its `main`.
        base: a command line that works; "@NAME" stands for what `made` has of that name, "@out" for a new folder.
        parsed: what is called first with options that the parser accepted.
        quick: whether the base command line takes seconds.
        extra: of the package, without which the command does nothing.
    """

    name: str
    module: str
    base: tuple[str, ...]
    parsed: str
    quick: bool = True
    extra: str | None = None

    @property
    def main(self) -> Callable[[list[str]], None]:
        """The command's function."""
        return importlib.import_module(self.module).main


COMMANDS = {
    command.name: command
    for command in (
        SweptCommand(
            "sample",
            "d_emo.pipelines.sample",
            ("--model", "@pipeline", "--every-class", "--num-images", "1", "--steps", "2", "--output", "@out"),
            "d_emo.pipelines.sample_command.run",
        ),
        SweptCommand("models", "d_emo.cli.models", ("--pattern", "D-EMOv2-N-8"), "d_emo.cli.models.tables"),
        SweptCommand("completion", "d_emo.cli.completion", ("bash",), "d_emo.cli.completion.all_parsers"),
        SweptCommand(
            "train_dit",
            "d_emo.train.train_dit",
            (*TINY, "--max-train-steps", "1", "--output-dir", "@out"),
            "d_emo.train.diffusion.trainer.run",
        ),
        SweptCommand(
            "train_classifier",
            "d_emo.train.train_classifier",
            (*TINY_CLASSIFIER, "--validation-share", "0", "--max-train-steps", "1", "--output-dir", "@out"),
            "d_emo.train.classification.trainer.run",
        ),
        SweptCommand(
            "train_video_classifier",
            "d_emo.train.train_video_classifier",
            (*TINY_VIDEO, "--train-data-dir", "@videos", "--max-train-steps", "1", "--output-dir", "@out"),
            "d_emo.train.video.trainer.run",
            extra="video",
        ),
        SweptCommand(
            "make_camera_motion",
            "d_emo.train.make_camera_motion",
            ("--photos", "@pictures", "--held-out", "1", "--frames", "2", "--resolution", "16", "--output-dir", "@out"),
            "d_emo.train.video.motion_command.run",
            extra="video",
        ),
        SweptCommand(
            "train_detector",
            "d_emo.train.train_detector",
            (*TINY_DETECTOR, "--train-data-dir", "@boxes", "--max-train-steps", "1", "--output-dir", "@out"),
            "d_emo.train.detection.trainer.run",
        ),
        SweptCommand(
            "train_segmenter",
            "d_emo.train.train_segmenter",
            (*TINY_SEGMENTER, "--train-data-dir", "@masks", "--max-train-steps", "1", "--output-dir", "@out"),
            "d_emo.train.segmentation.trainer.run",
        ),
        SweptCommand(
            "encode_latents",
            "d_emo.train.encode_latents",
            ("--train-data-dir", "@pictures", "--vae", "@vae", "--resolution", "16", "--output-dir", "@out"),
            "d_emo.train.diffusion.encoding.run",
        ),
        SweptCommand(
            "choose_average",
            "d_emo.train.choose_average",
            ("@snapshots", "--length", "0.07", "--output-dir", "@out"),
            "d_emo.train.diffusion.choosing.choose_averages",
        ),
        SweptCommand(
            "convert_dit",
            "d_emo.train.convert_dit",
            ("@dit.pt", "--objective", "dit", "--vae", "none", "--num-heads", "2", "--output-dir", "@out"),
            "d_emo.train.diffusion.convert.import_checkpoint",
        ),
        SweptCommand(
            "convert_emov2",
            "d_emo.train.convert_emov2",
            ("@emov2.pth", "--output-dir", "@out"),
            "d_emo.train.classification.convert.convert",
        ),
        SweptCommand(
            "make_packaged",
            "d_emo.train.make_packaged",
            ("digits", "--run-dir", "@pipeline", "--output-dir", "@out"),
            "d_emo.train.packing.command.run",
            quick=False,
        ),
        SweptCommand(
            "evaluate_fid",
            "d_emo.eval.evaluate_fid",
            ("--samples", "@samples.npz", "--reference", "digits", "--features", "pixels", "--output-dir", "@out",
             "--cache-dir", "@cache"),
            "d_emo.eval.fid.command.run",
        ),
        SweptCommand(
            "evaluate_classifier",
            "d_emo.eval.evaluate_classifier",
            ("--model", "@classifier", "--data-dir", "@pictures", "--output-dir", "@out"),
            "d_emo.eval.classification.command.run",
        ),
        SweptCommand(
            "evaluate_video_classifier",
            "d_emo.eval.evaluate_video_classifier",
            ("--model", "@video classifier", "--data-dir", "@videos", "--output-dir", "@out"),
            "d_emo.eval.video.command.run",
            extra="video",
        ),
        SweptCommand(
            "evaluate_detector",
            "d_emo.eval.evaluate_detector",
            ("--model", "@detector", "--data-dir", "@boxes", "--output-dir", "@out"),
            "d_emo.eval.detection.command.run",
        ),
        SweptCommand(
            "evaluate_segmenter",
            "d_emo.eval.evaluate_segmenter",
            ("--model", "@segmenter", "--data-dir", "@masks", "--output-dir", "@out"),
            "d_emo.eval.segmentation.command.run",
        ),
        SweptCommand(
            "evaluate_digits",
            "d_emo.eval.evaluate_digits",
            ("--model", "@pipeline"),
            "d_emo.eval.digits_report.load_digits_pipeline",
        ),
        SweptCommand(
            "export_classifier",
            "d_emo.eval.export_classifier",
            ("--model", "@classifier", "--formats", "torch", "--output-dir", "@out"),
            "d_emo.eval.systems.export_command.run",
        ),
        SweptCommand(
            "demo",
            "d_emo.pipelines.demo.app",
            ("--model", "@pipeline"),
            "d_emo.pipelines.demo.serving.run",
            quick=False,
        ),
        SweptCommand(
            "recipe_table",
            "d_emo.eval.recipe_table",
            ("--output-dir", "@out"),
            "d_emo.eval.recipes.command.run",
            quick=False,
        ),
        SweptCommand("compare_runs", "d_emo.eval.compare_runs", ("@run",), "d_emo.eval.compare_runs.read_run"),
        SweptCommand(
            "throughput",
            "d_emo.eval.throughput",
            ("--models", "D-EMOv2-N-8", "--latent", "8", "--batch", "1", "--jobs", "forward", "--dtypes", "float32",
             "--repeats", "2"),
            "d_emo.eval.benchmarks.side_by_side.run",
        ),
        SweptCommand(
            "receptive_field",
            "d_emo.eval.receptive_field",
            ("--models", "EMOv2-1M", "--image-size", "32", "--num-images", "1"),
            "d_emo.eval.classification.receptive_fields.open_network",
        ),
        SweptCommand(
            "dense_table",
            "d_emo.eval.tables.dense_table",
            ("--only", "V-EMOv2-5M*"),
            "d_emo.eval.tables.dense_table.count",
        ),
        SweptCommand(
            "sampling_table",
            "d_emo.eval.tables.sampling_table",
            ("--model", "@pipeline"),
            "d_emo.eval.tables.sampling_table.load_digits_pipeline",
            quick=False,
        ),
        SweptCommand(
            "guidance_table",
            "d_emo.eval.tables.guidance_table",
            ("--model", "@pipeline"),
            "d_emo.eval.tables.guidance_table.load_digits_pipeline",
            quick=False,
        ),
        SweptCommand(
            "model_table",
            "d_emo.eval.tables.model_table",
            ("--pattern", "D-EMOv2-N-8"),
            "d_emo.eval.tables.model_table.list_models",
        ),
        SweptCommand(
            "preset_table", "d_emo.eval.tables.preset_table", (), "d_emo.eval.tables.preset_table.settings_row"
        ),
        SweptCommand(
            "window_drawing", "d_emo.eval.tables.window_drawing", (), "d_emo.eval.tables.window_drawing.panels"
        ),
        SweptCommand(
            "loader_speed",
            "d_emo.eval.benchmarks.loader_speed",
            (),
            "d_emo.eval.benchmarks.loader_speed.weights_digest",
            quick=False,
        ),
        SweptCommand(
            "loop_cost",
            "d_emo.eval.benchmarks.loop_cost",
            ("--batch", "4", "--steps", "2"),
            "d_emo.eval.benchmarks.loop_cost.random_latents",
            quick=False,
        ),
        SweptCommand(
            "fid_cost",
            "d_emo.eval.benchmarks.fid_cost",
            ("--samples", "4", "--reference", "4"),
            "d_emo.eval.benchmarks.fid_cost.moments_of",
            quick=False,
        ),
        SweptCommand(
            "token_dropping",
            "d_emo.eval.benchmarks.token_dropping",
            ("--batch", "1"),
            "d_emo.eval.benchmarks.token_dropping.row",
            quick=False,
        ),
        SweptCommand(
            "compare_checkouts",
            "d_emo.eval.benchmarks.compare_checkouts",
            (".", "--rounds", "1"),
            "d_emo.eval.benchmarks.compare_checkouts.started",
            quick=False,
        ),
    )
}  # fmt: skip


def options_of(command: SweptCommand) -> list[argparse.Action]:
    """Every option and argument of a command that takes a value or is a switch; --help and --no-X aside."""
    return [
        action
        for action in parser_of(command.main)._actions
        if not isinstance(action, argparse._HelpAction | argparse._VersionAction) and action.help != argparse.SUPPRESS
    ]


def with_option(base: list[str], action: argparse.Action, value: str) -> list[str]:
    """A command line in which an option has another value; a switch has none."""
    if not action.option_strings:  # the only argument without a name comes first
        return [value, *base[1:]]
    name = max(action.option_strings, key=len)
    rest: list[str] = []
    words = iter(base)
    skipping = False
    for word in words:
        if word.startswith("--"):
            skipping = word == name
        if not skipping:
            rest.append(word)
    if action.nargs == 0:
        return [*rest, name] if value.lower() in TRUE else rest
    return [*rest, f"{name}={value}"] if action.nargs not in ("+", "*") else [*rest, name, value]


def filled(base: tuple[str, ...], made: dict[str, Path], out: Path) -> list[str]:
    """A command line with the paths of what was made."""
    return [str(out if word == "@out" else made[word[1:]]) if word.startswith("@") else word for word in base]


@dataclass(frozen=True)
class Outcome:
    """How a command ended.

    Attributes:
        kind: "done", "reached" (its work), "refused", or "broken": an error that is not one line, or no error code.
        message: the line, or what is wrong with it.
    """

    kind: str
    message: str = ""


def outcome(main: Callable[[list[str]], None], arguments: list[str], capsys: pytest.CaptureFixture) -> Outcome:
    """Run a command in this process; a refusal has to be one line of reasonable length, with an exit code."""
    AcceleratorState._reset_state(True)
    capsys.readouterr()
    try:
        with uncounted_but_for_plans(arguments), use_backend(chosen_backend()):  # undoes --kernels
            main(arguments)
    except Reached:
        return Outcome("reached")
    except SystemExit as stop:
        printed = capsys.readouterr().err
        line = stop.code if isinstance(stop.code, str) else (printed.strip().splitlines() or [""])[-1]
        if stop.code in (0, None):
            return Outcome("broken", f"ended with success and: {line}")
        lines = printed.count("\n") + isinstance(stop.code, str)
        if "\n" in line.strip() or len(line) > LONGEST or "Traceback" in printed or lines > LINES:
            return Outcome("broken", f"no single short line: {line[:200]!r}, {printed[-200:]!r}")
        return Outcome("refused", line)
    except BaseException as error:
        return Outcome("broken", f"raised {type(error).__name__}: {str(error)[:200]}")
    finally:
        AcceleratorState._reset_state(True)
    return Outcome("done")


def left_behind(out: Path) -> list[str]:
    """What a refused command left in its output folder or where its output file would be."""
    if not out.is_dir():
        return []
    return sorted(path.relative_to(out).as_posix() for path in out.rglob("*") if path.name != LOCK_FILE)
