"""The code that does once more what the page did: for people to copy, and run by the tests."""

import json
from collections.abc import Mapping
from typing import Any

from d_emo.pipelines.demo.classifying import TOP
from d_emo.pipelines.demo.drawing import OWN, Studio, Wish
from d_emo.pipelines.demo.opening import Source
from d_emo.pipelines.samplers import own_shift


def drawing_code(studio: Studio, source: Source, wish: Wish) -> str:
    """Python that draws the same pictures, into `images`."""
    own = wish.sampler == OWN
    shift = own_shift(studio.pipeline.scheduler)
    shifted = f", shift={shift:g}" if shift != 1 else ""
    arguments = [f"    {name}={_literal(value)}," for name, value in studio.arguments(wish).items()]
    lines = [
        *(["import torch", ""] if source.dtype != "float32" else []),
        f"from d_emo import {'DEMOPipeline, packaged' if source.packaged else 'DEMOPipeline'}",
        f"from d_emo.pipelines.samplers import {'image_generator' if own else 'image_generator, make_scheduler'}",
        "",
        f"pipe = DEMOPipeline.from_pretrained({_place(source)}{_dtype(source)}){_moved(source)}",
        *([] if own else [f'pipe.scheduler = make_scheduler("{wish.sampler}", pipe.transformer.config{shifted})']),
        "images = pipe(",
        *arguments,
        f"    generator=[image_generator({wish.seed}, index) for index in range({wish.count})],",
        ").images",
        "for index, image in enumerate(images):",
        f'    image.save(f"{wish.seed}-{{index}}.png")',
    ]
    return "\n".join(lines) + "\n"


def classifying_code(source: Source) -> str:
    """Python that says the same of a picture, in `answers`."""
    task = f'"image-classification", model={_place(source, "str({})")}'
    device = f", device={_literal(source.device)}" if source.device else ""
    lines = [
        *(["import torch"] if source.dtype != "float32" else []),
        "from transformers import pipeline",
        "",
        "from d_emo import packaged" if source.packaged else "import d_emo  # makes transformers know EMOv2",
        "from d_emo.images.decode import decode",
        "",
        f"classifier = pipeline({task}{_dtype(source)}{device})",
        f'answers = classifier(decode("picture.png", "picture.png"), top_k={TOP})',
    ]
    return "\n".join(lines) + "\n"


def settings_shown(settings: Mapping[str, Any] | None) -> dict[str, Any]:
    """What the pipeline says of a call, as plain values that JSON has."""
    return {name: list(value) if isinstance(value, tuple) else value for name, value in (settings or {}).items()}


def _place(source: Source, around: str = "{}") -> str:
    name = _literal(source.name)
    return around.format(f"packaged({name})") if source.packaged else name


def _literal(value: Any) -> str:
    """A value as Python has it; texts in the quotes of this package."""
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str) else repr(value)


def _dtype(source: Source) -> str:
    return "" if source.dtype == "float32" else f", dtype=torch.{source.dtype}"


def _moved(source: Source) -> str:
    return f".to({_literal(source.device)})" if source.device else ""
