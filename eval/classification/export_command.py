"""What `export_classifier` does after it has read its options: export, run, compare."""

import argparse
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from d_emo import export
from d_emo.classification.transformers_models import EMOv2Config, EMOv2ForImageClassification, make_image_processor
from d_emo.classification.variants import CLASSIFIERS
from d_emo.common.files import check_writable, written_whole
from d_emo.eval.classification.command import open_classifier
from d_emo.models.flops import count_parameters

# Largest difference of a logit, relative to the largest logit: sums in another order, in the file's type of numbers.
TOLERANCES = {torch.float64: 1e-4, torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 5e-2}
BATCHES = (1, 3)
SUFFIXES = {"onnx": ".onnx", "torch": ".pt2", "coreml": ".mlpackage"}
Answer = Callable[[torch.Tensor], torch.Tensor]


def run(options: argparse.Namespace) -> None:
    """Export, compare, print."""
    folder = options.output_dir or default_folder(options.model)
    check_writable(folder, "--output-dir", folder=True)  # before a model is fetched
    model, processor = open_model(options.model, options.image_size or 224)
    size = options.image_size or side_of(processor, options.model)
    name = Path(options.model).name
    print(f"{options.model}: {count_parameters(model):,} parameters, images of {size} x {size}")
    folder.mkdir(parents=True, exist_ok=True)
    for kind in options.formats:
        print(export_and_check(model, size, kind, folder / f"{name}{SUFFIXES[kind]}"), flush=True)
    processor.save_pretrained(folder)


def open_model(name: str, image_size: int) -> tuple[Any, Any]:
    """A classifier in eval mode, and its image processor.

    Raises:
        ValueError: there is no such classifier.
    """
    if name in CLASSIFIERS and not Path(name).is_dir():
        config = EMOv2Config.of(name, image_size, num_labels=1000)
        return EMOv2ForImageClassification(config).eval(), make_image_processor(image_size)
    try:
        model, processor = open_classifier(name)
    except ValueError as error:
        raise ValueError(f"{error} Names with fresh weights: {', '.join(CLASSIFIERS)}.") from error
    return model.eval(), processor


def side_of(processor: Any, name: str) -> int:
    """Side of the images that a processor makes.

    Raises:
        ValueError: it makes images of no single size.
    """
    for size in (getattr(processor, "crop_size", None), getattr(processor, "size", None)):
        if size and size.get("height") and size.get("height") == size.get("width"):
            return int(size["height"])
    raise ValueError(f"--model {name}: its image processor makes images of no single size; pass --image-size.")


def default_folder(model: str) -> Path:
    """Where the files go."""
    return Path(model) / "exported" if Path(model).is_dir() else Path("runs") / "exported"


def export_and_check(model: torch.nn.Module, size: int, kind: str, path: Path) -> str:
    """Write a file, compare it with the model.

    Returns:
        A line for people.

    Raises:
        ValueError: the file answers otherwise; it is deleted before it gets its name.
        ImportError: an extra is missing.
    """
    if kind == "coreml":
        export.save_coreml(model, size, path)
        note = "converted" if platform.system() == "Darwin" else "converted; runs on Apple's systems only, not here"
        return f"  {kind:<7} {path}, {_size(path)}: {note}"
    save = export.save_onnx if kind == "onnx" else export.save_program
    model = export.as_in_file(model, kind)
    with written_whole(path) as unchecked:
        save(model, size, unchecked)
        answer: Answer = export.OnnxModel(unchecked) if kind == "onnx" else torch.export.load(str(unchecked)).module()
        worst = max(difference(model, answer, size, batch) for batch in BATCHES)
        if not worst <= TOLERANCES[next(model.parameters()).dtype]:
            raise ValueError(f"{path} answers otherwise than the model, by {worst:.1e} of the largest logit; deleted.")
    return f"  {kind:<7} {path}, {_size(path)}: largest difference {worst:.1e} of the largest logit, batches of 1 and 3"


@torch.no_grad()
def difference(model: torch.nn.Module, answer: Answer, size: int, batch: int) -> float:
    """Largest difference of a logit on random images, relative to the largest logit."""
    pixels = export.example_images(model, size, batch, seed=batch)
    expected = export.Logits(model)(pixels).float()
    return float((answer(pixels).float() - expected).abs().max() / expected.abs().max())


def _size(path: Path) -> str:
    files = [path] if path.is_file() else [part for part in path.rglob("*") if part.is_file()]
    return f"{sum(file.stat().st_size for file in files) / 1e6:.1f} MB"
