"""Drawing with flow maps: what the network is asked, jumps by hand, guidance, schedulers that do not fit."""

import itertools
import re

import pytest
import torch
from diffusers import FlowMapEulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler
from helpers.pipelines import images, tiny_pipeline

from d_emo import DEMOPipeline
from d_emo.eval.fid.protocol import make_sampler, with_settings
from d_emo.pipelines.samplers import make_scheduler
from d_emo.schedulers.flow_paths import shift_time


def map_pipeline(shift: float = 1.0, **config) -> DEMOPipeline:
    """A pipeline around a tiny flow map."""
    flow = tiny_pipeline(flow=True, end_block=1, **config)
    pipeline = DEMOPipeline.from_pipe(flow, scheduler=FlowMapEulerDiscreteScheduler(shift=shift))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.mark.parametrize("shift", [1.0, 2.5])
@pytest.mark.parametrize("steps", [1, 2, 4, 7])
@torch.no_grad()
def test_steps_are_jumps_from_each_time_to_the_next_to_1e_6(steps, shift):
    pipeline = map_pipeline(shift)
    noise = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    found = images(pipeline, latents=noise, num_inference_steps=steps, guidance_scale=1.0)
    times = [shift_time(1 - step / steps, shift) for step in range(steps + 1)]
    sample, model = noise.clone(), pipeline.transformer.eval()
    for start, end in itertools.pairwise(times):
        mean = model(sample, 1000 * start, torch.tensor([0, 1]), end_timestep=1000 * end).sample
        sample = sample - (start - end) * mean
    torch.testing.assert_close(found, sample, atol=1e-6, rtol=1e-5)
    assert found.std() > 0.1


def test_four_steps_are_the_default_and_saved(tmp_path):
    pipeline = map_pipeline(distilled_guidance=1.5)
    pipeline.save_pretrained(tmp_path)
    opened = DEMOPipeline.from_pretrained(tmp_path)
    opened.set_progress_bar_config(disable=True)
    output = opened("tench", output_type="latent", generator=torch.Generator().manual_seed(0))
    assert output.settings["scheduler"] == "FlowMapEulerDiscreteScheduler"
    assert output.settings["num_inference_steps"] == 4 and opened.num_timesteps == 4
    assert output.settings["guidance_scale"] == 1.0


def test_guidance_acts_once_in_the_weights_or_at_sampling():
    distilled, plain = map_pipeline(distilled_guidance=1.5), map_pipeline()
    same, other = (images(distilled, guidance_scale=scale) for scale in (1.0, 4.0))
    assert torch.equal(same, other)
    without, guided = (images(plain, guidance_scale=scale) for scale in (1.0, 4.0))
    assert torch.equal(same, without) and (guided - without).abs().max() > 1e-3
    with pytest.raises(ValueError, match=r"--guidance-scale 3: the model was trained with a guidance of 1\.5 in its"):
        make_sampler(with_settings("quick", {"guidance_scale": 3.0}), distilled)
    assert type(make_sampler(with_settings("quick", {}), distilled)) is FlowMapEulerDiscreteScheduler


def test_schedulers_of_other_models_are_refused_by_name():
    pipeline = map_pipeline()
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler()
    with pytest.raises(ValueError, match=r"FlowMatchEulerDiscreteScheduler does not fit: the model is a flow map \(end_"
                       r"block=1\); use FlowMapEulerDiscreteScheduler"):  # fmt: skip
        images(pipeline)
    flow = tiny_pipeline(flow=True)
    flow.scheduler = FlowMapEulerDiscreteScheduler()
    with pytest.raises(
        ValueError, match=r"FlowMapEulerDiscreteScheduler does not fit: the model is no flow map .*use a"
    ):
        images(flow)
    said = "sampler='euler': the model predicts jumps of a flow map and is sampled by flow-map."
    with pytest.raises(ValueError, match=re.escape(said)):
        make_scheduler("euler", pipeline.transformer.config)
    with pytest.raises(ValueError, match="sampler='flow-map': the model predicts the flow and is sampled by euler"):
        make_scheduler("flow-map", flow.transformer.config)
