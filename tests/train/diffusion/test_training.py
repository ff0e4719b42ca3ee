"""The trainer as a user starts it: whole runs, kill -9, Ctrl-C, bad input."""

import importlib.util
import json
import os
import signal
from pathlib import Path

import PIL.Image
import pytest
import torch
from helpers.paths import ROOT
from helpers.processes import TRAIN_DIT, Command, Trainer, run_script, torchrun
from helpers.training import TINY, assert_same_bits, losses, run_here, train_to_the_end
from safetensors.torch import load_file

from d_emo import DEMOPipeline
from d_emo.common.files import file_digest
from d_emo.kernels.cpp import build
from d_emo.kernels.dispatch import chosen_backend

MORE_STATE = ["--optimizer", "muon", "--snapshot-every", "4", "--lr-scheduler", "wsd"]


@pytest.mark.parametrize(
    ("processes", "more"),
    [(1, []), *(pytest.param(*rest, marks=pytest.mark.slow) for rest in ((1, MORE_STATE), (2, []), (2, MORE_STATE)))],
    ids=["one", "one, more state", "two", "two, more state"],
)
def test_kill_9_and_resume_equals_an_undisturbed_run_bit_for_bit(tmp_path, capsys, processes, more):
    arguments = [*TINY, "--max-train-steps", "20", "--checkpoint-every", "10", *more, "--output-dir"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    output = train_to_the_end(capsys, tmp_path / "log", *arguments, whole, processes=processes)
    assert f"8 = {processes} process(es) x 1 accumulated x {8 // processes}" in output
    started = [*arguments, killed]
    with (
        Trainer(tmp_path / "log", *started)
        if processes == 1
        else Command(tmp_path / "log", torchrun(processes, TRAIN_DIT, *started))
    ) as trainer:
        trainer.wait_until((killed / "checkpoint-0000010").exists)
        trainer.kill()
    assert not (killed / "checkpoint-0000020").exists()
    arguments = [*arguments, killed, "--resume-from", "latest"]
    output = train_to_the_end(capsys, tmp_path / "log", *arguments, processes=processes)
    assert f"resuming from {killed / 'checkpoint-0000010'}, the newest whole checkpoint" in output
    manifest = json.loads((killed / "checkpoint-0000020" / "manifest.json").read_text())
    assert (manifest["step"], manifest["processes"]) == (20, processes)
    assert len(losses(killed)) == 21
    assert losses(killed) == losses(whole)
    assert_same_bits(killed / "checkpoint-0000020", whole / "checkpoint-0000020")
    snapshots = [{path.name: file_digest(path) for path in (run / "snapshots").glob("*")} for run in (whole, killed)]
    assert snapshots[0] == snapshots[1] and len(snapshots[0]) == (5 if more else 0)


# Sums over processes round differently. Muon's iteration rounds to bfloat16, where a last bit is 0.4% of a step.
@pytest.mark.parametrize(
    ("more", "tolerance"),
    [([], 1e-6), pytest.param(MORE_STATE[:4], 1e-3, marks=pytest.mark.slow)],
    ids=["adamw", "muon"],
)
def test_another_number_of_processes_continues_with_the_same_losses(tmp_path, capsys, more, tolerance):
    arguments = [*TINY, "--micro-batch-size", "4", "--checkpoint-every", "4", *more, "--output-dir"]
    whole, moved = tmp_path / "whole", tmp_path / "moved"
    train_to_the_end(capsys, tmp_path / "log", *arguments, whole, "--max-train-steps", "8")
    for processes, further in (
        (2, ["--max-train-steps", "4"]),
        (1, ["--max-train-steps", "8", "--resume-from", "latest"]),
    ):
        train_to_the_end(capsys, tmp_path / "log", *arguments, moved, *further, processes=processes)
    one, other = ([float(line.split(",")[1]) for line in losses(folder)[1:]] for folder in (whole, moved))
    assert len(one) == 8 and other == pytest.approx(one, rel=tolerance)


FULL_DISK = """
import resource, sys
from d_emo.train.train_dit import main
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))  # no file may grow beyond this
main(sys.argv[1:])
"""


def test_a_full_disk_costs_no_checkpoint(tmp_path, capsys):
    folder = tmp_path / "run"
    arguments = [*TINY, "--checkpoint-every", "2", "--output-dir", folder]
    train_to_the_end(capsys, tmp_path / "log", *arguments, "--max-train-steps", "2")
    more = [*map(str, arguments), "--max-train-steps", "4", "--resume-from", "latest"]
    code, output = run_script(tmp_path / "full.log", "-c", FULL_DISK, *more)
    assert code == 1 and "checkpoint-0000004 cannot be written" in output, output
    assert f"Earlier checkpoints in --output-dir {folder} are whole" in output and "Traceback" not in output
    assert [path.name for path in folder.iterdir() if "checkpoint" in path.name] == ["checkpoint-0000002"]
    train_to_the_end(capsys, tmp_path / "log", *more)
    assert len(losses(folder)) == 5


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), pytest.param(signal.SIGTERM, 143, marks=pytest.mark.slow)]
)
def test_ctrl_c_and_sigterm_save_before_they_stop(tmp_path, capsys, number, code):
    run = tmp_path / "run"
    with Trainer(tmp_path / "log", *TINY, "--num-workers", "2", "--output-dir", run) as trainer:
        trainer.wait_until(lambda: "step 2/" in trainer.output)
        os.killpg(trainer.process.pid, number)  # loader processes get it too, as from a terminal
        assert trainer.finish() == code, trainer.output
        assert "continue with --resume-from latest" in trainer.output
    (checkpoint,) = run.glob("checkpoint-*")
    step = json.loads((checkpoint / "manifest.json").read_text())["step"]
    resumed = [*TINY, "--max-train-steps", step + 1, "--output-dir", run, "--resume-from", "latest"]
    assert run_here(capsys, *resumed)[0] == 0
    assert (run / f"checkpoint-{step + 1:07d}").exists()


