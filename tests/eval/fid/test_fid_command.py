"""evaluate_fid as users run it: scores, report, several processes, mistakes, curves over training."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from helpers.paths import ROOT
from helpers.pipelines import tiny_pipeline
from helpers.processes import TRAIN_DIT, offline_environment, run_script
from helpers.training import run_here

from d_emo.eval import compare_runs, evaluate_fid
from d_emo.eval.fid import archives
from d_emo.eval.fid.extractors import PixelExtractor
from d_emo.eval.fid.image_sets import open_set
from d_emo.eval.fid.metrics import frechet_distance, moments_of
from d_emo.eval.fid.scoring import load_scores
from d_emo.pipelines import DEMOPipeline

SCORED = ("fid", "precision", "recall", "kid")


def evaluate(capsys, *arguments):
    """Run evaluate_fid in this process."""
    return run_here(capsys, *arguments, main=evaluate_fid.main)


@pytest.fixture(scope="module")
def grey_model(tmp_path_factory):
    """A saved flow model of 16 x 16 grey images with ten classes: random, but of the digits' shape."""
    folder = tmp_path_factory.mktemp("model")
    pipeline = tiny_pipeline(flow=True, in_channels=1, num_classes=10)
    pipeline.save_pretrained(folder)
    return folder


def model_arguments(model, tmp_path, *more):
    return (
        "--model", model, "--preset", "quick", "--num-images", 40, "--steps", 3, "--reference", "digits", "--features",
        "pixels", "--output-dir", tmp_path / "out", "--cache-dir", tmp_path / "cache", *more,
    )  # fmt: skip


def test_a_model_is_drawn_scored_and_reported(capsys, grey_model, tmp_path):
    export = tmp_path / "adm.npz"
    code, printed = evaluate(capsys, *model_arguments(grey_model, tmp_path, "--export-npz", export))
    assert code == 0, printed
    stored = json.loads((tmp_path / "out" / "scores.json").read_text())
    assert set(SCORED) <= set(stored["scores"])
    assert set(stored["left_out"]) == {"sfid", "is"}
    assert stored["conditions"]["drawn"]["sampling"]["num_images"] == 40
    assert "not comparable with published figures: 40 images, not 50,000" in printed
    assert "preset quick was changed (steps: 50 -> 3)" in printed
    assert "Frechet distance (pixels)" in printed and "FID" not in printed.replace("FID-5K", "")
    assert "40 sample images span at most 39 of 256 dimensions" in printed
    # The score is what the samples and the digits give.
    samples = open_set(str(tmp_path / "out" / "samples"))
    sides = [images.read(0, len(images)).reshape(len(images), -1) / 255 for images in (samples, open_set("digits"))]
    expected = frechet_distance(*(moments_of(side) for side in sides))
    assert stored["scores"]["fid"] == pytest.approx(expected, rel=1e-5)
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 2
    assert "http" not in page.split("<pre>")[0].replace("http-equiv", "")
    assert np.load(export)["arr_0"].shape == (40, 16, 16, 3)


def test_a_second_score_computes_nothing_again(capsys, grey_model, tmp_path, monkeypatch):
    first, _ = evaluate(capsys, *model_arguments(grey_model, tmp_path))
    scores = load_scores(tmp_path / "out" / "scores.json").values
    monkeypatch.setattr(PixelExtractor, "__call__", lambda *_: pytest.fail("features were computed again"))
    monkeypatch.setattr(DEMOPipeline, "__call__", lambda *_, **__: pytest.fail("images were drawn again"))
    code, printed = evaluate(capsys, *model_arguments(grey_model, tmp_path))
    assert first == code == 0, printed
    assert load_scores(tmp_path / "out" / "scores.json").values == scores


