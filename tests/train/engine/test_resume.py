"""Going on with a run: the same one wherever its output goes, changed on purpose only, from old checkpoints."""

import json
import os
import pickle
import shutil
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.processes import Script, Trainer
from helpers.training import TINY, assert_same_bits, losses, run_here, train_to_the_end
from safetensors.torch import load_file

from d_emo import create_model
from d_emo.common import locks, processes
from d_emo.common.locks import FolderLock, LockedError
from d_emo.train.engine.checkpoints import CheckpointError, write_manifest
from d_emo.train.engine.resume import check_same_run
from d_emo.train.engine.state import set_schedule


class Opened:
    """Leaves a mark where a pickle that holds it is opened."""

    def __init__(self, mark):
        self.mark = str(mark)

    def __reduce__(self):
        return Path.touch, (Path(self.mark),)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Four steps with checkpoints at two and four."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    with Trainer(folder.parent / "log", *TINY, "--max-train-steps", "4", "--checkpoint-every", "2", "--output-dir",
                 folder) as trainer:  # fmt: skip
        assert trainer.finish() == 0, trainer.output
    return folder


def copy_of(finished, tmp_path, without="checkpoint-0000004"):
    """The run as it was at its checkpoint of step 2."""
    shutil.copytree(finished, tmp_path / "run", ignore=shutil.ignore_patterns(without))
    return tmp_path / "run"


def make_old(checkpoint, mark):
    """Bring a checkpoint into the form of older versions, with a prepared pickle in place of its schedule."""
    state, step = checkpoint / "training_state", json.loads((checkpoint / "manifest.json").read_text())["step"]
    tensors = load_file(state / "optimizer.safetensors")
    names = [name for name, value in create_model("D-EMOv2-N-8").named_parameters() if value.requires_grad]
    values = {
        index: {key: tensors[f"{key}/{name}"] for key in ("step", "exp_avg", "exp_avg_sq")}
        for index, name in enumerate(names)
    }
    group = {"lr": 1e-3, "initial_lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0, "amsgrad": False,
             "maximize": False, "foreach": None, "capturable": False, "differentiable": False, "fused": True,
             "decoupled_weight_decay": True, "params": list(range(len(names)))}  # fmt: skip
    torch.save({"state": values, "param_groups": [group]}, state / "optimizer.bin")
    numbers = json.loads((state / "random-0.json").read_text())
    version, keys, gauss = numbers["python"]
    states = {"step": 0, "random_state": (version, tuple(keys), gauss),
              "numpy_random_seed": np.random.get_state(), "torch_manual_seed": torch.get_rng_state()}  # fmt: skip
    torch.save(states, state / "random_states_0.pkl")
    (state / "custom_checkpoint_0.pkl").write_bytes(pickle.dumps(Opened(mark)))
    for name in ("optimizer.safetensors", "optimizer.json", "random-0.json"):
        (state / name).unlink()
    for name in ("run.json", "manifest.json"):
        (checkpoint / name).unlink()
    write_manifest(checkpoint, {"step": step, "processes": 1, "sharded": False})


def test_an_old_checkpoint_goes_on_bit_for_bit_and_its_pickle_is_never_opened(finished, tmp_path, capsys):
    run, mark = copy_of(finished, tmp_path), tmp_path / "mark"
    make_old(run / "checkpoint-0000002", mark)
    pickle.loads(pickle.dumps(Opened(tmp_path / "control")))
    assert (tmp_path / "control").exists()  # such a pickle would
    train_to_the_end(capsys, tmp_path / "log", *TINY, "--max-train-steps", "4", "--output-dir", run, "--resume-from",
                     "latest")  # fmt: skip
    assert not mark.exists()
    assert losses(run) == losses(finished)
    assert_same_bits(run / "checkpoint-0000004", finished / "checkpoint-0000004")


