"""Flow maps: their identities on a flow that is known, what targets are made of, runs of the trainer."""

import re
from types import SimpleNamespace

import pytest
import torch
from helpers.models import randomize, tiny_model
from helpers.paths import ROOT, TESTS
from helpers.pipelines import tiny_pipeline
from helpers.processes import Trainer
from helpers.training import TINY, assert_same_bits, losses, run_here, train_to_the_end

from d_emo import DEMOPipeline
from d_emo.train.diffusion.config import DiffusionRunOptions, OptimizationOptions, parse_config
from d_emo.train.diffusion.flow_map import FlowMapObjective
from d_emo.train.diffusion.flow_map_options import FlowMapOptions
from d_emo.train.diffusion.objectives import Jumps
from d_emo.train.diffusion.plan import grid_steps

SHAPE = (64, 2, 4, 4)
NULL = 3
# Standard deviation of the Gaussian data of which the flow is known.
DEVIATION = 0.5


def make(path: str = "linear", **options) -> FlowMapObjective:
    return FlowMapObjective(OptimizationOptions(objective="flow-map", flow_path=path), FlowMapOptions(**options))


def draws(seed: int = 0) -> dict[str, torch.Tensor]:
    """What a batch is trained on, in float64."""
    generator = torch.Generator().manual_seed(seed)
    normal = lambda: torch.randn(SHAPE, generator=generator, dtype=torch.float64)  # noqa: E731
    return {
        "data": DEVIATION * normal(),
        "labels": torch.arange(len(normal())) % (NULL + 1),
        "noise": normal(),
        "time": torch.rand(SHAPE[0], generator=generator, dtype=torch.float64),
        "end": torch.rand(SHAPE[0], generator=generator, dtype=torch.float64),
    }


def scale(time: torch.Tensor) -> torch.Tensor:
    """Standard deviation of Gaussian data's samples on the linear path; their flow moves x in proportion to it."""
    return ((1 - time) ** 2 * DEVIATION**2 + time**2).sqrt()


def gaussian_map(x, timestep, labels, end):
    """The flow map of Gaussian data, in closed form: x_r = x_t scale(r) / scale(t). Its limit without a way is the
    derivative of the scale."""
    t, r = (moment.double() / 1000 for moment in (timestep, end))
    velocity = (t - (1 - t) * DEVIATION**2) / scale(t) ** 2
    way = (t - r).clamp(min=1e-300)
    mean = torch.where(t > r, (1 - scale(r) / scale(t)) / way, velocity)
    return mean[:, None, None, None] * x


@pytest.mark.parametrize("split", [0.1, 0.5, 0.8])
def test_the_true_map_of_gaussian_data_satisfies_what_jumps_are_trained_on_to_1e_6(split):
    objective, drawn = make(flow_map_split=split), draws()
    jumps = Jumps(drawn["end"], gaussian_map, NULL)
    times = objective.times(drawn["time"], drawn["end"])
    noisy = scale(times.start)[:, None, None, None] * drawn["noise"]
    target = objective.targets(noisy, torch.zeros(SHAPE), drawn["labels"], times, jumps)
    expected = gaussian_map(noisy, 1000 * times.start, drawn["labels"], 1000 * times.end)
    jumping = ~times.flow
    assert 10 < jumping.sum() < 54
    torch.testing.assert_close(target[jumping].double(), expected[jumping], atol=1e-6, rtol=1e-5)
    wrong = gaussian_map(noisy, 1000 * times.start, drawn["labels"], 1000 * times.start)  # the flow, without a jump
    assert (wrong - expected)[jumping].abs().max() > 0.1


@pytest.mark.parametrize("guidance", [1.0, 2.5])
def test_losses_of_a_linear_network_equal_those_by_hand_to_1e_6(guidance):
    """Every sample by itself, in plain loops, of a network that is linear in everything that it sees."""
    share, split = 0.4, 0.3
    objective = make(flow_map_share=share, flow_map_split=split, flow_map_guidance=guidance)
    drawn = draws(1)

    def linear(factor):
        return lambda x, t, y, r: (factor + t / 1000 + 0.5 * r / 1000 + 0.1 * y)[:, None, None, None] * x

    jumps = Jumps(drawn.pop("end"), linear(0.2), NULL)
    found = objective.losses(linear(0.7), **drawn, jumps=jumps)
    for index in range(SHAPE[0]):
        data, noise, label, a, b = (
            drawn["data"][index],
            drawn["noise"][index],
            int(drawn["labels"][index]),
            float(drawn["time"][index]),
            float(jumps.end[index]),
        )
        if b < share:
            t = r = a
            x = (1 - t) * data + t * noise
            target = noise - data
            if label != NULL:
                target = guidance * target + (1 - guidance) * (0.2 + 1.5 * t + 0.1 * NULL) * x
        else:
            t = a**0.5
            r = t * (1 - (b - share) / (1 - share))
            x = (1 - t) * data + t * noise
            s = t - split * (t - r)
            first = (0.2 + t + 0.5 * s + 0.1 * label) * x
            second = (0.2 + s + 0.5 * r + 0.1 * label) * (x - (t - s) * first)
            target = split * first + (1 - split) * second
        error = (((0.7 + t + 0.5 * r + 0.1 * label) * x - target) ** 2).mean()
        # The network's answers are turned to float32.
        torch.testing.assert_close(found["loss"][index].double(), error, atol=1e-6, rtol=1e-5)


