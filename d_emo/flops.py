"""Parameters and multiply-adds of a model, counted rather than quoted."""

import torch
from torch.utils.flop_counter import FlopCounterMode

from .kernels import use_backend
from .models import ClassConditionalTransformer2DModel


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
    counter = FlopCounterMode(display=False)
    training = model.training
    model.eval()
    # Plain PyTorch: the kernels' own check, made before their first use, would be counted too.
    with use_backend("reference"), counter, torch.no_grad():
        model(*inputs)
    model.train(training)
    return counter.get_total_flops() // 2
