"""Weights of an image classifier in a video classifier of the same size.

The paper's V-EMOv2 begins with a trained EMOv2 (its log names the file); how its kernels became three-dimensional was
not published. Inferred, after what is common for networks that mix convolutions and attention: the image's kernel goes
into the middle slice in time, with zeros beside it, so that a clip of one repeated frame gives what the image gives.
"""

import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from d_emo.classification.emov2 import EMOv2
from d_emo.classification.irmb import ParallelIRMB
from d_emo.classification.transformers_models import EMOv2ForImageClassification
from d_emo.common.messages import first_line, shown
from d_emo.common.saved_folders import may_be_on_hub, some
from d_emo.video.transformers_models import VEMOv2ForVideoClassification
from d_emo.video.v_emov2 import VEMOv2, VideoI2RMB

Source = str | os.PathLike | EMOv2 | EMOv2ForImageClassification
Model = TypeVar("Model", VEMOv2, VEMOv2ForVideoClassification)
HEAD = ("head.weight", "head.bias")


def inflate(model: Model, classifier: Source) -> Model:
    """Give a video classifier the weights of an image classifier, and return it.

    Kernels go into the middle slice in time; all else is copied by name. The head comes along where both have as many
    classes; else the video classifier keeps its own, and a warning says so.

    Args:
        model: V-EMOv2, as transformers' class or the plain network.
        classifier: EMOv2 of the same widths, depths and kernels: folder or Hub id of a classifier, network, or
            transformers' class.

    Raises:
        ValueError: one of them is another thing, the folder does not load, or they are of different sizes; the message
            names the first tensors, or blocks where tensors fit and something else is another (attention, activations).
    """
    network: nn.Module = getattr(model, "v_emov2", model)
    if not isinstance(network, VEMOv2):
        raise ValueError(f"model is a {type(model).__name__}; pass a VEMOv2ForVideoClassification or VEMOv2.")
    name, image_network = _image_network(classifier)
    wanted = network.state_dict()
    state = inflated(image_network.state_dict(), wanted)
    fresh = [key for key in HEAD if key in wanted and not _fits(state.get(key), wanted[key])]
    state = {key: tensor for key, tensor in state.items() if key not in HEAD or (key in wanted and key not in fresh)}
    wrong = [
        f"{key} {tuple(state[key].shape) if key in state else 'missing'}, not {tuple(tensor.shape)}"
        for key, tensor in wanted.items()
        if key not in fresh and not _fits(state.get(key), tensor)
    ]
    wrong += [f"{key} left over" for key in state if key not in wanted]
    wrong = wrong or _other_workings(network, image_network)
    if wrong:
        raise ValueError(
            f"{name} does not inflate to this video classifier ({some(wrong)}); pass an EMOv2 of the same widths, "
            "depths, kernels, channels, activations and kind of attention."
        )
    network.load_state_dict(state, strict=False)  # all but a fresh head
    if fresh:
        warnings.warn(f"{name}: {', '.join(fresh)} are newly initialised, and have to be trained.", stacklevel=2)
    return model


@torch.no_grad()
def inflated(state: Mapping[str, torch.Tensor], like: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors of an image classifier as a video classifier has them, under the same names.

    Args:
        state: by name; kernels are (O, I, k, k).
        like: those of the video classifier; kernels are (O, I, t, k, k) with an odd t.

    Returns:
        Kernels (O, I, t, k, k) that are zero but for their middle slice; all else as it is.
    """
    result = {}
    for name, tensor in state.items():
        result[name] = tensor
        if tensor.dim() == 4 and name in like and like[name].dim() == 5:
            deep = like[name].shape[2]
            result[name] = tensor.new_zeros(*tensor.shape[:2], deep, *tensor.shape[2:])
            result[name][:, :, deep // 2] = tensor
    return result


def _fits(given: torch.Tensor | None, wanted: torch.Tensor) -> bool:
    return given is not None and given.shape == wanted.shape


def _other_workings(network: VEMOv2, images: EMOv2) -> list[str]:
    """Blocks whose tensors fit and work otherwise, and what the image's has there."""
    wrong = []
    for name, block in network.named_modules():
        if not isinstance(block, VideoI2RMB):
            continue
        image_block: Any = images.get_submodule(name)
        works, image_works = _workings(block), _workings(image_block)
        if isinstance(image_block, ParallelIRMB):
            image_works["arrangement"] = "parallel"
        wrong += [
            f"{name}: {what} {value}, not {works.get(what, 'cascaded')}"
            for what, value in image_works.items()
            if value != works.get(what)
        ]
    return wrong


def _workings(block: Any) -> dict[str, Any]:
    attention = block.attn
    works = {
        "attention": attention.attention_type,
        "stride": block.conv.stride[-1],
        "dilation": block.conv.dilation[-1],
    }
    if attention.attention_type == "none":
        return works | {"activation": attention.activation.__name__}
    return works | {"heads": attention.num_heads}


def _image_network(classifier: Source) -> tuple[str, EMOv2]:
    """What to call an image classifier, and its network."""
    if isinstance(classifier, EMOv2):
        return "the classifier", classifier
    if isinstance(classifier, EMOv2ForImageClassification):
        return "the classifier", classifier.emov2
    if isinstance(classifier, str | os.PathLike) and str(classifier):
        if not Path(classifier).is_dir() and not may_be_on_hub(classifier):
            raise ValueError(
                f"image classifier {shown(str(classifier))} does not load as an EMOv2 (there is no such folder); pass "
                "a folder or Hub id (OWNER/NAME) of a trained classifier: a size's name has no weights to begin with."
            )
        try:
            return str(classifier), EMOv2ForImageClassification.from_pretrained(classifier).emov2
        except (OSError, RuntimeError) as error:
            raise ValueError(
                f"image classifier {shown(str(classifier))} does not load as an EMOv2 ({first_line(error)}); pass a "
                "folder or Hub id of a trained classifier."
            ) from error
    raise ValueError(
        f"image classifier {shown(classifier)} is a {type(classifier).__name__}; pass a folder or Hub id of an EMOv2 "
        "classifier, its network, or an EMOv2ForImageClassification."
    )