def test_an_old_sharded_checkpoint_is_refused_with_the_way_on(finished, tmp_path, capsys):
    run = copy_of(finished, tmp_path)
    checkpoint = run / "checkpoint-0000002"
    (checkpoint / "manifest.json").unlink()
    write_manifest(checkpoint, {"step": 2, "processes": 2, "sharded": True})
    code, output = run_here(capsys, *TINY, "--output-dir", run, "--resume-from", "latest")
    assert code != 0 and "an older version saved its state in shards" in output and "--init-from" in output


def test_a_checkpoint_holds_no_pickle(finished):
    names = {path.suffix for path in (finished / "checkpoint-0000004").rglob("*") if path.is_file()}
    assert names == {".safetensors", ".json", ".md"}


CHANGES = {"seed": "3", "learning_rate": "1e-2", "class_dropout_prob": "0.5", "ema_decay": "0.5",
           "global_batch_size": "4"}  # fmt: skip


@pytest.mark.parametrize("elsewhere", [True, False], ids=["into another folder", "in its folder"])
@pytest.mark.parametrize("name", CHANGES)
def test_a_run_is_compared_with_the_checkpoints_own_wherever_its_output_goes(
    finished, tmp_path, capsys, name, elsewhere
):
    run = copy_of(finished, tmp_path)
    target = tmp_path / "other" if elsewhere else run
    before = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.name != ".lock")
    options = [f"--{name.replace('_', '-')}", CHANGES[name], "--max-train-steps", "4", "--output-dir", target]
    code, output = run_here(capsys, *TINY, *options, "--resume-from", run / "checkpoint-0000002")
    assert code != 0 and f"{name} " in output and f"--allow-change {name}" in output
    left = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.name != ".lock")
    assert [path for path in left if path.name != "other"] == before


def test_a_permitted_rate_holds_from_there_on_and_the_rest_is_as_before(finished, tmp_path, capsys):
    run = copy_of(finished, tmp_path)
    output = train_to_the_end(
        capsys, tmp_path / "log", *TINY, "--learning-rate", "1e-2", "--max-train-steps", "4", "--output-dir",
        tmp_path / "other", "--resume-from", run / "checkpoint-0000002", "--allow-change", "learning_rate",
    )  # fmt: skip
    assert "from here on: learning_rate 0.002 -> 0.01" in output
    rows = [line.split(",") for line in losses(tmp_path / "other")[1:]]
    assert [float(row[3]) for row in rows] == [1e-2, 1e-2]
    assert rows[0][:3] == losses(finished)[3].split(",")[:3]  # the next loss comes of the old weights
    assert json.loads((tmp_path / "other" / "run.json").read_text())["learning_rate"] == 1e-2


def test_a_checkpoint_without_an_output_folder_goes_on_in_its_own(finished, tmp_path, capsys):
    run = copy_of(finished, tmp_path)
    train_to_the_end(capsys, tmp_path / "log", "--max-train-steps", "4", "--report-to", "none", "--resume-from",
                     run / "checkpoint-0000002")  # fmt: skip
    assert losses(run) == losses(finished)
    assert_same_bits(run / "checkpoint-0000004", finished / "checkpoint-0000004")


def test_options_that_a_person_broke_in_run_json_end_with_a_line(finished, tmp_path, capsys):
    for content in ('{"learning_rate": "fast"}', '{"seed": [1]}', "[]", "{", "[" * 100_000):
        run = copy_of(finished, tmp_path)
        for path in (run / "run.json", run / "checkpoint-0000002" / "run.json"):
            path.write_text(content)
        code, output = run_here(capsys, "--report-to", "none", "--output-dir", run, "--resume-from", "latest")
        assert code != 0 and "Traceback" not in output
        shutil.rmtree(run)


def test_a_mistyped_folder_is_said_with_the_run_that_may_be_meant(finished, capsys):
    near = finished.with_name("ruun")
    code, output = run_here(capsys, *TINY, "--max-train-steps", "1", "--output-dir", near, "--resume-from", "latest")
    assert code == 0 and f"no checkpoint in {near} yet (there is {finished}): starting from the beginning" in output
    shutil.rmtree(near)


