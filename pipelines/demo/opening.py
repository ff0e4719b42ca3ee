"""Opening the model of a page: a pipeline that draws or a classifier, told by what the folder holds."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError

import d_emo  # noqa: F401  makes transformers know EMOv2
from d_emo.common.messages import first_line
from d_emo.common.packaged import list_packaged, model_place
from d_emo.common.processes import device_named
from d_emo.common.saved_folders import LOADING_ERRORS, held_in, may_be_on_hub, read_object
from d_emo.pipelines import DEMOPipeline, open_pipeline

PIPELINE, CLASSIFIER = "model_index.json", "config.json"
CLASSIFIES = "ForImageClassification"


@dataclass(frozen=True, kw_only=True)
class Source:
    """A model as the user named it, and how it runs.

    Attributes:
        name: packaged name, folder or Hub id; see `model_place`.
        device: where it runs, as text; None for the default.
        dtype: of the weights.
    """

    name: str
    device: str | None = None
    dtype: str = "float32"

    @property
    def packaged(self) -> bool:
        """Whether it comes with the package."""
        return self.name in list_packaged()


def open_model(source: Source) -> Any:
    """A `DEMOPipeline`, or transformers' image-classification pipeline, where it is to run.

    Raises:
        ValueError: there is no such model, it is another kind of one, it does not load, or there is no such device.
    """
    device, dtype, place = device_named(source.device), getattr(torch, source.dtype), model_place(source.name)
    if _is_classifier(place):
        return _open_classifier(place, device, dtype)
    return open_pipeline(source.name, None if dtype is torch.float32 else dtype).to(device)


def draws(model: Any) -> bool:
    """Whether a model is one that draws."""
    return isinstance(model, DEMOPipeline)


def _is_classifier(place: str) -> bool:
    """Whether a folder or repository holds an image classifier; others are for `open_pipeline` to open or refuse."""
    folder = Path(place).expanduser()
    if folder.is_dir():
        if (folder / PIPELINE).is_file() or not (folder / CLASSIFIER).is_file():
            return False
        architectures = read_object(folder / CLASSIFIER).get("architectures") or []
        if not any(str(name).endswith(CLASSIFIES) for name in architectures):
            raise ValueError(
                f"--model {place}: {held_in(folder)} neither draws nor classifies pictures; name a pipeline's folder "
                "or an image classifier's."
            )
        return True
    if folder.exists() or not may_be_on_hub(place):
        return False
    try:
        hf_hub_download(place, PIPELINE)
    except EntryNotFoundError:
        return True
    except LOADING_ERRORS:
        return False
    return False


def _open_classifier(place: str, device: torch.device, dtype: torch.dtype) -> Any:
    from transformers import pipeline

    try:
        return pipeline("image-classification", model=place, device=device, dtype=dtype)
    except LOADING_ERRORS as error:
        reason = first_line(error).removeprefix(f"{place}: ")
        raise ValueError(f"--model {place}: this classifier does not load: {reason}") from error