def test_images_by_others_are_scored(capsys, tmp_path):
    digits = open_set("digits")
    archives.write_images(tmp_path / "half.npz", [digits.read(0, 900)], (900, 16, 16, 3))
    archives.write_images(tmp_path / "other.npz", [digits.read(900, 1797)], (897, 16, 16, 3))
    code, printed = evaluate(
        capsys, "--samples", tmp_path / "half.npz", "--reference", tmp_path / "other.npz", "--features", "pixels",
        "--output-dir", tmp_path / "out", "--cache-dir", tmp_path / "cache", "--metrics", "fid", "precision-recall",
        "--num-images", 800,
    )  # fmt: skip
    assert code == 0, printed
    scores = load_scores(tmp_path / "out" / "scores.json")
    assert set(scores.values) == {"fid", "precision", "recall"}
    assert scores.values["precision"] > 0.6 and scores.values["recall"] > 0.6
    assert "how the samples were drawn is not known here" in printed
    assert scores.conditions["samples"]["shape"] == [800, 16, 16, 3]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "{tmp}", "--reference", "digits"], "there is no pipeline in it"),
        (["--model", "{model}", "--reference", "nowhere"], "nowhere: there is no such folder"),
        (["--model", "{model}", "--reference", "digits", "--preset", "fid"], "--preset fid: unknown"),
        (["--model", "{model}", "--reference", "digits", "--preset", "dit-400k"], "--sampler ddpm: the model predicts"),
        (["--model", "{model}", "--reference", "digits", "--guidance-scale", "0"], "0 would draw without class"),
        (["--model", "{model}", "--reference", "digits", "--checkpoints", "all"], "has checkpoints of steps none"),
        (
            ["--model", "{model}", "--reference", "digits", "--batch-size", "0"],
            "--batch-size: 0 is not a whole number from 1 on",
        ),
        (["--samples", "{tmp}", "--reference", "digits"], "there are no images in this folder"),
        (["--reference", "digits"], "one of the arguments --model --samples is required"),
    ],
)
def test_mistakes_end_with_one_line_before_anything_is_drawn(capsys, grey_model, tmp_path, arguments, message):
    (tmp_path / "empty").mkdir()
    filled = [text.format(model=grey_model, tmp=tmp_path / "empty") for text in arguments]
    code, printed = evaluate(
        capsys, *filled, "--features", "pixels", "--output-dir", tmp_path / "out", "--cache-dir", tmp_path / "cache"
    )
    assert code != 0 and message in printed
    assert "Traceback" not in printed and not (tmp_path / "out").exists()


@pytest.fixture
def run_folder(tmp_path):
    """A run with two checkpoints."""
    for step, seed in ((10, 0), (20, 1)):
        pipeline = tiny_pipeline(flow=True, in_channels=1, num_classes=10)
        pipeline.transformer.proj_out.weight.data.mul_(1 + seed)
        pipeline.save_pretrained(tmp_path / "run" / f"checkpoint-{step:07d}")
    (tmp_path / "run" / "run.json").write_text(json.dumps({"model": "D-EMOv2-S-2", "objective": "sit"}))
    return tmp_path / "run"


def test_a_run_is_scored_over_its_checkpoints(capsys, run_folder, tmp_path):
    code, printed = evaluate(capsys, *model_arguments(run_folder, tmp_path, "--checkpoints", "all"))
    assert code == 0, printed
    assert "| 10 |" in printed and "| 20 |" in printed
    # Published figures are for ImageNet; the digits are no such reference.
    assert "published for" not in printed
    scores = [load_scores(tmp_path / "out" / f"step-{step:07d}" / "scores.json").values["fid"] for step in (10, 20)]
    assert scores[0] != scores[1]
    assert (tmp_path / "out" / "fid.png").stat().st_size > 5000
    assert (tmp_path / "out" / "report.html").read_text().count("data:image/png;base64,") == 3
    code, printed = evaluate(capsys, *model_arguments(run_folder, tmp_path, "--checkpoints", "20,30"))
    assert code != 0 and "has checkpoints of steps 10, 20" in printed


