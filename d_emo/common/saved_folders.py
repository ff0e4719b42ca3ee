"""What a folder holds that a library of the field saved, told by its small files: for messages about the wrong one."""

import pickle
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from d_emo.common.files import read_json
from d_emo.common.messages import first_line
from d_emo.common.packaged import is_packaged, list_packaged

# The file that says what a folder is, in the order in which they are looked for.
MARKS = ("model_index.json", "config.json", "scheduler_config.json", "adapter_config.json", "preprocessor_config.json")
ADAPTERS = "pytorch_lora_weights.safetensors"
# What tells Diffusers where a folder lies.
PLACE = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")
# What a model of transformers is, by the end of its class's name; `DETECTOR` is the type of our own.
CLASSIFIER, SEGMENTER, VIDEO_CLASSIFIER, OBJECTS = (
    "an image classifier", "a semantic segmenter", "a video classifier", "a detector",
)  # fmt: skip
TASKS = {
    "ForImageClassification": CLASSIFIER, "ForSemanticSegmentation": SEGMENTER,
    "ForVideoClassification": VIDEO_CLASSIFIER, "ForObjectDetection": OBJECTS,
}  # fmt: skip
DETECTOR = "d_emo-detector"
RESTORE = "Restore the config.json that was saved with the weights."
# How many names a message lists.
_SHOWN = 4
# What libraries raise where the files of a model are damaged, or are another thing's.
LOADING_ERRORS: tuple[type[Exception], ...] = (
    ArithmeticError, AttributeError, EOFError, ImportError, LookupError, OSError, RuntimeError, TypeError, ValueError,
    pickle.UnpicklingError, SafetensorError,
)  # fmt: skip


def may_be_on_hub(name: object, ours: Iterable[str] = ()) -> bool:
    """Whether a name of no folder is worth asking the Hub for, which takes long where there is no network.

    Args:
        name: OWNER/NAME if it is; in a folder that is there it is a mistyped one, such as runs/mien.
        ours: names of networks, which are nobody's.
    """
    owner = str(name).split("/")[0]
    return re.fullmatch(r"[\w.-]+/[\w.-]+", str(name)) is not None and owner not in ours and not Path(owner).is_dir()


def refuse_nobodys(place: str) -> None:
    """Refuse what `model_place` found where it is neither there nor worth asking the Hub for.

    Raises:
        ValueError: see above; the message is to come behind the model's name.
    """
    if not Path(place).exists() and not may_be_on_hub(place):
        raise ValueError(f"there is no such folder, and no packaged model but {', '.join(list_packaged())}")


def evaluation_folder(model: str) -> Path:
    """Where the report on a model goes unless the user says otherwise: into its folder, or beside the runs."""
    own = Path(model).is_dir() and not is_packaged(model)
    return Path(model) / "evaluation" if own else Path("runs") / f"evaluation-{Path(model).name}"


def read_object(path: Path) -> dict[str, Any]:
    """A JSON file's table.

    Raises:
        ValueError: it is no JSON, or holds something else; the message begins with its name.
        OSError: it cannot be read.
    """
    return read_json(path, "restore it")


def stored_object(name: Any, subfolder: str | None, wanted: str, part: str = "") -> dict[str, Any] | None:
    """The config.json of a model's local folder; None if there is no such folder.

    Args:
        name: the folder, or a Hub id.
        subfolder: of it, where the model lies; None if in the folder itself.
        wanted: class of the model.
        part: subfolder of pipelines in which such models lie; empty where pipelines have none.

    Raises:
        ValueError: it is a file, or holds something else; the message says what.
    """
    folder = Path(name) / (subfolder or "")
    if Path(name).is_file():
        raise ValueError(f"{name} is a file; pass the folder that {wanted}.save_pretrained wrote.")
    if not folder.is_dir():
        return None
    if not (folder / "config.json").is_file():
        in_pipeline = part and (folder / "model_index.json").is_file()
        remedy = f"pass subfolder={part!r}" if in_pipeline else "pass a model's folder"
        raise ValueError(f"{folder} holds {held_in(folder)}, not a {wanted} (no config.json); {remedy}.")
    return read_object(folder / "config.json")


