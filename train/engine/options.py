"""The options that every trainer has: batch, output, length of what is kept."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from d_emo.common.messages import shown
from d_emo.common.options import option, positive, require
from d_emo.train.data.options import DATA_SOURCES

# Of --kernels, which every network has.
KERNELS_HELP = (
    "Fast kernels where there are any, plain PyTorch, or fast ones or nothing. Default: $D_EMO_KERNELS or auto."
)
# In a run's folder: its options with defaults resolved, and its data.
RUN_FILE = "run.json"


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """Batch and output of any trainer."""

    output_dir: str | None = option(None, "Where everything is written. Default: runs/MODEL-DATA.")
    global_batch_size: int = option(256, "Images an optimizer step, over all processes.")
    micro_batch_size: int | None = option(
        None,
        "Images a process computes at once, at most its share; gradients are accumulated over the rest of that. "
        "Default: its whole share on a GPU, at most 32 on a CPU. BatchNorm sees one micro batch at a time.",
    )
    seed: int = option(0, "Seed of weights and of everything that is drawn.")
    log_every: int = option(100, "Steps between two log lines.")
    checkpoint_every: int = option(10_000, "Steps between two checkpoints.")
    keep_checkpoints: int | None = option(None, "Keep so many of the newest checkpoints. Default: all.")
    keep_every: int | None = option(None, "With --keep-checkpoints: also those at multiples of so many steps.")
    report_to: str = option(
        "tensorboard",
        "Trackers, with commas between: tensorboard, wandb, others that Accelerate knows. 'all': all that are "
        "installed. 'none'.",
    )
    license: str | None = option(
        None, "Licence of the weights for the model card, as the Hub spells it: apache-2.0, cc-by-nc-4.0, other."
    )
    resume_from: str | None = option(
        None, "A checkpoint folder, or 'latest': the newest whole one in the output folder."
    )
    allow_change: str | None = option(
        None, "With --resume-from: options that may differ from the checkpoint's run, such as learning_rate,seed."
    )
    cpu_threads: int | None = option(None, "Threads a process on a CPU. Default: the cores shared by the processes.")
    dry_run: bool = option(False, "Print what would run, or why it would not begin, and stop.")

    def __post_init__(self):
        counts = ("global_batch_size", "micro_batch_size", "log_every", "checkpoint_every",
                  "keep_checkpoints", "keep_every", "cpu_threads")  # fmt: skip
        positive(self, *counts)
        if self.keep_every and not self.keep_checkpoints:
            raise ValueError(f"--keep-every {self.keep_every}: all checkpoints are kept; add --keep-checkpoints.")
        if self.allow_change is not None and self.resume_from is None:
            raise ValueError(f"--allow-change {self.allow_change} belongs to --resume-from.")
        valid = self.license is None or re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", self.license)
        require(bool(valid), "license", self.license, "the Hub spells licences like apache-2.0 or cc-by-nc-4.0")
        require(0 <= self.seed < 2**64, "seed", self.seed, "must be in [0, 2^64)")

    def folder(self, model: str, data: str) -> Path:
        """--output-dir, or runs/MODEL-DATA with the data's name made fit for a folder."""
        return Path(self.output_dir or f"runs/{model}-{re.sub(r'[^A-Za-z0-9._-]+', '-', data)}")


@dataclass(frozen=True, kw_only=True)
class StepOptions:
    """What the steps of all trainers have in common, beside defaults of their own."""

    ema_warmup: bool = option(
        True,
        "Let the decay grow as (1 + n) / (10 + n) with the step n, up to --ema-decay: the average then follows the "
        "last tenth of a run of any length. Without it, short runs average their initial weights.",
    )
    mixed_precision: Literal["no", "bf16"] | None = option(
        None, "Autocast. Default: bf16 on a CUDA GPU that has it, elsewhere what accelerate is set up for."
    )


def stored_options(folder: Path) -> dict[str, Any]:
    """What the `run.json` of a run's or checkpoint's folder says; empty where there is no readable one."""
    try:
        stored = json.loads((folder / RUN_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return stored if isinstance(stored, dict) else {}


def refuse_other_trainer(folder: Path, trainer: str) -> None:
    """Refuse the folder of another trainer's run, or of its checkpoint.

    Raises:
        ValueError: it names both commands.
    """
    other = stored_options(folder).get("trainer", trainer)
    if other != trainer:
        raise ValueError(
            f"{folder} holds a run of {shown(other)}, and this is {trainer}: name another folder, or go on with that "
            "command."
        )


def options_of_run(trainer: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """A resumed run's own options, which lie under what the user gave: defaults may be others by now.

    Args:
        trainer: the command that goes on.
        given: by name. Empty is answered without --resume-from, and where the run's folder has to be guessed or has no
            readable `run.json`; `resume.check_same_run` then compares.

    Raises:
        ValueError: the run is another trainer's.
    """
    resume_from, folder = given.get("resume_from"), given.get("output_dir")
    if resume_from is None:
        return {}
    left = {"resume_from", "allow_change", "output_dir", "dry_run"}
    if any(given.get(source) is not None for source in DATA_SOURCES):
        left |= {*DATA_SOURCES}  # the data may have moved
    folders = [Path(folder)] if folder else []
    own = {}
    if resume_from != "latest":
        folders = [Path(resume_from), Path(resume_from).absolute().parent, *folders]
        if not folder and Path(resume_from).name.startswith("checkpoint-"):  # the run goes on where it is
            own = {"output_dir": str(Path(resume_from).parent)}
    for path in folders:
        if stored := stored_options(path):
            refuse_other_trainer(path, trainer)
            return {**{name: value for name, value in stored.items() if name not in left}, **own}
    return {}
