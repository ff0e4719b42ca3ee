"""Opening a pipeline that a user named, with an error that says what to do."""

from pathlib import Path

import torch

from d_emo.common.messages import first_line, nearest, shown
from d_emo.common.packaged import list_packaged, model_place
from d_emo.common.saved_folders import LOADING_ERRORS, may_be_on_hub

from .pipeline_demo import DEMOPipeline


def open_weaker(name: str | None, dtype: torch.dtype | None = None) -> DEMOPipeline | None:
    """The weaker pipeline that --guide names, on the CPU; None where it names none.

    Raises:
        ValueError: see `open_pipeline`.
    """
    if name is None:
        return None
    try:
        return open_pipeline(name, dtype)
    except ValueError as error:
        raise ValueError(f"--guide {error}") from error


def open_pipeline(name: str, dtype: torch.dtype | None = None) -> DEMOPipeline:
    """The pipeline of a packaged name, a folder or a Hub id.

    Args:
        name: see `model_place`.
        dtype: of its weights, None for float32; what must stay float32 (BatchNorm, positions) does.

    Raises:
        ValueError: it does not load; the message begins with the name and gives the remedy.
    """
    place = model_place(name)
    path = Path(place).expanduser()
    if not isinstance(dtype, torch.dtype | None):
        raise ValueError(f"dtype is {shown(dtype)}; pass a type such as torch.bfloat16, or None for float32.")
    if not path.exists() and not may_be_on_hub(place):
        there = nearest(name, list_packaged()) if list_packaged() else "this installation has none packaged."
        raise ValueError(f"{name}: neither a pipeline folder, nor a packaged model, nor a Hub id (OWNER/NAME); {there}")
    options = {} if dtype is None else {"dtype": dtype}
    try:
        return DEMOPipeline.from_pretrained(path if path.exists() else place, **options)
    except LOADING_ERRORS as error:
        if path.exists():
            reason = first_line(error).removeprefix(f"{path}: ")
            raise ValueError(f"{name}: this pipeline does not load: {reason}") from error
        reason = first_line(error.__cause__ or error)
        raise ValueError(
            f"{name}: neither a pipeline folder (there is no such folder) nor reachable on the Hub ({reason}); fetch "
            f"it where there is a network (hf download {name}) and pass its folder."
        ) from error