def not_found(name: Any, error: OSError) -> OSError:
    """The error for a name that is neither a folder nor on the Hub, in one line; raise it from the original."""
    return OSError(
        f"{name}: there is no such folder, and on the Hub it was not found ({first_line(error)}); check the name, or "
        f"fetch it where there is a network (hf download {name})."
    )


def held_in(folder: Path) -> str:
    """What a folder holds, as the end of a sentence: "a pipeline (DiTPipeline)", "nothing that a library saved"."""
    for mark in MARKS:
        if (folder / mark).is_file():
            try:
                return _kind(mark, read_object(folder / mark))
            except (OSError, ValueError):
                return f"a damaged {mark}"
    if (folder / ADAPTERS).is_file():
        return "LoRA adapters"
    inside = sorted(path.parent.name for path in folder.glob("*/model_index.json"))
    return f"folders of pipelines ({', '.join(inside[:3])})" if inside else "nothing that a library saved"


def refuse_other_tasks(name: object, *wanted: str) -> None:
    """Refuse a local folder whose small files say that its model is of another task.

    What says nothing of a task, such as a backbone, is left to what loads it.

    Args:
        name: the folder, or anything else, such as a Hub id or None.
        wanted: of the values of `TASKS`, those that are taken.

    Raises:
        ValueError: it holds another thing; the message is to come behind the folder's name.
    """
    folder = Path(str(name))
    if name is not None and folder.is_dir() and (found := _task_in(folder)) is not None and found not in wanted:
        raise ValueError(f"it holds {found}, not {' or '.join(wanted)}; name the folder of one.")


def _task_in(folder: Path) -> str | None:
    """What a folder's model is: one of `TASKS`, or a pipeline or model of Diffusers; None where that is not told."""
    if (folder / "model_index.json").is_file():
        return held_in(folder)
    try:
        config = read_object(folder / "config.json")
    except (OSError, ValueError):
        return None
    if "_class_name" in config:
        return kind_of(config)
    if config.get("model_type") == DETECTOR:
        return OBJECTS
    named = config.get("architectures")
    first = named[0] if isinstance(named, list) and named else None
    return next((task for ending, task in TASKS.items() if str(first).endswith(ending)), None)


def _kind(mark: str, content: dict[str, Any]) -> str:
    name = content.get("_class_name")
    if mark == "model_index.json":
        return f"a pipeline ({name})"
    if mark == "config.json":
        return kind_of(content)
    if mark == "scheduler_config.json":
        return f"a scheduler ({name})"
    return "LoRA adapters" if mark == "adapter_config.json" else "an image processor"


def kind_of(config: dict[str, Any]) -> str:
    """Which model a config.json is of, Diffusers' or transformers'."""
    if isinstance(name := config.get("_class_name"), str):
        return f"a {name}"
    if isinstance(kind := config.get("model_type"), str):
        named = config.get("architectures")
        first = named[0] if isinstance(named, list) and named else kind
        return f"a {first} of transformers (model_type {kind!r})"
    return "a model of no name"


def different(missing: Iterable[str], unknown: Iterable[str]) -> str:
    """A sentence about weights and a configuration that are of two models, empty if they are of one."""
    missing, unknown = sorted(missing), sorted(unknown)
    if not missing and not unknown:
        return ""
    return (
        f"config.json and weights are of different models (missing in the file: {some(missing)}; not in the model: "
        f"{some(unknown)})."
    )


def some(names: list[str]) -> str:
    """A few of these names, and how many there are beside; "nothing" if there are none."""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return (", ".join(names[:_SHOWN]) or "nothing") + more
