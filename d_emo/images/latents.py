"""The one place where images become latents and latents become images.

Scale and shift come from the VAE's own configuration, never from a constant: z = (latent - shift) * scale.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from d_emo.common import checks
from d_emo.common.messages import first_line
from d_emo.common.saved_folders import LOADING_ERRORS

if TYPE_CHECKING:
    from diffusers import AutoencoderKL


def open_vae(name: str, dtype: torch.dtype | None = None) -> "AutoencoderKL":
    """An SD-type VAE.

    Args:
        name: Hub id, its folder, or a pipeline's folder that has it in `vae/`.
        dtype: of its weights; None for float32.

    Raises:
        ValueError: it is neither a local folder nor reachable.
    """
    from diffusers import AutoencoderKL

    name = checks.text(name, "vae")
    options: dict[str, Any] = {} if dtype is None else {"dtype": dtype}
    if (Path(name) / "vae" / "config.json").is_file():
        options["subfolder"] = "vae"
    try:
        return AutoencoderKL.from_pretrained(name, **options)
    except LOADING_ERRORS as error:
        reason = first_line(error)
        if (Path(name) / options.get("subfolder", "") / "config.json").is_file():
            raise ValueError(f"{name}: its VAE does not load ({reason}); fetch it again, or name another.") from error
        raise ValueError(
            f"{name}: neither a VAE folder nor reachable on the Hub ({reason}). Fetch it where there is a network "
            f"(hf download {name}) and pass its folder."
        ) from error


def vae_scale_factor(vae: Any) -> int:
    """Pixels per latent pixel along a side."""
    return 2 ** (len(vae.config.block_out_channels) - 1)


def _scale_and_shift(vae: Any) -> tuple[float, float]:
    scale = getattr(vae.config, "scaling_factor", None)
    if scale is None:
        raise ValueError(f"{type(vae).__name__} has no scaling_factor in its config; use an AutoencoderKL-type VAE.")
    return float(scale), float(getattr(vae.config, "shift_factor", None) or 0.0)


@torch.no_grad()
def encode_moments(vae: Any, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation of the VAE's posterior, float32, neither scaled nor shifted.

    Args:
        vae: an AutoencoderKL-type VAE (its `encode` returns `latent_dist`).
        images: (B, channels, H, W) in [-1, 1].

    Returns:
        Two tensors (B, latent channels, H / f, W / f).
    """
    posterior = vae.encode(images.to(vae.dtype)).latent_dist
    return posterior.mean.float(), posterior.std.float()


def sample_latents(vae: Any, mean: torch.Tensor, std: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """A draw from the posterior, float32, scaled and shifted for training; all of one shape (B, C, h, w).

    `noise` is standard normal; zeros give the posterior's mean.
    """
    scale, shift = _scale_and_shift(vae)
    return (mean + std * noise.float() - shift) * scale


def encode_images(vae: Any, images: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """Latents of images (B, channels, H, W) in [-1, 1], drawn with `noise`, scaled and shifted for training."""
    return sample_latents(vae, *encode_moments(vae, images), noise)


@torch.no_grad()
def decode_latents(vae: Any, latents: torch.Tensor) -> torch.Tensor:
    """Decode scaled latents to float32 images, (B, channels, H, W), about [-1, 1] and not clamped."""
    scale, shift = _scale_and_shift(vae)
    return vae.decode((latents.float() / scale + shift).to(vae.dtype), return_dict=False)[0].float()
