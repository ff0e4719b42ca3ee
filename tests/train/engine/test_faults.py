"""What goes wrong on real machines while training: nothing but the steps since the last checkpoint may be lost."""

import os
import signal
import time

import PIL.Image
import psutil
import pytest
from helpers.processes import TRAIN_DIT, Command, Trainer, run_script, torchrun
from helpers.training import TINY, assert_same_bits, losses, run_here, train_to_the_end


@pytest.fixture
def pictures(tmp_path):
    """A folder of two classes with six pictures each."""
    for number, name in enumerate(("cat", "dog")):
        (tmp_path / "pictures" / name).mkdir(parents=True)
        for index in range(6):
            colour = (number * 100, index * 40, 7)
            PIL.Image.new("RGB", (20, 16), colour).save(tmp_path / "pictures" / name / f"{index}.png")
    return tmp_path / "pictures"


def on(pictures, *more):
    """The tiny run on a folder of pictures."""
    return [*TINY, "--train-data-dir", pictures, "--resolution", "16", "--vae", "none", *more]


def checkpoints(folder):
    return sorted(path.name for path in folder.glob("checkpoint-*"))


def test_kill_9_while_a_checkpoint_is_written(tmp_path, capsys):
    """Killed in each of several saves, the run still ends with the bits of an undisturbed one."""
    arguments = [*TINY, "--max-train-steps", "6", "--checkpoint-every", "2", "--output-dir"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    train_to_the_end(capsys, tmp_path / "log", *arguments, whole)
    for step in (2, 4):
        resume = ["--resume-from", "latest"] if step > 2 else []
        with Trainer(tmp_path / "log", *arguments, killed, *resume) as trainer:
            trainer.wait_until((killed / f".partial-checkpoint-{step:07d}").exists)
            trainer.kill()
        assert f"checkpoint-{step:07d}" not in checkpoints(killed)
        if step == 2:  # the first is needed for the second round
            train_to_the_end(capsys, tmp_path / "log", *arguments, killed, "--max-train-steps", "2", "--resume-from",
                             "latest")  # fmt: skip
    train_to_the_end(capsys, tmp_path / "log", *arguments, killed, "--resume-from", "latest")
    assert losses(killed) == losses(whole)
    assert_same_bits(killed / "checkpoint-0000006", whole / "checkpoint-0000006")
    assert not list(killed.glob(".partial-*"))


@pytest.mark.slow
def test_sigterm_to_torchrun_saves_on_all_processes(tmp_path):
    run = tmp_path / "run"
    with Command(tmp_path / "log", torchrun(2, TRAIN_DIT, *TINY, "--output-dir", run)) as trainer:
        trainer.wait_until(lambda: "step 2/" in trainer.output)
        os.kill(trainer.process.pid, signal.SIGTERM)
        assert trainer.finish() != 0
        assert "continue with --resume-from latest" in trainer.output
    (checkpoint,) = checkpoints(run)
    step = int(checkpoint[-7:])
    with Trainer(tmp_path / "log", *TINY, "--output-dir", run, "--resume-from", "latest", "--max-train-steps",
                 step + 1, processes=2) as trainer:  # fmt: skip
        assert trainer.finish() == 0, trainer.output
    assert len(losses(run)) == step + 2


@pytest.mark.slow
def test_a_missing_file_of_one_process_is_named_and_latest_goes_back(tmp_path):
    run = tmp_path / "run"
    arguments = [*TINY, "--checkpoint-every", "2", "--output-dir", run, "--max-train-steps"]
    with Trainer(tmp_path / "log", *arguments, "4", processes=2) as trainer:
        assert trainer.finish() == 0, trainer.output
    before = losses(run)
    (run / "checkpoint-0000004" / "training_state" / "random-1.json").unlink()
    with Trainer(
        tmp_path / "log", *arguments, "6", "--resume-from", run / "checkpoint-0000004", processes=2
    ) as trainer:
        assert trainer.finish() != 0
        assert "checkpoint-0000004: training_state/random-1.json is missing" in trainer.output
    with Trainer(tmp_path / "log", *arguments, "6", "--resume-from", "latest", processes=2) as trainer:
        assert trainer.finish() == 0, trainer.output
        assert "skipped: checkpoint" in trainer.output and "checkpoint-0000002, the newest whole" in trainer.output
    assert losses(run)[:5] == before


def test_a_loader_process_that_dies_ends_the_run_with_a_line(tmp_path, pictures, capsys):
    run = tmp_path / "run"
    arguments = on(pictures, "--num-workers", "2", "--output-dir", run, "--checkpoint-every", "2")
    with Trainer(tmp_path / "log", *arguments) as trainer:
        trainer.wait_until(lambda: f"saved {run}/checkpoint-0000002" in trainer.output)
        workers = [child for child in trainer.process.children(recursive=True) if is_worker(child, trainer.process)]
        assert workers
        workers[0].kill()
        assert trainer.finish() == 1, trainer.output
        assert "the data could not be read (DataLoader worker" in trainer.output
        assert "continue with --resume-from latest" in trainer.output and "Traceback" not in trainer.output
    step = int(checkpoints(run)[-1][-7:])
    resumed = [*arguments, "--resume-from", "latest", "--max-train-steps", step + 2]
    assert run_here(capsys, *resumed)[0] == 0


def is_worker(process, trainer):
    """Whether a child is a forked copy of the trainer, which the loader's processes are."""
    try:
        return process.cmdline() == trainer.cmdline()
    except psutil.Error:
        return False


@pytest.mark.parametrize("jump", [-86_400.0, pytest.param(86_400.0, marks=pytest.mark.slow)])
def test_a_jump_of_the_clock_changes_nothing(tmp_path, capsys, monkeypatch, jump):
    still, jumping = tmp_path / "still", tmp_path / "jumping"
    arguments = [*TINY, "--max-train-steps", "4", "--checkpoint-every", "2", "--output-dir"]
    assert run_here(capsys, *arguments, still)[0] == 0
    now, calls = time.time, iter(range(10**9))
    monkeypatch.setattr(time, "time", lambda: now() + jump * (next(calls) % 2))
    code, output = run_here(capsys, *arguments, jumping)
    assert code == 0, output
    assert losses(jumping) == losses(still)
    assert_same_bits(jumping / "checkpoint-0000004", still / "checkpoint-0000004")
    assert all(float(line.rsplit(",", 2)[1]) > 0 for line in (jumping / "train_log.csv").read_text().splitlines()[1:])


def test_a_corrupt_image_among_good_ones_stops_or_is_skipped_aloud(tmp_path, pictures, capsys):
    broken = pictures / "cat" / "2.png"
    broken.write_bytes(broken.read_bytes()[:50])
    arguments = on(pictures, "--max-train-steps", "4", "--num-workers", "1", "--output-dir")
    code, output = run_here(capsys, *arguments, tmp_path / "stop")
    assert code != 0 and "cat/2.png cannot be read" in output and "--on-bad-image skip" in output
    code, output = run_here(capsys, *arguments, tmp_path / "skip", "--on-bad-image", "skip")
    assert code == 0 and "skipped: " in output and "cat/2.png" in output
    assert len(losses(tmp_path / "skip")) == 5


@pytest.mark.skipif(os.name != "posix", reason="shared memory of POSIX")
def test_a_loader_that_cannot_hand_over_its_batch_ends_the_run_with_a_line(tmp_path, pictures):
    """As where shared memory is full (Docker's default is 64 MB): the run does not wait for ever."""
    code = (
        "import sys, torch\n"
        "from multiprocessing.reduction import ForkingPickler\n"
        "def full(storage): raise RuntimeError('unable to allocate shared memory(shm): No space left on device')\n"
        "ForkingPickler.register(torch.Tensor, full)\n"
        "from d_emo.train.train_dit import main; main(sys.argv[1:])"
    )
    arguments = on(pictures, "--num-workers", "1", "--max-train-steps", "4", "--output-dir", tmp_path / "run")
    exit_code, output = run_script(tmp_path / "log", "-c", code, *arguments)
    assert exit_code == 1 and "--shm-size" in output.splitlines()[-1], output
