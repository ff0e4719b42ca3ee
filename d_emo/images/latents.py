"""The one place where images become latents and latents become images, whatever the autoencoder.

What a class does otherwise than others is in `autoencoder_kinds`: here are images in [-1, 1] and latents that are
grouped where the class groups them. A posterior (B, M, C, h, w) is mean and standard deviation (M = 2), or the latent
itself of a deterministic autoencoder (M = 1), neither scaled nor shifted; `LatentSpace` turns it into what models are
trained on.
"""

from typing import Any

import torch
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

from d_emo.images.autoencoder_kinds import KINDS
from d_emo.images.autoencoders import LatentSpace, class_of, group_side


@torch.no_grad()
def encode_posterior(vae: Any, images: torch.Tensor) -> torch.Tensor:
    """What an autoencoder knows of the latents of images.

    Args:
        vae: an autoencoder of a class of `KINDS`, in eval mode.
        images: (B, channels, H, W) in [-1, 1].

    Returns:
        (B, M, C, h, w) float32.
    """
    kind = KINDS[class_of(vae)]
    low, high = kind.pixel_range
    answer = getattr(vae.encode((low + (high - low) * (images + 1) / 2).to(vae.dtype)), kind.output)
    parts = (answer,) if isinstance(answer, torch.Tensor) else (answer.mean, answer.std)
    return torch.stack([pixel_unshuffle(part.float(), group_side(vae)) for part in parts], dim=1)


def draw_latents(space: LatentSpace, posterior: torch.Tensor, noise: torch.Tensor | None) -> torch.Tensor:
    """A draw from posteriors (B, M, C, h, w), float32 (B, C, h, w), normalised for training.

    `noise` is standard normal, (B, C, h, w); zeros give the posterior's mean, and so does None. It is not used where
    M = 1.
    """
    latents = posterior[:, 0]
    if posterior.shape[1] == 2 and noise is not None:
        latents = latents + posterior[:, 1] * noise.float()
    return space.normalized(latents)


def encode_images(vae: Any, space: LatentSpace, images: torch.Tensor, noise: torch.Tensor | None) -> torch.Tensor:
    """Latents (B, C, h, w) of images (B, channels, H, W) in [-1, 1], drawn with `noise`, normalised for training."""
    return draw_latents(space, encode_posterior(vae, images), noise)


@torch.no_grad()
def decode_latents(
    vae: Any,
    space: LatentSpace,
    latents: torch.Tensor,
    generator: torch.Generator | list[torch.Generator] | None = None,
) -> torch.Tensor:
    """Decode normalised latents to float32 images, (B, channels, H, W), about [-1, 1] and not clamped.

    Args:
        vae: the autoencoder.
        space: what it makes of images.
        latents: (B, C, h, w).
        generator: of a decoder that draws noise (ConsistencyDecoderVAE); others take none.
    """
    kind = KINDS[class_of(vae)]
    raw = pixel_shuffle(space.restored(latents.float()), group_side(vae)).to(vae.dtype)
    images = vae.decode(raw, return_dict=False, **({"generator": generator} if kind.draws else {}))[0]
    low, high = kind.pixel_range
    return images.float() if (low, high) == (-1.0, 1.0) else 2 * (images.float() - low) / (high - low) - 1
