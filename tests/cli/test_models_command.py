"""`d-emo models`: names with parameters, as the functions make them."""

import pytest

import d_emo
from d_emo.cli import models
from d_emo.common import packaged as home


def test_names_are_listed_with_the_parameters_of_what_their_function_makes(capsys):
    models.main(["--pattern", "D-EMOv2-N-8", "EMOv2-1M"])
    lines = capsys.readouterr().out.splitlines()
    diffusion = sum(parameter.numel() for parameter in d_emo.create_model("D-EMOv2-N-8").parameters())
    classifier = sum(parameter.numel() for parameter in d_emo.create_classifier("EMOv2-1M").parameters())
    assert lines[:2] == [
        "diffusion (d_emo.create_model(NAME)):",
        f"  D-EMOv2-N-8              {diffusion:>13,} parameters",
    ]
    assert lines[2:4] == [
        "classifiers (d_emo.create_classifier(NAME)):",
        f"  EMOv2-1M                 {classifier:>13,} parameters",
    ]
    assert lines[4] == "segmenters (d_emo.create_segmenter(NAME)):" and len(lines) == 6


def test_what_comes_with_the_package_is_named_with_its_kind(tmp_path, monkeypatch, capsys):
    for name, mark, content in (
        ("apples", "model_index.json", '{"_class_name": "DEMOPipeline"}'),
        ("pears", "config.json", '{"architectures": ["EMOv2ForImageClassification"]}'),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / mark).write_text(content)
    monkeypatch.setattr(home, "_FOLDER", tmp_path)
    models.main(["--pattern", "apples", "pears"])
    assert capsys.readouterr().out.splitlines() == [
        "packaged, trained (d_emo.packaged(NAME)):",
        "  apples                   DEMOPipeline",
        "  pears                    EMOv2ForImageClassification",
    ]


def test_a_pattern_without_a_match_is_said(capsys):
    with pytest.raises(SystemExit, match="--pattern xyz: no name matches; leave it out to see all"):
        models.main(["--pattern", "xyz"])


def test_all_names_are_listed_without_their_weights():
    titles = dict(models.tables(["*"]))
    assert len(titles) == 5
    listed = {title.split(" (")[0]: list(getattr(d_emo, names)()) for title, (_, names) in models.MADE.items()}
    assert all(listed.values()) and set(listed) <= {title.split(" (")[0] for title in titles}