@pytest.mark.slow
def test_two_trainers_of_one_folder_the_second_is_refused_and_the_first_unharmed(tmp_path, capsys):
    run = tmp_path / "run"
    arguments = [*TINY, "--max-train-steps", "1000000", "--checkpoint-every", "50", "--keep-checkpoints", "1",
                 "--output-dir", run]  # fmt: skip
    with Trainer(tmp_path / "log", *arguments) as trainer:
        trainer.wait_until((run / "checkpoint-0000050").exists)
        for resume in ([], ["--resume-from", "latest"]):
            code, output = run_here(capsys, *arguments, *resume)
            assert code != 0 and f"--output-dir {run} is in use by process {trainer.process.pid}" in output
        assert trainer.is_running()
        trainer.process.send_signal(signal.SIGTERM)
        trainer.finish()
    steps = [int(line.split(",")[0]) for line in losses(run)[1:]]
    assert steps == list(range(1, len(steps) + 1))


def test_a_lock_is_gone_with_its_process_though_children_that_it_forked_live_on(tmp_path):
    code = (
        "import os, sys, time; from pathlib import Path; from d_emo.common.locks import FolderLock\n"
        f"lock = FolderLock(Path({str(tmp_path / 'folder')!r})); child = os.fork()\n"
        f"(child == 0) or Path({str(tmp_path / 'ready')!r}).write_text(str(child)); time.sleep(60)"
    )
    with Script(tmp_path / "log", "-c", code) as holder:
        holder.wait_until(lambda: (tmp_path / "ready").exists() and (tmp_path / "ready").read_text() != "")
        with pytest.raises(LockedError, match=r"--output-dir .*folder is in use by process \d+ on"):
            FolderLock(tmp_path / "folder", "--output-dir")
        holder.process.kill()
        holder.forked[0].join()
        child = int((tmp_path / "ready").read_text())
        os.kill(child, 0)  # it lives
        FolderLock(tmp_path / "folder").release()
        os.kill(child, signal.SIGKILL)


def test_a_lock_of_a_folder_that_was_removed_meanwhile_is_none(tmp_path, monkeypatch):
    """Its holder removes an empty folder at its end; who waited for that lock makes the folder, and the lock, anew."""
    folder, lock = tmp_path / "folder", locks._lock

    def removed_first(descriptor):
        monkeypatch.setattr(locks, "_lock", lock)
        shutil.rmtree(folder)
        folder.mkdir()
        return lock(descriptor)

    monkeypatch.setattr(locks, "_lock", removed_first)
    with FolderLock(folder, wait=True) as held:
        assert os.path.samestat(os.fstat(held._descriptor), (folder / ".lock").stat())


def test_a_refused_start_leaves_no_folder(tmp_path, capsys):
    arguments = [*TINY, "--output-dir", tmp_path / "run", "--resume-from", tmp_path / "checkpoint-0000001"]
    code, output = run_here(capsys, *arguments)
    assert code != 0 and "there is no such folder" in output
    assert not list(tmp_path.iterdir())


def test_a_lock_follows_no_link(tmp_path):
    (tmp_path / "target").write_text("precious")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / ".lock").symlink_to(tmp_path / "target")
    with pytest.raises(OSError, match="folder"):
        FolderLock(tmp_path / "folder")
    assert (tmp_path / "target").read_text() == "precious"


@pytest.mark.parametrize(
    "number",
    [signal.SIGHUP, *(pytest.param(number, marks=pytest.mark.slow) for number in (signal.SIGTERM, signal.SIGINT))],
)
def test_a_signal_saves_and_stops(tmp_path, number):
    run = tmp_path / "run"
    with Trainer(tmp_path / "log", *TINY, "--output-dir", run) as trainer:
        trainer.wait_until(lambda: "step 2: loss" in trainer.output or "step 2/" in trainer.output)
        trainer.process.send_signal(number)
        assert trainer.finish() == 128 + number, trainer.output
    (checkpoint,) = run.glob("checkpoint-*")
    assert (checkpoint / "manifest.json").is_file()


