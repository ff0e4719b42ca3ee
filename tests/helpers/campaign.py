"""The campaign: whatever happens to a command, run again it ends with the bits of an undisturbed run.

A job is a command with what it leaves; a fault strikes it at a random moment. Then the same command is run until it is
done, as a job script would, and its result is compared with the undisturbed one.
"""

import contextlib
import csv
import hashlib
import json
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from helpers.file_damage import DAMAGES
from helpers.paths import ROOT
from helpers.processes import Command, Running, Script, torchrun

# So often the command may have to be run again.
TRIES = 5
SECONDS = 240
Result = dict[str, str]


@dataclass(frozen=True)
class Job:
    """A command.

    Attributes:
        script: of it, under the repository.
        arguments: with "{out}" for the output folder and "{NAME}" for what `made` has of that name.
        result: what it leaves, by name, as digests.
        kept: patterns of files in the output folder that it can do without: they are damaged.
        names: that it writes below the output folder: links are planted there.
        processes: of it.
        launcher: starts it, if it is not started alone.
        again: arguments of every run.
    """

    script: str
    arguments: tuple[str, ...]
    result: Callable[[Path], Result]
    kept: tuple[str, ...]
    names: tuple[str, ...]
    processes: int = 1
    launcher: str = ""

    def words(self, out: Path, made: dict[str, Path]) -> list[str]:
        """The command line behind the script."""
        return [word.format(out=out, **{name: str(path) for name, path in made.items()}) for word in self.arguments]

    def start(self, log: Path, out: Path, made: dict[str, Path], limit: int | None = None) -> Running:
        """Start it; with `limit`, no file of its can grow beyond so many bytes."""
        script, words = ROOT / self.script, self.words(out, made)
        if self.launcher == "torchrun":
            return Command(log, torchrun(self.processes, script, *words))
        if self.launcher == "accelerate launch":
            launch = ["accelerate", "launch", "--cpu", "--num_processes", "1", "--num_machines", "1",
                      "--dynamo_backend", "no", "--mixed_precision", "no"]  # fmt: skip
            return Command(log, [*launch, script, *words])
        if limit is None:
            return Script(log, script, *words, processes=self.processes)
        code = (
            "import resource, runpy, sys; resource.setrlimit(resource.RLIMIT_FSIZE, ({0}, {0})); "
            "sys.argv[0] = {1!r}; runpy.run_path({1!r}, run_name='__main__')"
        )
        return Script(log, "-c", code.format(limit, str(script)), *words, processes=self.processes)


