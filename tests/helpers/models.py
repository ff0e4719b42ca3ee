"""Tiny models with random parameters."""

import torch

from d_emo import create_model


@torch.no_grad()
def randomize(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Give every parameter and running statistic a random value: a fresh adaLN-Zero model outputs zeros."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in model.state_dict().items():
        if name.endswith("pos_embed") or not tensor.is_floating_point() or not tensor.numel():
            continue
        noise = torch.randn(tensor.shape, generator=generator) * 0.3 / max(1.0, tensor[0].numel() ** 0.5)
        if name.endswith("running_var"):
            noise = 0.5 + noise.abs()
        elif "norm" in name and name.endswith("weight"):
            noise = 1 + noise
        tensor.copy_(noise)
    return model


@torch.no_grad()
def enliven(model: torch.nn.Module, seed: int = 0, gain: float = 6.0) -> torch.nn.Module:
    """`randomize`, with matrices so large that what an image network answers depends on the image."""
    randomize(model, seed)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.mul_(gain)
    return model


# Families without an S-2, and what else is smaller in their tiny models.
OTHERS = {
    "LightningDiT": ("LightningDiT-B-2", {}),
    "JiT": ("JiT-B-16", {"patch_size": 2, "patch_bottleneck": 6, "context_length": 3}),
}


def fresh_model(family: str = "D-EMOv2", **overrides) -> torch.nn.Module:
    """A real model of a few thousand parameters."""
    name, own = OTHERS.get(family, (f"{family}-S-2", {}))
    config = {
        **own,
        "sample_size": 16,
        "in_channels": 4,
        "hidden_size": 32,
        "num_layers": 2,
        "num_attention_heads": 2,
        "num_classes": 10,
    }
    return create_model(name, **{**config, **overrides})


def tiny_model(family: str = "D-EMOv2", **overrides) -> torch.nn.Module:
    """The same, randomised, in eval mode."""
    return randomize(fresh_model(family, **overrides)).eval()
