"""A second output head in training: its loss, where its gradients go, resuming, fine-tuning, what is refused."""

import json
import re

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import convert_to_fp32
from helpers.models import tiny_model
from helpers.paths import ROOT
from helpers.pipelines import tiny_pipeline
from helpers.training import TINY, assert_two_processes_train_as_one, train_in_parts

from d_emo import DEMOPipeline
from d_emo.models.transformer_base import ClassConditionalOutput
from d_emo.train.data.sources import load_source
from d_emo.train.diffusion.choose_objective import make_objective
from d_emo.train.diffusion.config import parse_config
from d_emo.train.diffusion.init_from import InitialWeights
from d_emo.train.diffusion.plan import make_plan
from d_emo.train.diffusion.terms import Drawn, GuideTerm

FLOW = {"learn_sigma": False, "prediction_type": "flow_prediction"}


def plan_of(*arguments):
    """The plan of a run on the digits."""
    config = parse_config(["--config", str(ROOT / "train/configs/digits.yaml"), *map(str, arguments)])
    return make_plan(config, load_source(config.data), Accelerator(cpu=True))


def batch():
    generator = torch.Generator().manual_seed(0)
    data, noise = (torch.randn(3, 4, 16, 16, generator=generator) for _ in range(2))
    return Drawn(data, torch.tensor([0, 5, 10]), noise, torch.rand(3, generator=generator))


def objective_of(*arguments):
    return make_objective(parse_config(list(arguments)).optimization, (4, 16, 16))


def test_the_second_heads_loss_is_half_the_mean_square_error_of_its_velocity():
    drawn, model = batch(), tiny_model(**FLOW, guide_block=1)
    objective = objective_of("--objective", "sit")
    seen = []

    def network(noisy, timestep, labels):
        seen.append(model(noisy, timestep, labels))
        return seen[-1].sample

    objective.losses(network, drawn.data, drawn.labels, drawn.noise, drawn.time)
    found = GuideTerm(objective, plan_of("--guide-block", 2).config.recipe.guide_weight)(seen[0], drawn)
    # The weight is that of the paper's code: loss(final) + 0.5 loss(intermediate).
    expected = 0.5 * (seen[0].guide - (drawn.noise - drawn.data)).square().mean()
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("kind", [("--objective", "sit"), ("--objective", "dit")])
def test_its_gradients_reach_what_comes_before_it_and_nothing_after(kind):
    drawn, objective = batch(), objective_of(*kind)
    model = tiny_model(**({} if kind[1] == "dit" else FLOW), num_layers=3, guide_block=2)
    outputs = []

    def network(noisy, timestep, labels):
        outputs.append(model(noisy, timestep, labels))
        return outputs[-1].sample

    objective.losses(network, drawn.data, drawn.labels, drawn.noise, drawn.time)
    GuideTerm(objective, 0.5)(outputs[0], drawn).backward()
    after = re.compile(r"blocks\.2\.|norm_out\.|proj_out\.")
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        reached = parameter.grad is not None and bool(parameter.grad.abs().max() > 0)
        assert reached == (after.match(name) is None), name


def test_a_second_prediction_passes_through_what_accelerate_does_to_outputs():
    drawn, model = batch(), tiny_model(**FLOW, guide_block=1)
    output = model(drawn.data, torch.tensor([5.0]).expand(3), drawn.labels, features_after=2)
    assert len(output.to_tuple()) == 3
    converted = convert_to_fp32(output)  # as with --mixed-precision bf16
    assert torch.equal(converted.guide, output.guide) and torch.equal(converted.features, output.features)


