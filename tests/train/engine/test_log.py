"""What a run says: lines with time, step and speed; the table behind them; and when nobody listens."""

import csv
import errno
import io
import re

import pytest
from helpers.training import TINY, run_here

from d_emo.common.processes import cores, loader_processes
from d_emo.train.engine.log import append_row, seconds_so_far, truncate_log

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


def test_a_damaged_log_keeps_no_run_from_going_on(tmp_path):
    """Lines that are torn, edited or of no text go; those of a version with fewer columns stay, with an empty one."""
    log, columns = tmp_path / "log.csv", ("step", "loss", "seconds")
    for content, steps in (
        (b"step,loss,seconds\n1,0.5,2.5\n2,0.25,5.0\n3,0.2,7.5\n", ["1", "2"]),
        (b"step,loss\n1,0.5\n2,0.25\n", ["1", "2"]),
        (b"step,loss,seconds\n1,0.5,2.5\n2,0.\n", ["1"]),
        (b"step,loss,seconds\n1,x,2.5\n\xff\xfe,1,1\n2,0.25,5.0\n", ["2"]),
        (b"step,loss,seconds\n1,0.5,2.5\n" + b"9" * 200_000 + b",1,1\n\0,\0\n", ["1"]),
        (b"\xff\0\0", []),
        (b"", []),
    ):
        log.write_bytes(content)
        for _ in range(2):
            truncate_log(log, 2, columns)
            with log.open(newline="") as file:
                header, *rows = csv.reader(file)
            assert header == list(columns) and [row[0] for row in rows] == steps and {len(row) for row in rows} <= {3}
        assert seconds_so_far(log) == (float(rows[-1][2] or 0) if rows else 0.0)
    assert seconds_so_far(tmp_path / "none.csv") == 0.0


def test_a_line_of_a_log_follows_no_link(tmp_path):
    (tmp_path / "elsewhere.csv").write_text("precious")
    (tmp_path / "log.csv").symlink_to(tmp_path / "elsewhere.csv")
    with pytest.raises(OSError, match=r"log\.csv"):
        append_row(tmp_path / "log.csv", (1, 0.5))
    assert (tmp_path / "elsewhere.csv").read_text() == "precious"
