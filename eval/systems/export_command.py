"""What `export_classifier` does after it has read its options: export, run, compare."""

import argparse
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageClassification,
    AutoModelForSemanticSegmentation,
    AutoModelForVideoClassification,
)

from d_emo import export, make_image_processor
from d_emo.common.files import check_writable, written_whole
from d_emo.common.messages import first_line
from d_emo.common.options import blamed
from d_emo.common.packaged import is_packaged, model_place
from d_emo.common.saved_folders import (
    CLASSIFIER,
    LOADING_ERRORS,
    SEGMENTER,
    VIDEO_CLASSIFIER,
    may_be_on_hub,
    refuse_other_tasks,
)
from d_emo.eval.systems.names import KINDS, kind_of, names_in_words
from d_emo.models.flops import count_parameters

# Largest difference of a number, relative to the largest: sums in another order, in the file's type of numbers.
TOLERANCES = {torch.float64: 1e-4, torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 5e-2}
BATCHES = (1, 3)
SUFFIXES = {"onnx": ".onnx", "torch": ".pt2", "coreml": ".mlpackage"}
# What the end of an architecture's name says of the class that opens it.
OPENERS: dict[str, Any] = {
    "ForSemanticSegmentation": AutoModelForSemanticSegmentation,
    "ForVideoClassification": AutoModelForVideoClassification,
    "ForImageClassification": AutoModelForImageClassification,
}
Size = tuple[int, int]
Tensors = torch.Tensor | tuple[torch.Tensor, ...]
Answer = Callable[[torch.Tensor], Tensors]


def run(options: argparse.Namespace) -> None:
    """Export, compare, print."""
    folder = options.output_dir or default_folder(options.model)
    check_writable(folder, "--output-dir", folder=True)  # before a model is fetched
    given = options.image_size or []
    model, processor, side = open_model(options.model, given[0] if given else None)
    height, width = size = (given[0], given[-1]) if given else (side or side_of(processor, options.model),) * 2
    try:
        frames = export.frames_of(model, options.frames)
    except ValueError as error:
        told = first_line(error).replace("num_frames=", "--frames ").replace("num_frames", "--frames")
        raise ValueError(f"--model {options.model}: {told}") from error
    name = Path(options.model).name if Path(options.model).is_dir() else options.model.replace("/", "-")
    taken = f"clips of {frames[0]} frames of" if frames else "images of"
    print(f"{options.model}: {count_parameters(model):,} parameters, {taken} {height} x {width}")
    folder.mkdir(parents=True, exist_ok=True)
    for kind in options.formats:
        path = folder / f"{name}{SUFFIXES[kind]}"
        print(export_and_check(model, size, kind, path, options.frames), flush=True)
    if processor is not None:
        processor.save_pretrained(folder)


def open_model(name: str, image_size: int | None = None) -> tuple[Any, Any, int | None]:
    """A network in eval mode, its image processor, and the side of its images.

    Returns:
        The processor is None for detectors, which normalise themselves, for fresh video classifiers, and for folders
        without one of models of other than three channels; the side is None where the processor has it.

    Raises:
        ValueError: there is no such network.
    """
    place = model_place(name)
    kind = None if Path(place).is_dir() else kind_of(name)
    if kind is not None:
        side = image_size or kind.side
        model = kind.build(name, side).eval()
        if kind.title == "classifier":
            return model, make_image_processor(side), side
        return model, model.make_image_processor() if hasattr(model, "make_image_processor") else None, side
    with blamed(f"--model {name}"):
        refuse_other_tasks(place, CLASSIFIER, SEGMENTER, VIDEO_CLASSIFIER)
    try:
        if not Path(place).is_dir() and not may_be_on_hub(place, [known for kind in KINDS for known in kind.names()]):
            raise ValueError("there is no such folder or name")
        config = AutoConfig.from_pretrained(place)
        architecture = (getattr(config, "architectures", None) or ["ForImageClassification"])[0]
        opener = next((opener for end, opener in OPENERS.items() if architecture.endswith(end)), None)
        if opener is None:
            raise ValueError(f"it holds a {architecture}")
        model, processor = opener.from_pretrained(place), _processor_of(place, getattr(config, "num_channels", 3))
    except LOADING_ERRORS as error:
        raise ValueError(
            f"--model {name} does not load as an image classifier, a segmenter or a video classifier "
            f"({first_line(error)}). Names with fresh weights: {names_in_words()}."
        ) from error
    return model.eval(), processor, getattr(config, "image_size", None) if processor is None else None


