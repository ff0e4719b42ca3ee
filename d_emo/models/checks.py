"""What the diffusion transformers refuse: inputs of other shapes, folders of other networks or of half a network."""

import difflib
import inspect
import numbers
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from d_emo.common.messages import shown
from d_emo.common.saved_folders import PLACE, RESTORE, different, kind_of, not_found, stored_object

# What Diffusers writes beside a model's own fields.
NOTES = (
    *("quantization_config", "dtype", "torch_dtype"),
    # Of Diffusers' EMAModel, which writes them into the config.json of the model that it saves.
    *("decay", "min_decay", "optimization_step", "update_after_step", "use_ema_warmup", "inv_gamma", "power"),
)
# Schedules have a thousand steps; this is far from where numbers stop being whole in float32.
LARGEST_TIMESTEP = 1_000_000


class UntouchedStatisticsWarning(UserWarning):
    """Trained weights beside BatchNorm statistics that no training step has touched."""


def check_input(
    config: Any, null_label: int, hidden_states: Any, timestep: Any, class_labels: Any, end_timestep: Any = None
) -> None:
    """Refuse what `forward` cannot work on, without waiting for a GPU.

    Args:
        config: of the model.
        null_label: the largest label.
        hidden_states: (B, C, H, W).
        timestep: (B,) or one value.
        class_labels: (B,) or None.
        end_timestep: (B,), one value, or None.
    """
    channels, patch = config.in_channels, config.patch_size
    if not isinstance(hidden_states, torch.Tensor) or hidden_states.dim() != 4:
        given = tuple(hidden_states.shape) if hasattr(hidden_states, "shape") else type(hidden_states).__name__
        remedy = "; for one sample pass hidden_states[None]" if len(getattr(hidden_states, "shape", ())) == 3 else ""
        raise ValueError(f"hidden_states are {given}, not a tensor (B, {channels}, H, W){remedy}.")
    if not hidden_states.is_floating_point():
        raise ValueError(f"hidden_states are {hidden_states.dtype}; pass floating-point numbers, about [-1, 1].")
    batch = len(hidden_states)
    if hidden_states.shape[1] != channels:
        remedy = " (channels come second: permute(0, 3, 1, 2))" if hidden_states.shape[3] == channels else ""
        raise ValueError(f"the input has {hidden_states.shape[1]} channels, the model takes {channels}{remedy}.")
    for name, size in zip(("height", "width"), hidden_states.shape[2:], strict=True):
        if size % patch or size < patch:
            raise ValueError(
                f"{name}={size} is not a positive multiple of patch_size={patch}; "
                f"use {max(patch, size - size % patch)}."
            )
    _check_time(timestep, "timestep", batch)
    if end_timestep is not None:
        if config.get("end_block") is None:
            raise ValueError(
                f"end_timestep={shown(end_timestep)}: the network is no flow map (its end_block is None) and knows one "
                "time only; leave it out."
            )
        _check_time(end_timestep, "end_timestep", batch)
    _check_labels(config.num_classes, null_label, class_labels, batch)


def _check_time(timestep: Any, name: str, batch: int) -> None:
    shape = tuple(timestep.shape) if isinstance(timestep, torch.Tensor) else ()
    remedy = f"pass one number, or a tensor ({batch},), one a sample"
    if not isinstance(timestep, torch.Tensor | numbers.Real) or shape not in ((), (1,), (batch,)):
        given = f"of shape {shape}" if shape else f"a {type(timestep).__name__}"
        raise ValueError(f"{name} is {given}; {remedy}.")
    largest: Any = LARGEST_TIMESTEP
    if isinstance(timestep, numbers.Real) and not -largest <= timestep <= largest:
        raise ValueError(f"{name}={timestep} is beyond {LARGEST_TIMESTEP}; {remedy}.")


def check_depth(features_after: Any, num_layers: int) -> None:
    """Refuse a number of blocks that a network does not have; None is no number."""
    if features_after is None:
        return
    if not isinstance(features_after, int) or not 1 <= features_after <= num_layers:
        raise ValueError(
            f"features_after={shown(features_after)}: the network has {num_layers} blocks; use 1 to {num_layers}."
        )


def _check_labels(num_classes: int, null_label: int, labels: Any, batch: int) -> None:
    rule = f"pass ids as a tensor ({batch},) of integers, or {null_label} for every sample without a class"
    if labels is None:
        if num_classes:
            raise ValueError(f"class_labels is missing and the model has {num_classes} classes; {rule}.")
        return
    if not isinstance(labels, torch.Tensor):
        raise ValueError(f"class_labels is a {type(labels).__name__}; {rule}.")
    if labels.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"class_labels is {labels.dtype}; {rule} (labels.long()).")
    if tuple(labels.shape) not in ((), (1,), (batch,)):
        raise ValueError(f"class_labels has the shape {tuple(labels.shape)}; {rule}.")
    # On a GPU a look at the values would wait for it; while a graph is recorded there are none.
    if labels.device.type != "cpu" or type(labels) is not torch.Tensor or not labels.numel() or _is_recorded(labels):
        return
    low, high = (int(value) for value in labels.aminmax())
    if low < 0 or high > null_label:
        raise ValueError(
            f"class_labels has {low if low < 0 else high}; the model's classes are 0 to {num_classes - 1}, and "
            f"{null_label} is no class."
        )