def digest(path: Path) -> str:
    """Of a file's content."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def files(*patterns: str) -> Callable[[Path], Result]:
    """Digests of the files of some names."""

    def result(out: Path) -> Result:
        found = sorted(path for pattern in patterns for path in out.glob(pattern))
        assert found, f"{out} has none of {patterns}"
        return {path.relative_to(out).as_posix(): digest(path) for path in found}

    return result


def trained(weights: str) -> Callable[[Path], Result]:
    """Weights, and the losses on the way."""

    def result(out: Path) -> Result:
        with (out / "train_log.csv").open(newline="") as file:
            losses = [f"{row['step']} {row['loss']}" for row in csv.DictReader(file)]
        return {**files(weights)(out), "losses": " ".join(losses)}

    return result


def scored(out: Path) -> Result:
    """The scores of an evaluation."""
    content = json.loads((out / "scores.json").read_text())
    return {name: repr(value) for name, value in content["scores"].items()}


# Plain PyTorch: compiled kernels differ from it in the last bits, and other processes may be compiling them meanwhile.
TRAINING = ("--kernels", "reference", "--global-batch-size", "8", "--log-every", "1", "--report-to", "none",
            "--num-workers", "0", "--checkpoint-every", "2", "--max-train-steps", "8", "--resume-from", "latest",
            "--output-dir", "{out}")  # fmt: skip
DIFFUSION = ("--model", "D-EMOv2-N-8", "--sample-every", "0", "--objective", "dit", "--lr-scheduler", "constant",
             "--lr-warmup-steps", "0", *TRAINING)  # fmt: skip
CHECKPOINTS = ("checkpoint-*/training_state/*", "checkpoint-*/manifest.json", "checkpoint-*/transformer/*")
CHECKPOINT_NAMES = ("checkpoint-0000004", ".partial-checkpoint-0000004", "train_log.csv", "run.json")
DIFFUSED = trained("transformer/*.safetensors")


def _diffusion(processes: int = 1, launcher: str = "") -> Job:
    return Job("train/train_dit.py", DIFFUSION, DIFFUSED, CHECKPOINTS, CHECKPOINT_NAMES, processes, launcher)


JOBS = {
    "train_dit": _diffusion(),
    "train_dit on 2 processes": _diffusion(2),
    "train_classifier": Job(
        "train/train_classifier.py",
        ("--model-config", '{{"depths": [1, 1, 1, 1], "widths": [8, 8, 16, 16], "head_dims": [8, 8, 8, 8]}}',
         "--resolution", "32", "--warmup-epochs", "0", "--validate-every", "8", *TRAINING),
        trained("model.safetensors"), ("checkpoint-*/training_state/*", "checkpoint-*/manifest.json"), CHECKPOINT_NAMES,
    ),
    "encode_latents": Job(
        "train/encode_latents.py",
        ("--train-data-dir", "{pictures}", "--vae", "{vae}", "--resolution", "32", "--batch-size", "2", "--shard-size",
         "8", "--num-workers", "0", "--statistics", "true", "--output-dir", "{out}"),
        files("latents-*.npy", "labels.npy", "statistics.json"), ("latents-*.npy", "statistics.json"),
        ("latents-000000016.npy", ".partial-latents-000000016.npy", "labels.npy", "statistics.json"),
    ),
    "evaluate_fid": Job(
        "eval/evaluate_fid.py",
        ("--model", "{pipeline}", "--preset", "quick", "--steps", "4", "--num-images", "64", "--batch-size", "4",
         "--reference", "digits", "--features", "pixels", "--output-dir", "{out}", "--cache-dir", "{out}-cache"),
        scored, ("samples/*.npz", "features/*/*.npz", "scores.json", "*.npz"),
        ("scores.json", "report.html", "samples", "features"),
    ),
    "evaluate_classifier": Job(
        "eval/evaluate_classifier.py",
        ("--model", "{classifier}", "--data-dir", "{pictures}", "--output-dir", "{out}"),
        files("classes.csv", "confusion.png"), ("classes.csv", "report.json", "confusion.png"),
        ("report.json", "classes.csv", "confusion.png"),
    ),
    "evaluate_detector": Job(
        "eval/evaluate_detector.py",
        ("--model", "{detector}", "--data-dir", "{boxes}", "--output-dir", "{out}"),
        files("classes.csv"), ("classes.csv", "report.json", "report.html"),
        ("report.json", "classes.csv", "report.html"),
    ),
    "evaluate_segmenter": Job(
        "eval/evaluate_segmenter.py",
        ("--model", "{segmenter}", "--data-dir", "{masks}", "--output-dir", "{out}"),
        files("classes.csv"), ("classes.csv", "report.json", "report.html"),
        ("report.json", "classes.csv", "report.html"),
    ),
}  # fmt: skip
LAUNCHED = {
    "torchrun train_dit on 2 processes": _diffusion(2, "torchrun"),
    "accelerate launch train_dit": _diffusion(1, "accelerate launch"),
}


@dataclass
class Struck:
    """A job while a fault strikes it."""

    job: Job
    running: Running
    out: Path
    made: dict[str, Path]
    random: np.random.RandomState
    scratch: Path
    undo: list[Callable[[], None]] = field(default_factory=list)
    checks: list[Callable[[], None]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def _signal_all(number: int) -> Callable[[Struck], None]:
    """To each process, as a scheduler or a terminal does."""

    def strike(struck: Struck) -> None:
        for process in struck.running.processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, number)

    return strike


def _signal_launcher(number: int) -> Callable[[Struck], None]:
    """To the process that was started alone: a launcher passes it on, or does not."""

    def strike(struck: Struck) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(struck.running.processes[0].pid, number)

    return strike


def _kill(struck: Struck) -> None:
    struck.running.kill()


def _vanish(struck: Struck) -> None:
    """The output folder is gone."""
    shutil.rmtree(struck.out, ignore_errors=True)


def _become_a_file(struck: Struck) -> None:
    """A file lies where the output folder was."""
    shutil.rmtree(struck.out, ignore_errors=True)
    with contextlib.suppress(OSError):
        struck.out.write_text("mine")
    struck.undo.append(lambda: struck.out.is_file() and struck.out.unlink())


def _plant_links(struck: Struck) -> None:
    """Links to somebody's files lie where the command is going to write."""
    victim = struck.scratch / f"victim-{struck.random.randint(10**9)}"
    victim.mkdir()
    (victim / "thesis.txt").write_text("mine")
    planted = []
    with contextlib.suppress(OSError):
        struck.out.mkdir(parents=True, exist_ok=True)
    for name in struck.job.names:
        with contextlib.suppress(OSError):
            (struck.out / name).symlink_to(victim if struck.random.randint(2) else victim / "thesis.txt")
            planted.append(struck.out / name)

    def intact() -> None:
        assert [path.name for path in victim.iterdir()] == ["thesis.txt"], list(victim.iterdir())
        assert (victim / "thesis.txt").read_text() == "mine"

    def remove() -> None:
        for path in planted:
            if path.is_symlink():
                path.unlink()

    struck.checks.append(intact)
    struck.undo.append(remove)


def _damage(struck: Struck) -> None:
    """Killed, and some of its files are damaged, or exchanged for something else."""
    struck.running.kill()
    found = sorted({path for pattern in struck.job.kept for path in struck.out.glob(pattern) if path.is_file()})
    for _ in range(min(2, len(found))):
        path = found[struck.random.randint(len(found))]
        # A folder in a report's place is the user's: it is named, never deleted.
        left = ("not readable", "a pipe", *(("a folder",) if "report.json" in struck.job.names else ()))
        names = [name for name in DAMAGES if name not in left]
        if path.is_file() and path.stat().st_size:
            name = names[struck.random.randint(len(names))]
            DAMAGES[name](path)
            struck.notes.append(f"{path.relative_to(struck.out)}: {name}")


