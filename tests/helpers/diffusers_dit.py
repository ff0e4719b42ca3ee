"""Diffusers' DiT, tiny, with random weights and one embedding for all blocks, as the published one has."""

import torch
from diffusers import DDIMScheduler, DiTPipeline, DiTTransformer2DModel

from helpers.pipelines import tiny_vae

NAMES = {0: "tench, Tinca tinca", 1: "crane, bird", 2: "crane, machine"}


@torch.no_grad()
def diffusers_dit(seed: int = 0, tied: bool = True, **overrides) -> DiTTransformer2DModel:
    """Two blocks, random everywhere, in eval mode."""
    config = {"num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 4, "out_channels": 8, "num_layers": 2,
              "sample_size": 8, "num_embeds_ada_norm": 3}  # fmt: skip
    model = DiTTransformer2DModel(**{**config, **overrides})
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        scale = 0.2 if parameter.dim() == 1 else parameter[0].numel() ** -0.5
        parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
    if tied:
        for block in model.transformer_blocks:
            block.norm1.emb.load_state_dict(model.transformer_blocks[0].norm1.emb.state_dict())
    return model.eval()


def dit_pipeline(**overrides) -> DiTPipeline:
    """Diffusers' pipeline around it."""
    vae = tiny_vae()
    vae.register_to_config(shift_factor=None)
    scheduler = DDIMScheduler(beta_start=1e-4, beta_end=0.03, beta_schedule="linear", clip_sample=False)
    pipeline = DiTPipeline(transformer=diffusers_dit(**overrides), vae=vae, scheduler=scheduler, id2label=NAMES)
    pipeline.register_to_config(id2label=NAMES)  # as published folders have it
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
