"""The README's first command, end to end: digits that a classifier fitted on real ones can read. Minutes long."""

import json
import subprocess
import sys

import pytest
from helpers.paths import ROOT
from helpers.processes import TRAIN_DIT, Command


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_readmes_model_draws_the_digit_that_was_asked_for(tmp_path):
    model = tmp_path / "digits"
    config = ROOT / "train" / "configs" / "digits.yaml"
    command = [sys.executable, TRAIN_DIT, "--config", config, "--output-dir", model]
    with Command(tmp_path / "log", command) as trainer:
        assert trainer.finish(seconds=1500) == 0, trainer.output
    log = (model / "train_log.csv").read_text().splitlines()
    losses = {int(step): float(loss) for step, loss, *_ in (line.split(",") for line in log[1:])}
    # As ever since the first release of the recipe; processors round differently.
    assert [losses[step] for step in (50, 100, 150)] == pytest.approx([1.1560, 0.4594, 0.3605], abs=2e-3)
    command = [sys.executable, str(ROOT / "eval" / "evaluate_digits.py"), "--model", str(model)]
    subprocess.run(command, check=True)
    report = json.loads((model / "evaluation" / "digits.json").read_text())
    assert report["num_samples"] == 200
    assert report["classifier_accuracy"] >= 0.93
    assert report["requested_class"] >= 0.97
    assert report["close_share"] < 0.1