def _exchange(struck: Struck) -> None:
    """Killed, and two of its files change places."""
    struck.running.kill()
    found = sorted({path for pattern in struck.job.kept for path in struck.out.glob(pattern) if path.is_file()})
    if len(found) > 1:
        first, second = (found[index] for index in struck.random.choice(len(found), 2, replace=False))
        content = first.read_bytes()
        first.write_bytes(second.read_bytes())
        second.write_bytes(content)


def _start_another(struck: Struck) -> None:
    """The same command is started a second time, while the first one works."""
    with struck.job.start(struck.scratch / "second.log", struck.out, struck.made) as second:
        wait(second)
        assert "Traceback" not in second.output, second.output


FAULTS: dict[str, Callable[[Struck], None]] = {
    "kill -9": _kill,
    "SIGTERM": _signal_all(signal.SIGTERM),
    "Ctrl-C": _signal_all(signal.SIGINT),
    "SIGHUP": _signal_all(signal.SIGHUP),
    "a full disk": lambda struck: None,  # from its start, see `strike`
    "the folder is gone": _vanish,
    "a file in the folder's place": _become_a_file,
    "links planted": _plant_links,
    "files damaged": _damage,
    "files exchanged": _exchange,
    "two at once": _start_another,
}
LAUNCHER_FAULTS: dict[str, Callable[[Struck], None]] = {
    "SIGTERM to the launcher": _signal_launcher(signal.SIGTERM),
    "kill -9 of the launcher": _signal_launcher(signal.SIGKILL),
    "Ctrl-C": _signal_all(signal.SIGINT),
}
# After these a command may end in any way.
MUTE = {"kill -9", "files damaged", "files exchanged", "kill -9 of the launcher"}


def wait(running: Running) -> int:
    """Until all processes have ended by themselves; the first exit code that is not 0."""
    deadline = time.monotonic() + SECONDS
    while running.is_running() and time.monotonic() < deadline:
        codes = running.exit_codes()
        if any(codes) and None in codes:
            time.sleep(5)
            running.kill()  # as a launcher does
        time.sleep(0.02)
    assert not running.is_running(), f"no end after {SECONDS} s: {running.output[-2000:]}"
    return next((code for code in running.exit_codes() if code), 0)


def undisturbed(job: Job, scratch: Path, made: dict[str, Path]) -> tuple[Result, float]:
    """What a job leaves, and the seconds that it takes."""
    out, start = scratch / "undisturbed", time.monotonic()
    with job.start(scratch / "undisturbed.log", out, made) as running:
        assert wait(running) == 0, running.output
    return job.result(out), time.monotonic() - start


def strike(
    job: Job, fault: str, seed: int, scratch: Path, made: dict[str, Path], expected: Result, seconds: float
) -> int:
    """Let a fault strike once, run the command until it is done, and compare; how many runs it took."""
    random, out = np.random.RandomState(seed), scratch / "out"
    limit = int(random.choice([2_000, 20_000, 60_000])) if fault == "a full disk" else None
    with job.start(scratch / "first.log", out, made, limit) as running:
        struck = Struck(job, running, out, made, random, scratch)
        moment = time.monotonic() + random.uniform(0, seconds)
        while time.monotonic() < moment and running.is_running():
            time.sleep(0.01)
        {**FAULTS, **LAUNCHER_FAULTS}[fault](struck)
        if fault == "kill -9 of the launcher":
            wait_for_children(job, out)
        code = wait(running)
        said = running.output
    assert fault in MUTE or job.launcher or "Traceback" not in said, f"{fault}: {said[-3000:]}"  # launchers have some
    for check in struck.checks:
        check()
    for runs in range(1, TRIES + 1):
        if (code == 0 and runs > 1) or (code == 0 and fault not in MUTE and complete(job, out, expected)):
            break
        for undo in struck.undo:
            undo()
        if "no whole checkpoint" in said:  # all of them were damaged
            shutil.rmtree(out)
        with job.start(scratch / f"again-{runs}.log", out, made) as running:
            code, said = wait(running), running.output
        assert "Traceback" not in said, said[-3000:]
        for check in struck.checks:
            check()
    assert code == 0, f"not done after {TRIES} runs: {said[-3000:]}"
    assert job.result(out) == expected, f"other results after {fault} (seed {seed}; {'; '.join(struck.notes)})"
    return runs


def complete(job: Job, out: Path, expected: Result) -> bool:
    """Whether a job's result is there as it should be."""
    try:
        return job.result(out) == expected
    except (AssertionError, OSError, ValueError, KeyError):
        return False


def wait_for_children(job: Job, out: Path) -> None:
    """Until no process works on a folder any more: those of a killed launcher notice that it is gone."""
    deadline = time.monotonic() + SECONDS
    while any(_works_on(out)) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not any(_works_on(out)), "processes of a killed launcher go on"


def _works_on(out: Path) -> Iterator[int]:
    import psutil

    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if str(out) in process.cmdline():
                yield process.pid
