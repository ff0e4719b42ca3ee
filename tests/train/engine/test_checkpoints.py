"""Checkpoints: whole or refused by name."""

import json
import shutil

import pytest
from helpers.pipelines import tiny_pipeline

from d_emo import DEMOPipeline
from d_emo.common.files import partial_path, remove_partial, replace_folder, write_json, written_whole
from d_emo.train.engine.checkpoints import (
    CheckpointError,
    checkpoint_path,
    list_checkpoints,
    prune_checkpoints,
    publish_pipeline,
    verify_checkpoint,
    write_manifest,
)
from d_emo.train.engine.resume import check_run_folder, check_same_run, find_checkpoint


def fake_checkpoint(output_dir, step, content=b"weights" * 100):
    path = checkpoint_path(output_dir, step)
    (path / "training_state").mkdir(parents=True)
    (path / "training_state" / "model.safetensors").write_bytes(content)
    write_manifest(path, {"step": step})
    return path


def test_a_whole_checkpoint_is_accepted(tmp_path):
    path = fake_checkpoint(tmp_path, 10)
    assert verify_checkpoint(path)["step"] == 10
    assert find_checkpoint(str(path), tmp_path) == (path, verify_checkpoint(path), [])


def cut_in_half(path):
    file = path / "training_state" / "model.safetensors"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def change_a_byte(path):
    file = path / "training_state" / "model.safetensors"
    file.write_bytes(b"W" + file.read_bytes()[1:])


def remove_a_file(path):
    (path / "training_state" / "model.safetensors").unlink()


def remove_the_manifest(path):
    (path / "manifest.json").unlink()


def damage_the_manifest(path):
    (path / "manifest.json").write_text('{"step": 10, "fil')


def empty_the_manifest(path):
    (path / "manifest.json").write_text('{"step": 10, "files": {}}')


def list_in_the_manifest(path):
    (path / "manifest.json").write_text("[1, 2]")


def nest_the_manifest(path):
    (path / "manifest.json").write_text("[" * 100_000)


def list_a_file_elsewhere(path):
    content = json.loads((path / "manifest.json").read_text())
    del content["sha256"]
    content["files"]["../other"] = {"bytes": 0, "sha256": ""}
    write_json(path / "manifest.json", content)


def rename_a_key_of_the_manifest(path):
    content = json.loads((path / "manifest.json").read_text())
    content["process"] = content.pop("step")
    write_json(path / "manifest.json", {**content, "step": 10})


def add_a_file(path):
    (path / "training_state" / "custom_checkpoint_0.pkl").write_bytes(b"")


def exchange_a_file(path):
    other = fake_checkpoint(path.parent / "other", 10, b"WEIGHTS" * 100)
    (other / "training_state" / "model.safetensors").replace(path / "training_state" / "model.safetensors")


def rename_another(path):
    shutil.rmtree(path)
    fake_checkpoint(path.parent / "other", 9).rename(path)


DAMAGES = {
    cut_in_half: "model.safetensors has 350 bytes, not 700",
    change_a_byte: "the content of .*model.safetensors changed",
    remove_a_file: "model.safetensors is missing",
    remove_the_manifest: "not written to its end",
    damage_the_manifest: "manifest.json is damaged",
    empty_the_manifest: "manifest.json is damaged",
    list_in_the_manifest: "manifest.json is damaged",
    nest_the_manifest: "manifest.json is damaged",
    list_a_file_elsewhere: "manifest.json is damaged",
    rename_a_key_of_the_manifest: "manifest.json is damaged .its content changed",
    add_a_file: "custom_checkpoint_0.pkl was not written with it",
    exchange_a_file: "the content of .*model.safetensors changed",
    rename_another: "it was renamed, it is of step 9",
}