@pytest.mark.parametrize("objective", ["dit", "sit"])
def test_a_run_writes_a_pipeline_grids_and_curves(tmp_path, capsys, objective):
    run = tmp_path / "run"
    code, output = run_here(
        capsys, "--model", "D-EMOv2-N-8", "--objective", objective, "--global-batch-size", "8",
        "--max-train-steps", "3", "--log-every", "1", "--sample-every", "2", "--sample-steps", "3",
        "--samples-per-class", "2", "--checkpoint-every", "2", "--output-dir", run,
    )  # fmt: skip
    assert code == 0, output
    assert output.startswith("No data was named: training on scikit-learn's handwritten digits")
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


def picture_folder(root: Path, classes=("cat", "dog")) -> Path:
    for name in classes:
        (root / name).mkdir(parents=True)
        for index in range(4):
            PIL.Image.new("RGB", (40, 32), (index * 60, 0, 0)).save(root / name / f"{index}.jpg")
    return root


def test_class_folders_train_with_their_names_and_loader_processes(tmp_path, capsys):
    data = picture_folder(tmp_path / "data", ("n02099601", "own"))
    broken = data / "own" / "2.jpg"
    broken.write_bytes(broken.read_bytes()[:100])
    arguments = [*TINY, "--train-data-dir", data, "--resolution", "16", "--max-train-steps", "2", "--num-workers", "2",
                 "--output-dir"]  # fmt: skip
    code, output = run_here(capsys, *arguments, tmp_path / "stopped")
    assert code != 0
    assert "own/2.jpg cannot be read" in output and "--on-bad-image skip" in output
    code, output = run_here(capsys, *arguments, tmp_path / "skipped", "--on-bad-image", "skip")
    assert code == 0
    assert "skipped: " in output and "own/2.jpg cannot be read" in output
    pipeline = DEMOPipeline.from_pretrained(tmp_path / "skipped")
    assert pipeline.get_label_ids(["golden retriever", "own"]) == [0, 1]


