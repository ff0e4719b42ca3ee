"""Autoencoders of published sizes with random weights, for what a dry run says of memory and disk.

    python tests/helpers/published_autoencoders.py FOLDER [rae] [vavae] [dc]

Sizes: nyu-visionx/RAE-dinov2-wReg-base-ViTXL-n08 (arXiv 2510.11690, bytetriper/RAE), VA-VAE f16d32 (arXiv 2501.01423),
mit-han-lab/dc-ae-f32c32-in-1.0 (arXiv 2410.10733).
"""

import sys
from pathlib import Path
from typing import Any

import diffusers

BLOCKS = ("ResBlock",) * 3 + ("EfficientViTBlock",) * 3
SIZES: dict[str, tuple[str, dict[str, Any]]] = {
    "rae": ("AutoencoderRAE", {
        "encoder_hidden_size": 768, "encoder_patch_size": 14, "encoder_num_hidden_layers": 12, "patch_size": 16,
        "encoder_input_size": 224, "image_size": 256, "decoder_hidden_size": 1152, "decoder_num_hidden_layers": 28,
        "decoder_num_attention_heads": 16, "decoder_intermediate_size": 4096,
    }),
    "vavae": ("AutoencoderKL", {
        "block_out_channels": (128, 128, 256, 256, 512), "down_block_types": ("DownEncoderBlock2D",) * 5,
        "up_block_types": ("UpDecoderBlock2D",) * 5, "layers_per_block": 2, "latent_channels": 32,
        "scaling_factor": 1.0, "latents_mean": [0.0] * 32, "latents_std": [2.0] * 32,
    }),
    "dc": ("AutoencoderDC", {
        "latent_channels": 32, "encoder_block_types": BLOCKS, "decoder_block_types": BLOCKS,
        "encoder_layers_per_block": (0, 4, 8, 2, 2, 2), "decoder_layers_per_block": (0, 5, 10, 2, 2, 2),
        "encoder_qkv_multiscales": ((),) * 6, "decoder_qkv_multiscales": ((),) * 6, "downsample_block_type": "Conv",
        "upsample_block_type": "interpolate", "decoder_norm_types": ("batch_norm",) * 3 + ("rms_norm",) * 3,
        "decoder_act_fns": ("relu",) * 3 + ("silu",) * 3, "scaling_factor": 0.3189,
    }),
}  # fmt: skip

if __name__ == "__main__":
    folder, *names = sys.argv[1:]
    for name in names or SIZES:
        kind, config = SIZES[name]
        getattr(diffusers, kind)(**config).save_pretrained(Path(folder) / name)
        print(f"{kind} in {Path(folder) / name}")
