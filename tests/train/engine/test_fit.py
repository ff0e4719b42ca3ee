"""Runs of any length: what the average holds, warm-ups, epochs, batches, and notes where these do not fit."""

import PIL.Image
import pytest
import torch
from accelerate import Accelerator
from helpers.pipelines import tiny_pipeline
from helpers.training import run_here
from safetensors.torch import load_file

from d_emo import DEMOPipeline
from d_emo.train.classification.config import ClassifierOptimizationOptions
from d_emo.train.data.sources import load_source
from d_emo.train.diffusion.config import OptimizationOptions, parse_config
from d_emo.train.diffusion.plan import make_plan
from d_emo.train.engine import fit
from d_emo.train.engine.averaging import WeightAverage
from d_emo.train.engine.batch_layout import batch_layout

pytestmark = pytest.mark.usefixtures("uncounted_plans")
TINY = ("--model", "D-EMOv2-N-8", "--global-batch-size", "8", "--report-to", "none", "--num-workers", "0",
        "--objective", "dit", "--lr-scheduler", "constant", "--ema-decay", "0.9999",
        "--checkpoint-every", "50")  # fmt: skip


@pytest.mark.parametrize("warmup", [True, False])
@pytest.mark.parametrize(
    ("decay", "steps"), [(0.9999, 1), (0.9999, 60), (0.98, 60), (0.9, 700), (0.9998, 700), (0.0, 3)]
)
def test_share_of_the_start_is_what_the_average_keeps(decay, steps, warmup):
    """The average of a weight that is 1 at the start and 0 ever after, in float32: tolerance 1e-5."""
    model = torch.nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        model.weight.fill_(1.0)
        average = WeightAverage(model, OptimizationOptions(ema_decay=decay, ema_warmup=warmup))
        model.weight.fill_(0.0)
        for _ in range(steps):
            average.update_parameters(model)
    assert fit.share_of_start(decay, warmup, steps) == pytest.approx(float(average.module.weight), rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("steps", [20, 60, 1_000, 5_000, 10_000, 400_000])
@pytest.mark.parametrize("options", [OptimizationOptions(), ClassifierOptimizationOptions()], ids=["dit", "classifier"])
def test_by_default_the_average_forgets_its_start_in_a_run_of_any_length(options, steps):
    assert fit.share_of_start(options.ema_decay, options.ema_warmup, steps) < 1e-6


def test_a_short_run_saves_what_it_learned(tmp_path, capsys):
    """Sixty steps at the defaults: the average moved nearly as far from the start as the weights did."""
    first = ("--output-dir", tmp_path / "start", "--max-train-steps", 1, "--learning-rate", 1e-12)
    assert run_here(capsys, *TINY, *first, "--sample-every", 0)[0] == 0
    more = ("--output-dir", tmp_path / "run", "--max-train-steps", 60, "--learning-rate", 1e-3, "--sample-every", 0)
    code, output = run_here(capsys, *TINY, *more)
    assert code == 0 and "initial weights" not in output
    weights = "diffusion_pytorch_model.safetensors"
    start = load_file(tmp_path / "start" / "transformer" / weights)
    average = load_file(tmp_path / "run" / "transformer" / weights)
    raw = load_file(tmp_path / "run" / "checkpoint-0000060" / "training_state" / "model.safetensors")
    names = [name for name in raw if raw[name].is_floating_point() and "running" not in name and name != "pos_embed"]
    moved, went = (sum(float((state[n] - start[n]).square().sum()) for n in names) ** 0.5 for state in (average, raw))
    assert moved > 0.7 * went > 0


@pytest.mark.parametrize(("asked", "steps", "warmup"), [(0, 10, 0), (100, 400_000, 100), (100, 60, 15), (5, 2, 0)])
def test_warm_ups_take_a_quarter_of_a_run_at_most(asked, steps, warmup):
    assert fit.fitting_warmup(asked, steps) == warmup


@pytest.mark.parametrize(("epochs", "size", "batch", "steps"), [(1, 60, 256, 1), (3, 1797, 64, 85), (0.5, 100, 10, 5)])
def test_epochs_become_steps(epochs, size, batch, steps):
    assert fit.steps_of_epochs(epochs, size, batch) == steps


def plan_of(*arguments):
    config = parse_config([*TINY, *map(str, arguments)])
    return make_plan(config, load_source(config.data), Accelerator(cpu=True))


def test_num_epochs_is_the_length_of_a_run():
    plan = plan_of("--num-epochs", 2, "--lr-scheduler", "cosine", "--lr-warmup-steps", 1000)
    assert plan.max_train_steps == 450 and plan.warmup_steps == 112  # 1,797 digits, 8 at once
    assert plan.identity()["lr_schedule_steps"] == 450 and "450 steps, 2.0 epochs" in plan.describe()
    with pytest.raises(ValueError, match="--max-train-steps 5 and --num-epochs 2 both say how long"):
        parse_config(["--num-epochs", "2", "--max-train-steps", "5"])


@pytest.mark.parametrize(("schedule", "left_out"), [("constant", True), ("constant_with_warmup", False)])
def test_a_warm_up_that_a_schedule_leaves_out_is_said(schedule, left_out):
    described = plan_of("--max-train-steps", 40, "--lr-warmup-steps", 5, "--lr-scheduler", schedule).describe()
    assert f"({schedule}, 5 steps of warm-up" in described
    assert ("which this schedule leaves out: --lr-scheduler constant_with_warmup" in described) == left_out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--max-train-steps", 5000, "--ema-warmup", "false"), "still holds 61% of the initial weights"),
        (("--max-train-steps", 100, "--ema-warmup", "false", "--ema-decay", 0.99), "still holds 37%"),
        (("--global-batch-size", 2048), "a batch of 2048 holds each of the 1797 images 1.1 times"),
        (("--max-train-steps", 2_000_000), "show each of the 1,797 images 8,904 times"),
        (("--max-train-steps", 40), "--checkpoint-every 10 saves on the way"),
    ],
)
def test_the_plan_says_what_does_not_fit(arguments, message):
    assert message in " ".join(fit.notes(plan_of(*arguments)))