def test_both_times_are_draws_of_the_flows_own_times_the_later_one_first():
    objective = make(flow_map_share=0.5)
    generator = torch.Generator().manual_seed(0)
    times = objective.times(torch.rand(40_000, generator=generator), torch.rand(40_000, generator=generator))
    assert 0.49 < times.flow.float().mean() < 0.51
    assert torch.equal(times.start[times.flow], times.end[times.flow])
    start, middle, end = (moment[~times.flow] for moment in (times.start, times.middle, times.end))
    assert (end <= middle).all() and (middle <= start).all() and end.min() >= 0 and start.max() <= 1
    torch.testing.assert_close(middle, (start + end) / 2)
    # The larger and the smaller of two even draws have the means 2/3 and 1/3, and both together are even.
    assert start.mean().item() == pytest.approx(2 / 3, abs=5e-3) and end.mean().item() == pytest.approx(1 / 3, abs=5e-3)
    both = torch.cat([start, end]).sort().values
    assert (both - torch.linspace(0, 1, len(both))).abs().max() < 0.015


def test_gradients_reach_the_network_and_never_what_makes_the_targets():
    flow = {"learn_sigma": False, "prediction_type": "flow_prediction", "end_block": 1, "num_classes": NULL}
    student, teacher = (randomize(tiny_model(**flow), seed) for seed in (1, 2))
    generator = torch.Generator().manual_seed(0)
    data, noise = (torch.randn(8, 4, 16, 16, generator=generator) for _ in range(2))
    time, end = torch.rand(8, generator=generator), torch.linspace(0, 0.99, 8)

    def asked(model):
        return lambda x, t, y, r: model(x, t, y, end_timestep=r).sample

    for only_jumps in (False, True):
        student.zero_grad()
        jumps = Jumps(end.clamp(min=0.6) if only_jumps else end, asked(teacher), NULL)
        losses_ = make(flow_map_guidance=1.5).losses(asked(student), data, torch.arange(8) % 4, noise, time, jumps)
        losses_["loss"].mean().backward()
        assert all(parameter.grad is None for parameter in teacher.parameters())
        for name, parameter in student.named_parameters():
            if parameter.requires_grad:
                assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize(("asked", "made_for", "drawn"), [(None, 250, 50), (None, 50, 50), (None, 4, 4), (7, 4, 7)])
def test_grids_take_fifty_steps_or_those_that_a_sampler_is_made_for(asked, made_for, drawn):
    pipeline = SimpleNamespace(config=SimpleNamespace(default_num_inference_steps=made_for))
    assert grid_steps(DiffusionRunOptions(sample_steps=asked), pipeline) == drawn


FLOW_MAP = [*TINY, "--objective", "flow-map", "--flow-map-guidance", "1.5", "--sample-steps", "2"]


def trainer_options(folder, *more):
    return [*FLOW_MAP, "--init-from", folder / "base", "--micro-batch-size", "4", *more]


@pytest.fixture
def base(tmp_path):
    """A flow with random weights, to start from."""
    flow = {"learn_sigma": False, "prediction_type": "flow_prediction"}
    names = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
    model = tiny_model(in_channels=1, num_classes=10, **flow)
    pipeline = tiny_pipeline(flow=True)
    DEMOPipeline(model, pipeline.scheduler, id2label=dict(enumerate(names))).save_pretrained(tmp_path / "base")
    return tmp_path


