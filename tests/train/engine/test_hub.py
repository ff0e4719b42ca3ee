"""--push-to-hub, with a Hub that is a folder: what is sent, when it fails, what is said."""

import shutil
from pathlib import Path

import huggingface_hub
import pytest
from helpers.training import TINY, run_here
from huggingface_hub.utils import filter_repo_objects

from d_emo import DEMOPipeline


class FolderHub:
    """Stands for the Hub's two calls, with the real client's own selection of files."""

    def __init__(self, root: Path):
        self.root = root
        self.private = "never asked"

    def create_repo(self, name, *, private, exist_ok):
        self.private = private
        name = name if "/" in name else f"me/{name}"
        (self.root / name).mkdir(parents=True, exist_ok=exist_ok)
        return huggingface_hub.RepoUrl(f"https://huggingface.co/{name}")

    def upload_folder(self, *, repo_id, folder_path, commit_message, allow_patterns, ignore_patterns):
        names = [path.relative_to(folder_path).as_posix() for path in folder_path.rglob("*") if path.is_file()]
        for name in filter_repo_objects(names, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns):
            target = self.root / repo_id / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(folder_path / name, target)
        return f"https://huggingface.co/{repo_id} ({commit_message})"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    made = FolderHub(tmp_path / "hub")
    monkeypatch.setattr(huggingface_hub, "create_repo", made.create_repo)
    monkeypatch.setattr(huggingface_hub, "upload_folder", made.upload_folder)
    return made


ARGUMENTS = [*TINY, "--max-train-steps", "2", "--checkpoint-every", "1", "--sample-steps", "2", "--push-to-hub", "true"]


def test_the_pipeline_its_card_and_pictures_are_sent_and_checkpoints_are_not(tmp_path, capsys, hub):
    arguments = [*ARGUMENTS, "--sample-every", "2", "--output-dir", tmp_path / "digits"]
    code, printed = run_here(capsys, *arguments, "--hub-private", "true")
    assert code == 0 and "uploaded: https://huggingface.co/me/digits (After 2 steps)" in printed, printed
    assert hub.private is True
    sent = {path.relative_to(hub.root / "me/digits").as_posix() for path in (hub.root / "me/digits").rglob("*")}
    assert {"README.md", "model_index.json", "loss.png", "samples/step-0000002.png"} <= sent
    assert "transformer/diffusion_pytorch_model.safetensors" in sent
    assert not any("checkpoint" in name or name in ("run.json", "train_log.csv") for name in sent)
    assert 'from_pretrained("me/digits")' in (hub.root / "me/digits/README.md").read_text()  # of whoever reads it
    assert "# digits: D-EMOv2-N-8" in (hub.root / "me/digits/README.md").read_text()
    assert {"picture.png"} <= sent
    assert DEMOPipeline.from_pretrained(hub.root / "me/digits").id2label[3] == "three"


def test_a_repository_that_cannot_be_opened_ends_the_run_before_it_computes(tmp_path, capsys, offline):
    code, printed = run_here(capsys, *ARGUMENTS, "--output-dir", tmp_path / "run")
    assert code != 0 and "--push-to-hub: the repository run cannot be opened" in printed
    assert "hf auth login" in printed and "step 1" not in printed


def test_a_failed_upload_leaves_the_pipeline_and_says_how_to_send_it(tmp_path, capsys, hub, monkeypatch):
    def broken(**_):
        raise OSError("connection lost")

    monkeypatch.setattr(huggingface_hub, "upload_folder", broken)
    code, printed = run_here(capsys, *ARGUMENTS, "--hub-model-id", "lab/digits", "--output-dir", tmp_path / "run")
    assert code != 0 and "connection lost" in printed and f"hf upload lab/digits {tmp_path / 'run'}" in printed
    assert DEMOPipeline.from_pretrained(tmp_path / "run").id2label


def test_hub_options_without_push_to_hub_are_refused(tmp_path, capsys):
    code, printed = run_here(capsys, *TINY, "--hub-model-id", "a/b", "--output-dir", tmp_path)
    assert code != 0 and "need --push-to-hub" in printed


@pytest.mark.usefixtures("offline", "hub")
def test_a_dry_run_asks_for_a_login_and_makes_no_repository(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "whoami", lambda: {"name": "me"})
    arguments = [*ARGUMENTS, "--output-dir", tmp_path / "digits", "--dry-run"]
    code, printed = run_here(capsys, *arguments)
    assert code == 0 and not (tmp_path / "hub").exists(), printed

    def nobody():
        raise OSError("no token found")

    monkeypatch.setattr(huggingface_hub, "whoami", nobody)
    code, printed = run_here(capsys, *arguments)
    assert code and "--push-to-hub: the repository digits cannot be opened (no token found" in printed
