"""The trackers of --report-to: what they are called, where their files are, how a continued run goes on in them.

TensorBoard's events are in RUN/logs, wandb's files in RUN/wandb, the id of its run in `RUN/wandb-run.txt`. Project and
run are called `d_emo` and like the run's folder, unless wandb's variables (WANDB_PROJECT, WANDB_NAME, ...) say
otherwise.
"""

import os
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker, get_available_trackers

from d_emo.common.files import written_whole
from d_emo.common.messages import first_line, printable
from d_emo.train.engine.run import AnyRun

PROJECT = "d_emo"
# Beneath a run's folder. Accelerate puts TensorBoard's events into a folder of it that is named like the project.
LOG_FOLDER = "logs"
WANDB_RUN = "wandb-run.txt"
# Trackers that an extra of this package brings.
EXTRAS = {"tensorboard": "train", "wandb": "wandb"}
SETTINGS = "settings"


def chosen_trackers(report_to: str) -> list[str]:
    """The trackers that --report-to names: "none", or names with commas between, or "all" that are installed.

    Raises:
        ValueError: one is unknown or not installed.
    """
    installed = [str(name) for name in get_available_trackers()]
    names = [name.strip() for name in report_to.split(",") if name.strip()]
    if names == ["none"]:
        return []
    if names == ["all"]:
        return installed
    known = sorted(LOGGER_TYPE_TO_CLASS)
    for name in names:
        if name not in known:
            raise ValueError(
                f"--report-to {report_to}: {name} is no tracker that Accelerate knows; use some of "
                f"{', '.join(known)} with commas between, all that are installed (all), or none."
            )
        if name not in installed:
            package = f"'d-emo[{EXTRAS[name]}]'" if name in EXTRAS else name.replace("_", "-")
            raise ValueError(
                f"--report-to {report_to}: {name} is not installed; pip install {package}, or use --report-to none."
            )
    if not names:
        raise ValueError("--report-to is empty; name a tracker, such as tensorboard, or none.")
    return list(dict.fromkeys(names))


def open_trackers(run: AnyRun, settings: Mapping[str, Any]) -> None:
    """Start what --report-to named, in the run's folder, and tell it the options; every process calls this."""
    accelerator, folder = run.accelerator, run.output_dir
    names = [str(name) for name in accelerator.log_with]
    options: dict[str, dict[str, Any]] = {}
    if "tensorboard" in names and run.step:
        options["tensorboard"] = {"purge_step": run.step + 1}  # what came after the checkpoint is computed again
    if "wandb" in names and accelerator.is_main_process:
        options["wandb"] = wandb_options(folder, continued=run.step > 0)
    project = os.environ.get("WANDB_PROJECT", "") if "wandb" in names else ""
    shown = {
        name: printable(value) if isinstance(value, str) else value
        for name, value in settings.items()
        if isinstance(value, int | float | str | bool)
    }
    try:
        accelerator.init_trackers(project or PROJECT, init_kwargs=options)
        for tracker in accelerator.trackers:
            store_settings(tracker, shown)
    except Exception as error:  # each tracker has errors of its own: nobody logged in, no server
        if isinstance(error, OSError) and error.filename is not None:  # a file's, not a connection's
            raise
        accelerator.trackers.clear()  # those that have not started cannot end
        remedy = "log in with `wandb login`, set WANDB_MODE=offline" if "wandb" in names else "set it up"
        raise ValueError(
            f"--report-to {','.join(names)}: it does not start ({first_line(error)}); {remedy}, or use "
            "--report-to none."
        ) from error


def store_settings(tracker: GeneralTracker, settings: Mapping[str, Any]) -> None:
    """Hand a tracker the options. TensorBoard gets a table among its texts: Accelerate's way there makes a run more."""
    if tracker.name == "tensorboard":
        rows = [f"| {name} | {value} |" for name, value in settings.items()]
        tracker.log({SETTINGS: "\n".join(["| option | value |", "|---|---|", *rows])}, step=0)
    else:
        tracker.store_init_configuration(dict(settings))


def wandb_options(folder: Path, continued: bool) -> dict[str, Any]:
    """What `wandb.init` is told: files in the run's folder, its name, and the id by which a continued run goes on.

    Args:
        folder: the run's.
        continued: whether it goes on from a checkpoint; otherwise it gets a new id.
    """
    stored = folder / WANDB_RUN
    options: dict[str, Any] = {"dir": str(folder), "name": printable(folder.name)}
    if os.environ.get("WANDB_RUN_ID"):
        return _without_variables(options)
    if not (continued and stored.is_file()):
        with written_whole(stored) as partial:
            partial.write_text(uuid.uuid4().hex[:8] + "\n", encoding="utf-8")
    return _without_variables({**options, "id": stored.read_text(encoding="utf-8").strip(), "resume": "allow"})


def _without_variables(options: dict[str, Any]) -> dict[str, Any]:
    """Those options that no variable of wandb's sets: its `init` would prefer them to the variables."""
    variables = {"dir": "WANDB_DIR", "name": "WANDB_NAME", "resume": "WANDB_RESUME"}
    return {key: value for key, value in options.items() if not os.environ.get(variables.get(key, ""))}


def track_image(accelerator: Accelerator, name: str, image: PIL.Image.Image, step: int) -> None:
    """Hand a picture to every tracker that takes some."""
    for tracker in accelerator.trackers:
        if hasattr(tracker, "log_images"):
            layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
            tracker.log_images({name: np.asarray(image)[None]}, step=step, **layout)