def test_a_run_resumes_bit_for_bit_and_draws_in_four_steps(base, capsys):
    whole, stopped = base / "whole", base / "stopped"
    options = trainer_options(base, "--checkpoint-every", "2")
    output = train_to_the_end(capsys, base / "log", *options, "--max-train-steps", "4", "--output-dir", whole)
    assert "1 of 2 blocks see the present time, the rest a jump's end, guidance 1.5 in the weights" in output
    train_to_the_end(capsys, base / "log", *options, "--max-train-steps", "2", "--output-dir", stopped)
    train_to_the_end(
        capsys, base / "log", *options, "--max-train-steps", "4", "--output-dir", stopped, "--resume-from", "latest"
    )
    assert losses(whole) == losses(stopped) and len(losses(whole)) == 5
    assert_same_bits(whole / "checkpoint-0000004", stopped / "checkpoint-0000004")
    pipeline = DEMOPipeline.from_pretrained(whole)
    pipeline.set_progress_bar_config(disable=True)
    output = pipeline("three", output_type="latent", generator=torch.Generator().manual_seed(0))
    assert output.settings["num_inference_steps"] == 4 and output.settings["guidance_scale"] == 1.0
    assert pipeline.transformer.config.end_block == 1 and pipeline.transformer.config.distilled_guidance == 1.5
    card = (whole / "README.md").read_text()
    assert "| flow_map_guidance | 1.5 |" in card and "| end_block | 1 |" in card and "lee2025dmf" in card


class ShardedTrainer(Trainer):
    """The trainer under FSDP2."""

    script = TESTS / "helpers" / "fsdp_on_cpu.py"


@pytest.mark.slow
@pytest.mark.parametrize("kind", [Trainer, ShardedTrainer])
def test_two_processes_train_as_one_does(base, capsys, kind):
    found = []
    for processes in (1, 2):
        folder = base / f"of-{processes}"
        options = trainer_options(base, "--max-train-steps", "4", "--output-dir", folder)
        train_to_the_end(capsys, base / "log", *options, processes=processes, kind=kind)
        found.append([float(line.split(",")[1]) for line in losses(folder)[1:]])
    # Sums over processes round differently.
    assert len(found[0]) == 4 and found[1] == pytest.approx(found[0], rel=1e-5 if kind is ShardedTrainer else 1e-6)


def test_a_flow_can_be_made_of_a_map_again(base, capsys):
    one = trainer_options(base, "--max-train-steps", "1", "--output-dir", base / "map")
    train_to_the_end(capsys, base / "log", *one)
    again = [*TINY, "--objective", "sit", "--init-from", base / "map", "--max-train-steps", "1"]
    train_to_the_end(capsys, base / "log", *again, "--output-dir", base / "flow")
    assert DEMOPipeline.from_pretrained(base / "flow").transformer.config.end_block is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--end-block", "2"], "--end-block 2: belongs to --objective flow-map"),
        (["--flow-map-guidance", "2"], "--flow-map-guidance 2.0: belongs to --objective flow-map"),
        (["--objective", "flow-map", "--flow-map-share", "0"], "--flow-map-share 0.0: must be above 0 and below 1"),
        (["--objective", "flow-map", "--flow-map-split", "1"], "--flow-map-split 1.0: must be above 0 and below 1"),
        (["--objective", "flow-map", "--flow-map-guidance", "0.5"], "--flow-map-guidance 0.5: must be 1 (none) or"),
        (
            ["--objective", "flow-map", "--flow-map-guidance", "2", "--class-dropout-prob", "0"],
            "--flow-map-guidance 2.0: it steers from samples without their class",
        ),
        (["--objective", "flow-map", "--prediction", "data"], "--prediction data: flow maps predict velocities"),
        (["--objective", "flow-map", "--flow-path", "vp"], "--flow-path vp: flow maps are for linear and gvp"),
    ],
)
def test_options_that_do_not_fit_are_refused(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        parse_config([*TINY[:-6], *TINY[-4:], *arguments])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--init-from", "base", "--end-block", "3"],
            "end_block=3 is beyond the last of num_layers=2 blocks; use 1 to",
        ),
        (["--guide-block", "1"], "end_block=4 and guide_block=1 exclude each other; leave one out"),
        (["--unconditional"], "--flow-map-guidance 1.5: a model without classes has no guidance; leave it out"),
    ],
)
def test_networks_that_do_not_fit_are_refused_before_anything_is_made(base, capsys, monkeypatch, arguments, message):
    monkeypatch.chdir(base)
    code, output = run_here(capsys, *FLOW_MAP, *arguments, "--output-dir", "run")
    assert code != 0 and message in output.replace("\n", " ")
    assert not list((base / "run").glob("checkpoint-*"))


def test_the_digits_configuration_is_a_flow_map_of_the_packaged_digits():
    config = parse_config(["--config", str(ROOT / "train/configs/digits-flow-map.yaml")])
    assert config.optimization.objective == "flow-map" and config.model.init_from == "digits"
