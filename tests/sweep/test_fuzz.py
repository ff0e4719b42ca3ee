"""Mutated files through every reader, in a process whose memory is limited: refused or read, and nothing else."""

import pytest
from helpers.paths import TESTS
from helpers.processes import run_script


@pytest.mark.parametrize("count", [240, pytest.param(10_000, marks=pytest.mark.slow)])
def test_mutated_files_are_read_or_refused(count, tmp_path):
    code, output = run_script(tmp_path / "log", TESTS / "helpers" / "reader_fuzz.py", count, count)
    assert code == 0, output
    print(output)
