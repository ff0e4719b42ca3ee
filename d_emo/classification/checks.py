"""What the classification backbones refuse: images and labels that they cannot work on, in one line each."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

# A label that the loss leaves out (`torch.nn.functional.cross_entropy`).
IGNORED_LABEL = -100


def check_pixels(pixels: Any, conv: nn.Module) -> None:
    """Refuse images that the first layer cannot take.

    Args:
        pixels: (B, C, H, W), normalised.
        conv: the first layer, whose parameters say how many channels and which type of numbers it takes.

    Raises:
        ValueError: it is no such tensor.
    """
    if torch.jit.is_tracing():  # every comparison would be warned of
        return
    channels = getattr(conv, "in_channels", None)
    shape = f"(B, {channels or 'C'}, H, W)"
    check_tensor(pixels, shape, "EMOv2", "image processor")
    if pixels.dim() != 4:
        remedy = "; for one image pass pixel_values[None]" if pixels.dim() == 3 else ""
        raise ValueError(f"pixel_values have the shape {tuple(pixels.shape)}, not {shape}{remedy}.")
    if channels and pixels.shape[1] != channels:
        remedy = " (channels come second: permute(0, 3, 1, 2))" if pixels.shape[3] == channels else ""
        raise ValueError(f"pixel_values have {pixels.shape[1]} channels, the model takes {channels}{remedy}.")
    if 0 in (pixels.shape[0], pixels.shape[2], pixels.shape[3]):
        raise ValueError(f"pixel_values have the shape {tuple(pixels.shape)}: no pixel; leave out empty batches.")
    check_type(pixels, conv)


def check_tensor(pixels: Any, shape: str, network: str, processor: str) -> None:
    """Refuse what is no tensor.

    Args:
        pixels: what a network is given.
        shape: that it should have, in words.
        network: its name.
        processor: what makes its input.

    Raises:
        ValueError: it is something else, torch.fx's stand-in among them.
    """
    if isinstance(pixels, torch.fx.Proxy):
        raise ValueError(f"{network} cannot be traced by torch.fx, its windows depend on the grid; use torch.export.")
    if not isinstance(pixels, torch.Tensor):
        given = type(pixels).__name__
        raise ValueError(f"pixel_values is a {given}; pass a tensor {shape}, as the {processor} makes it.")


def check_type(pixels: torch.Tensor, conv: nn.Module) -> None:
    """Refuse numbers of another type than the first layer's.

    Args:
        pixels: of any shape.
        conv: the first layer.

    Raises:
        ValueError: they are no floating-point numbers, or of another type and no autocast changes it.
    """
    if not pixels.is_floating_point():
        raise ValueError(f"pixel_values are {pixels.dtype}; pass normalised floating-point numbers (image processor).")
    weight = getattr(conv, "weight", None)
    if (
        isinstance(weight, torch.Tensor)
        and weight.is_floating_point()
        and weight.dtype != pixels.dtype
        and not torch.is_autocast_enabled(pixels.device.type)
    ):
        name = str(weight.dtype).removeprefix("torch.")
        raise ValueError(
            f"pixel_values are {pixels.dtype}, the model is {weight.dtype}; pass pixel_values.to(torch.{name})."
        )


def check_features(features: Any, channels: int) -> None:
    """Refuse what a head cannot work on.

    Args:
        features: (B, C, h, w).
        channels: C.

    Raises:
        ValueError: it is no such tensor.
    """
    if not isinstance(features, torch.Tensor) or features.dim() != 4 or features.shape[1] != channels:
        given = tuple(features.shape) if isinstance(features, torch.Tensor) else f"a {type(features).__name__}"
        raise ValueError(f"features are {given}; pass what forward_features returns, (B, {channels}, h, w).")


def check_tensors(state: Any) -> None:
    """Refuse what is no state dictionary.

    Raises:
        ValueError: it is no dictionary of tensors by name.
    """
    if not isinstance(state, Mapping) or not state:
        given = "empty" if isinstance(state, Mapping) else f"a {type(state).__name__}"
        raise ValueError(f"the state is {given}; pass a dictionary of tensors by name.")
    for name, tensor in state.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            given = type(tensor).__name__
            raise ValueError(f"the state has a {given} by the name {name!r}; pass a dictionary of tensors by name.")


def refuse_single_values(network: nn.Module, pixels: Any, reduction: int) -> None:
    """Refuse to train BatchNorm on one value a channel, which has no deviation.

    Args:
        network: with the norms.
        pixels: images (B, C, H, W), or clips (B, T, C, H, W) of which one frame is left.
        reduction: so many times smaller is the smallest grid.

    Raises:
        ValueError: the batch is one image or clip that ends as a single value.
    """
    if not network.training or torch.jit.is_tracing() or not isinstance(pixels, torch.Tensor) or pixels.dim() < 4:
        return
    if pixels.shape[0] != 1 or max(pixels.shape[-2:]) > reduction:
        return
    if any(isinstance(norm, nn.BatchNorm2d | nn.BatchNorm3d) and norm.training for norm in network.modules()):
        kind = "image" if pixels.dim() == 4 else "clip"
        sides = " x ".join(map(str, (*pixels.shape[1:-3], *pixels.shape[-2:])))
        raise ValueError(
            f"one {kind} of {sides} leaves BatchNorm a single value to train on; pass 2 {kind}s or more, larger ones, "
            "or call eval()."
        )


def check_labels(labels: Any, batch: int, classes: int, problem: str | None) -> None:
    """Refuse labels that the loss cannot work on.

    Args:
        labels: (B,) class ids, or (B, K) numbers.
        batch: B.
        classes: K.
        problem: transformers' `problem_type`, None where the labels decide.

    Raises:
        ValueError: labels of another shape, type or range, or an unknown problem.
    """
    if problem not in (None, "regression", "single_label_classification", "multi_label_classification"):
        raise ValueError(
            f"problem_type={problem!r} is unknown; use regression, single_label_classification or "
            "multi_label_classification."
        )
    if not classes:
        raise ValueError("labels were given and the model has no classes (num_labels=0).")
    if not isinstance(labels, torch.Tensor):
        raise ValueError(f"labels is a {type(labels).__name__}; pass a tensor ({batch},) of class ids.")
    # As transformers decides: where nothing is said, whole numbers are ids.
    ids = problem == "single_label_classification" or (
        problem is None and classes > 1 and (labels.dim() < 2 or not labels.is_floating_point())
    )
    given, shape = f"labels have the shape {tuple(labels.shape)}", tuple(labels.shape)
    if not ids:
        shapes = ((batch, classes),) if classes > 1 else ((batch,), (batch, 1))
        if shape not in shapes:
            raise ValueError(f"{given}; {problem or 'this model'} takes {' or '.join(map(str, shapes))}.")
        if not labels.is_floating_point():
            raise ValueError(f"labels are {labels.dtype}; {problem or 'this model'} takes numbers (labels.float()).")
        return
    rule = f"pass a tensor ({batch},) of ids from 0 to {classes - 1}, as integers (labels.long())"
    if shape == (batch, classes) and classes > 1:
        rule += ", or labels.float() for several labels an image"
    # Without a word from the configuration, transformers takes uint8 for several labels an image.
    if labels.dtype != torch.int64 and not (labels.dtype == torch.uint8 and problem):
        raise ValueError(f"labels are {labels.dtype}; {rule}.")
    if shape not in ((batch,), (batch, 1)):
        raise ValueError(f"{given}; {rule}.")
    unknown = unknown_id(labels, classes, IGNORED_LABEL)
    if unknown is not None:
        raise ValueError(f"labels have {unknown}, the model has {classes} classes; {rule}.")


def unknown_id(labels: torch.Tensor, classes: int, ignored: int) -> int | None:
    """The first label that is neither a class nor the ignored one.

    Args:
        labels: ids of any shape and whole type.
        classes: K; ids are 0 to K - 1.
        ignored: an id that the loss leaves out.

    Returns:
        It, or None: there is none, or nobody looks. On a GPU a look at the values would wait for it; while a graph is
        recorded there are none.
    """
    if labels.device.type != "cpu" or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return None
    labels = labels.long()  # a byte would be compared with 300 as with 44
    wrong = labels[(labels != ignored) & ((labels < 0) | (labels >= classes))]
    return int(wrong[0]) if wrong.numel() else None
