"""Models that come with the package: found by name, whatever folders there are."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import d_emo
from d_emo.common import packaged as home
from d_emo.common.saved_folders import evaluation_folder


@pytest.fixture
def shelf(tmp_path, monkeypatch):
    """A place of two models and of a folder that is none."""
    for name, mark in {"zebra": "config.json", "apple": "model_index.json", "notes": "readme.txt"}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / mark).write_text("{}")
    (tmp_path / "apple" / "transformer").mkdir()
    (tmp_path / "apple" / "transformer" / "config.json").write_text("{}")
    monkeypatch.setattr(home, "_FOLDER", tmp_path)
    return tmp_path


def test_a_folder_with_a_model_is_a_packaged_model_and_nothing_else_is_needed(shelf):
    assert d_emo.list_packaged() == ["apple", "zebra"]
    assert d_emo.packaged("apple") == shelf / "apple"


@pytest.mark.parametrize("name", ["aple", "notes", "", "..", "apple/transformer", "./apple"])
def test_another_name_is_refused_with_the_names_that_there_are(shelf, name):
    expected = rf"packaged model '{name}' is unknown \(there are apple, zebra\); " if name else "name='' is not a name"
    with pytest.raises(ValueError, match=expected):
        d_emo.packaged(name)


def test_a_near_name_is_offered(shelf):
    with pytest.raises(ValueError, match=r"did you mean apple\?"):
        d_emo.packaged("Aple")


def test_an_installation_without_models_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(home, "_FOLDER", tmp_path / "missing")
    assert d_emo.list_packaged() == []
    with pytest.raises(ValueError, match="this installation has none"):
        d_emo.packaged("digits")


def test_asking_loads_no_library():
    code = "import sys, d_emo; d_emo.list_packaged(); print([one for one in ('torch', 'numpy') if one in sys.modules])"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_name_means_the_packaged_model_and_a_path_what_lies_there(shelf, tmp_path, monkeypatch, capsys):
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "other")
    assert home.model_place("apple") == str(shelf / "apple") and home.model_place("mine/apple") == "mine/apple"
    assert evaluation_folder("apple") == Path("runs/evaluation-apple") and not capsys.readouterr().err
    Path("apple").mkdir()
    assert home.model_place("apple") == str(shelf / "apple")
    assert "write ./apple for what lies" in capsys.readouterr().err
    assert home.model_place("./apple") == "./apple" and evaluation_folder("./apple") == Path("apple/evaluation")
    assert evaluation_folder("apple") == Path("runs/evaluation-apple")
