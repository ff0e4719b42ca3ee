"""What a run on a GPU found, as tables and plots.

    python -m d_emo.eval.benchmarks.gpu.report docs/data/h100 --speed-plot docs/h100_speed.png

The folder is one that `first_run`, `pair` or `quality` filled; `--loss-plot` draws the losses of the latter two.
"""

import argparse
import csv
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from d_emo.common.command_line import CommandParser
from d_emo.common.commands import command
from d_emo.common.files import check_writable, written_whole
from d_emo.common.gpus import peak_flops
from d_emo.eval.benchmarks.gpu.parts import RESULTS
from d_emo.eval.benchmarks.gpu.results import read_results
from d_emo.eval.benchmarks.side_by_side import known

Line = dict[str, Any]
OURS, PLAIN, THEIRS = "D-EMOv2", "D-EMOv2, plain PyTorch", "DiT"
CHECKS = ("attention", "local", "network", "launch", "bench", "profile", "training", "trained", "quality")
# What kernels are, by their names; the first that fits.
KINDS = (
    ("optimizer", r"multi_tensor_apply|fused_adam"),
    ("attention of PyTorch (SDPA)", r"sdpa|flash|fmha"),
    ("cuDNN's depthwise convolution", r"(dgrad|wgrad|conv)2d|depthwise"),
    ("matrix products", r"nvjet|gemm|cutlass|cublas"),
    ("made by Inductor", r"^triton_"),
    ("this package's kernels", r"^_\w+_kernel$"),
    ("PyTorch's other kernels", r"at::native|Memset|Memcpy"),
)
REST = "not among the longest"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return (
        "\n".join("| " + " | ".join(line) + " |" for line in lines).replace("| --- ", "|---").replace("--- |", "---|")
    )


def of_kind(lines: Sequence[Line], kind: str) -> list[Line]:
    """The lines of a kind."""
    return [line for line in lines if line["kind"] == kind]


def describe_machine(lines: Sequence[Line]) -> str:
    """The card, what runs on it, and its two ceilings."""
    facts = of_kind(lines, "facts")
    if not facts:
        return "no facts"
    found = facts[0]
    return (
        f"{found.get('gpu', 'no GPU')}, torch {found['torch']}, Triton {found['triton']}: "
        f"copies {found['copy_tb_s']:.2f} TB/s, products {found['matmul_tflops']:.0f} TFLOP/s"
    )


def checks(lines: Sequence[Line]) -> str:
    """How many checks were right, and those that were not."""
    told = []
    for kind in CHECKS:
        judged = [line for line in of_kind(lines, kind) if "ok" in line]
        bad = [line for line in judged if not line["ok"]]
        if judged:
            told.append(f"{kind}: {len(judged) - len(bad)} of {len(judged)}")
        told += [f"  FAILED {line.get('name', '')}: {line.get('error') or line.get('errors') or line}" for line in bad]
    return "\n".join(told)


def _pairs(lines: Sequence[Line]) -> dict[tuple[str, str], dict[str, Line]]:
    """By case and size: the lines of both networks, and of D-EMOv2 in plain PyTorch."""
    found: dict[tuple[str, str], dict[str, Line]] = {}
    for line in of_kind(lines, "speed"):
        name, _, variant = line["model"].partition("@")
        family, _, size = name.partition("-")
        if name.startswith("D-EMOv2"):
            family, size = OURS, name.removeprefix("D-EMOv2-")
        which = PLAIN if "reference" in variant else family
        case = line["case"] + (", checkpointed" if "checkpointed" in variant else "")
        found.setdefault((case, size), {})[which] = line
    return {key: lines for key, lines in found.items() if THEIRS in lines and OURS in lines}


def speed_table(lines: Sequence[Line]) -> str:
    """Images a second, ratios, share of the card's peak and memory; a row a case."""
    gpu = next((line.get("gpu", "") for line in of_kind(lines, "facts")), "")
    peak = peak_flops(gpu)
    header = ["case", "size", "D-EMOv2, images/s", "plain PyTorch", "DiT", "D-EMOv2 over DiT", "plain over DiT"]
    rows = []
    for (case, size), found in _pairs(lines).items():
        cells = [case.replace(" bfloat16", ""), size]
        cells += [known(found.get(which, {}).get("images_s"), ",.0f") for which in (OURS, PLAIN, THEIRS)]
        cells += [known(found.get(which, {}).get("ratio"), ".2f") for which in (OURS, PLAIN)]
        both = [found[which] for which in (OURS, THEIRS)]
        shares = [peak and line.get("tflops") and 1e12 * line["tflops"] / peak for line in both]
        cells.append(", ".join(known(share or None, ".0%") for share in shares))
        cells.append(", ".join(known(line.get("peak_mib") and line["peak_mib"] / 1024, ".1f") for line in both))
        rows.append(cells)
    return table([*header, "MFU, both", "peak GiB, both"], rows)


