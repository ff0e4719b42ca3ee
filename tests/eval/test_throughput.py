"""The benchmark's own arithmetic and messages."""

import json
import subprocess
import sys

import pytest
import torch

from d_emo.eval import throughput
from d_emo.eval.benchmarks.peak_memory import PeakMemory
from d_emo.eval.benchmarks.subjects import Case, Subject


def test_it_measures_models_in_turns_and_writes_table_json_and_plot(tmp_path, capsys):
    models = ["D-EMOv2-N-8@reference+checkpointed", "diffusers:DiT-N-8", "DiT-N-8"]
    arguments = ["--models", *models, "--batch", "2", "--latent", "16", "--depth", "1", "--repeats", "3"]
    throughput.main([*arguments, "--dtypes", "float32", "--output", str(tmp_path)])
    results = json.loads((tmp_path / "results.json").read_text())["results"]
    assert [(entry["model"], entry["case"]["job"]) for entry in results] == [
        (model, job) for job in ("forward", "train") for model in models
    ]
    assert all(len(entry["seconds"]) == 3 for entry in results)
    assert results[2]["ratio"] == 1
    assert results[5]["flops"] == 3 * results[2]["flops"] > 0
    assert (tmp_path / "ratios.png").stat().st_size > 1000
    assert (tmp_path / "table.md").read_text().count("\n") == 2 + len(results)
    assert "DiT-N-8" in capsys.readouterr().out


def test_classifiers_are_measured_beside_timms_and_onnxruntime(tmp_path, capsys):
    models = ["EMOv2-1M", "EMOv2-1M@onnx", "timm:mobilenetv4_conv_small_050"]
    throughput.main(["--models", *models, "--jobs", "forward", "--dtypes", "float32", "--batch", "1", "--image", "64",
                     "--repeats", "2", "--output", str(tmp_path)])  # fmt: skip
    results = json.loads((tmp_path / "results.json").read_text())["results"]
    assert [entry["model"] for entry in results] == models and results[0]["parameters"] == 1_460_844
    assert results[0]["flops"] == results[1]["flops"] > 0
    assert "| 1.46M |" in capsys.readouterr().out


def test_flops_are_those_of_the_model():
    case = Case("forward", "float32", "none", 3, 32, None)
    subject = Subject("D-EMOv2-N-4", case, torch.device("cpu"))
    from d_emo import create_model
    from d_emo.models.flops import count_macs

    assert subject.flops == 2 * 3 * count_macs(create_model("D-EMOv2-N-4"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--models", "DiT-Q-2"], "'DiT-Q-2' is unknown"),
        (["--models", "DiT-S-2@fast"], "'fast' is unknown; use reference or checkpointed"),
        (["--repeats", "1"], "--repeats: 1 is not a whole number from 2 on"),
        (["--batch", "0"], "--batch: 0 is not a whole number from 1 on"),
        (["--depth", "-1"], "--depth: -1 is not a whole number from 1 on"),
        (["--threads", "0"], "--threads: 0 is not a whole number from 1 on"),
        (["--output", "/dev/null"], "--output /dev/null is no folder"),
        (["--models", "timm:resnet18", "--jobs", "sample"], "models of this package only"),
        (["--models", "EMOv2-1M@onnx"], "add --jobs forward --dtypes float32"),
        (["--models", "EMOv2-1M", "DiT-S-2"], "cannot be measured side by side"),
    ],
)
def test_bad_arguments_are_refused(arguments, message, capsys):
    with pytest.raises(SystemExit):
        throughput.main(arguments)
    assert message in capsys.readouterr().err


def test_help_does_not_wait_for_pytorch():
    code = (
        "import sys\nfrom d_emo.eval import throughput\ntry: throughput.main(['--help'])\n"
        "finally: print(sorted({'torch', 'diffusers', 'transformers'} & set(sys.modules)), file=sys.stderr)"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert answer.returncode == 0 and "--repeats" in answer.stdout and answer.stderr.strip() == "[]"


def test_peak_memory_sees_what_is_held_for_a_moment():
    with PeakMemory(torch.device("cpu")) as peak:
        torch.ones(50 * 2**18).sum()
    if peak.mib is None:
        pytest.skip("the system does not let a process reset its peak")
    assert 40 < peak.mib < 150
