"""What is shown: bars on a terminal, lines elsewhere, and nothing that anybody has to read twice."""

import ast
import errno
import io
import itertools
import re
import time
import warnings

import pytest
from helpers.paths import ROOT

from d_emo.common import output
from d_emo.common.output import Progress, duration, quiet_libraries, reader_gone, say


class Terminal(io.StringIO):
    """A stream that says that it is a terminal."""

    def isatty(self):
        return True


class Failing(io.StringIO):
    """A stream whose writing fails."""

    def __init__(self, number):
        super().__init__()
        self.number, self.tried = number, 0

    def write(self, text):
        self.tried += 1
        raise OSError(self.number, "failed")  # BrokenPipeError for EPIPE

    def fileno(self):
        raise io.UnsupportedOperation


def test_without_a_terminal_long_work_says_how_far_it_is_and_draws_no_bar(capsys, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    with Progress(10_000, "image", "encoding", done=2_000) as progress:
        for _ in range(100):
            now[0] += 10
            progress.update(50)
    printed = capsys.readouterr()
    lines = printed.err.splitlines()
    assert printed.out == "" and "%|" not in printed.err
    stamp = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d"
    assert re.fullmatch(stamp + r" encoding: 2,100 of 10,000 images, 5\.0 images/s, 0:20 elapsed, 26:20 left", lines[0])
    assert 8 < len(lines) < 40  # a thousand seconds; and fewer and fewer of them
    told = [int(re.search(r": ([\d,]+) of", line)[1].replace(",", "")) for line in lines]
    gaps = [after - before for before, after in itertools.pairwise(told)]
    assert gaps == sorted(gaps)


def test_short_work_and_other_processes_say_nothing(capsys, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    for options, seconds in (({}, 1), ({"shown": False}, 100), ({"lines": False}, 100)):
        with Progress(10, "file", **options) as progress:
            for _ in range(12):  # more than all, as processes count that guess at the others' share
                now[0] += seconds / 12
                progress.update()
        assert progress.done == 10
    assert capsys.readouterr() == ("", "")


def test_a_terminal_gets_a_bar_below_what_is_said(monkeypatch):
    screen = Terminal()
    monkeypatch.setattr("sys.stderr", screen)
    with Progress(4, "step") as progress:
        progress.update(loss="0.5")
        say("step 1", screen)
        progress.update(3)
    assert "%|" in screen.getvalue() and "4/4" in screen.getvalue() and "loss=0.5" in screen.getvalue()
    assert "\rstep 1\n" in screen.getvalue() or "\nstep 1\n" in screen.getvalue()


def test_a_terminal_that_vanished_changes_nothing(monkeypatch):
    gone = Failing(errno.EIO)
    say("step 1", gone)
    assert gone.tried


def test_a_signals_handler_may_speak_in_the_middle_of_a_line(tmp_path):
    class Busy(io.StringIO):
        def write(self, text):
            raise RuntimeError("reentrant call inside <_io.BufferedWriter name='<stdout>'>")

        def fileno(self):
            return file.fileno()

    with (tmp_path / "out").open("w") as file:
        say("stopping", Busy())
    assert (tmp_path / "out").read_text() == "\nstopping\n"


def test_a_closed_pipe_ends_a_command_or_is_noted_where_something_is_to_be_saved():
    with pytest.raises(BrokenPipeError):
        say("step 1", Failing(errno.EPIPE))
    noted = []
    with reader_gone(lambda: noted.append(True)):
        say("step 1", Failing(errno.EPIPE))
    assert noted == [True]
    with pytest.raises(OSError, match="failed"):
        say("step 1", Failing(errno.ENOSPC))


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0:00"),
        (59.6, "1:00"),
        (725, "12:05"),
        (11525, "3:12:05"),
        (90061, "1 day 1:01:01"),
        (9e5, "10 days 10:00:00"),
    ],
)
def test_durations_read_like_a_clock(seconds, text):
    assert duration(seconds) == text


def test_bars_come_from_one_place():
    """Nothing else of the package imports tqdm, so that one rule decides whether a bar is drawn."""
    users = []
    for folder in ("d_emo", "pipelines", "eval", "train"):
        for path in (ROOT / folder).rglob("*.py"):
            names = [
                name
                for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
                for name in (
                    [alias.name for alias in node.names] if isinstance(node, ast.Import)
                    else [node.module or ""] if isinstance(node, ast.ImportFrom) else []
                )
            ]  # fmt: skip
            users += [path.resolve()] if any(name.split(".")[0] == "tqdm" for name in names) else []
    assert set(users) == {ROOT / "d_emo/common/output.py"}


def test_libraries_are_quiet_where_there_is_no_terminal(monkeypatch):
    import huggingface_hub.utils
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    for name in ("TQDM_DISABLE", "HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS"):
        monkeypatch.delenv(name, raising=False)
    try:
        diffusers_logging.enable_progress_bar()
        transformers_logging.enable_progress_bar()
        monkeypatch.setattr("sys.stderr", Terminal())
        quiet_libraries()
        assert diffusers_logging.is_progress_bar_enabled() and "TQDM_DISABLE" not in output.os.environ
        monkeypatch.setattr("sys.stderr", io.StringIO())
        quiet_libraries()
        assert not diffusers_logging.is_progress_bar_enabled()
        assert not transformers_logging.is_progress_bar_enabled()
        assert huggingface_hub.utils.are_progress_bars_disabled()
        assert output.os.environ["TQDM_DISABLE"] == "1"
    finally:
        diffusers_logging.enable_progress_bar()
        transformers_logging.enable_progress_bar()
        huggingface_hub.utils.enable_progress_bars()


def test_a_warning_that_nobody_can_mend_is_not_shown():
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        quiet_libraries()
        warnings.warn("This DataLoader will create 9 worker processes in total.", UserWarning, stacklevel=1)
        warnings.warn("Something else.", UserWarning, stacklevel=1)
    assert [str(warning.message) for warning in shown] == ["Something else."]
