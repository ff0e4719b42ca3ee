"""FSDP2 on several processes (CPUs here): the numbers of DDP, sharded checkpoints, another number of processes."""

import shutil

import pytest
import torch
from helpers.paths import TESTS
from helpers.processes import Trainer
from helpers.training import losses, run_here
from safetensors.torch import load_file

from d_emo import DEMOPipeline

OPTIONS = ["--model", "D-EMOv2-N-8", "--global-batch-size", "12", "--micro-batch-size", "2", "--log-every", "1",
           "--sample-every", "0", "--report-to", "none", "--num-workers", "0", "--learning-rate", "1e-3",
           "--ema-decay", "0.9", "--lr-scheduler", "constant", "--lr-warmup-steps", "0", "--output-dir"]  # fmt: skip


class ShardedTrainer(Trainer):
    """The trainer under FSDP2."""

    script = TESTS / "helpers" / "fsdp_on_cpu.py"


def values(folder):
    return [float(line.split(",")[1]) for line in losses(folder)[1:]]


@pytest.fixture(scope="module")
def sharded_run(tmp_path_factory):
    """Eight steps on two processes, sharded, with samples on the way."""
    folder = tmp_path_factory.mktemp("sharded")
    arguments = [*OPTIONS, folder / "run", "--max-train-steps", "8", "--checkpoint-every", "4", "--sample-every", "8",
                 "--sample-steps", "2"]  # fmt: skip
    with ShardedTrainer(folder / "log", *arguments, processes=2) as trainer:
        assert trainer.finish() == 0, trainer.output
    return folder / "run"


def test_sharded_losses_and_averages_are_those_of_ddp(sharded_run, tmp_path):
    with Trainer(tmp_path / "log", *OPTIONS, tmp_path / "run", "--max-train-steps", "8", processes=2) as trainer:
        assert trainer.finish() == 0, trainer.output
    assert values(sharded_run) == pytest.approx(values(tmp_path / "run"), rel=1e-5)
    names = ("checkpoint-0000008", "transformer", "diffusion_pytorch_model.safetensors")
    sharded, whole = (load_file(folder.joinpath(*names)) for folder in (sharded_run, tmp_path / "run"))
    assert sharded.keys() == whole.keys()
    for name, value in whole.items():
        # AdamW's first steps are nearly sign(gradient): rounding may turn a zero gradient's.
        torch.testing.assert_close(sharded[name], value, atol=5e-4, rtol=1e-4, msg=name)
    earlier = DEMOPipeline.from_pretrained(sharded_run / "checkpoint-0000004").transformer.state_dict()
    moved = "blocks.0.i2rmb.proj_out.weight"
    assert (sharded[moved] - earlier[moved]).abs().max() > 1e-4
    assert (sharded_run / "samples" / "step-0000008.png").exists()


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 3])
def test_a_sharded_checkpoint_continues_on_any_number_of_processes(sharded_run, tmp_path, processes):
    moved = tmp_path / "moved"
    shutil.copytree(sharded_run, moved, ignore=shutil.ignore_patterns("checkpoint-0000008"))
    arguments = [*OPTIONS, moved, "--max-train-steps", "8", "--resume-from", "latest"]
    with ShardedTrainer(tmp_path / "log", *arguments, processes=processes) as trainer:
        assert trainer.finish() == 0, trainer.output
        assert "checkpoint-0000004, the newest whole checkpoint" in trainer.output
    assert values(moved) == pytest.approx(values(sharded_run), rel=1e-6)
    parts = ("checkpoint-0000008", "transformer", "diffusion_pytorch_model.safetensors")
    again, straight = (load_file(folder.joinpath(*parts)) for folder in (moved, sharded_run))
    for name, value in straight.items():
        if not value.is_floating_point():
            continue  # counters of micro batches a process
        torch.testing.assert_close(again[name], value, atol=1e-6 if processes == 2 else 5e-4, rtol=1e-4, msg=name)


@pytest.mark.slow
def test_a_sharded_checkpoint_continues_without_sharding(sharded_run, tmp_path, capsys):
    moved = tmp_path / "moved"
    shutil.copytree(sharded_run, moved, ignore=shutil.ignore_patterns("checkpoint-0000008"))
    code, output = run_here(capsys, *OPTIONS, moved, "--max-train-steps", "8", "--resume-from", "latest")
    assert code == 0, output
    assert values(moved) == pytest.approx(values(sharded_run), rel=1e-5)
