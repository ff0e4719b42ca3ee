"""Reading the published EMOv2 checkpoints, and what timm's trainer saved; the command is `train/convert_emov2.py`."""

import argparse
from collections.abc import Mapping
from pathlib import Path

import torch

from d_emo.classification.published import checkpoint_state, import_classifier
from d_emo.classification.transformers_models import EMOv2Config, EMOv2ForImageClassification
from d_emo.classification.variants import CLASSIFIERS, create_classifier
from d_emo.common.files import check_replaceable, written_folder
from d_emo.common.tensor_files import read_state, read_tensors
from d_emo.images.labels import english_names, imagenet_wnid_to_name, read_class_names

# Where full checkpoints hold the two kinds of weights: the authors', and those of timm's trainer.
WEIGHTS = {"averaged": ("net_E", "state_dict_ema"), "raw": ("net", "state_dict")}
IMAGENET_CLASSES = 1000


def convert(options: argparse.Namespace) -> None:
    """Write a folder with model, configuration and image processor, whole or not at all."""
    path = Path(options.checkpoint)
    content = read_tensors(path)
    of_timm = isinstance(content, dict) and "state_dict_ema" in content
    parts = {kind: names[of_timm] for kind, names in WEIGHTS.items()}
    state = checkpoint_state(read_state(path, tuple(parts.values()), parts[options.weights]))
    name, num_classes = size_of(state)
    target = Path(options.output_dir)
    check_replaceable(target, "--output-dir", "config.json", "model")
    names = class_names(options.class_names, num_classes)
    config = EMOv2Config.of(name, options.image_size, id2label=names)
    model = EMOv2ForImageClassification(config)
    import_classifier(state, model.emov2)
    with written_folder(target) as partial:
        model.save_pretrained(partial)  # and an image processor
    print(f"{options.checkpoint}: {name}, {num_classes} classes, {options.weights} weights; model in {target}")


def size_of(state: Mapping[str, torch.Tensor]) -> tuple[str, int]:
    """The size and number of classes that a state dictionary under this package's names is of.

    Raises:
        ValueError: it is none of the published sizes.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    if "head.weight" not in shapes:
        raise ValueError(f"no EMOv1 or EMOv2 weights: head.weight is missing among {len(shapes)} tensors.")
    num_classes = shapes["head.weight"][0]
    for name in CLASSIFIERS:
        with torch.device("meta"):
            expected = create_classifier(name, num_classes=num_classes).state_dict()
        if {key: tuple(tensor.shape) for key, tensor in expected.items()} == shapes:
            return name, num_classes
    raise ValueError(f"its tensors fit none of {', '.join(CLASSIFIERS)}.")


def class_names(source: str | None, num_classes: int) -> list[str]:
    """Names by class id: of a file, ImageNet's, or the ids."""
    if source is not None:
        names = english_names(read_class_names(source))
        if len(names) != num_classes:
            raise ValueError(f"--class-names {source}: {len(names)} names for {num_classes} classes.")
        return names
    if num_classes == IMAGENET_CLASSES:
        return english_names(imagenet_wnid_to_name())
    return [str(number) for number in range(num_classes)]
