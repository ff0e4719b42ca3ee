"""Two or more checkouts of this project beside one another, in turns: what a change costs or gains.

    git worktree add ../before COMMIT
    python eval/benchmarks/compare_checkouts.py ../before . --models D-EMOv2-S-2 DiT-S-2

Every checkout runs in a process of its own, which stays alive; only one of them works at a time. In a round every
checkout does every job, and the next round goes through them backwards. A ratio is the median over rounds of the
first checkout's time over another one's: above 1, the change is faster. The last model is the baseline of "over". Jobs
and types are those of throughput.py. The table names checkouts by their commits; `+` stands for changes since.
"""

import argparse
import contextlib
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from d_emo.common.command_line import CommandParser
from d_emo.common.commands import command
from d_emo.common.numbers import whole_from

JOBS, DTYPES = ("forward", "train"), ("float32", "bfloat16")
LEAST_SECONDS = 0.8  # of a measurement; shorter jobs are repeated
Case = tuple[str, str, str]  # job, dtype, model


def prepare(job: str, dtype: str, model_name: str, batch: int, latent: int) -> Callable[[], None]:
    """A forward pass in `dtype`, or a training step in float32 or autocast, as a function."""
    import torch

    from d_emo import create_model

    torch.manual_seed(0)
    kind = getattr(torch, dtype)
    model = create_model(model_name, sample_size=latent)
    for parameter in model.parameters():
        if parameter.requires_grad:  # adaLN-Zero's zeros would distort times
            torch.nn.init.normal_(parameter, std=0.02)
    latents = torch.randn(batch, 4, latent, latent)
    times, labels = torch.full((batch,), 500), torch.zeros(batch, dtype=torch.long)
    if job == "forward":
        model.eval().to(kind)

        def forward() -> None:
            with torch.no_grad():
                model(latents.to(kind), times, labels)

        return forward
    optimizer = torch.optim.AdamW((p for p in model.train().parameters() if p.requires_grad), lr=1e-6, fused=True)

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
            sample = model(latents, times, labels).sample
        sample.float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def work(options: argparse.Namespace) -> None:
    """A checkout's process: reads cases, one a line, does each and answers with the seconds."""
    try:
        from d_emo.common.processes import keep_freed_memory
    except ImportError:  # a checkout of before d_emo/common
        from d_emo.processes import keep_freed_memory  # type: ignore[no-redef]

    keep_freed_memory()
    jobs: dict[Case, tuple[Callable[[], None], int]] = {}
    for line in sys.stdin:
        case: Case = tuple(json.loads(line))
        if case not in jobs:
            job = prepare(*case, options.batch, options.latent)
            job()  # compiles, allocates, makes the optimizer's state
            jobs[case] = job, max(1, round(LEAST_SECONDS / timed(job, 1)))
        print(json.dumps(timed(*jobs[case], options.clock)), flush=True)


def timed(job: Callable[[], None], times: int, clock: str = "wall") -> float:
    """Seconds that a job takes, over several runs."""
    now = time.perf_counter if clock == "wall" else time.process_time
    start = now()
    for _ in range(times):
        job()
    return (now() - start) / times


@contextlib.contextmanager
def started(checkout: Path, options: argparse.Namespace) -> Iterator[Callable[[Case], float]]:
    """A checkout's process, as a function from a case to its seconds."""
    with tempfile.TemporaryDirectory() as folder:
        package = Path(folder, "d_emo")  # found before any installation of the project
        package.mkdir()
        for path in (checkout / "d_emo").iterdir():
            (package / path.name).symlink_to(path)
        for name in ("pipelines", "train", "eval"):
            if not (package / name).exists():
                (package / name).symlink_to(checkout / name)
        command = [sys.executable, __file__, "--work", "--clock", options.clock]
        command += ["--batch", str(options.batch), "--latent", str(options.latent)]
        environment = {**os.environ, "PYTHONPATH": folder}
        if options.clock == "cpu":
            environment["OMP_WAIT_POLICY"] = "passive"  # or threads that wait would count as work
        process = subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert process.stdin and process.stdout
        requests, answers = process.stdin, process.stdout

        def seconds(case: Case) -> float:
            requests.write(json.dumps(case) + "\n")
            requests.flush()
            if not (answer := answers.readline()):
                raise RuntimeError(f"{checkout} failed at {', '.join(case)}; see above.")
            return json.loads(answer)

        try:
            yield seconds
        finally:
            requests.close()
            process.wait(60)


def label(checkout: Path) -> str:
    """The checkout's commit."""
    git = ["git", "-C", str(checkout)]
    commit = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    changed = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True).stdout
    return (commit or checkout.name) + ("+" if changed else "")


def ratio(numerators: list[float], denominators: list[float]) -> float:
    """Median of the rounds' ratios."""
    return statistics.median(a / b for a, b in zip(numerators, denominators, strict=True))


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = CommandParser("compare_checkouts", __doc__)
    parser.add_argument("checkouts", nargs="*", type=Path, help="Folders; the first is what others are compared with.")
    parser.add_argument("--models", nargs="+", default=["D-EMOv2-S-2", "DiT-S-2"], help="The last is the baseline.")
    parser.add_argument("--jobs", nargs="+", choices=JOBS, default=JOBS)
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=DTYPES)
    parser.add_argument("--batch", type=whole_from(1), default=8)
    parser.add_argument("--latent", type=whole_from(1), default=32, help="Side of the latent.")
    parser.add_argument("--rounds", type=whole_from(1), default=7)
    parser.add_argument(
        "--clock", choices=("wall", "cpu"), default="wall",
        help="cpu: the processor's time of all threads, for a machine that does other things at the same time.",
    )  # fmt: skip
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if not options.work and not options.checkouts:
        parser.error("name at least one checkout.")
    return options


@command("compare_checkouts")
def main(arguments: list[str]) -> None:
    """Measure, print the table."""
    options = parse(arguments)
    if options.work:
        return work(options)
    cases = list(itertools.product(options.jobs, options.dtypes, options.models))
    seconds: dict[tuple[Path, Case], list[float]] = {key: [] for key in itertools.product(options.checkouts, cases)}
    with contextlib.ExitStack() as stack:
        run = {path: stack.enter_context(started(path.resolve(), options)) for path in options.checkouts}
        for number in range(options.rounds):
            for case in cases:
                for path in options.checkouts[:: -1 if number % 2 else 1]:
                    seconds[path, case].append(run[path](case))
    print(
        f"| case | model | checkout | ms | over {label(options.checkouts[0].resolve())} | over {options.models[-1]} |"
    )
    print("|---" * 6 + "|")
    for (job, dtype, model), path in itertools.product(cases, options.checkouts):
        ours = seconds[path, (job, dtype, model)]
        before = seconds[options.checkouts[0], (job, dtype, model)]
        baseline = seconds[path, (job, dtype, options.models[-1])]
        print(
            f"| {job} {dtype}, batch {options.batch} | {model} | {label(path.resolve())} "
            f"| {1e3 * statistics.median(ours):.0f} | {ratio(before, ours):.3f} | {ratio(baseline, ours):.2f} |"
        )
    return None


if __name__ == "__main__":
    main(sys.argv[1:])
