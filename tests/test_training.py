"""The trainer as a user starts it: whole runs, kill -9, Ctrl-C, bad input."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import PIL.Image
import pytest
import torch
from conftest import offline_environment, run_trainer, trainer_command
from safetensors.torch import load_file

from d_emo import DEMOPipeline

# Small and quick, everything else as a user would run it.
TINY = ["--model", "D-EMOv2-N-8", "--global-batch-size", "8", "--log-every", "1", "--sample-every", "0",
        "--report-to", "none", "--num-workers", "0"]  # fmt: skip


def losses(folder: Path) -> list[str]:
    """The log without its speed column."""
    return [line.rsplit(",", 1)[0] for line in (folder / "train_log.csv").read_text().splitlines()]


def assert_same_bits(first: Path, second: Path) -> None:
    """Two checkpoints hold the same weights, average and optimizer, bit for bit."""
    for name in ("training_state/model.safetensors", "transformer/diffusion_pytorch_model.safetensors"):
        a, b = load_file(first / name), load_file(second / name)
        assert a.keys() == b.keys()
        assert all(torch.equal(a[key], b[key]) for key in a), name
    a, b = (
        torch.load(path / "training_state" / "optimizer.bin", weights_only=True)["state"] for path in (first, second)
    )
    assert a.keys() == b.keys()
    assert all(torch.equal(a[i][key], b[i][key]) for i in a for key in a[i])


def kill_when(arguments: list, appears: Path, processes: int = 1, number: int = signal.SIGKILL) -> tuple[int, str]:
    """Start the trainer, send a signal to all of its processes once a path exists; exit code and output."""
    process = subprocess.Popen(
        trainer_command(*arguments, processes=processes), env=offline_environment(), start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    deadline = time.monotonic() + 240
    while not appears.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    if process.poll() is None:
        os.killpg(process.pid, number)
    output = process.communicate(timeout=120)[0]
    assert appears.exists(), output
    return process.returncode, output


@pytest.mark.parametrize("processes", [1, 2])
def test_kill_9_and_resume_equals_an_undisturbed_run_bit_for_bit(tmp_path, processes):
    arguments = [*TINY, "--max-train-steps", "20", "--checkpoint-every", "10", "--output-dir"]
    whole = run_trainer(*arguments, tmp_path / "whole", processes=processes)
    assert whole.returncode == 0, whole.stderr
    killed = tmp_path / "killed"
    code, _ = kill_when([*arguments, killed], killed / "checkpoint-0000010", processes)
    assert code == -signal.SIGKILL
    assert not (killed / "checkpoint-0000020").exists()
    resumed = run_trainer(*arguments, killed, "--resume-from", "latest", processes=processes)
    assert resumed.returncode == 0, resumed.stderr
    assert "resuming from" in resumed.stdout and "checkpoint-0000010, the newest whole checkpoint" in resumed.stdout
    assert len(losses(killed)) == 21
    assert losses(killed) == losses(tmp_path / "whole")
    assert_same_bits(killed / "checkpoint-0000020", tmp_path / "whole" / "checkpoint-0000020")


def test_two_processes_run_where_two_were_asked_for(tmp_path):
    done = run_trainer(*TINY, "--max-train-steps", "1", "--output-dir", tmp_path / "run", processes=2)
    assert done.returncode == 0, done.stderr
    assert "8 = 2 process(es) x 1 accumulated x 4" in done.stdout
    manifest = json.loads((tmp_path / "run" / "checkpoint-0000001" / "manifest.json").read_text())
    assert manifest["processes"] == 2


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_ctrl_c_and_sigterm_save_before_they_stop(tmp_path, number, code):
    run = tmp_path / "run"
    arguments = [*TINY, "--max-train-steps", "100000", "--output-dir", run]
    # The log gets its second line after the first step, when the handlers stand.
    log = run / "train_log.csv"
    process = subprocess.Popen(trainer_command(*arguments), env=offline_environment(), stdout=subprocess.PIPE,
                               stderr=subprocess.STDOUT, text=True)  # fmt: skip
    deadline = time.monotonic() + 120
    while (not log.exists() or len(log.read_text().splitlines()) < 3) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(number)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == code, output
    assert "continue with --resume-from latest" in output
    (checkpoint,) = run.glob("checkpoint-*")
    step = json.loads((checkpoint / "manifest.json").read_text())["step"]
    again = run_trainer(*arguments[:-4], "--max-train-steps", step + 1, "--output-dir", run, "--resume-from", "latest")
    assert again.returncode == 0, again.stderr
    assert (run / f"checkpoint-{step + 1:07d}").exists()


@pytest.mark.parametrize("objective", ["dit", "sit"])
def test_a_run_writes_a_pipeline_grids_and_curves(tmp_path, objective):
    run = tmp_path / "run"
    done = run_trainer(
        "--model", "D-EMOv2-N-8", "--objective", objective, "--global-batch-size", "8", "--max-train-steps", "3",
        "--log-every", "1", "--sample-every", "2", "--sample-steps", "3", "--samples-per-class", "2",
        "--checkpoint-every", "2", "--output-dir", run,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("No data was named: training on scikit-learn's handwritten digits")
    grids = sorted((run / "samples").iterdir())
    assert [path.name for path in grids] == ["step-0000002.png", "step-0000003.png"]
    with PIL.Image.open(grids[0]) as grid:
        assert grid.size == (2 * 50, 10 * 66)
    with PIL.Image.open(run / "loss.png") as curve:
        assert curve.width > 400
    assert list((run / "logs").rglob("events.out.tfevents.*"))
    assert not list(run.rglob(".partial*"))
    for folder in (run, run / "checkpoint-0000002"):
        pipeline = DEMOPipeline.from_pretrained(folder)
        assert pipeline.id2label[3] == "three"
        assert pipeline("three", num_inference_steps=2).images[0].size == (16, 16)


def test_class_folders_train_with_their_names_and_loader_processes(tmp_path):
    for name in ("n02099601", "own"):
        (tmp_path / "data" / name).mkdir(parents=True)
        for index in range(4):
            PIL.Image.new("RGB", (40, 32), (index * 60, 0, 0)).save(tmp_path / "data" / name / f"{index}.jpg")
    broken = tmp_path / "data" / "own" / "2.jpg"
    broken.write_bytes(broken.read_bytes()[:100])
    arguments = [*TINY, "--train-data-dir", tmp_path / "data", "--resolution", "16", "--max-train-steps", "2",
                 "--num-workers", "2", "--output-dir"]  # fmt: skip
    stopped = run_trainer(*arguments, tmp_path / "stopped")
    assert stopped.returncode != 0
    assert "own/2.jpg cannot be read" in stopped.stderr and "--on-bad-image skip" in stopped.stderr
    assert "Traceback" not in stopped.stderr
    skipped = run_trainer(*arguments, tmp_path / "skipped", "--on-bad-image", "skip")
    assert skipped.returncode == 0, skipped.stderr
    assert "skipped: " in skipped.stdout and "own/2.jpg cannot be read" in skipped.stdout
    pipeline = DEMOPipeline.from_pretrained(tmp_path / "skipped")
    assert pipeline.get_label_ids(["golden retriever", "own"]) == [0, 1]


def test_training_on_latents_of_a_vae(tmp_path):
    from test_pipeline import tiny_vae

    tiny_vae().save_pretrained(tmp_path / "vae")
    for name in ("cat", "dog"):
        (tmp_path / "data" / name).mkdir(parents=True)
        for index in range(4):
            PIL.Image.new("RGB", (40, 32), (index * 60, 0, 0)).save(tmp_path / "data" / name / f"{index}.png")
    arguments = [*TINY, "--train-data-dir", tmp_path / "data", "--vae", tmp_path / "vae", "--max-train-steps", "1"]
    done = run_trainer(*arguments, "--resolution", "32", "--output-dir", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert "4 x 16 x 16" in done.stdout
    pipeline = DEMOPipeline.from_pretrained(tmp_path / "run")
    assert pipeline.vae.config.scaling_factor == 0.7
    assert pipeline("cat", num_inference_steps=2).images[0].size == (32, 32)
    refused = run_trainer(*arguments, "--resolution", "31", "--output-dir", tmp_path / "other")
    assert "--resolution 31 is not a multiple of the VAE's factor 2; use 32" in refused.stderr


def test_bf16_autocast_keeps_weights_and_statistics_in_float32(tmp_path):
    done = run_trainer(*TINY, "--mixed-precision", "bf16", "--max-train-steps", "2", "--output-dir", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    weights = load_file(tmp_path / "run" / "checkpoint-0000002" / "training_state" / "model.safetensors")
    assert all(value.dtype in (torch.float32, torch.int64) for value in weights.values())


def test_a_diverging_run_stops_and_keeps_its_checkpoint(tmp_path):
    run = tmp_path / "run"
    done = run_trainer(
        *TINY, "--learning-rate", "1e30", "--max-train-steps", "9", "--checkpoint-every", "1", "--output-dir", run
    )
    assert done.returncode != 0
    assert "The weights were not changed" in done.stderr
    last = sorted(run.glob("checkpoint-*"))[-1]
    weights = load_file(last / "training_state" / "model.safetensors")
    assert all(value.isfinite().all() for value in weights.values())


def test_dry_run_says_what_would_run_and_writes_nothing(tmp_path):
    done = run_trainer("--model", "D-EMOv2-B-2", "--dry-run", "--output-dir", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert "D-EMOv2-B-2: 95," in done.stdout and "GMACs an image" in done.stdout
    assert "digits: 1,797 images, 10 classes" in done.stdout
    assert "400,000 steps" in done.stdout
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "D-EMOv2-B2"], "model 'D-EMOv2-B2' is unknown; did you mean D-EMOv2-B-2"),
        (["--resolution", "15"], "sample_size=15 is not a multiple of patch_size=8; use 8"),
        (["--global-batch-size", "9", "--micro-batch-size", "2"], "--micro-batch-size 2 does not divide the 9 images"),
        (["--train-data-dir", "nowhere"], "--train-data-dir nowhere: there is no such folder"),
        (["--vae", "someone/vae"], "--vae someone/vae: neither a VAE folder nor reachable on the Hub"),
        (["--dataset", "someone/data"], "--dataset someone/data: cannot be opened"),
        (["--resume-from", "nowhere"], "checkpoint nowhere: there is no such folder"),
        (["--lr-scheduler", "sawtooth"], "--lr-scheduler sawtooth"),
    ],
)
def test_bad_input_ends_in_one_line(tmp_path, arguments, message):
    done = run_trainer(*TINY, "--output-dir", tmp_path / "run", *arguments)
    assert done.returncode == 1
    assert f"train_dit: {message}" in done.stderr
    assert "Traceback" not in done.stderr


def test_another_runs_folder_is_not_touched(tmp_path):
    run = tmp_path / "run"
    assert run_trainer(*TINY, "--max-train-steps", "1", "--output-dir", run).returncode == 0
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    again = run_trainer(*TINY, "--max-train-steps", "1", "--output-dir", run)
    assert again.returncode == 1 and "holds a run up to checkpoint-0000001" in again.stderr
    other = run_trainer(*TINY, "--seed", "1", "--max-train-steps", "2", "--output-dir", run, "--resume-from", "latest")
    assert other.returncode == 1 and "holds another run: seed 0 -> 1" in other.stderr
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before