def test_the_plan_of_a_run_that_fits_has_no_notes():
    assert fit.notes(plan_of("--max-train-steps", 20_000)) == []


@pytest.mark.parametrize(
    ("total", "micro"), [(37, 37), (41, 41), (64, 32), (8, 8), (4, 4), (1, 1), (96, 32), (256, 32), (74, 37), (48, 24)]
)
def test_a_batch_is_never_split_into_tiny_ones(total, micro):
    assert batch_layout(total, None, 1, on_cpu=True).micro_batch_size == micro


@pytest.mark.parametrize("total", [67, 97, 134, 1021])
def test_a_batch_that_only_splits_into_tiny_ones_is_refused(total):
    with pytest.raises(ValueError, match=r"use a multiple of 32, such as \d+ a process, or .*--micro-batch-size"):
        batch_layout(total, None, 1, on_cpu=True)
    assert batch_layout(total, total, 1, on_cpu=True).micro_batch_size == total
    assert batch_layout(total, None, 1, on_cpu=False).micro_batch_size == total  # a GPU takes the whole share


@pytest.fixture
def grey_flow(tmp_path):
    folder = tmp_path / "grey"
    tiny_pipeline(flow=True, in_channels=1, num_classes=10).save_pretrained(folder)
    return folder


def test_colour_is_a_choice_and_follows_given_weights(grey_flow):
    assert plan_of("--color", "rgb").latent_shape[0] == 3
    assert plan_of("--color", "grey").latent_shape[0] == 1 == plan_of().latent_shape[0]
    plan = plan_of("--init-from", grey_flow, "--objective", "sit", "--resolution", 16)
    assert plan.latent_shape == (1, 16, 16)


def test_weights_that_see_pixels_decide_on_pixels_and_their_size(grey_flow, tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for number in range(4):
            PIL.Image.new("RGB", (300, 260), (number, 0, 0)).save(tmp_path / "photos" / name / f"{number}.png")
    plan = plan_of("--init-from", grey_flow, "--objective", "sit", "--train-data-dir", tmp_path / "photos")
    assert plan.vae is None and plan.latent_shape == (1, 16, 16) and plan.resolution == 16


def test_other_weights_than_asked_for_name_the_fitting_options(grey_flow):
    with pytest.raises(ValueError, match="--objective sit --flow-path linear --prediction velocity --vae none --color"):
        plan_of("--init-from", grey_flow, "--color", "rgb", "--objective", "dit")
    assert DEMOPipeline.from_pretrained(grey_flow).transformer.config.in_channels == 1
