"""Parameters and multiply-adds of a model, counted rather than quoted."""

from collections.abc import Callable
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from d_emo.kernels import use_backend
from d_emo.models import ClassConditionalTransformer2DModel
from d_emo.models.i2rmb import SpanningWindowAttention


def count_parameters(model: torch.nn.Module) -> int:
    """All parameters, the fixed position table included, as the published counts do."""
    return sum(parameter.numel() for parameter in model.parameters())


def count_macs(model: ClassConditionalTransformer2DModel) -> int:
    """Multiply-adds of one forward pass of one sample of the configured size.

    Counts matrix products and convolutions, attention's two products included; not normalisation or activations. The
    paper's D-EMOv2 rows also count normalisation, its DiT rows leave the attention products out.
    """
    device = next(model.parameters()).device
    latents = torch.zeros(1, model.config.in_channels, *model.sample_shape, device=device)
    labels = torch.full((1,), model.null_label, device=device)
    return count_macs_on(model, latents, torch.zeros(1, device=device), labels)


def count_macs_on(model: torch.nn.Module, *inputs: torch.Tensor) -> int:
    """Multiply-adds of one forward pass in eval mode on these inputs, counted as `count_macs` does."""
    training = model.training
    model.eval()
    macs = macs_of(lambda: model(*inputs))
    model.train(training)
    return macs


def macs_of(work: Callable[[], object]) -> int:
    """Multiply-adds of the products and convolutions in `work`, without gradients."""
    counter = FlopCounterMode(display=False)
    # Plain PyTorch: the kernels' own check, made before their first use, would be counted too, and PyTorch's counter
    # does not know its own fused attention for CPUs.
    with use_backend("reference"), sdpa_kernel(SDPBackend.MATH), counter, torch.no_grad():
        work()
    return counter.get_total_flops() // 2


# What the paper's counter (fvcore) takes a normalised value for.
_NORM_COSTS = {torch.nn.BatchNorm2d: 2, torch.nn.LayerNorm: 5}


def count_macs_as_published(model: torch.nn.Module, *inputs: torch.Tensor) -> tuple[int, int]:
    """Multiply-adds as the EMOv2 paper counts them.

    Returns:
        Those of products and convolutions, with both kinds of window where a grid is one window (which this package
        attends to once and doubles); and the same plus 2 a value of BatchNorm and 5 of LayerNorm, as in its tables.
    """
    twice = norms = 0

    def watch(module: torch.nn.Module, arguments: Any, output: torch.Tensor) -> None:
        nonlocal twice, norms
        if isinstance(module, SpanningWindowAttention):
            twice += module.macs_saved(*arguments[0].shape)
        else:
            norms += output.numel() * next(cost for kind, cost in _NORM_COSTS.items() if isinstance(module, kind))

    watched = (SpanningWindowAttention, *_NORM_COSTS)
    hooks = [module.register_forward_hook(watch) for module in model.modules() if isinstance(module, watched)]
    try:
        products = count_macs_on(model, *inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return products + twice, products + twice + norms