def _processor_of(name: str, channels: int) -> Any:
    """Its image processor; None where there is none for images of so many channels."""
    try:
        return AutoImageProcessor.from_pretrained(name)
    except LOADING_ERRORS:
        if channels == 3:
            raise
        return None


def side_of(processor: Any, name: str) -> int:
    """Side of the images that a processor makes.

    Raises:
        ValueError: it makes images of no single size.
    """
    for size in (getattr(processor, "crop_size", None), getattr(processor, "size", None)):
        if size and size.get("height") and size.get("height") == size.get("width"):
            return int(size["height"])
    raise ValueError(f"--model {name}: no image processor of it makes images of a single size; pass --image-size.")


def default_folder(model: str) -> Path:
    """Where the files go."""
    return Path(model) / "exported" if Path(model).is_dir() and not is_packaged(model) else Path("runs") / "exported"


def export_and_check(
    model: torch.nn.Module, size: export.ImageSize, kind: str, path: Path, frames: int | None = None
) -> str:
    """Write a file, compare it with the model.

    Args:
        model: a classifier, a segmenter or a detector.
        size: side of its images, or height and width.
        kind: of file, one of `FORMATS`.
        path: of the file.
        frames: of a video classifier's clips; None for its own.

    Returns:
        A line for people.

    Raises:
        ValueError: the file answers otherwise; it is deleted before it gets its name.
        ImportError: an extra is missing.
    """
    if kind == "coreml":
        export.save_coreml(model, size, path, frames)
        note = "converted" if platform.system() == "Darwin" else "converted; runs on Apple's systems only, not here"
        return f"  {kind:<7} {path}, {_size(path)}: {note}"
    save = export.save_onnx if kind == "onnx" else export.save_program
    model = export.as_in_file(model, kind)
    with written_whole(path) as unchecked:
        save(model, size, unchecked, frames)
        answer: Answer = export.OnnxModel(unchecked) if kind == "onnx" else torch.export.load(str(unchecked)).module()
        worst = max(difference(model, answer, size, batch, frames) for batch in BATCHES)
        if not worst <= TOLERANCES[next(model.parameters()).dtype]:
            raise ValueError(f"{path} answers otherwise than the model, by {worst:.1e} of the largest logit; deleted.")
    return f"  {kind:<7} {path}, {_size(path)}: largest difference {worst:.1e} of the largest logit, batches of 1 and 3"


@torch.no_grad()
def difference(
    model: torch.nn.Module, answer: Answer, size: export.ImageSize, batch: int, frames: int | None = None
) -> float:
    """Largest difference of a logit on random images, relative to the largest logit; of a detector's boxes too."""
    pixels = export.example_images(model, size, batch, seed=batch, num_frames=frames)
    pairs = zip(_several(answer(pixels)), _several(export.as_network(model, pixels)(pixels)), strict=True)
    return max(float((got.float() - own.float()).abs().max() / own.float().abs().max()) for got, own in pairs)


def _several(made: Tensors) -> tuple[torch.Tensor, ...]:
    return (made,) if isinstance(made, torch.Tensor) else tuple(made)


def _size(path: Path) -> str:
    files = [path] if path.is_file() else [part for part in path.rglob("*") if part.is_file()]
    return f"{sum(file.stat().st_size for file in files) / 1e6:.1f} MB"
