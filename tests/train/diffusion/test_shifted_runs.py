"""Runs with a time shift: what the plan, checkpoints and samplers know of it; a bottleneck that is passed on."""

import json

import pytest
from accelerate import Accelerator
from diffusers import FlowMatchEulerDiscreteScheduler
from helpers.models import tiny_model
from helpers.paths import ROOT
from helpers.training import TINY, run_here

from d_emo import DEMOPipeline
from d_emo.train.data.sources import load_source
from d_emo.train.diffusion import plan
from d_emo.train.diffusion.config import parse_config
from d_emo.train.diffusion.plan import make_plan

pytestmark = pytest.mark.usefixtures("uncounted_plans")
DATA = ("--objective", "sit", "--prediction", "data")


def plan_of(*arguments):
    """The plan of a run on the digits."""
    config = parse_config(["--config", str(ROOT / "train/configs/digits.yaml"), *map(str, arguments)])
    return make_plan(config, load_source(config.data), Accelerator(cpu=True))


@pytest.mark.slow
def test_an_automatic_shift_is_saved_with_what_it_came_to_and_compared(capsys, tmp_path):
    run = (*TINY, *DATA, "--max-train-steps", 1, "--output-dir", tmp_path / "run")
    code, printed = run_here(capsys, *run, "--time-shift", "auto")
    # 1 x 16 x 16 values: the root of 256 / 4096.
    assert code == 0 and "sit (data on the linear path, times shifted by 0.25)" in printed, printed
    pipeline = DEMOPipeline.from_pretrained(tmp_path / "run")
    assert (pipeline.scheduler.config.shift, pipeline.transformer.config.prediction_type) == (0.25, "sample")
    assert json.loads((tmp_path / "run/run.json").read_text())["time_shift"] == 0.25
    assert "| time_shift | 0.25 |" in (tmp_path / "run/README.md").read_text()
    code, printed = run_here(capsys, *run, "--time-shift", 2, "--resume-from", "latest")
    assert code != 0 and "time_shift 0.25 -> 2.0" in printed, printed


def test_a_shift_is_a_number_or_auto_and_decides_the_results(capsys):
    auto, same, other, none = (plan_of(*DATA, *more) for more in (
        ("--time-shift", "auto"), ("--time-shift", 0.25), ("--time-shift", "2"), ()))  # fmt: skip
    assert auto.identity() == same.identity() and auto.identity() != other.identity()
    assert (other.identity()["time_shift"], none.identity()["time_shift"]) == (2.0, 1.0)
    assert "shifted by" not in none.describe()
    for text in ("word", "nan", ""):
        with pytest.raises(SystemExit):
            parse_config(["--time-shift", text])
        assert "--time-shift" in capsys.readouterr().err


@pytest.mark.parametrize("word", ["velocity", "noise", "score", "data"])
def test_the_plan_calls_a_prediction_what_the_option_calls_it(word):
    assert f"  sit ({word} on the linear path), " in plan_of("--prediction", word).describe()
    assert "  dit (noise), " in plan_of("--objective", "dit").describe()


def test_the_plan_says_where_the_weights_to_start_from_had_another_shift(tmp_path):
    model = tiny_model(in_channels=1, num_classes=0, learn_sigma=False, prediction_type="sample")
    DEMOPipeline(model, FlowMatchEulerDiscreteScheduler(shift=3.0)).save_pretrained(tmp_path)
    start = (*DATA, "--init-from", tmp_path)
    assert "--init-from was trained with --time-shift 3), label" in plan_of(*start).describe()
    assert "was trained with" not in plan_of(*start, "--time-shift", 3).describe()
    with pytest.raises(ValueError, match="--flow-path linear --prediction data --time-shift 3 --vae none"):
        plan_of("--init-from", tmp_path)


def test_a_bottleneck_of_the_patches_reaches_the_model_where_it_is_given(monkeypatch):
    asked = []
    monkeypatch.setattr(plan, "create_model", lambda name, **config: asked.append(config))
    for arguments in (("--patch-bottleneck", 16), ()):
        plan_of(*DATA, *arguments).build_model()
    assert asked[0].pop("patch_bottleneck") == 16 and asked[0] == asked[1]
    with pytest.raises(ValueError, match="--patch-bottleneck 0: must be positive"):
        plan_of("--patch-bottleneck", 0)
