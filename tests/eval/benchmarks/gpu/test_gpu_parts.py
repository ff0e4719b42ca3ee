"""What a run on a GPU is made of, rehearsed on a CPU: processes with limits, checks that can fail, measurements."""

import itertools
import signal
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from helpers.paths import ROOT

from d_emo.eval.benchmarks import side_by_side
from d_emo.eval.benchmarks.gpu import (
    beside_dit,
    facts,
    first_run,
    kernel_checks,
    launches,
    operators,
    pair,
    part,
    profiles,
    quality,
    train,
)
from d_emo.eval.benchmarks.gpu.kernel_checks import Attention, Local, check_attention, check_local, unwritten_is_nan
from d_emo.eval.benchmarks.gpu.network_checks import NetworkChecks
from d_emo.eval.benchmarks.gpu.parts import LOG, RESULTS, Parts
from d_emo.eval.benchmarks.gpu.results import Results, read_results
from d_emo.kernels import local_branch, use_backend, window_attention

CPU = torch.device("cpu")
SMALL = Attention(32, 2, 64, (4, 4), (8, 8))


@pytest.fixture
def results(tmp_path):
    """Results of a rehearsal."""
    return Results(tmp_path, tiny=True)


def lines(results):
    """What was written, by kind."""
    found = {}
    for line in read_results(results.folder / RESULTS):
        found.setdefault(line["kind"], []).append(line)
    return found


# ---- parts and results -----------------------------------------------------------------------------------------------


def script(code):
    return [sys.executable, "-c", code]


def test_a_part_that_fails_or_takes_too_long_ends_itself_alone(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("d_emo.eval.benchmarks.gpu.parts.LEAST", 0.5)
    parts = Parts(tmp_path, 60)
    began = time.monotonic()
    assert not parts.run("slow", 4, script("import time; print('begun', flush=True); time.sleep(60)"))
    assert not parts.run("wrong", 20, script("print('about to fail'); raise SystemExit(3)"))
    assert parts.run("right", 20, script("print('fine')"), script("print('at the same time')"))
    assert time.monotonic() - began < 15
    log = (tmp_path / LOG).read_text()
    assert all(word in log for word in ("begun", "about to fail", "fine", "at the same time"))
    printed = capsys.readouterr().out
    assert "## slow: time over" in printed and "## wrong: exit code 3" in printed and "## right: exit code 0" in printed


def test_a_process_is_asked_by_the_signal_that_it_saves_at(tmp_path, monkeypatch):
    monkeypatch.setattr("d_emo.eval.benchmarks.gpu.parts.LEAST", 0.5)
    saved = tmp_path / "saved"
    code = f"import time\ntry: time.sleep(60)\nexcept KeyboardInterrupt: open({str(saved)!r}, 'w').write('yes')"
    parts = Parts(tmp_path, 60)
    parts.run("trainer", 2, script(code), ask=signal.SIGINT)
    assert saved.read_text() == "yes"


def test_a_process_that_does_not_end_is_killed_with_what_it_started(tmp_path, monkeypatch):
    monkeypatch.setattr("d_emo.eval.benchmarks.gpu.parts.LEAST", 0.5)
    monkeypatch.setattr("d_emo.eval.benchmarks.gpu.parts.PATIENCE", 0.5)
    code = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)"
    began = time.monotonic()
    assert not Parts(tmp_path, 60).run("deaf", 2, script(code))
    assert time.monotonic() - began < 10


def test_what_has_no_time_left_is_left_out(tmp_path, capsys):
    parts = Parts(tmp_path, 30)
    assert not parts.run("late", 60, script("raise SystemExit(0)"), kept=25)
    assert "## late: left out, no time left" in capsys.readouterr().out


def test_what_a_check_raises_is_a_line(results):
    def fail():
        raise torch.OutOfMemoryError("CUDA out of memory")

    results.attempt("check", "first", fail)
    results.attempt("check", "second", lambda: {"ok": False, "errors": ["1e-1"]})
    results.attempt("check", "third", lambda: None)
    first, second, third = lines(results)["check"]
    assert first["error"] == "OutOfMemoryError: CUDA out of memory" and first["where"].startswith("test_gpu_parts.py")
    assert [line["ok"] for line in (first, second, third)] == [False, False, True]


