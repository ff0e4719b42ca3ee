"""The report of a run on a GPU, and that the documents' tables are what it prints."""

import json

import pytest
from helpers.paths import ROOT

from d_emo.eval.benchmarks.gpu import report

H100 = ROOT / "docs" / "data" / "h100"


def test_the_documents_tables_are_what_the_report_prints():
    printed = "\n\n".join(report.report(folder) for folder in (H100, H100 / "first"))
    documents = [ROOT / "docs" / f"{name}.md" for name in ("speed", "kernels", "gallery")]
    text = "".join(document.read_text(encoding="utf-8") for document in documents)
    heads = [part.splitlines()[0] for part in printed.split("\n\n") if part.startswith("|")]
    held = [part.splitlines()[0] for part in printed.split("\n\n") if part.startswith("|") and part.strip() in text]
    # All of the last run's but the many launches; of the first one's what was not measured again.
    assert [heads.index(head) for head in held] == [0, 2, 3, 5] and "| setting |" in heads[1] and "operator" in held[3]


def test_tables_are_of_the_lines(tmp_path):
    lines = [
        {"kind": "facts", "gpu": "NVIDIA H100 80GB HBM3", "torch": "2", "triton": "3", "copy_tb_s": 3.0,
         "matmul_tflops": 7.0},
        {"kind": "speed", "model": "D-EMOv2-S-2", "case": "train bfloat16, batch 8", "images_s": 50.0, "ratio": 0.5,
         "tflops": 98.94, "peak_mib": 2048.0},
        {"kind": "speed", "model": "D-EMOv2-S-2@reference", "case": "train bfloat16, batch 8", "error": "full"},
        {"kind": "speed", "model": "DiT-S-2", "case": "train bfloat16, batch 8", "images_s": 100.0, "ratio": 1.0,
         "tflops": 494.7, "peak_mib": 1024.0},
        {"kind": "local", "name": "one", "ok": False, "errors": ["1e-1"]},
        {"kind": "profile", "name": "DiT-S-2 none", "ok": True, "gpu_ms": 12.0,
         "top": [["nvjet_x", 1, 5.0], ["Optimizer.step#AdamW.step", 1, 2.0], ["_forward_kernel", 1, 3.0]]},
        {"kind": "launch", "name": "S b256 local TILE 8", "all_ms": 1.5,
         "kernels": {"_join_kernel": 0.5, "_x_kernel": 1}},
    ]  # fmt: skip
    (tmp_path / "results.jsonl").write_text("\n".join(map(json.dumps, lines)))
    text = report.report(tmp_path)
    assert "| train, batch 8 | S-2 | 50 | - | 100 | 0.50 | - | 10%, 50% | 2.0, 1.0 |" in text
    assert "| S b256 local TILE 8 | 1.500 | join 0.500, x 1.000 |" in text
    assert "local: 0 of 1\n  FAILED one: ['1e-1']" in text
    assert (
        "| matrix products | 5.0 |" in text
        and "| not among the longest | 2.0 |" in text
        and "| in all | 10.0 |" in text
    )


@pytest.mark.parametrize(
    ("kernel", "kind"),
    [
        ("nvjet_sm90_tst_192x192_64x3", "matrix products"),
        ("_convolution_gradient_kernel", "this package's kernels"),
        ("triton_poi_fused_add_0", "made by Inductor"),
        ("dgrad2d_c1_k1_nhwc_specialized", "cuDNN's depthwise convolution"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_bprop", "attention of PyTorch (SDPA)"),
        ("void at::native::elementwise_kernel<128, 4>", "PyTorch's other kernels"),
        ("something else", "others"),
    ],
)
def test_kernels_are_told_apart_by_their_names(kernel, kind):
    assert report.kind_of_kernel(kernel) == kind


def test_plots_are_drawn(tmp_path):
    report.main([str(H100), "--speed-plot", str(tmp_path / "a.png"), "--loss-plot", str(tmp_path / "b.png")])
    assert all((tmp_path / name).stat().st_size > 10_000 for name in ("a.png", "b.png"))


def test_a_folder_without_results_is_refused(tmp_path):
    with pytest.raises(SystemExit) as ended:
        report.main([str(tmp_path)])
    assert "there is no results.jsonl" in str(ended.value.code)