@pytest.mark.slow
def test_three_processes_give_the_images_and_scores_of_one(grey_model, capsys, tmp_path):
    digits = open_set("digits")
    archives.write_images(tmp_path / "half.npz", [digits.read(0, 900)], (900, 16, 16, 3))
    script = tmp_path / "both.py"
    script.write_text(
        "import sys\n"
        "from d_emo.eval.evaluate_fid import parse_options\n"
        "from d_emo.eval.fid.command import evaluate\n"
        "from d_emo.common.processes import start_processes\n"
        "accelerator = start_processes()\n"
        "for line in sys.argv[1:]:\n"
        "    evaluate(parse_options(line.split()), accelerator)\n"
        "accelerator.end_training()\n"
    )
    images, scores = {}, {}
    for processes in (1, 3):
        folder = tmp_path / str(processes)
        drawn = model_arguments(grey_model, folder, "--metrics", "fid")
        given = (
            "--samples", tmp_path / "half.npz", "--reference", "digits", "--features", "pixels", "--output-dir",
            folder / "given", "--cache-dir", folder / "cache",
        )  # fmt: skip
        if processes == 1:
            for line in (drawn, given):
                code, printed = run_here(capsys, *line, main=evaluate_fid.main)
                assert code == 0, printed
        else:
            lines = (" ".join(map(str, line)) for line in (drawn, given))
            code, printed = run_script(tmp_path / "log", script, *lines, processes=processes)
            assert code == 0, printed
        images[processes] = open_set(str(folder / "out" / "samples")).read(0, 40).astype(int)
        scores[processes] = load_scores(folder / "given" / "scores.json").values
    # Another number of threads may round differently: a grey level.
    assert np.abs(images[3] - images[1]).max() <= 1
    for name in SCORED:
        assert scores[3][name] == pytest.approx(scores[1][name], abs=1e-8), name


def test_the_script_says_what_it_can_do():
    command = [sys.executable, str(ROOT / "eval" / "evaluate_fid.py"), "--help"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True, env=offline_environment()).stdout
    for preset in ("dit-400k", "dit-script", "sit-sde", "sit-ode", "quick"):
        assert preset in printed