def test_shards_share_the_checks(tmp_path):
    for shard in range(3):
        results = Results(tmp_path, shard=(shard, 3))
        for number in range(7):
            results.attempt("check", str(number), lambda: None)
    names = [line["name"] for line in lines(results)["check"]]
    assert names == ["0", "3", "6", "1", "4", "2", "5"]


def test_a_line_that_was_cut_off_is_left_out(tmp_path):
    (tmp_path / RESULTS).write_text('{"kind": "a"}\n{"kind": "b", "val')
    assert read_results(tmp_path / RESULTS) == [{"kind": "a"}]


# ---- what is right ---------------------------------------------------------------------------------------------------


def test_new_memory_is_nan_until_it_is_written():
    with unwritten_is_nan():
        assert torch.empty(100).isnan().all()
    assert not torch.are_deterministic_algorithms_enabled()


def test_the_kernels_of_this_machine_pass(results):
    kernel_checks.run(results)
    found = lines(results)
    assert len(found["attention"]) == 2 and len(found["local"]) == 13
    assert [line for line in found["attention"] + found["local"] if not line["ok"]] == []


@pytest.mark.parametrize("case", [Local(16, kernel=1), Local(16, grid=(1, 1), batch=4)])
def test_a_gradient_that_vanishes_is_measured_by_what_cancels(case, monkeypatch):
    assert case.gradient_vanishes
    assert check_local(case, torch.bfloat16, CPU)["ok"]

    def without_statistics(hidden, conv, norm):
        """The gradient of a kernel that forgets that the statistics depend on the weights."""
        mean, variance = norm.running_mean, norm.running_var
        y = conv(hidden.permute(0, 3, 1, 2).float())
        norm.eval()
        with torch.no_grad():
            mean.copy_(y.mean((0, 2, 3)))
            variance.copy_(y.var((0, 2, 3), correction=0))
        return hidden + torch.nn.functional.silu(norm(y)).permute(0, 2, 3, 1).to(hidden.dtype)

    monkeypatch.setattr(kernel_checks, "local_branch", without_statistics)
    found = check_local(case, torch.bfloat16, CPU)
    assert not found["ok"] and float(found["errors"][2]) > 0.5  # errors of the kernel's gradient
    assert float(found["errors"][0]) < 1e-2  # the result is right


def test_a_kernel_that_is_wrong_or_never_the_same_fails(monkeypatch):
    assert check_attention(SMALL, torch.float32, CPU)["ok"]
    monkeypatch.setattr(kernel_checks, "window_attention", lambda *given: 1.001 * window_attention(*given))
    assert not check_attention(SMALL, torch.float32, CPU)["ok"]
    factors = itertools.cycle((1, 1 + 1e-6))
    monkeypatch.setattr(kernel_checks, "window_attention", lambda *given: window_attention(*given) * next(factors))
    found = check_attention(SMALL, torch.float32, CPU)
    assert not found["ok"] and not found["same_twice"]


def test_memory_that_a_kernel_leaves_unwritten_fails(monkeypatch):
    def forgetful(hidden, conv, norm):
        out = torch.empty_like(hidden)
        out[1:] = local_branch(hidden, conv, norm)[1:]
        return out

    monkeypatch.setattr(kernel_checks, "local_branch", forgetful)
    found = check_local(Local(16, grid=(4, 4)), torch.float32, CPU)
    assert found["errors"][0] == "nan" and not found["ok"]


def test_a_network_is_compared_and_its_operators_are_seen(results):
    checks = NetworkChecks(results)
    assert checks.compare(checks.network(), bfloat16=False)["ok"]
    assert checks.compare(checks.checkpointed(), backend="native")["ok"]
    seen = checks.kernels_in(checks.network())
    assert seen["ok"] and "d_emo::local_branch_backward" in seen["operators"]
    with use_backend("reference"):
        assert not checks.kernels_in(checks.network())["ok"]
    other = checks.network()
    with torch.no_grad():
        other.blocks[0].i2rmb.conv.weight.mul_(1.1)
    assert not checks.compare(other, bfloat16=False)["ok"]


# ---- measurements ----------------------------------------------------------------------------------------------------


