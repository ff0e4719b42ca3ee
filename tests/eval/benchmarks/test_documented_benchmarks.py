"""Benchmarks and tables that documents name, as small as they go: they still measure what the package has become."""

import importlib
import re

import pytest
from helpers.paths import ROOT

import d_emo

# Module, its smallest arguments, the first columns of what it prints, and its lines.
CASES = {
    "loop_cost": (
        "d_emo.eval.benchmarks.loop_cost", ["--batch", "8", "--steps", "5", "--side", "8"], "| noise on |", 2
    ),
    "loader_speed": (
        "d_emo.eval.benchmarks.loader_speed",
        ["--count", "64", "--resolution", "32", "--rounds", "1", "--encoded", "1"], "|", 3,
    ),
    "fid_cost": ("d_emo.eval.benchmarks.fid_cost", ["--samples", "64", "--reference", "64"], "|", 1),
    "token_dropping": (
        "d_emo.eval.benchmarks.token_dropping",
        ["--models", "D-EMOv2-N-4", "--latent", "16", "--batch", "2", "--repeats", "2"], "|", 1,
    ),
    "compare_checkouts": (
        "d_emo.eval.benchmarks.compare_checkouts",
        [str(ROOT), "--models", "D-EMOv2-N-8", "DiT-N-8", "--jobs", "forward", "--dtypes", "float32", "--batch", "2",
         "--rounds", "2"], "|", 1,
    ),
    "sampling_table": (
        "d_emo.eval.tables.sampling_table",
        ["--model", str(d_emo.packaged("digits")), "--per-class", "2", "--steps", "2", "4", "--repeats", "1"], "|", 2,
    ),
    "guidance_table": (
        "d_emo.eval.tables.guidance_table",
        ["--model", str(d_emo.packaged("digits")), "--guide", str(d_emo.packaged("digits")), "--per-class", "2",
         "--evaluations", "8"], "|", 3,
    ),
}  # fmt: skip
SOON = {"loop_cost", "token_dropping"}


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name not in SOON)) for name in CASES])
def test_it_runs_and_prints_its_table(name, tmp_path, capfd, monkeypatch):
    module, arguments, first, least = CASES[name]
    if name.endswith("_table"):
        arguments = [*arguments, "--output-dir", str(tmp_path / "scores")]
    monkeypatch.chdir(tmp_path)
    importlib.import_module(module).main(arguments)
    printed = capfd.readouterr().out
    lines = [line for line in printed.splitlines() if line.startswith(first[0])]
    assert lines and lines[0].startswith(first), printed
    measured = [line for line in lines[1:] if re.search(r"\d", line)]
    assert len(measured) >= least, printed
    assert "nan" not in printed
