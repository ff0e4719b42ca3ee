"""Trackers: their files lie in the run's folder, a continued run goes on in them, and mistakes are one line."""

import sys
import types

import accelerate.tracking
import pytest
from accelerate.utils import LoggerType
from helpers.training import TINY, run_here
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from d_emo.train.engine.trackers import chosen_trackers, wandb_options

ARGUMENTS = [*TINY, "--checkpoint-every", "2", "--sample-steps", "2", "--samples-per-class", "1"]


class FakeWandb(types.ModuleType):
    """Stands for wandb: remembers what it was told."""

    def __init__(self):
        super().__init__("wandb")
        self.started, self.logged, self.settings = [], [], {}
        self.config = types.SimpleNamespace(update=lambda values, **_: self.settings.update(values))
        self.failure = None

    def init(self, **options):
        if self.failure:
            raise self.failure
        self.started.append(options)
        return types.SimpleNamespace(log=lambda values, step: self.logged.append((step, values)), finish=lambda: None)

    class Image:
        def __init__(self, pixels):
            self.shape = pixels.shape


@pytest.fixture
def wandb(monkeypatch):
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.setattr(accelerate.tracking, "_available_trackers", [LoggerType.TENSORBOARD, LoggerType.WANDB])
    for name in ("PROJECT", "NAME", "DIR", "RUN_ID", "RESUME"):
        monkeypatch.delenv(f"WANDB_{name}", raising=False)
    return fake


def test_a_continued_run_goes_on_in_its_trackers_inside_its_folder(tmp_path, capsys, wandb):
    folder = tmp_path / "run"
    arguments = [*ARGUMENTS, "--report-to", "wandb,tensorboard", "--sample-every", "2", "--output-dir", folder]
    for more in (["--max-train-steps", "2"], ["--max-train-steps", "4", "--resume-from", "latest"]):
        code, printed = run_here(capsys, *arguments, *more)
        assert code == 0, printed
    events = [path for path in (folder / "logs").rglob("*") if path.is_file()]
    assert len(events) == 2 and {path.parent for path in events} == {folder / "logs" / "d_emo"}  # and no other run
    read = EventAccumulator(str(folder / "logs" / "d_emo"))
    read.Reload()
    assert [event.step for event in read.Scalars("loss")] == [1, 2, 3, 4]
    assert [event.step for event in read.Images("samples")] == [2, 4]
    text = read.Tensors("settings/text_summary")[-1].tensor_proto.string_val[0].decode()
    assert "| global_batch_size | 8 |" in text
    first, second = wandb.started
    assert first == second and first["id"] == (folder / "wandb-run.txt").read_text().strip()
    assert first["project"] == "d_emo" and first["name"] == "run" and first["resume"] == "allow"
    assert first["dir"] == str(folder)
    assert [step for step, values in wandb.logged if "loss" in values] == [1, 2, 3, 4]
    assert [values["samples"][0].shape[2] for _, values in wandb.logged if "samples" in values] == [3, 3]
    assert wandb.settings["global_batch_size"] == 8 and wandb.settings["max_train_steps"] == 4


def test_wandbs_own_variables_come_first(tmp_path, monkeypatch, wandb):
    fresh = wandb_options(tmp_path, continued=False)
    assert wandb_options(tmp_path, continued=True) == fresh != wandb_options(tmp_path, continued=False)
    monkeypatch.setenv("WANDB_NAME", "mine")
    monkeypatch.setenv("WANDB_DIR", "/elsewhere")
    assert {"name", "dir"}.isdisjoint(wandb_options(tmp_path, continued=True))
    monkeypatch.setenv("WANDB_RUN_ID", "abc")
    assert "id" not in wandb_options(tmp_path, continued=True)


def test_a_tracker_that_does_not_start_ends_the_run_with_a_line(tmp_path, capsys, wandb):
    wandb.failure = RuntimeError("No API key configured. See https://a.b/c.")
    code, printed = run_here(capsys, *ARGUMENTS, "--report-to", "wandb", "--output-dir", tmp_path)
    assert code != 0 and "Traceback" not in printed
    assert "--report-to wandb: it does not start (No API key configured); log in with `wandb login`" in printed


@pytest.mark.parametrize(
    ("report_to", "message"),
    [
        ("tensorbord", "tensorbord is no tracker that Accelerate knows; use some of aim,"),
        ("tensorboard,foo", "foo is no tracker"),
        ("wandb", r"wandb is not installed; pip install 'd-emo\[wandb\]'"),
        ("tensorboard,comet_ml", "comet_ml is not installed; pip install comet-ml"),
        (" , ", "--report-to is empty"),
    ],
)
def test_trackers_that_cannot_be_used_are_one_line(monkeypatch, report_to, message):
    monkeypatch.setattr(accelerate.tracking, "_available_trackers", [LoggerType.TENSORBOARD])
    with pytest.raises(ValueError, match=message):
        chosen_trackers(report_to)


def test_trackers_are_named_with_commas_or_all_or_none(monkeypatch):
    monkeypatch.setattr(accelerate.tracking, "_available_trackers", [LoggerType.TENSORBOARD, LoggerType.WANDB])
    assert chosen_trackers("none") == [] and chosen_trackers("all") == ["tensorboard", "wandb"]
    assert chosen_trackers("wandb, tensorboard,wandb") == ["wandb", "tensorboard"]
