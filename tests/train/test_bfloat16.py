"""Autocast to bfloat16, which is what GPUs train in by default, in every trainer: runs here, on a CPU."""

import csv

import pytest
from helpers.trainers import TRAINERS
from helpers.training import run_here

# Of losses in bfloat16, which has three digits, beside those in float32.
TOLERANCE = 0.05


# Networks and objectives whose arithmetic is their own, by trainer.
CASES = [
    ("diffusion", "--objective flow-map"),
    *(
        pytest.param(*case, marks=pytest.mark.slow)
        for case in (
            ("diffusion", "--objective sit --align digits-classifier --align-block 2 --guide-block 1"),
            ("classifier", ""),
            ("segmenter", "--head deeplabv3"),
            ("segmenter", "--head semantic_fpn"),
            ("detector", "--system mask_rcnn"),
        )
    ),
]


@pytest.mark.parametrize(("trainer", "options"), CASES)
def test_losses_are_those_of_float32_but_for_rounding(capsys, tmp_path, trainer, options):
    module, tiny, write = TRAINERS[trainer]
    data = [] if write is None else ["--train-data-dir", write(tmp_path / "data")]
    if trainer in ("segmenter", "detector"):
        data += ["--validation-dir", data[1], "--validate-every", "2"]
    found = []
    for precision in ("no", "bf16"):
        out = tmp_path / precision
        code, output = run_here(
            capsys, *tiny, *data, "--max-train-steps", "2", *options.split(), "--mixed-precision", precision,
            "--output-dir", out, main=module.main,
        )  # fmt: skip
        assert code == 0, output
        with (out / "train_log.csv").open() as file:
            found.append([float(row["loss"]) for row in csv.DictReader(file)])
    plain, rounded = found
    assert rounded == pytest.approx(plain, rel=TOLERANCE)
    assert rounded != plain


def test_video_classifiers_are_refused_where_pytorchs_gradients_are_undefined(capsys, tmp_path):
    module, tiny, write = TRAINERS["video"]
    words = [*tiny, "--train-data-dir", write(tmp_path / "data"), "--max-train-steps", "1", "--dry-run"]
    words += ["--output-dir", tmp_path / "run"]
    code, output = run_here(capsys, *words, "--mixed-precision", "bf16", main=module.main)
    assert code and "bfloat16 on a CPU: PyTorch's convolutions in space and time" in output
    assert run_here(capsys, *words, main=module.main)[0] == 0


@pytest.mark.parametrize(("system", "refused"), [("ssdlite", True), ("retinanet", True), ("mask_rcnn", False)])
def test_detectors_are_refused_where_pytorchs_gradients_are_undefined(capsys, tmp_path, system, refused):
    module, tiny, write = TRAINERS["detector"]
    words = [*tiny, "--system", system, "--train-data-dir", write(tmp_path / "data"), "--max-train-steps", "1"]
    words += ["--dry-run", "--output-dir", tmp_path / "run"]
    code, output = run_here(capsys, *words, "--mixed-precision", "bf16", main=module.main)
    assert bool(code) == refused, output
    assert ("undefined gradients there; use --mixed-precision no" in output) == refused
    assert run_here(capsys, *words, main=module.main)[0] == 0