def test_training_on_latents_of_a_vae(tmp_path, capsys):
    from helpers.pipelines import tiny_vae

    tiny_vae().save_pretrained(tmp_path / "vae")
    arguments = [*TINY, "--train-data-dir", picture_folder(tmp_path / "data"), "--vae", tmp_path / "vae",
                 "--max-train-steps", "1"]  # fmt: skip
    code, output = run_here(capsys, *arguments, "--resolution", "32", "--output-dir", tmp_path / "run")
    assert code == 0, output
    assert "4 x 16 x 16" in output
    pipeline = DEMOPipeline.from_pretrained(tmp_path / "run")
    assert pipeline.vae.config.scaling_factor == 0.7
    assert pipeline("cat", num_inference_steps=2).images[0].size == (32, 32)
    _, output = run_here(capsys, *arguments, "--resolution", "31", "--output-dir", tmp_path / "other")
    assert "--resolution 31: it is not a multiple of 2, the factor of AutoencoderKL; use 32" in output


def test_unconditional_training(tmp_path, capsys):
    arguments = [*TINY, "--unconditional", "--max-train-steps", "1", "--sample-every", "1", "--sample-steps", "2"]
    code, output = run_here(capsys, *arguments, "--output-dir", tmp_path)
    assert code == 0, output
    assert "no classes" in output
    assert DEMOPipeline.from_pretrained(tmp_path)(num_inference_steps=2).class_labels == []


def test_bf16_autocast_keeps_weights_and_statistics_in_float32(tmp_path, capsys):
    arguments = [*TINY, "--mixed-precision", "bf16", "--max-train-steps", "2"]
    code, output = run_here(capsys, *arguments, "--output-dir", tmp_path)
    assert code == 0, output
    weights = load_file(tmp_path / "checkpoint-0000002" / "training_state" / "model.safetensors")
    assert all(value.dtype in (torch.float32, torch.int64) for value in weights.values())


def test_a_diverging_run_stops_and_keeps_its_checkpoint(tmp_path, capsys):
    arguments = [*TINY, "--learning-rate", "1e30", "--max-train-steps", "9", "--checkpoint-every", "1"]
    code, output = run_here(capsys, *arguments, "--output-dir", tmp_path)
    assert code != 0
    assert "The weights were not changed" in output
    last = sorted(tmp_path.glob("checkpoint-*"))[-1]
    weights = load_file(last / "training_state" / "model.safetensors")
    assert all(value.isfinite().all() for value in weights.values())


def test_dry_run_says_what_would_run_and_writes_nothing(tmp_path, capsys):
    code, output = run_here(capsys, "--model", "D-EMOv2-B-2", "--dry-run", "--output-dir", tmp_path / "run")
    assert code == 0, output
    assert "D-EMOv2-B-2: 95," in output and "GMACs an image" in output
    assert "digits: 1,797 images, 10 classes" in output
    assert "1,000 steps, 35.6 epochs, roughly" in output and "hours on this CPU" in output
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "D-EMOv2-B2"], "model 'D-EMOv2-B2' is unknown; did you mean D-EMOv2-B-2"),
        (["--resolution", "15"], "DEMOTransformer2DModel: sample_size=15 is not a multiple of patch_size=8; use 8"),
        (["--global-batch-size", "9", "--micro-batch-size", "2"], "--micro-batch-size 2 does not divide the 9 images"),
        (["--train-data-dir", "nowhere"], "--train-data-dir nowhere: there is no such folder"),
        (["--vae", "someone/vae"], "--vae someone/vae: neither a VAE folder nor reachable on the Hub"),
        (["--dataset", "someone/data"], "--dataset someone/data: cannot be opened"),
        (["--resume-from", "nowhere"], "checkpoint nowhere: there is no such folder"),
        (["--lr-scheduler", "sawtooth"], "--lr-scheduler sawtooth"),
        (["--report-to", "notebook"], "--report-to notebook"),
        pytest.param(
            ["--report-to", "aim"],
            "--report-to aim: aim is not installed; pip install aim",
            marks=pytest.mark.skipif(importlib.util.find_spec("aim") is not None, reason="aim is installed"),
        ),
        (["--modle", "x"], "--modle is not an option; did you mean model"),
    ],
)
@pytest.mark.usefixtures("offline")
def test_bad_input_ends_in_one_line(tmp_path, capsys, arguments, message):
    code, output = run_here(capsys, *TINY, "--output-dir", tmp_path / "run", *arguments)
    assert code != 0
    assert f"train_dit: {message}" in output
    assert not list((tmp_path / "run").glob("checkpoint-*"))


