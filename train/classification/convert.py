"""Reading the published EMOv2 checkpoints, and what timm's trainer saved; the command is `train/convert_emov2.py`."""

import argparse
from pathlib import Path

from d_emo.classification.checkpoint_files import read_classifier
from d_emo.classification.published import import_classifier
from d_emo.classification.transformers_models import EMOv2Config, EMOv2ForImageClassification
from d_emo.common.files import check_replaceable, written_folder
from d_emo.images.labels import english_names, imagenet_wnid_to_name, read_class_names

IMAGENET_CLASSES = 1000


def convert(options: argparse.Namespace) -> None:
    """Write a folder with model, configuration and image processor, whole or not at all."""
    name, num_classes, state = read_classifier(Path(options.checkpoint), options.weights)
    target = Path(options.output_dir)
    check_replaceable(target, "--output-dir", "config.json", "model")
    names = class_names(options.class_names, num_classes)
    config = EMOv2Config.of(name, options.image_size, id2label=names)
    model = EMOv2ForImageClassification(config)
    import_classifier(state, model.emov2)
    with written_folder(target) as partial:
        model.save_pretrained(partial)  # and an image processor
    print(f"{options.checkpoint}: {name}, {num_classes} classes, {options.weights} weights; model in {target}")


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
