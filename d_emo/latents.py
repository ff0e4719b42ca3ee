"""The one place where images become latents and latents become images.

Scale and shift come from the VAE's own configuration, never from a constant: z = (latent - shift) * scale.
"""

from typing import Any

import torch


def vae_scale_factor(vae: Any) -> int:
    """Pixels per latent pixel along a side."""
    return 2 ** (len(vae.config.block_out_channels) - 1)


def _scale_and_shift(vae: Any) -> tuple[float, float]:
    scale = getattr(vae.config, "scaling_factor", None)
    if scale is None:
        raise ValueError(f"{type(vae).__name__} has no scaling_factor in its config; use an AutoencoderKL-type VAE.")
    return float(scale), float(getattr(vae.config, "shift_factor", None) or 0.0)


@torch.no_grad()
def encode_images(vae: Any, images: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """Sample latents of images from the VAE's posterior.

    Args:
        vae: an AutoencoderKL-type VAE (its `encode` returns `latent_dist`).
        images: (B, channels, H, W) in [-1, 1].
        noise: (B, latent channels, H / f, W / f), standard normal; zeros give the posterior's mean.

    Returns:
        Float32 latents of the shape of `noise`, scaled and shifted for training.
    """
    scale, shift = _scale_and_shift(vae)
    posterior = vae.encode(images.to(vae.dtype)).latent_dist
    latents = posterior.mean.float() + posterior.std.float() * noise.float()
    return (latents - shift) * scale


@torch.no_grad()
def decode_latents(vae: Any, latents: torch.Tensor) -> torch.Tensor:
    """Decode scaled latents to float32 images, (B, channels, H, W), about [-1, 1] and not clamped."""
    scale, shift = _scale_and_shift(vae)
    return vae.decode((latents.float() / scale + shift).to(vae.dtype), return_dict=False)[0].float()