def _is_recorded(tensor: torch.Tensor) -> bool:
    """Whether a compiler, a tracer or a transform such as vmap looks on, for which values cannot be read."""
    return (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or torch._C._functorch.is_functorch_wrapped_tensor(tensor)
    )


def stored_config(wanted: Any, name: Any, options: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration that a folder or Hub id holds.

    Args:
        wanted: the class that is to be loaded.
        name: folder or Hub id.
        options: of `from_pretrained`.

    Raises:
        ValueError: a local folder without one; the message says what it holds instead.
        OSError: there is no such folder or model.
    """
    stored_object(name, options.get("subfolder"), wanted.__name__, part="transformer")
    try:
        return dict(wanted.load_config(name, **{key: options[key] for key in PLACE if key in options}))
    except OSError as error:
        if Path(name).exists():
            return {}
        raise not_found(name, error) from error


def check_kind(wanted: type, name: Any, config: Mapping[str, Any], converted_by: str | None = None) -> None:
    """Refuse a folder that says it holds another kind of network; where that cannot be told, loading will tell.

    Args:
        wanted: the class that is to be loaded.
        name: folder or Hub id.
        config: what it holds.
        converted_by: the class that loads it all the same.
    """
    stored = config.get("_class_name")
    if not isinstance(stored, str | None):
        raise ValueError(f"{name}: its config.json names no class (_class_name is a {type(stored).__name__}).")
    if stored in {kind.__name__ for kind in wanted.__mro__} or (stored is None and "model_type" not in config):
        _check_fields(wanted, name, config)
        return
    if converted_by is not None:
        remedy = f"load it with {converted_by}.from_pretrained, which converts it"
    elif stored is None:
        remedy = "load it with transformers"
    else:
        remedy = f"load it with {stored}.from_pretrained"
    raise ValueError(f"{name}: its config.json is of {kind_of(dict(config))}, not of a {wanted.__name__}; {remedy}.")


def _check_fields(wanted: type, name: Any, config: Mapping[str, Any]) -> None:
    """Refuse fields that the class does not have: Diffusers would leave them out, and take the default's meaning."""
    fields = list(inspect.signature(wanted).parameters)
    unknown = [key for key in config if not key.startswith("_") and key not in (*fields, *NOTES)]
    if unknown:
        close = difflib.get_close_matches(unknown[0], fields, 1)
        remedy = f"is it {close[0]}?" if close else "was it written by a newer version?"
        raise ValueError(f"{name}: its config.json has {unknown[0]!r}, which no {wanted.__name__} has; {remedy}")


def load_strictly(state: Mapping[str, torch.Tensor], model: torch.nn.Module) -> None:
    """Load tensors under a model's own names, every one of them.

    Raises:
        ValueError: a tensor is missing, left over, or of another shape; the message names some.
    """
    expected = model.state_dict()
    wrong = [
        f"{name} {tuple(tensor.shape)}, not {tuple(expected[name].shape)}"
        for name, tensor in state.items()
        if name in expected and tensor.shape != expected[name].shape
    ]
    missing, unknown = sorted(expected.keys() - state.keys()), sorted(state.keys() - expected.keys())
    if wrong or missing or unknown:
        raise ValueError(f"weights do not fit: missing {missing[:5]}, unknown {unknown[:5]}, other shapes {wrong[:5]}.")
    model.load_state_dict(state, strict=True)


def check_loading(name: str, model: nn.Module, information: Mapping[str, Any]) -> None:
    """Refuse a model of which parts are missing in the file, or the other way round.

    Args:
        name: what was loaded.
        model: what came of it.
        information: Diffusers' report of the loading.
    """
    if getattr(model, "hf_quantizer", None) is not None:
        return  # quantized weights have other names
    missing, unknown = (sorted(information.get(key) or ()) for key in ("missing_keys", "unexpected_keys"))
    if not missing and not unknown:
        return
    config: Any = model.config
    stored = {key.split(".")[1] for key in unknown if key.startswith("blocks.")}
    layers = config.num_layers + len(stored) if unknown and not missing else config.num_layers
    cause = f"config.json says num_layers={config.num_layers}"
    if stored and not missing:
        cause += f", the weights have {layers} blocks"
    raise ValueError(f"{name}: {different(missing, unknown)} {cause}. {RESTORE}")


def warn_of_untouched_statistics(model: nn.Module, event: str) -> None:
    """Warn where trained weights stand beside BatchNorm statistics that are still 0 and 1: samples would be noise."""
    norms: list[Any] = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    output = getattr(getattr(model, "proj_out", None), "weight", None)
    if not norms or output is None:
        return
    tensors = [output, *(tensor for norm in norms for tensor in (norm.running_mean, norm.running_var))]
    if any(tensor is None or tensor.device.type == "meta" for tensor in tensors):
        return
    untouched = [norm for norm in norms if not norm.running_mean.any() and bool((norm.running_var == 1).all())]
    if untouched and bool(output.any()):  # the output's weights are zero until they are trained
        warnings.warn(
            f"{event} with trained weights, but {len(untouched)} of {len(norms)} BatchNorm layers have untouched "
            "statistics (mean 0, variance 1): samples will be noise. An average of the parameters alone does this, "
            "such as Diffusers' EMAModel; d_emo.WeightAverage averages buffers, too.",
            UntouchedStatisticsWarning,
            stacklevel=3,
        )