def operators_table(lines: Sequence[Line]) -> str:
    """The operators alone: milliseconds forward and backward, and those of reading and writing each tensor once."""
    rows = []
    for line in of_kind(lines, "micro"):
        if "forward_ms" not in line:
            continue
        backward = line.get("backward_ms", line.get("both_ms", float("nan")) - line["forward_ms"])
        floor = ", ".join(f"{value:.2f}" for value in line.get("floor_ms_f_b", []))
        rows.append([line["name"], f"{line['forward_ms']:.2f}", f"{backward:.2f}", floor or "-"])
    return table(["operator", "forward, ms", "backward, ms", "each tensor once, ms"], rows)


def launches_table(lines: Sequence[Line]) -> str:
    """Settings of the kernels' launches: milliseconds of all kernels forward and backward, and of each."""
    rows = []
    for line in of_kind(lines, "launch"):
        if "kernels" in line:
            each = ", ".join(
                f"{name.strip('_').removesuffix('_kernel')} {ms:.3f}" for name, ms in line["kernels"].items()
            )
            rows.append([line["name"], f"{line['all_ms']:.3f}", each])
    return table(["setting", "ms", "of them"], sorted(rows))


def kind_of_kernel(name: str) -> str:
    """What a kernel is for, by its name."""
    return next((kind for kind, pattern in KINDS if re.search(pattern, name)), "others")


def profile_table(lines: Sequence[Line]) -> str:
    """Where the GPU's milliseconds of a training step go, by kinds of kernels."""
    profiles = [line for line in of_kind(lines, "profile") if "top" in line]
    columns = []
    for line in profiles:
        sums: dict[str, float] = {}
        marked = 0.0
        for name, _, milliseconds in line["top"]:
            if name.startswith("Optimizer"):  # a mark over kernels that are listed, too
                marked += milliseconds
                continue
            sums[kind_of_kernel(name)] = sums.get(kind_of_kernel(name), 0.0) + milliseconds
        total = line["gpu_ms"] - marked
        columns.append(sums | {REST: total - sum(sums.values()), "in all": total})
    kinds = [kind for kind, _ in KINDS] + ["others", REST, "in all"]
    rows = [[kind, *(f"{sums.get(kind, 0):.1f}" for sums in columns)] for kind in kinds]
    rows = [row for row in rows if set(row[1:]) != {"0.0"}]
    titles = [line["name"].replace(" none", "").replace(" blocks", ", compiled") for line in profiles]
    return table(["ms of the longest kernels", *titles], rows)


def read_losses(folder: Path) -> dict[str, list[dict[str, float]]]:
    """The loss curves in a folder by the models' names: MODEL/loss.csv or loss-MODEL.csv."""
    files = {path.stem.removeprefix("loss-"): path for path in folder.glob("loss-*.csv")}
    files |= {path.parent.name: path for path in folder.glob("*/loss.csv")}
    curves = {}
    for name in sorted(files):
        with files[name].open(newline="", encoding="utf-8") as file:
            curves[name] = [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]
    return {name: rows for name, rows in curves.items() if rows}


