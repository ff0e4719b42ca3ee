"""What a run says: lines with time, step and speed; the table behind them; and when nobody listens."""

import csv
import errno
import io
import re

import pytest
from helpers.training import TINY, run_here

from d_emo.common.processes import cores, loader_processes

LINE = (
    r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d step (\d+)/4: loss \d\.\d+, gradient norm [\d.]+, learning rate [\d.e-]+, "
    r"[\d.]+ images/s, [\d:]+ elapsed, [\d:]+ left"
)


def read_log(folder):
    with (folder / "train_log.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_line_says_when_where_and_how_long_and_time_goes_on_where_it_stopped(tmp_path, capsys):
    arguments = [*TINY, "--checkpoint-every", "2", "--output-dir", tmp_path]
    code, printed = run_here(capsys, *arguments, "--max-train-steps", "2")
    assert code == 0 and "%|" not in printed and "s/step" not in printed and "Warning" not in printed, printed
    before = float(read_log(tmp_path)[-1]["seconds"])
    assert before > 0
    # As if it had taken an hour and then been interrupted.
    log = (tmp_path / "train_log.csv").read_text()
    (tmp_path / "train_log.csv").write_text(log.replace(f",{before}", ",3600.0"))
    code, printed = run_here(capsys, *arguments, "--max-train-steps", "4", "--resume-from", "latest")
    assert code == 0, printed
    assert re.findall(LINE, printed) == ["3", "4"] and "1:00:0" in printed
    assert re.search(r"step 4/4: saved .*checkpoint-0000004", printed)
    seconds = [float(row["seconds"]) for row in read_log(tmp_path)]
    assert len(seconds) == 4 and seconds == sorted(seconds) and seconds[2] > 3600


class Closed(io.StringIO):
    """Standard output that fails after the first step's line."""

    def __init__(self, number):
        super().__init__()
        self.number = number

    def write(self, text):
        if "step 1/" in self.getvalue() and text.strip():
            raise OSError(self.number, "failed")
        return super().write(text)

    def fileno(self):
        raise io.UnsupportedOperation


@pytest.mark.parametrize(("number", "code", "last"), [(errno.EPIPE, 141, 3), (errno.EIO, 0, 4)])
def test_a_run_that_nobody_reads_is_saved_and_one_whose_terminal_vanished_goes_on(
    tmp_path, capsys, monkeypatch, number, code, last
):
    """`train | head` ends like Ctrl-C, with a checkpoint; a closed window behind nohup changes nothing."""
    shown = Closed(number)
    monkeypatch.setattr("sys.stdout", shown)
    ended, printed = run_here(capsys, *TINY, "--max-train-steps", "4", "--output-dir", tmp_path)
    assert ended == code, printed
    assert "step 1/4" in shown.getvalue() and "step 2/4" not in shown.getvalue()
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == [f"checkpoint-{last:07d}"]
    assert len(read_log(tmp_path)) == last and "Traceback" not in printed


def test_loader_processes_are_at_most_the_cores_unless_more_are_asked_for(monkeypatch):
    assert loader_processes(None, 4) == min(4, cores()) and loader_processes(None, 0) == 0
    assert loader_processes(0, 4) == 0 and loader_processes(10 * cores(), 4) == 10 * cores()
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(10 * cores()))
    assert loader_processes(None, 4) == 1