@pytest.mark.parametrize(
    ("launched", "code"), [(True, 128 + signal.SIGTERM), pytest.param(False, None, marks=pytest.mark.slow)]
)
def test_a_trainer_ends_in_order_with_its_launcher_and_outlives_anything_else(tmp_path, launched, code):
    """The launcher, here a process that pretends to be one, dies by kill -9."""
    run, pid, done = tmp_path / "run", tmp_path / "pid", tmp_path / "done"
    steps = ["--max-train-steps", "100000" if launched else "60", "--output-dir", str(run)]
    parent = (
        "import os, time; from pathlib import Path; from d_emo.common import processes\n"
        f"processes.is_launcher = lambda words: {launched}; child = os.fork()\n"
        "if child: time.sleep(600)\n"
        f"Path({str(pid)!r}).write_text(str(os.getpid()))\n"
        "from d_emo.train import train_dit\n"
        "try:\n"
        f"    train_dit.main({[*TINY, *steps]!r}); code = 0\n"
        "except SystemExit as stop:\n"
        "    code = stop.code\n"
        f"Path({str(done)!r}).write_text(str(code)); os._exit(0)"
    )
    with Script(tmp_path / "log", "-c", parent) as launcher:
        launcher.wait_until(lambda: "step 2: loss" in launcher.output or "step 2/" in launcher.output)
        launcher.process.kill()
        launcher.forked[0].join()
        wait_for(done)
    assert done.read_text() == str(code or 0)
    assert list(run.glob("checkpoint-*"))


@pytest.mark.parametrize(
    ("line", "launches"),
    [
        ("python /usr/bin/accelerate launch train/train_dit.py", True),
        ("/usr/bin/python3.11 -u -m torch.distributed.run --nproc-per-node 2 train.py", True),
        ("python -m accelerate.commands.launch train/train_dit.py", True),
        ("/opt/python/bin/python3 /opt/python/bin/torchrun train.py", True),
        ("bash /home/me/accelerate/run.sh", False),
        ("sh -c cd accelerate; python train/train_dit.py", False),
        ("python sweep_accelerate.py", False),
        ("python sweep.py torchrun", False),
        ("tmux new -s accelerate", False),
        ("", False),
    ],
)
def test_only_launchers_are_taken_for_launchers(line, launches):
    assert processes.is_launcher(line.split()) == launches


def wait_for(path, seconds=120):
    import time

    deadline = time.monotonic() + seconds
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert path.exists()


def test_ignored_signals_stay_ignored(monkeypatch):
    from d_emo.train.engine.stopping import StopRequest

    former = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        with StopRequest():
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
            assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
    finally:
        signal.signal(signal.SIGHUP, former)


@pytest.mark.parametrize("name", ["constant_with_warmup", "cosine", "linear", "polynomial", "cosine_with_restarts"])
def test_a_schedule_rebuilt_from_the_step_goes_on_bit_for_bit(name):
    from diffusers.optimization import get_scheduler

    def schedule():
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=3e-4)
        return optimizer, get_scheduler(name, optimizer, num_warmup_steps=5, num_training_steps=40)

    straight, rates = schedule(), []
    for _ in range(30):
        straight[0].step()
        straight[1].step()
        rates.append(straight[0].param_groups[0]["lr"])
    optimizer, rebuilt = schedule()
    set_schedule(rebuilt, 13)
    assert optimizer.param_groups[0]["lr"] == rates[12] == rebuilt.get_last_lr()[0]
    for rate in rates[13:]:
        optimizer.step()
        rebuilt.step()
        assert optimizer.param_groups[0]["lr"] == rate


def test_the_precision_of_a_launch_is_part_of_the_run(finished, tmp_path, capsys, monkeypatch):
    run = copy_of(finished, tmp_path)
    assert json.loads((run / "run.json").read_text())["mixed_precision"] == "no"
    arguments = [*TINY, "--max-train-steps", "4", "--output-dir", run, "--resume-from", "latest"]
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")  # as `accelerate launch --mixed_precision bf16` sets it
    code, output = run_here(capsys, *arguments, "--mixed-precision", "bf16")
    assert code != 0 and "mixed_precision 'no' -> 'bf16'" in output
    assert run_here(capsys, *arguments)[0] == 0  # the run's own lies under what is given
    assert losses(run) == losses(finished)


