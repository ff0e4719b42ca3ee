"""Parameters and multiply-adds of a model, counted rather than quoted."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from d_emo.kernels import use_backend
from d_emo.models import ClassConditionalTransformer2DModel


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


@dataclass(frozen=True)
class PublishedMacs:
    """What the EMOv2 paper's counter counts in one forward pass.

    Attributes:
        products: multiply-adds of matrix products and convolutions, with both kinds of window where a grid is a single
            one (which this package attends to once and doubles).
        norms: 2 a value of BatchNorm of any dimension (1 without weights), 5 of LayerNorm (4 without weights).
        resampling: 4 an output value of bilinear and 1 of nearest-neighbour upsampling, to the same size too, and 1 an
            input value of adaptive average pooling to more than one value. To one value PyTorch runs a mean, which
            counts nothing; to count that, too, would change no published figure.
    """

    products: int
    norms: int
    resampling: int

    @property
    def total(self) -> int:
        """All of them; biases, activations, softmax, additions and other norms count nothing."""
        return self.products + self.norms + self.resampling


class _Watched(TorchFunctionMode):
    """Adds up norms and resampling by the functions that are called: operators of the same size run none."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = self.resampling = 0

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        output = function(*args, **(kwargs or {}))  # what it calls in turn is not seen here, nor counted twice
        named = dict(zip(_FIRST_ARGUMENTS.get(function, ()), args, strict=False)) | (kwargs or {})
        if function is F.batch_norm:
            self.norms += output.numel() * (1 if named.get("weight") is None else 2)
        elif function is F.layer_norm:
            self.norms += output.numel() * (4 if named.get("weight") is None else 5)
        elif function is F.interpolate:
            self.resampling += output.numel() * _UPSAMPLING.get(named.get("mode", "nearest"), 0)
        elif function in _POOLING and output.numel() > output.shape[: -_POOLING[function]].numel():
            self.resampling += named["input"].numel()
        return output


# Adaptive average pooling, and the dimensions that it goes over.
_POOLING = {F.adaptive_avg_pool1d: 1, F.adaptive_avg_pool2d: 2, F.adaptive_avg_pool3d: 3}
_UPSAMPLING = {"nearest": 1, "nearest-exact": 1, "bilinear": 4}
_FIRST_ARGUMENTS: dict[Any, tuple[str, ...]] = {
    F.batch_norm: ("input", "running_mean", "running_var", "weight", "bias"),
    F.layer_norm: ("input", "normalized_shape", "weight", "bias"),
    F.interpolate: ("input", "size", "scale_factor", "mode"),
    **dict.fromkeys(_POOLING, ("input", "output_size")),
}


def count_macs_as_published(model: torch.nn.Module, *inputs: torch.Tensor) -> PublishedMacs:
    """Multiply-adds of one forward pass in eval mode as the EMOv2 paper counts them, by mmengine's (fvcore's) counter.

    Works on the meta device, where a pass takes no time. A module that attends to a single window once in place of
    twice says so by a method `macs_saved(*shape)`, which is asked with the shape of the module's first input.

    Args:
        model: any module; frozen BatchNorms (torchvision's, timm's) count as BatchNorms.
        *inputs: of its forward pass.
    """
    watched = _Watched()
    saved = 0

    def watch(module: Any, arguments: tuple[Any, ...], named: dict[str, Any], output: Any) -> None:
        nonlocal saved
        if _is_frozen_norm(module):
            watched.norms += 2 * output.numel()
        else:
            given = arguments[0] if arguments else next(iter(named.values()))
            saved += module.macs_saved(*given.shape)

    chosen = [module for module in model.modules() if hasattr(module, "macs_saved") or _is_frozen_norm(module)]
    hooks = [module.register_forward_hook(watch, with_kwargs=True) for module in chosen]
    try:
        with watched:
            products = count_macs_on(model, *inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return PublishedMacs(products + saved, watched.norms, watched.resampling)


def _is_frozen_norm(module: torch.nn.Module) -> bool:
    """Whether a module is a BatchNorm written out as a product and a sum, which no function gives away."""
    return type(module).__name__.startswith("FrozenBatchNorm")


@dataclass(frozen=True)
class ModuleCost:
    """What a module costs by the paper's formulas.

    Attributes:
        parameters: weights and biases.
        flops: two a multiply-add of the products and convolutions, and three an entry of an attention matrix for its
            softmax (exponential, sum, division); biases count nothing.
    """

    parameters: int
    flops: int


def published_module_costs(channels: int, side: int, window: int, kernel: int, groups: int) -> dict[str, ModuleCost]:
    """Table II of arXiv 2412.06674: modules from C channels to C channels on W x W pixels, with biases.

    Args:
        channels: C.
        side: W in pixels; L = W * W.
        window: w in pixels, of windows that divide the map; l = w * w.
        kernel: k.
        groups: G of the convolution, which divide C.

    Returns:
        "attention" (of one head), "window attention", "convolution" and "depthwise convolution".
    """
    pixels, tokens = side * side, window * window
    projections = 4 * (channels + 1) * channels

    def attention(keys: int) -> ModuleCost:
        products = 8 * channels**2 * pixels + 4 * channels * pixels * keys
        return ModuleCost(projections, products + 3 * pixels * keys)

    def convolution(inputs: int) -> ModuleCost:
        taps = inputs * kernel**2
        return ModuleCost((taps + 1) * channels, 2 * taps * pixels * channels)

    return {
        "attention": attention(pixels),
        "window attention": attention(tokens),
        "convolution": convolution(channels // groups),
        "depthwise convolution": convolution(1),
    }
