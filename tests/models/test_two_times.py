"""Networks of two times: the flow that they were made from, which parts see which time, what is refused."""

import re

import pytest
import torch
from helpers.models import tiny_model

from d_emo import create_model

FLOW = {"learn_sigma": False, "prediction_type": "flow_prediction"}
FAMILIES = ("D-EMOv2", "DiT", "LightningDiT", "JiT")
TIMES = torch.tensor([100.0, 500.0, 900.0])
LABELS = torch.tensor([0, 1, 10])


def noisy() -> torch.Tensor:
    return torch.randn(3, 4, 16, 16, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_without_a_way_it_is_the_flow_that_it_was_made_from_bit_for_bit(family):
    flow, two_times = tiny_model(family, **FLOW).eval(), tiny_model(family, end_block=1, **FLOW).eval()
    two_times.load_state_dict(flow.state_dict(), strict=True)  # no weight is new
    expected = flow(noisy(), TIMES, LABELS).sample
    assert torch.equal(two_times(noisy(), TIMES, LABELS, end_timestep=TIMES).sample, expected)
    assert torch.equal(two_times(noisy(), TIMES, LABELS).sample, expected)
    elsewhere = two_times(noisy(), TIMES, LABELS, end_timestep=TIMES / 2).sample
    assert (elsewhere - expected).flatten(1).abs().amax(1).min() > 1e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_the_first_blocks_see_the_present_time_the_last_and_the_output_the_end(family):
    model, seen = tiny_model(family, end_block=1, **FLOW).eval(), []
    for module in (*model.blocks, model.norm_out):
        module.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[1]))
    model(noisy(), TIMES, LABELS, end_timestep=250.0)
    label = model.label_embed(LABELS)
    present = model.embed_time(TIMES) + label
    end = model.embed_time(torch.full((3,), 250.0)) + label
    assert [torch.equal(found, present) for found in seen] == [True, False, False]
    assert [torch.equal(found, end) for found in seen] == [False, True, True]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"end_block": 3}, "end_block=3 is beyond the last of num_layers=2 blocks; use 1 to 2"),
        ({"end_block": 0}, "end_block=0"),
        ({"end_block": 1, "prediction_type": "epsilon"}, "end_block=1 belongs to prediction_type='flow_prediction'"),
        ({"end_block": 1, "guide_block": 1}, "end_block=1 and guide_block=1 exclude each other"),
        ({"distilled_guidance": 2.0}, "distilled_guidance=2.0 belongs to a flow map; set end_block, too"),
        ({"end_block": 1, "distilled_guidance": 0.5}, "distilled_guidance=0.5"),
    ],
)
def test_configurations_that_do_not_fit_are_refused(config, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        create_model("D-EMOv2-N-2", **{"num_layers": 2, **FLOW, **config})


def test_an_end_is_refused_where_it_has_no_meaning_or_no_number():
    with pytest.raises(ValueError, match=r"end_timestep=5: the network is no flow map .*; leave it out"):
        tiny_model(**FLOW)(noisy(), TIMES, LABELS, end_timestep=5)
    model = tiny_model(end_block=1, **FLOW)
    with pytest.raises(ValueError, match=r"end_timestep is of shape \(2,\); pass one number, or a tensor \(3,\)"):
        model(noisy(), TIMES, LABELS, end_timestep=TIMES[:2])
    with pytest.raises(ValueError, match="end_timestep is a str"):
        model(noisy(), TIMES, LABELS, end_timestep="0")