@pytest.mark.slow
def test_another_runs_folder_is_not_touched(tmp_path, capsys):
    arguments = [*TINY, "--output-dir", tmp_path, "--max-train-steps"]
    assert run_here(capsys, *arguments, "1")[0] == 0

    def times():
        return {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.name != ".lock"}

    before = times()
    assert "holds a run up to checkpoint-0000001" in run_here(capsys, *arguments, "1")[1]
    changed = [*arguments, "2", "--seed", "1", "--resume-from", "latest"]
    for more in ([], ["--dry-run"]):
        assert "checkpoint-0000001 is of another run: seed 0 -> 1" in run_here(capsys, *changed, *more)[1]
    cosine = [*arguments, "2", "--lr-scheduler", "cosine", "--resume-from", "latest"]
    assert "lr_schedule_steps None -> 2; lr_scheduler 'constant' -> 'cosine'" in run_here(capsys, *cosine)[1]
    assert times() == before


@pytest.mark.skipif(bool(build.obstacle()), reason=f"no C++ kernels here: {build.obstacle()}")
@pytest.mark.parametrize("steps", [15, pytest.param(50, marks=pytest.mark.slow)])
@pytest.mark.slow
def test_kernels_leave_the_losses_of_digits_steps_as_they_were_to_1e_4(tmp_path, capsys, steps):
    arguments = ["--config", ROOT / "train" / "configs" / "digits.yaml", "--max-train-steps", steps]
    arguments += ["--log-every", "1", "--sample-every", "0", "--report-to", "none", "--output-dir"]
    traces, before = [], chosen_backend()
    for kernels, name in (("native", "C++"), ("reference", "plain PyTorch, as chosen")):
        code, output = run_here(capsys, *arguments, tmp_path / kernels, "--kernels", kernels)
        assert code == 0, output
        assert f"kernels    {name}" in output
        assert chosen_backend() == before  # the choice is the run's
        lines = (tmp_path / kernels / "train_log.csv").read_text().splitlines()[1:]
        traces.append([float(line.split(",")[1]) for line in lines])
    assert len(traces[0]) == steps
    assert traces[0] == pytest.approx(traces[1], abs=1e-4)
    assert traces[0] != traces[1]  # the two did not run the same code


@pytest.mark.slow
def test_a_resumed_run_keeps_its_own_options_whatever_the_defaults_are(tmp_path, capsys):
    run = tmp_path / "run"
    first = ("--max-train-steps", "1", "--ema-warmup", "false", "--seed", "5", "--output-dir", run)
    train_to_the_end(capsys, tmp_path / "log", *TINY, *first)
    bare = ("--resume-from", "latest", "--output-dir", run, "--max-train-steps", "2")
    assert "resuming from" in train_to_the_end(capsys, tmp_path / "log", *bare)
    options = json.loads((run / "run.json").read_text())
    assert (options["ema_warmup"], options["seed"], options["global_batch_size"]) == (False, 5, 8)
    code, printed = run_here(capsys, *bare[:-1], "3", "--seed", "6")
    assert code != 0 and "seed 5 -> 6" in printed, printed
    before = (run / "run.json").read_bytes()
    code, printed = run_here(capsys, *bare[:-1], "1")
    assert code != 0 and "is at step 2, past the 1 that were asked for" in printed, printed
    assert (run / "run.json").read_bytes() == before