@pytest.mark.parametrize(("damage", "message"), DAMAGES.items(), ids=lambda value: getattr(value, "__name__", ""))
def test_a_damaged_checkpoint_is_refused_by_name(tmp_path, damage, message):
    fake_checkpoint(tmp_path, 5)
    path = fake_checkpoint(tmp_path, 10)
    damage(path)
    with pytest.raises(CheckpointError, match=f"checkpoint-0000010.*{message}"):
        find_checkpoint(str(path), tmp_path)


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda value: value.__name__)
def test_latest_goes_back_to_the_newest_whole_one_and_says_so(tmp_path, damage):
    fake_checkpoint(tmp_path, 5)
    good = fake_checkpoint(tmp_path, 7)
    damage(fake_checkpoint(tmp_path, 10))
    path, manifest, notes = find_checkpoint("latest", tmp_path)
    assert (path, manifest["step"]) == (good, 7)
    assert "skipped" in notes[0] and "checkpoint-0000010" in notes[0]
    assert "checkpoint-0000007, the newest whole checkpoint" in notes[1]


def test_latest_with_only_damaged_checkpoints_is_refused(tmp_path):
    cut_in_half(fake_checkpoint(tmp_path, 5))
    with pytest.raises(CheckpointError, match=r"no whole checkpoint.*checkpoint-0000005"):
        find_checkpoint("latest", tmp_path)


def test_a_runs_folder_is_no_checkpoint_and_the_refusal_names_those_in_it(tmp_path):
    fake_checkpoint(tmp_path, 5)
    fake_checkpoint(tmp_path, 10)
    with pytest.raises(CheckpointError, match=r"is a run's folder.*checkpoint-0000010.*--resume-from latest"):
        find_checkpoint(str(tmp_path), tmp_path / "other")


def test_latest_before_the_first_checkpoint_starts_from_the_beginning(tmp_path):
    path, _, notes = find_checkpoint("latest", tmp_path)
    assert path is None
    assert "starting from the beginning" in notes[0]


def test_partial_folders_are_no_checkpoints(tmp_path):
    fake_checkpoint(tmp_path, 900000)
    fake_checkpoint(tmp_path, 12345678)
    (tmp_path / ".partial-checkpoint-0000011").mkdir()
    (tmp_path / "checkpoint-best").mkdir()
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-0900000", "checkpoint-12345678"]


def test_a_folder_with_other_files_is_refused(tmp_path):
    (tmp_path / "thesis.txt").write_text("")
    with pytest.raises(CheckpointError, match="not empty and holds no run"):
        check_run_folder(tmp_path, resuming=False)


def test_a_run_with_checkpoints_is_continued_only_where_that_is_asked_for(tmp_path):
    write_json(tmp_path / "run.json", {"seed": 0})
    check_run_folder(tmp_path, resuming=False)  # killed before it had anything to lose
    fake_checkpoint(tmp_path, 5)
    with pytest.raises(CheckpointError, match="holds a run up to checkpoint-0000005; continue it with --resume-from"):
        check_run_folder(tmp_path, resuming=False)
    check_run_folder(tmp_path, resuming=True)


RUN = {"model": "D-EMOv2-S-2", "seed": 0, "learning_rate": 1e-4, "lr_schedule_steps": 100, "data_size": 9, "data": "a",
       "log_every": 5, "objective": "dit"}  # fmt: skip


def compared(tmp_path, allowed=None, **changes):
    return check_same_run("--resume-from X", RUN, {**RUN, **changes}, allowed, tmp_path)


def test_what_does_not_change_the_result_may_differ(tmp_path):
    assert compared(tmp_path, log_every=7, data="moved") == []


def test_what_changes_the_result_is_named_with_the_ways_on(tmp_path):
    with pytest.raises(CheckpointError) as refusal:
        compared(tmp_path, seed=1, learning_rate=1e-3)
    message = str(refusal.value)
    assert "learning_rate 0.0001 -> 0.001; seed 0 -> 1" in message
    assert "--allow-change learning_rate,seed" in message and f"--init-from {tmp_path}" in message


