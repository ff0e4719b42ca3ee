"""Averages after the fact of a run: followed on the way, made of snapshots, written as pipelines, scored in a sweep."""

import json
import re
import shutil

import pytest
import torch
from helpers.made import write_snapshots
from helpers.training import TINY, run_here
from safetensors.torch import load_file

from d_emo import DEMOPipeline
from d_emo.common.snapshots import choose, list_snapshots, put_into
from d_emo.eval import evaluate_fid
from d_emo.train import choose_average

STEPS, EVERY = 60, 3
OTHERS = (0.03, 0.075, 0.15)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A short run on the digits that also follows what others are compared with."""
    folder = tmp_path_factory.mktemp("run") / "digits"
    lengths = ",".join(f"{length:g}" for length in (0.05, 0.1, *OTHERS))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("D_EMO_TRACEBACK", "1")
        from d_emo.train import train_dit

        train_dit.main([
            *TINY, "--cpu-threads", "1", "--learning-rate", "2e-3", "--max-train-steps", str(STEPS),
            "--snapshot-every", str(EVERY),
            "--snapshot-lengths", lengths, "--output-dir", str(folder),
        ])  # fmt: skip
    yield folder
    shutil.rmtree(folder)


def flat(state):
    return torch.cat([tensor.double().flatten() for tensor in state.values()])


@pytest.mark.parametrize("length", OTHERS)
def test_an_average_of_snapshots_is_the_one_that_was_followed(run, length):
    snapshots = list_snapshots(run)
    assert [snapshot.step for snapshot in snapshots] == [*range(EVERY, STEPS + 1, EVERY)]
    model = DEMOPipeline.from_pretrained(run).transformer
    put_into(model, choose([snapshot._replace(lengths=("0.05", "0.1")) for snapshot in snapshots], length))
    prefix = f"{length:g}/"
    state = load_file(run / f"checkpoint-{STEPS:07d}" / "training_state" / "power_averages.safetensors")
    direct = {name[len(prefix) :]: value for name, value in state.items() if name.startswith(prefix)}
    made = model.state_dict()
    assert made.keys() == direct.keys()
    floating = [name for name, value in direct.items() if value.is_floating_point()]
    for kind, tolerance in (("running_", 0.02), ("", 0.002)):
        names = [name for name in floating if kind in name]
        expected = flat({name: direct[name] for name in names})
        error = flat({name: made[name] for name in names}) - expected
        assert error.norm() < tolerance * expected.norm(), kind


def test_the_command_writes_pipelines_that_say_what_they_are(run, tmp_path, capsys):
    arguments = (run, "--length", "0.07", "0.12", "--output-dir", tmp_path / "made")
    code, printed = run_here(capsys, *arguments, main=choose_average.main)
    assert code == 0, printed
    folder = tmp_path / "made" / "average-0.07"
    assert re.search(
        rf"average-0.07: .* of relative length 0.07 at step {STEPS}, of 20 snapshots; its profile is 0", printed
    )
    card = (folder / "README.md").read_text()
    assert "# digits: D-EMOv2-N-8 on digits, average 0.07" in card and "picture.png" not in card
    assert "holds a **power-function average of relative length 0.07" in card
    assert f"from_pretrained({json.dumps(folder.as_posix())})" in card
    pipelines = [DEMOPipeline.from_pretrained(tmp_path / "made" / f"average-{length}") for length in ("0.07", "0.12")]
    assert pipelines[0]("three", num_inference_steps=2).images[0].size == (16, 16)
    first, second = (pipeline.transformer.state_dict()["blocks.0.i2rmb.proj_out.weight"] for pipeline in pipelines)
    assert 0 < (first - second).abs().max() < 0.1
    code, printed = run_here(capsys, run, "--length", "0.1", "--step", "16", main=choose_average.main)
    assert code != 0 and f"--step: step=16: there is no snapshot of it, but of {EVERY} to {STEPS}" in printed
    code, printed = run_here(capsys, tmp_path, "--length", "0.1", main=choose_average.main)
    assert code != 0 and "has no snapshots" in printed
    code, printed = run_here(capsys, run, "--length", "0.5", main=choose_average.main)
    assert code != 0 and "0.5 is not a number from 0.01 to 0.28" in printed


def test_a_sweep_takes_averages(tmp_path, capsys):
    run = write_snapshots(tmp_path / "run")
    arguments = ("--model", run, "--preset", "quick", "--num-images", 12, "--steps", 2, "--reference", "digits",
                 "--features", "pixels", "--output-dir", tmp_path / "out", "--cache-dir", tmp_path / "cache",
                 "--sweep-images", 6, "--metrics", "fid")  # fmt: skip
    code, printed = run_here(capsys, *arguments, "--sweep", "ema=0.03,0.15", main=evaluate_fid.main)
    assert code == 0, printed
    rows = json.loads((tmp_path / "out" / "sweep.json").read_text())
    assert [point["ema"] for point in rows["points"]] == [0.03, 0.15]
    assert rows["points"][0]["fid"] != rows["points"][1]["fid"]
    best = rows["best"]["ema"]
    manifest = json.loads((tmp_path / "out" / f"ema-{best:g}" / "manifest.json").read_text())
    assert manifest["sampling"]["ema"] == best
    small = json.loads((tmp_path / "out" / "sweep" / f"ema-{best:g}" / "manifest.json").read_text())
    assert manifest["transformer"] == small["transformer"]  # the average of the point, not of the last one
    for more, message in (
        (("--sweep", "ema=0.5"), "--ema=0.5 is not None or a number from 0.01"),
        (("--model", "digits", "--ema", "0.1"), "--ema 0.1: digits has no snapshots"),
        (("--ema", "0.1", "--weights", "raw"), "--weights raw"),
    ):
        code, printed = run_here(capsys, *arguments, *more, main=evaluate_fid.main)
        assert code != 0 and message in printed, printed


@pytest.mark.slow
def test_a_run_without_them_cannot_go_on_with_them(tmp_path, capsys):
    arguments = (*TINY, "--output-dir", tmp_path / "run")
    assert run_here(capsys, *arguments, "--max-train-steps", 1)[0] == 0
    more = ("--resume-from", "latest", "--max-train-steps", 2, "--snapshot-every", 1)
    code, printed = run_here(capsys, *arguments, *more)
    assert code != 0 and "does not have the averages of --snapshot-lengths" in printed
    assert "go on with --snapshot-every 0" in printed


def test_a_plan_says_what_snapshots_take(tmp_path, capsys):
    more = ("--max-train-steps", 10, "--snapshot-every", 4, "--dry-run", "--output-dir", tmp_path / "run")
    code, printed = run_here(capsys, *TINY, *more)
    assert code == 0, printed
    assert re.search(
        r"snapshots +averages of relative length 0.05 and 0.1 every 4 steps: 3 files of [\d.]+ MiB in snapshots/",
        printed,
    )
    average = float(re.search(r"average ([\d.]+) MiB", printed)[1])
    assert average == pytest.approx(3 * float(re.search(r"weights ([\d.]+) MiB", printed)[1]), rel=0.05)
    for arguments, message in (
        (("--snapshot-lengths", "0.1,0.1"), "--snapshot-lengths 0.1,0.1: expected different numbers"),
        (("--snapshot-lengths", "0.1,x"), "--snapshot-lengths 0.1,x: expected different numbers"),
        (("--init-from", "x", "--lora-rank", "2"), "--snapshot-every 4: snapshots hold whole networks"),
    ):
        code, printed = run_here(capsys, *TINY, *more, *arguments)
        assert code != 0 and message in printed, printed
