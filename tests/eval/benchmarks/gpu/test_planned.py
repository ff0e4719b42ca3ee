"""Plans for a GPU against what was measured on one (docs/data/h100), and the command that compares them."""

import json

import pytest
from helpers.paths import ROOT

from d_emo.eval.benchmarks.gpu import planned
from d_emo.train.diffusion import on_gpus
from d_emo.train.engine import fleet, roofline

H100 = ROOT / "docs" / "data" / "h100"


def close(steps):
    """Memory within 10%, time within 15%."""
    return [step for step in steps if not (
        step.planned_bytes == pytest.approx(step.held, rel=0.1)
        and step.planned_seconds == pytest.approx(step.seconds, rel=0.15)
    )]  # fmt: skip


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """The measurements of S-2 alone, which take seconds to plan."""
    folder = tmp_path_factory.mktemp("h100")
    lines = (H100 / "results.jsonl").read_text(encoding="utf-8").splitlines()
    kept = [line for line in lines if json.loads(line)["kind"] == "facts" or '-S-2"' in line]
    (folder / "results.jsonl").write_text("\n".join(kept), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def steps(small):
    return planned.measured_steps(small)


def test_plans_are_what_was_measured(steps):
    assert len(steps) == 6 and close(steps) == []


@pytest.mark.slow
def test_all_plans_are_what_was_measured_and_the_shares_are_those_that_fit(tmp_path):
    steps = planned.measured_steps(H100)
    assert len(steps) == 18 and close(steps) == []
    found = planned.fitted(steps)
    compiled, uncompiled = roofline.COMPILED, roofline.UNCOMPILED
    kept = [compiled.products, compiled.kernels, compiled.rest, uncompiled.rest]
    assert list(found.values())[:4] == pytest.approx(kept, abs=0.02)
    assert (uncompiled.products, uncompiled.kernels) == (compiled.products, compiled.kernels)
    assert found["microseconds of a launch"] == pytest.approx(1e6 * roofline.UNCOMPILED.launch, rel=0.1)
    assert found["microseconds of a kernel's launch"] == pytest.approx(1e6 * roofline.UNCOMPILED.kernel_launch, rel=0.1)
    assert found["kept by compiled blocks"] == pytest.approx(on_gpus.KEPT_BY_COMPILED, abs=0.01)
    assert found["kept by DiT's"] == pytest.approx(on_gpus.KEPT_BY_COMPILED_DIT, abs=0.01)
    planned.write_steps(steps, tmp_path / "steps.csv")
    assert (tmp_path / "steps.csv").read_bytes() == fleet.MEASURED.read_bytes()
    document = (ROOT / "docs" / "speed.md").read_text(encoding="utf-8")
    assert all(table in document for table in planned.report(steps).split("\n\n"))


def test_the_command_prints_both_and_keeps_the_steps(monkeypatch, steps, small, tmp_path, capsys):
    monkeypatch.setattr(planned, "measured_steps", lambda folder: steps if folder == small else None)
    planned.main([str(small), "--steps", str(tmp_path / "steps.csv")])
    printed = capsys.readouterr().out
    assert "| D-EMOv2-S-2 | batch 256, 32 x 32, compiled | 58.6 |" in printed
    assert "Too few steps to fit" in printed, "of one size no three factors follow"
    written = (tmp_path / "steps.csv").read_text(encoding="utf-8").splitlines()
    assert set(written) <= set(fleet.MEASURED.read_text(encoding="utf-8").splitlines()) and len(written) == 7


@pytest.mark.parametrize("line", ['{"a": 1}', "[1, 2]", "null", '{"kind": "facts"}'])
def test_damaged_results_are_named(tmp_path, line):
    (tmp_path / "results.jsonl").write_text(line + "\n", encoding="utf-8")
    with pytest.raises(SystemExit, match=r"results\.jsonl is damaged, or not what first_run writes"):
        planned.main([str(tmp_path)])


def test_a_card_that_plans_do_not_know_is_named(tmp_path):
    (tmp_path / "results.jsonl").write_text('{"kind": "facts", "gpu": "NVIDIA H100 PCIe"}\n', encoding="utf-8")
    with pytest.raises(ValueError, match=r"plans know nothing of NVIDIA H100 PCIe"):
        planned.measured_steps(tmp_path)