def test_a_guide_that_equals_the_prediction_costs_its_weight_more():
    drawn, objective = batch(), objective_of("--objective", "dit")
    prediction = torch.randn(3, 8, 16, 16, generator=torch.Generator().manual_seed(1))
    own = objective.losses(lambda *_: prediction, drawn.data, drawn.labels, drawn.noise, drawn.time)["loss"].mean()
    term = GuideTerm(objective, 0.7)(ClassConditionalOutput(sample=prediction, guide=prediction), drawn)
    torch.testing.assert_close(term, 0.7 * own)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_a_run_with_a_second_head_resumes_bit_for_bit_and_its_card_says_so(tmp_path, capsys, processes):
    whole = train_in_parts(capsys, tmp_path, *TINY, "--guide-block", "2", processes=processes)
    card = (whole / "README.md").read_text()
    assert "| guide_block | 2 |" in card and "| guide_weight | 0.5 |" in card
    assert 'pipe("zero", internal_guidance=1.4)' in card
    pipeline = DEMOPipeline.from_pretrained(whole)
    assert pipeline.transformer.guide_proj_out.weight.abs().max() > 0
    assert json.loads((whole / "run.json").read_text())["guide_block"] == 2


@pytest.mark.slow
def test_two_processes_train_a_second_head_as_one_does(tmp_path, capsys):
    assert_two_processes_train_as_one(capsys, tmp_path, *TINY, "--guide-block", "2", "--max-train-steps", "3")


@pytest.fixture
def trained(tmp_path):
    """Folders of a flow model without a second head, and of one with it."""
    for name, block in (("plain", None), ("headed", 1)):
        tiny_pipeline(flow=True, in_channels=1, num_classes=10, guide_block=block).save_pretrained(tmp_path / name)
    return tmp_path


def build(folder, **task):
    initial = InitialWeights(str(folder))
    task = {"sample_size": 16, "in_channels": 1, "num_classes": 10, **FLOW, **task}
    return initial.transformer.state_dict(), initial.build(initial.config(task), initial.id2label)


def test_fine_tuning_adds_a_fresh_head_or_keeps_the_one_that_is_there(trained):
    state, model = build(trained / "plain", guide_block=1)
    found = model.state_dict()
    torch.testing.assert_close({name: found[name] for name in state}, state, atol=0, rtol=0)
    assert {name.split("_")[0] for name in found.keys() - state.keys()} == {"guide"}
    assert not model.guide_proj_out.weight.any() and model.config.guide_block == 1
    for task in ({}, {"guide_block": 1}):
        state, model = build(trained / "headed", **task)
        torch.testing.assert_close(model.state_dict(), state, atol=0, rtol=0)
    with pytest.raises(ValueError, match=r"guide_block 1, not 2\. .*: --guide-block 1 --objective sit"):
        build(trained / "headed", guide_block=2)


def test_a_head_that_came_with_the_weights_is_trained_unasked(trained):
    (term,) = plan_of("--objective", "sit", "--init-from", trained / "headed").terms
    assert term.weight == 0.5
    assert plan_of("--objective", "sit", "--init-from", trained / "plain").terms == []


def test_blocks_that_are_not_there_and_adapters_beside_a_fresh_head_are_refused(trained):
    with pytest.raises(ValueError, match="guide_block=6 is not before the last of num_layers=6 blocks; use 1 to 5"):
        plan_of("--guide-block", 6).describe()
    with pytest.raises(ValueError, match=r"--guide-weight 2\.0: it goes with --guide-block"):
        parse_config(["--guide-weight", "2"])
    with pytest.raises(ValueError, match="--guide-block 1: --lora-rank trains adapters beside frozen weights"):
        plan_of("--init-from", trained / "plain", "--guide-block", 1, "--lora-rank", 2)


@pytest.mark.slow
def test_the_plan_counts_the_head():
    plain, headed = (plan_of(*more).describe() for more in ((), ("--guide-block", 2)))
    counted = [int(re.search(r"([\d,]+) parameters", text)[1].replace(",", "")) for text in (plain, headed)]
    # 128 channels to 4 x 4 pixels, their norm, and two times 128 to modulate them.
    assert counted[1] - counted[0] == 128 * 16 + 16 + 256 + 128 * 256 + 256