@pytest.mark.slow
def test_training_scores_itself_on_the_way(capsys, tmp_path):
    arguments = (
        "--config", ROOT / "train/configs/digits.yaml", "--model", "D-EMOv2-N-8", "--output-dir", tmp_path / "run",
        "--max-train-steps", 4,
        "--global-batch-size", 8, "--micro-batch-size", 8, "--fid-every", 2, "--fid-images", 20, "--fid-features",
        "pixels", "--sample-every", 0, "--report-to", "none",
    )  # fmt: skip
    code, printed = run_here(capsys, *arguments)
    assert code == 0, printed
    assert "step 2/4: Frechet distance (pixels)" in printed and "step 4/4: Frechet distance (pixels)" in printed
    for step in (2, 4):
        folder = tmp_path / "run" / "fid" / f"step-{step:07d}"
        stored = json.loads((folder / "scores.json").read_text())
        assert stored["conditions"]["preset"] == "quick" and stored["scores"]["fid"] > 0
        assert not (folder / "samples").exists() and (folder / "samples.png").is_file()
    assert (tmp_path / "run" / "fid" / "fid.png").is_file()
    card = (tmp_path / "run" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: diffusers") and "**averaged** weights" in card and "after 4 of" in card
    assert "digits, 1,797 images, 10 classes (zero, one," in card and "| learning_rate | 0.002 |" in card
    assert card.count("Frechet distance (pixels)") == 2
    card = (tmp_path / "run" / "checkpoint-0000004" / "README.md").read_text()
    assert card.count("Frechet distance (pixels)") == 1  # step 4 is scored after it is saved


@pytest.mark.slow
def test_runs_are_compared_side_by_side(capsys, tmp_path):
    common = ("--max-train-steps", 2, "--global-batch-size", 4, "--fid-every", 2, "--fid-images", 8, "--fid-features",
              "pixels", "--sample-every", 0, "--report-to", "none", "--log-every", 1, "--learning-rate", "1e-2",
              "--ema-decay", "0.5")  # fmt: skip
    for model in ("D-EMOv2-N-8", "DiT-N-8"):
        code, printed = run_here(capsys, "--model", model, "--output-dir", tmp_path / model, *common)
        assert code == 0, printed
    compare_runs.main(
        [str(tmp_path / "D-EMOv2-N-8"), str(tmp_path / "DiT-N-8"), "--output", str(tmp_path / "both.png")]
    )
    printed = capsys.readouterr().out
    scores = [load_scores(tmp_path / model / "fid" / "step-0000002" / "scores.json").values["fid"]
              for model in ("D-EMOv2-N-8", "DiT-N-8")]  # fmt: skip
    assert "D-EMOv2-N-8: loss | Frechet distance (pixels)" in printed
    assert all(f"| {score:.4f} |" in printed for score in scores) and scores[0] != scores[1]
    assert (tmp_path / "both.png").stat().st_size > 5000
    with pytest.raises(SystemExit, match=r"there is no train_log\.csv"):
        compare_runs.main([str(tmp_path)])


@pytest.mark.slow
def test_two_training_processes_score_one_model(capsys, tmp_path):
    arguments = (
        "--config", ROOT / "train/configs/digits.yaml", "--model", "D-EMOv2-N-8", "--output-dir", tmp_path / "run",
        "--max-train-steps", 2,
        "--global-batch-size", 8, "--micro-batch-size", 4, "--fid-every", 2, "--fid-images", 150, "--fid-features",
        "pixels", "--sample-every", 0, "--report-to", "none",
    )  # fmt: skip
    code, printed = run_script(tmp_path / "log", TRAIN_DIT, *arguments, processes=2)
    assert code == 0, printed
    in_loop = load_scores(tmp_path / "run" / "fid" / "step-0000002" / "scores.json")
    # Two shards of samples, one a process: both drew with the weights and statistics that were saved.
    code, printed = run_here(
        capsys, "--model", tmp_path / "run" / "checkpoint-0000002", "--preset", "quick", "--num-images", "150",
        "--reference", "digits", "--features", "pixels", "--output-dir", tmp_path / "again", "--cache-dir",
        tmp_path / "cache", "--metrics", "fid", main=evaluate_fid.main,
    )  # fmt: skip
    assert code == 0, printed
    again = load_scores(tmp_path / "again" / "scores.json")
    assert again.conditions["drawn"]["transformer"] == in_loop.conditions["drawn"]["transformer"]
    # Tolerance: a grey level in few pixels, from another number of threads.
    assert again.values["fid"] == pytest.approx(in_loop.values["fid"], rel=1e-3)


def test_training_does_not_start_without_what_its_fid_needs(capsys, tmp_path):
    code, printed = run_here(
        capsys, "--output-dir", tmp_path / "run", "--max-train-steps", 4, "--fid-every", 2, "--fid-inception-weights",
        tmp_path / "absent.pth",
    )  # fmt: skip
    assert code != 0 and "there is no such file" in printed
    assert not list((tmp_path / "run").glob("checkpoint-*"))


ADM_FILES = "D_EMO_ADM_FILES"
# ADM-G with upsampling on ImageNet 256 x 256, 50,000 samples, as the original evaluator scores its own files.
ADM_SCORES = {
    "fid": (3.9426, 0.005),
    "sfid": (6.1404, 0.005),
    "is": (215.84, 0.3),
    "precision": (0.8265, 0.003),
    "recall": (0.5309, 0.004),
}


@pytest.mark.slow
@pytest.mark.timeout(86_400)
def test_acceptance_adms_own_samples_score_what_adm_says(capsys, tmp_path):
    if ADM_FILES not in os.environ:
        pytest.skip(
            f"set {ADM_FILES} to a folder with VIRTUAL_imagenet256_labeled.npz and "
            "admnet_guided_upsampled_imagenet256.npz of guided-diffusion"
        )
    folder = os.environ[ADM_FILES]
    code, printed = evaluate(
        capsys, "--samples", f"{folder}/admnet_guided_upsampled_imagenet256.npz", "--reference",
        f"{folder}/VIRTUAL_imagenet256_labeled.npz", "--output-dir", tmp_path,
    )  # fmt: skip
    assert code == 0, printed
    scores = load_scores(tmp_path / "scores.json")
    assert not scores.not_comparable
    for name, (expected, tolerance) in ADM_SCORES.items():
        assert scores.values[name] == pytest.approx(expected, abs=tolerance), name
