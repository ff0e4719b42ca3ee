"""Making packaged models from a finished training: what lies in the folder, and what its card says."""

import json

import pytest
import torch
import yaml
from helpers.classifiers import TINY as TINY_CLASSIFIER
from helpers.training import TINY, run_here
from transformers import pipeline as task

from d_emo import DEMOPipeline
from d_emo.common.float16 import save_float16
from d_emo.eval.fid.scoring import load_scores
from d_emo.images.digits import digits_source
from d_emo.train import make_packaged, train_classifier
from d_emo.train.packing import drawing, reading


@pytest.fixture(autouse=True)
def few(monkeypatch, tmp_path):
    """As few samples as the evaluators take."""
    monkeypatch.setattr(drawing, "PER_CLASS", 2)
    monkeypatch.setattr(drawing, "STEPS", 2)
    fewer = [{"500": "40"}.get(word, word) for word in drawing.FRECHET]
    monkeypatch.setattr(drawing, "FRECHET", (*fewer, "--steps", "2"))
    monkeypatch.setenv("D_EMO_CACHE", str(tmp_path / "cache"))


def names_in(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_a_finished_training_that_draws_becomes_a_folder_with_its_card(capsys, tmp_path):
    run, out = tmp_path / "run", tmp_path / "digits"
    code, printed = run_here(capsys, *TINY, "--objective", "sit", "--max-train-steps", 1, "--output-dir", run)
    assert code == 0, printed
    code, printed = run_here(capsys, "digits", "--run-dir", run, "--output-dir", out, main=make_packaged.main)
    assert code == 0, printed
    assert names_in(out) == [
        "README.md", "model_index.json", "neighbours.png", "scheduler/scheduler_config.json",
        "transformer/config.json", "transformer/diffusion_pytorch_model.safetensors",
    ]  # fmt: skip
    save_float16(DEMOPipeline.from_pretrained(run), tmp_path / "again")
    weights = "transformer/diffusion_pytorch_model.safetensors"
    assert (out / weights).read_bytes() == (tmp_path / "again" / weights).read_bytes()

    assert not [path for path in out.rglob("*.json") if "_name_or_path" in path.read_text()]
    card = (out / "README.md").read_text()
    fields = yaml.safe_load(card.split("---\n")[1])
    assert fields["license"] == "apache-2.0" and fields["library_name"] == "diffusers"
    assert "# digits: D-EMOv2-N-8 on digits" in card
    assert 'from_pretrained(d_emo.packaged("digits"))' in card and "{name}" not in card
    assert "Data: digits, 1,797 images, 10 classes (zero, one, " in card
    assert "python train/make_packaged.py digits --output-dir digits" in card
    assert "accelerate launch -m d_emo.train.train_dit --model D-EMOv2-N-8" in card
    assert "\nSeed 0. " in card and "1 steps took" in card and "zhang2025emov2" in card and "CC BY 4.0" in card
    assert str(tmp_path) not in card
    value = load_scores(run / "evaluation" / "fid" / "scores.json").values["fid"]
    assert "pixels of 40 samples" in card and f"**{value:.3f}** (95% interval" in card


def test_a_training_of_which_only_a_checkpoint_is_there_goes_on(capsys, tmp_path, monkeypatch):
    class Reached(BaseException):
        pass

    def caught(arguments):
        raise Reached(arguments)

    (tmp_path / "run" / "checkpoint-0000001").mkdir(parents=True)
    monkeypatch.setattr(drawing, "train", caught)
    for folder, more in (("run", ["--resume-from", "latest"]), ("new", [])):
        with pytest.raises(Reached) as found:
            make_packaged.main(["digits", "--run-dir", str(tmp_path / folder), "--output-dir", str(tmp_path / "out")])
        config, *rest = found.value.args[0][1:]
        assert config.endswith("digits-packaged.yaml") and rest == ["--output-dir", str(tmp_path / folder), *more]


def test_a_classifier_is_packed_likewise(capsys, tmp_path):
    run, out = tmp_path / "run", tmp_path / "reader"
    code, printed = run_here(capsys, *TINY_CLASSIFIER, "--max-train-steps", 1, "--output-dir", run,
                             main=train_classifier.main)  # fmt: skip
    assert code == 0, printed
    arguments = ("digits-classifier", "--run-dir", run, "--output-dir", out)
    code, printed = run_here(capsys, *arguments, main=make_packaged.main)
    assert code == 0, printed
    assert names_in(out) == [
        "README.md", "config.json", "confusion.png", "model.safetensors", "preprocessor_config.json"
    ]  # fmt: skip
    card = (out / "README.md").read_text()
    assert "The 360 digits that were held out" in card and str(tmp_path) not in card
    assert "train_classifier" in card and 'd_emo.packaged("digits-classifier")' in card
    answer = task("image-classification", str(out))(digits_source().read(0).convert("RGB"), top_k=10)
    assert {entry["label"] for entry in answer} == set(digits_source().id2label.values())
    assert reading.load(str(out)).model.dtype == torch.float32
    for name in ("config.json", "preprocessor_config.json"):  # the trainer's, not what models of the size usually get
        assert json.loads((out / name).read_text()) == json.loads((run / name).read_text())


def test_a_folder_with_something_in_it_is_refused_before_the_work(capsys, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    code, printed = run_here(capsys, "digits", "--output-dir", tmp_path, main=make_packaged.main)
    assert code and "is not empty; choose a new folder." in printed
    code, printed = run_here(capsys, "letters", "--output-dir", tmp_path / "out", main=make_packaged.main)
    assert code and "invalid choice: 'letters'" in printed
