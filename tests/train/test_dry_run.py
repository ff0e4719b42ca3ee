"""--dry-run of every trainer: the plan, then what the run would begin with, in the same words, and no trace."""

import pytest
from helpers.trainers import TRAINERS
from helpers.training import run_here

from d_emo.common.locks import FolderLock

# What only making the run finds out, by trainer.
LATE = {
    "diffusion": [
        (["--lr-scheduler", "sawtooth"], "--lr-scheduler sawtooth"),
        (["--objective", "dit", "--sample-every", "1", "--sample-steps", "5000"], "num_inference_steps=5000"),
        (["--fid-every", "1", "--fid-reference", "nowhere"], "--fid-reference nowhere"),
        (["--fid-every", "1", "--fid-inception-weights", "nowhere.pth"], "nowhere.pth"),
        (["--push-to-hub", "true", "--hub-model-id", "me/di..gits"], "--push-to-hub: the repository me/di..gits"),
    ],
    "classifier": [
        (["--optimizer", "sawtooth"], "--optimizer sawtooth"),
        (["--auto-augment", "nonsense"], "--auto-augment nonsense"),
        (["--teacher", "nowhere"], "--teacher nowhere does not load"),
    ],
    "segmenter": [(["--lr-multipliers", "nothing.=2"], "--lr-multipliers: no parameter that learns begins with")],
    "detector": [(["--no-weight-decay", "nothing."], "--no-weight-decay: no parameter has")],
    "video": [(["--lr-multipliers", "nothing.=2"], "--lr-multipliers: no parameter that learns begins with")],
}


class Case:
    """A trainer with its data, and a run of one step."""

    def __init__(self, name, root):
        self.module, self.options, write = TRAINERS[name]
        if write is not None:
            self.options = [*self.options, "--train-data-dir", write(root / "data")]
        self.root, self.run = root, root / "runs" / "one"

    def __call__(self, capsys, *more):
        common = ["--max-train-steps", "1", "--cpu-threads", "1"]
        return run_here(capsys, *self.options, *common, *more, main=self.module.main)

    def ends(self, capsys, *more):
        """The last line of the dry run, which leaves no trace and is the real one's."""
        before = traces(self.root)
        code, dry = self(capsys, *more, "--dry-run")
        assert traces(self.root) == before
        real_code, real = self(capsys, *more)
        assert code and real_code, dry + real
        assert dry.splitlines()[-1] == real.splitlines()[-1]
        return dry.splitlines()[-1]


def traces(folder):
    """Everything in a folder with its time, the locks of those who looked aside."""
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}


@pytest.fixture(
    scope="module",
    params=[pytest.param(name, marks=[pytest.mark.slow] if name != "video" else []) for name in TRAINERS],
)
def case(request, tmp_path_factory):
    return request.param, Case(request.param, tmp_path_factory.mktemp(request.param))


@pytest.mark.usefixtures("offline")
def test_a_dry_run_ends_as_the_run_would_begin(case, capsys):
    name, trainer = case
    code, planned = trainer(capsys, "--dry-run", "--output-dir", trainer.run)
    assert code == 0 and "  optimizer " in planned, planned
    assert not trainer.run.parent.exists()  # nor what was made for it
    assert trainer(capsys, "--output-dir", trainer.run)[0] == 0
    resume = ["--output-dir", trainer.run, "--resume-from", "latest"]
    changed = trainer.ends(capsys, *resume, "--learning-rate", "0.5", "--max-train-steps", "2")
    assert "checkpoint-0000001 is of another run: learning_rate" in changed
    assert "holds a run up to checkpoint-0000001; continue it" in trainer.ends(capsys, "--output-dir", trainer.run)
    assert "no such folder" in trainer.ends(capsys, "--output-dir", trainer.root / "new", "--resume-from", "nowhere")
    with FolderLock(trainer.run):
        assert "is in use by this process" in trainer.ends(capsys, *resume)
    code, planned = trainer(capsys, *resume, "--dry-run")
    assert code == 0 and "resuming from" in planned
    for number, (options, message) in enumerate(LATE[name]):
        assert message in trainer.ends(capsys, *options, "--output-dir", trainer.root / f"late-{number}")