def losses_table(folder: Path) -> str:
    """Losses at the steps that all curves have, and the minutes that each took for them."""
    curves = read_losses(folder)
    if len(curves) < 2:
        return ""
    shared = sorted(set.intersection(*({row["step"] for row in rows} for rows in curves.values())))
    shown = shared if len(shared) <= 12 else shared[:: -(-len(shared) // 12)]
    cells = []
    for step in shown:
        row = [f"{step:,.0f}"]
        for rows in curves.values():
            line = next(line for line in rows if line["step"] == step)
            row += [f"{line['loss']:.4f}", f"{line['seconds'] / 60:.2f}"]
        cells.append(row)
    titles = [f"{name}: {what}" for name in curves for what in ("loss", "minutes")]
    return table(["step", *titles], cells)


def plot_losses(folder: Path, path: Path) -> None:
    """Losses over steps, and over minutes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4), layout="constrained")
    axes = figure.subplots(1, 2)
    curves = read_losses(folder)
    for name, rows in curves.items():
        losses = [row["loss"] for row in rows]
        few = {"marker": "o", "linestyle": "none"} if len(rows) < 20 else {"linewidth": 1}
        axes[0].plot([row["step"] for row in rows], losses, **few, markersize=4, label=name)
        axes[1].plot([row["seconds"] / 60 for row in rows], losses, **few, markersize=4, label=name)
    lowest = min(row["loss"] for rows in curves.values() for row in rows)
    for axis, label in zip(axes, ("step", "minutes of training"), strict=True):
        axis.set(xlabel=label, ylabel="training loss", yscale="log", ylim=(0.97 * lowest, max(0.4, 1.1 * lowest)))
        axis.yaxis.set_major_formatter("{x:.2f}")
        axis.yaxis.set_minor_formatter("{x:.2f}")
        axis.grid(alpha=0.3, which="both")
        axis.legend()
    with written_whole(path) as partial:
        figure.savefig(partial, format="png", dpi=110)


def plot_speed(lines: Sequence[Line], path: Path) -> None:
    """Speeds over DiT's, a row a case: dots, those of the kernels filled."""
    from matplotlib.figure import Figure

    pairs = sorted(_pairs(lines).items(), key=lambda pair: pair[0], reverse=True)
    labels = [f"{size}: {case.replace(' bfloat16', '').replace(', 32x32', '')}" for (case, size), _ in pairs]
    figure = Figure(figsize=(8, 0.9 + 0.27 * len(pairs)), layout="constrained")
    axes = figure.subplots()
    for which, filled in ((OURS, True), (PLAIN, False)):
        points = [(found[which]["ratio"], row) for row, (_, found) in enumerate(pairs) if which in found]
        axes.scatter(*zip(*points, strict=True), facecolors="C0" if filled else "none", edgecolors="C0", label=which)
        for ratio, row in points if filled else []:
            axes.annotate(f"{ratio:.2f}", (ratio, row), (6, -3), textcoords="offset points", fontsize=8)
    axes.set_yticks(range(len(pairs)), labels, fontsize=8)
    axes.set(xlim=(0, 1.1), xlabel="speed, DiT = 1")
    axes.axvline(1, color="black", linewidth=0.8)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="lower left")
    with written_whole(path) as partial:
        figure.savefig(partial, format="png", dpi=110)


def report(folder: Path) -> str:
    """All tables of a folder of results.

    Raises:
        ValueError: there are no results in it.
    """
    path = folder / RESULTS
    if not path.is_file():
        raise ValueError(f"{folder}: there is no {RESULTS}; name a folder that a run on a GPU filled.")
    lines = read_results(path)
    parts = [describe_machine(lines), checks(lines)]
    for kind, tabulate in (
        ("speed", speed_table),
        ("micro", operators_table),
        ("launch", launches_table),
        ("profile", profile_table),
    ):
        if of_kind(lines, kind) and (kind != "profile" or any("top" in line for line in of_kind(lines, kind))):
            parts.append(tabulate(lines))
    parts += [f"{line['kind']}: {line}" for kind in ("training", "quality") for line in of_kind(lines, kind)]
    return "\n\n".join(part for part in (*parts, losses_table(folder)) if part)


@command("report", extra="eval")
def main(arguments: list[str]) -> None:
    """Print the tables, draw the plots."""
    parser = CommandParser("report", __doc__)
    parser.add_argument("folder", type=Path, help="That a run on a GPU filled.")
    parser.add_argument("--speed-plot", type=Path, help="PNG of speeds beside DiT.")
    parser.add_argument("--loss-plot", type=Path, help="PNG of losses.")
    options: argparse.Namespace = parser.parse_args(arguments)
    for name in ("speed_plot", "loss_plot"):
        if place := getattr(options, name):
            check_writable(place, f"--{name.replace('_', '-')}")
    print(report(options.folder))
    if options.speed_plot:
        plot_speed(read_results(options.folder / RESULTS), options.speed_plot)
    if options.loss_plot:
        plot_losses(options.folder, options.loss_plot)


if __name__ == "__main__":
    main(sys.argv[1:])