@pytest.mark.parametrize(
    ("change", "name"),
    [({"seed": 1}, "seed"), ({"learning_rate": 1e-3}, "learning-rate"), ({"lr_schedule_steps": 200}, "max_train_steps"),
     ({"data_size": 10}, "data")],
)  # fmt: skip
def test_a_permission_names_the_option_that_a_person_knows(tmp_path, change, name):
    with pytest.raises(CheckpointError, match=f"--allow-change {name.replace('-', '_')}"):
        compared(tmp_path, **change)
    assert len(compared(tmp_path, name, **change)) == 1
    with pytest.raises(CheckpointError, match="--allow-change"):
        compared(tmp_path, "log_every", **change)


@pytest.mark.parametrize("change", [{"model": "DiT-S-2"}, {"objective": "sit"}])
def test_no_permission_makes_another_network_of_the_weights(tmp_path, change):
    (name,) = change
    with pytest.raises(CheckpointError, match=f"{name} .* -> .*--init-from") as refusal:
        compared(tmp_path, name, **change)
    assert "--allow-change" not in str(refusal.value)


def test_permission_for_an_option_that_does_not_exist_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"--allow-change learning_rat: .*did you mean learning_rate"):
        compared(tmp_path, "learning_rat")


def test_publishing_replaces_an_older_pipeline_and_keeps_the_run(tmp_path):
    (tmp_path / "train_log.csv").write_text("step")
    publish_pipeline(tiny_pipeline(), tmp_path, "card")
    publish_pipeline(tiny_pipeline(hidden_size=64), tmp_path, "card")
    assert DEMOPipeline.from_pretrained(tmp_path).transformer.config.hidden_size == 64
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "README.md",
        "model_index.json",
        "scheduler",
        "train_log.csv",
        "transformer",
    ]


def test_old_checkpoints_are_deleted_but_the_newest_and_the_multiples(tmp_path):
    for step in range(10, 80, 10):
        (tmp_path / f"checkpoint-{step:07d}").mkdir()
    assert prune_checkpoints(tmp_path, None, None) == []
    deleted = prune_checkpoints(tmp_path, 2, 30)
    assert [path.name[-2:] for path in deleted] == ["10", "20", "40", "50"]
    assert [path.name[-2:] for path in sorted(tmp_path.iterdir())] == ["30", "60", "70"]
    assert prune_checkpoints(tmp_path, 1, None) and [path.name[-2:] for path in tmp_path.iterdir()] == ["70"]


def test_an_interrupted_publication_does_not_load(tmp_path, monkeypatch):
    publish_pipeline(tiny_pipeline(), tmp_path, "card")
    monkeypatch.setattr(
        "d_emo.train.engine.checkpoints.replace_folder", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt)
    )
    with pytest.raises(KeyboardInterrupt):
        publish_pipeline(tiny_pipeline(hidden_size=64), tmp_path, "card")
    assert not (tmp_path / "model_index.json").exists()


def test_a_file_appears_whole_or_not_at_all(tmp_path):
    write_json(tmp_path / "a.json", {"x": 1})
    assert json.loads((tmp_path / "a.json").read_text()) == {"x": 1}
    with pytest.raises(KeyboardInterrupt), written_whole(tmp_path / "a.json") as partial:
        partial.write_text("{")
        raise KeyboardInterrupt
    assert json.loads((tmp_path / "a.json").read_text()) == {"x": 1}
    remove_partial(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_a_folder_is_replaced_and_leaves_nothing_behind(tmp_path):
    for name in ("new", "old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    partial_path(tmp_path / "replaced-old").mkdir()  # left by a process that was killed here
    replace_folder(tmp_path / "new", tmp_path / "old")
    assert [p.relative_to(tmp_path).as_posix() for p in sorted(tmp_path.rglob("*"))] == ["old", "old/new"]
