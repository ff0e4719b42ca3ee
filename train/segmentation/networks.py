"""The network that is trained: fresh, on a trained classifier, or a trained segmenter for other classes."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForSemanticSegmentation

from d_emo.classification.backbones import known_name
from d_emo.classification.checkpoint_files import read_classifier
from d_emo.common.messages import first_line
from d_emo.common.options import blamed
from d_emo.common.saved_folders import CLASSIFIER, LOADING_ERRORS, SEGMENTER, refuse_other_tasks
from d_emo.segmentation.heads import Classifier
from d_emo.segmentation.transformers_config import EMOv2SegmentationConfig
from d_emo.segmentation.transformers_models import SegmentationPreTrainedModel
from d_emo.segmentation.unet_config import UEMOv2Config
from d_emo.segmentation.variants import WHOLE_NETWORKS, create_segmenter, list_segmenters
from d_emo.train.engine.task_plan import A_SIZE, named_start
from d_emo.train.segmentation.config import SegmenterOptions

SEGMENTERS = (EMOv2SegmentationConfig.model_type, UEMOv2Config.model_type)
# Files of weights, as against folders.
WEIGHT_FILES = (".pth", ".pt", ".bin", ".tar", ".safetensors")


def build_network(options: SegmenterOptions, id2label: dict[int, str]) -> SegmentationPreTrainedModel:
    """The network of these options.

    Args:
        options: of the network.
        id2label: class names by id.

    Raises:
        ValueError: no such network, overrides that it does not take, or weights that do not load.
    """
    with blamed(named_start(options)):
        refuse_other_tasks(options.init_from, SEGMENTER, CLASSIFIER)
    with blamed(named_start(options), *LOADING_ERRORS):
        if options.init_from is None:
            return _created(options, options.model, id2label)
        if is_file(options.init_from):
            return _from_published(options, Path(options.init_from), id2label)
        if known_name("network", options.init_from, list_segmenters()):
            raise ValueError(A_SIZE)
        if AutoConfig.from_pretrained(options.init_from).model_type in SEGMENTERS:
            return _continued(options, options.init_from, id2label)
        return _on_classifier(options, options.init_from, id2label)


def is_file(init_from: str) -> bool:
    """Whether --init-from names a file of weights."""
    return Path(init_from).is_file() or (init_from.endswith(WEIGHT_FILES) and not Path(init_from).is_dir())


def _created(options: SegmenterOptions, name: str, id2label: dict[int, str]) -> SegmentationPreTrainedModel:
    head: dict[str, Any] = {"head": options.head} if options.head else {}
    return create_segmenter(name, **head, id2label=id2label, **options.overrides())


def _on_classifier(options: SegmenterOptions, name: str, id2label: dict[int, str]) -> SegmentationPreTrainedModel:
    if options.model in WHOLE_NETWORKS:
        raise ValueError(f"{options.model} has nothing of a classifier; start from a segmenter of its kind, or fresh.")
    return _created(options, name, id2label)


def _from_published(options: SegmenterOptions, path: Path, id2label: dict[int, str]) -> SegmentationPreTrainedModel:
    """A fresh segmenter of the checkpoint's size, with its stages."""
    size, _, state = read_classifier(path)
    model = _on_classifier(options, size, id2label)
    backbone: Any = model.backbone
    stages = {name: tensor for name, tensor in state.items() if not name.startswith(("norm.", "head."))}
    try:
        backbone.emov2.load_state_dict(stages)
    except RuntimeError as error:
        raise ValueError(f"its weights do not fit --model-config ({first_line(error)}).") from error
    return model


def _continued(options: SegmenterOptions, name: str, id2label: dict[int, str]) -> SegmentationPreTrainedModel:
    """A trained segmenter; its last layers are new where the classes differ."""
    if options.overrides():
        raise ValueError(f"the network is what it is; leave out --model-config {options.model_config}.")
    model: Any = AutoModelForSemanticSegmentation.from_pretrained(name, dtype=torch.float32)
    head = getattr(model.config, "head", None)
    if options.head and options.head != head:
        raise ValueError(f"its head is {head or 'its own'}; leave out --head {options.head}.")
    if model.config.id2label != id2label:
        for part in (model.decode_head, model.auxiliary_head):
            if part is not None:
                part.classifier = _fresh(part.classifier, len(id2label))
        model.config.id2label = id2label
        model.config.label2id = {label: number for number, label in id2label.items()}
    return model


def _fresh(former: Classifier, num_classes: int) -> Classifier:
    """A last layer as segmenters begin with."""
    layer = Classifier(former.in_channels, num_classes)
    torch.nn.init.normal_(layer.weight, std=0.01)
    torch.nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
    return layer