def test_what_a_default_came_to_is_no_other_value(finished, tmp_path, capsys):
    run = copy_of(finished, tmp_path)
    train_to_the_end(capsys, tmp_path / "log", *TINY, "--max-train-steps", "4", "--output-dir", run, "--resume-from",
                     "latest", "--mixed-precision", "no", "--color", "grey")  # fmt: skip
    assert losses(run) == losses(finished)


def test_a_folder_whose_name_is_no_text_is_refused_before_anything_is_computed(tmp_path, capsys):
    run = tmp_path / os.fsdecode(b"l\xfcbeck")
    code, output = run_here(capsys, *TINY, "--max-train-steps", "1", "--output-dir", run)
    assert code != 0 and r"l\xfcbeck: a name on the way there is no text in UTF-8" in output
    assert not run.exists()
    odd = tmp_path / "two\nlines ü"
    train_to_the_end(capsys, tmp_path / "log", *TINY, "--max-train-steps", "1", "--output-dir", odd)
    assert run_here(capsys, *TINY, "--max-train-steps", "2", "--output-dir", odd, "--resume-from", "latest")[0] == 0


def test_a_trainer_runs_in_a_thread(tmp_path):
    """As servers of notebooks start it."""
    from d_emo.train import train_dit

    arguments = [*TINY, "--max-train-steps", "1", "--output-dir", str(tmp_path / "run")]
    with ThreadPoolExecutor(1) as pool:
        pool.submit(train_dit.main, arguments).result()  # raises what the trainer exits with
    assert (tmp_path / "run" / "model_index.json").is_file()


def test_a_launcher_that_ended_while_its_trainer_started_is_noticed(monkeypatch):
    from d_emo.common import commands, processes

    monkeypatch.setattr(commands, "started_by", -1)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    with pytest.raises(processes.LaunchError, match="its launcher ended while it started"):
        processes._end_with_launcher()


@pytest.mark.parametrize(
    "adapters", [[], pytest.param(["--lora-rank", "2"], marks=pytest.mark.slow)], ids=["all weights", "LoRA"]
)
def test_a_run_goes_on_though_what_it_began_with_is_gone(finished, tmp_path, capsys, adapters):
    shutil.copytree(finished / "checkpoint-0000004", tmp_path / "base")
    arguments = [*TINY, *adapters, "--checkpoint-every", "2", "--max-train-steps", "4", "--output-dir"]
    run = tmp_path / "run"
    train_to_the_end(capsys, tmp_path / "log", *arguments, run, "--init-from", tmp_path / "base")
    before = losses(run)
    shutil.rmtree(tmp_path / "base")
    shutil.rmtree(run / "checkpoint-0000004")
    resume = [*arguments, run, "--resume-from", "latest", "--init-from"]
    code, output = run_here(capsys, *resume, tmp_path / "base")
    assert code != 0 and "--allow-change init_from" in output
    train_to_the_end(capsys, tmp_path / "log", *resume, run / "checkpoint-0000002", "--allow-change", "init_from")
    assert losses(run) == before


def test_the_vae_is_told_by_its_weights(tmp_path):
    stored = {**RUN_WITH_VAE, "vae": "here"}
    assert check_same_run("X", stored, {**stored, "vae": "elsewhere"}, None, tmp_path) == []
    with pytest.raises(CheckpointError, match=r"vae_digest 'a' -> 'b'.*--init-from"):
        check_same_run("X", stored, {**stored, "vae_digest": "b"}, "vae_digest", tmp_path)
    older = {**stored, "vae_digest": None}
    assert check_same_run("X", older, stored, None, tmp_path) == []
    with pytest.raises(CheckpointError, match="vae 'here' -> 'elsewhere'"):
        check_same_run("X", older, {**stored, "vae": "elsewhere"}, None, tmp_path)


RUN_WITH_VAE = {"model": "D-EMOv2-S-2", "vae_digest": "a"}
