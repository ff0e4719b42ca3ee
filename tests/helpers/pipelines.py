"""Tiny pipelines, the golden files' stand-in networks behind a pipeline, and what is drawn from them."""

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    ConfigMixin,
    DDPMScheduler,
    FlowMatchEulerDiscreteScheduler,
    ModelMixin,
)
from diffusers.configuration_utils import register_to_config
from diffusers.models.cache_utils import CacheMixin

from d_emo import DEMOPipeline
from helpers.golden import seeded_input
from helpers.models import tiny_model


def dit_scheduler(**overrides) -> DDPMScheduler:
    """DiT's sampler."""
    config = {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02, "variance_type": "learned_range",
              "clip_sample": False, "timestep_spacing": "linspace"}  # fmt: skip
    return DDPMScheduler(**{**config, **overrides})


def tiny_pipeline(flow: bool = False, **overrides) -> DEMOPipeline:
    """A pixel-space pipeline around `tiny_model`, three named classes."""
    objective = {"learn_sigma": False, "prediction_type": "flow_prediction"} if flow else {}
    model = tiny_model(**{"in_channels": 3, "num_classes": 3, **objective, **overrides})
    names = {0: "tench, Tinca tinca", 1: "crane, bird", 2: "crane, machine"}
    pipeline = DEMOPipeline(
        model,
        FlowMatchEulerDiscreteScheduler() if flow else dit_scheduler(),
        id2label=names if model.config.num_classes else None,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


class StandIn(ModelMixin, ConfigMixin, CacheMixin):
    """The golden files' stand-in networks, behind the interface of the transformers."""

    sample_shape = (8, 8)
    null_label = 0

    @register_to_config
    def __init__(self, flow: bool = False, in_channels: int = 4, num_classes: int = 0, patch_size: int = 2,
                 learn_sigma: bool = True, prediction_type: str = "epsilon"):  # fmt: skip
        super().__init__()
        self.anchor = torch.nn.Parameter(torch.zeros(1))
        self.alphas_cumprod = (1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)).cumprod(0)

    def forward(self, x, timestep, class_labels, return_dict):
        if self.config.flow:
            time = 1 - timestep / 1000  # SiT's time: 1 is data; SiT's velocity is data - noise
            velocity = 0.5 * x.roll(1, 3) - 0.8 * x + 0.3 * torch.cos(3 * time)[:, None, None, None]
            return (-velocity,)
        s = (timestep / 1000)[:, None, None, None]
        c = (1 - self.alphas_cumprod[timestep.long()]).sqrt().float()[:, None, None, None]
        epsilon = 0.9 * c * x + 0.1 * c * x.roll(1, 3) + 0.05 * s
        return (torch.cat([epsilon, torch.tanh(0.3 * x.roll(1, 2) + s - 0.5)], dim=1),)


def stand_in_pipeline(scheduler, **config) -> DEMOPipeline:
    pipeline = DEMOPipeline(StandIn(**config), scheduler)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def sample_golden(pipeline, expected: dict, steps: int, seed_key: str) -> torch.Tensor:
    noise = seeded_input(expected[seed_key], tuple(expected["shape"]))
    output = pipeline(num_images_per_label=2, num_inference_steps=steps, latents=noise, output_type="latent")
    return output.images


def assert_golden(result: torch.Tensor, expected: dict, tolerance: float) -> None:
    means = result.mean(dim=(2, 3)).flatten()
    torch.testing.assert_close(means, torch.tensor(expected["result_mean"]), atol=tolerance, rtol=0)
    assert result.std().item() == pytest.approx(expected["result_std"], abs=tolerance)
    rows = [result[n, c, h] for n in range(2) for c in range(4) for h in range(8)]
    row = torch.tensor(expected["row"])
    assert min((candidate - row).abs().max().item() for candidate in rows) < tolerance


def images(pipeline, labels=(0, 1), seed=0, **arguments):
    """Tensor images with one generator an image."""
    count = len(labels) if labels is not None else arguments.get("num_images_per_label", 1)
    generators = [torch.Generator().manual_seed(seed + i) for i in range(count)]
    arguments = {"num_inference_steps": 4, "generator": generators, "output_type": "latent", **arguments}
    return pipeline(None if labels is None else list(labels), **arguments).images


def tiny_vae() -> AutoencoderKL:
    torch.manual_seed(0)
    return AutoencoderKL(
        block_out_channels=(8, 8), norm_num_groups=4, latent_channels=4, layers_per_block=1, scaling_factor=0.7,
        shift_factor=0.3, down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    ).eval()  # fmt: skip
