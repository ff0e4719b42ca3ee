"""Tiny autoencoders of every class that models here work with, random everywhere."""

from typing import Any

import diffusers
import torch

from d_emo.images.autoencoder_kinds import KINDS

DOWN, UP = ("DownEncoderBlock2D",) * 2, ("UpDecoderBlock2D",) * 2
# Factor 2 and latents of 4 channels where no other number is given.
KL = {"block_out_channels": (8, 8), "down_block_types": DOWN, "up_block_types": UP, "norm_num_groups": 4,
      "latent_channels": 4, "layers_per_block": 1}  # fmt: skip
PER_CHANNEL = {"latents_mean": [0.1, -0.2, 0.3, 0.4], "latents_std": [1.0, 2.0, 3.0, 0.5], "scaling_factor": 0.5}
# By class; "AutoencoderKL per channel" is SDXL's and Playground's way to write statistics.
CONFIGS: dict[str, dict[str, Any]] = {
    "AutoencoderKL": {**KL, "scaling_factor": 0.7, "shift_factor": 0.3},
    "AutoencoderKL per channel": {**KL, **PER_CHANNEL},
    "AutoencoderRAE": {  # takes 28 pixels, gives 32 in latents of 64 channels, 2 x 2
        "encoder_hidden_size": 64, "encoder_num_hidden_layers": 1, "encoder_patch_size": 14, "encoder_input_size": 28,
        "patch_size": 16, "decoder_hidden_size": 32, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 2,
        "decoder_intermediate_size": 64,
    },
    "AutoencoderDC": {
        "latent_channels": 8, "attention_head_dim": 2, "scaling_factor": 0.41,
        "encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8),
        "encoder_layers_per_block": (1, 1), "decoder_layers_per_block": (1, 1),
        "encoder_qkv_multiscales": ((), (5,)), "decoder_qkv_multiscales": ((), (5,)),
        "encoder_block_types": ("ResBlock", "EfficientViTBlock"),
        "decoder_block_types": ("ResBlock", "EfficientViTBlock"),
    },
    "AutoencoderKLFlux2": {**KL, "sample_size": 32},  # factor 4 and 16 channels, grouped by 2 x 2
    "AutoencoderTiny": {
        "encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8), "num_encoder_blocks": (1, 1),
        "num_decoder_blocks": (1, 1), "scaling_factor": 0.9,
    },
    "AsymmetricAutoencoderKL": {
        "down_block_types": DOWN, "down_block_out_channels": (8, 8), "up_block_types": UP,
        "up_block_out_channels": (8, 16), "norm_num_groups": 4, "scaling_factor": 0.6,
    },
    "ConsistencyDecoderVAE": {
        "encoder_block_out_channels": (8, 8), "encoder_down_block_types": DOWN, "encoder_layers_per_block": 1,
        "encoder_norm_num_groups": 4, "scaling_factor": 0.8,
        "decoder_block_out_channels": (8, 8), "decoder_down_block_types": ("ResnetDownsampleBlock2D",) * 2,
        "decoder_up_block_types": ("ResnetUpsampleBlock2D",) * 2, "decoder_layers_per_block": 1,
        "decoder_norm_num_groups": 4,
    },
}  # fmt: skip
assert {name.split()[0] for name in CONFIGS} == set(KINDS)


@torch.no_grad()
def tiny_autoencoder(kind: str = "AutoencoderKL", seed: int = 0, **overrides: Any) -> Any:
    """An autoencoder of a class, tiny, with random weights and statistics, in eval mode.

    Args:
        kind: a name of `CONFIGS`.
        seed: of weights and statistics.
        overrides: of its configuration.
    """
    config = {**CONFIGS[kind], **overrides}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if kind == "AutoencoderRAE":
            drawn = {"latents_mean": 0.1 * torch.randn(1, 64, 1, 1), "latents_std": 0.5 + torch.rand(1, 64, 1, 1)}
            config = {**drawn, **config}
        vae = getattr(diffusers, kind.split()[0])(**config)
        for parameter in vae.parameters():
            parameter += 0.1 * torch.randn_like(parameter) / max(1.0, parameter[0].numel() ** 0.5)
        if kind == "AutoencoderKLFlux2":
            vae.bn.running_mean.normal_(0, 0.3)
            vae.bn.running_var.uniform_(0.5, 2.0)
    return vae.eval()