def test_facts_operators_models_and_profiles_are_rehearsed(results, monkeypatch):
    monkeypatch.setattr(beside_dit, "TINY", beside_dit.TINY[:1])
    monkeypatch.setattr(side_by_side, "PRODUCT_ON_CPU", (64, 64))
    for measurement in (facts, operators, beside_dit, profiles):
        measurement.run(results)
    found = lines(results)
    assert found["facts"][0]["copy_tb_s"] > 0 and found["facts"][0]["kernels"]
    assert len(found["micro"]) == 9 and all(line["ok"] for line in found["micro"] + found["bench"] + found["profile"])
    assert [line["model"] for line in found["speed"][:3]] == ["D-EMOv2-N-8", "D-EMOv2-N-8@reference", "DiT-N-8"]
    assert "aten::" in (results.folder / "profile-D-EMOv2-N-8-none.txt").read_text()


def test_a_setting_holds_while_it_is_tried_and_no_longer(results):
    module, seen = SimpleNamespace(__name__="kernels", WARPS=4), []
    found = launches.measured(results, module, {"WARPS": 8}, lambda: lambda: seen.append(module.WARPS))
    assert found == {} and seen == [8] and module.WARPS == 4  # on a CPU nothing is measured
    assert launches.told({"TILE": 8, "TILE_WARPS": 4}) == "TILE 8, TILE_WARPS 4"


def test_the_settings_name_what_the_kernels_have_and_begin_with_it():
    pytest.importorskip("triton")
    from d_emo.kernels.triton import attention, local

    for module, tried in ((attention, launches.ATTENTION), (local, launches.WALKS)):
        assert tried[0] == {name: getattr(module, name) for name in tried[0]}
    assert all(hasattr(local, name) for setting in launches.TILES for name in setting)


def test_models_that_no_time_is_left_for_are_named(tmp_path):
    results = Results(tmp_path, tiny=True, seconds=0)
    beside_dit.run(results)
    assert [line["error"] for line in lines(results)["bench"]] == ["no time left"] * len(beside_dit.TINY)


def test_a_part_that_has_hardly_time_is_told_so(tmp_path, monkeypatch):
    """And not refused by its own command line."""
    begun = {}
    monkeypatch.setattr(Parts, "left", lambda parts: 9.0)
    monkeypatch.setattr(
        Parts, "run", lambda parts, name, seconds, *commands, **_: begun.update({name: commands}) or True
    )
    monkeypatch.setattr(first_run, "summarise", lambda folder: None)
    first_run.main(["--tiny", "--output-dir", str(tmp_path), "--parts", "models", "profiles"])
    assert [*begun] == ["facts", "models", "profiles"]
    for (words,) in begun.values():
        assert part.parse(words[3:]).seconds >= 0


@pytest.mark.parametrize(
    ("command", "arguments", "message"),
    [
        (first_run, ["--output-dir", "/dev/null"], "--output-dir /dev/null is no folder"),
        (first_run, ["--output-dir", "x", "--data", "none.parquet"], "--data none.parquet: there is no such file"),
        (train, ["--output-dir", "x", "--data", "none.parquet"], "--data none.parquet: there is no such file"),
        (train, ["--output-dir", "x", "--data", __file__, "--ema-decay", "1"], "1 is not a number from 0 and below 1"),
        (pair, ["--output-dir", "x", "--data", __file__, "--seconds", "110"], "--seconds 110 leaves nothing to train"),
        (quality, ["--output-dir", "x", "--data", __file__, "--models", "a", "a"], "--models a a: name each once"),
    ],
)
def test_bad_arguments_are_refused_in_one_line(command, arguments, message, capsys):
    with pytest.raises(SystemExit) as ended:
        command.main(arguments)
    printed = capsys.readouterr().err
    assert ended.value.code == 2 and message in printed and printed.count("\n") == 1


@pytest.mark.slow
def test_the_whole_first_run_is_rehearsed(tmp_path, picture_table):
    first_run.main(["--tiny", "--output-dir", str(tmp_path), "--data", str(picture_table), "--seconds", "400"])
    found = read_results(tmp_path / RESULTS)
    wrong = [line for line in found if not line.get("ok", True)]
    assert not wrong
    assert {"facts", "attention", "local", "network", "launch", "micro", "speed", "profile", "training"} <= {
        line["kind"] for line in found
    }
    assert (tmp_path / first_run.TRAINING_LOG).is_file() and "| case |" in (tmp_path / "summary.md").read_text()
    assert len([path for path in tmp_path.iterdir() if path.is_file()]) <= 8


def test_the_kernels_own_tests_are_where_the_run_looks_for_them():
    (words,) = first_run.kernel_tests(tiny=False)
    assert str(ROOT / "tests" / "helpers" / "triton_cases.py") in words
