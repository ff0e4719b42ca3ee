"""No tracked file is half merged."""

import re
import shutil
import subprocess

import pytest
from helpers.paths import ROOT

# What Git writes above and below both versions, in any file: seven signs and a space at a line's beginning.
MARKER = re.compile(rb"^(?:%s|%s) " % (b"<" * 7, b">" * 7), re.MULTILINE)


def half_merged(folder, names):
    """The names of files and lines that hold a marker; links are looked at where they lead."""
    found = []
    for name in names:
        path = folder / name
        if path.is_symlink() or not path.is_file():
            continue
        content = path.read_bytes()
        if b"\0" not in content[:8192]:  # as Git tells text from what is none
            lines = [content.count(b"\n", 0, mark.start()) + 1 for mark in MARKER.finditer(content)]
            found += [f"{name}:{line}" for line in lines]
    return found


def test_no_tracked_file_holds_markers_of_a_merge():
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        pytest.skip("needs a checkout and git")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    names = [name for name in listed.split("\0") if name]
    assert "CHANGELOG.md" in names
    assert not half_merged(ROOT, names)


def test_markers_are_found_and_rules_of_headings_are_not(tmp_path):
    ours, theirs = "<" * 7, ">" * 7
    (tmp_path / "merged.md").write_text(f"# A\n{ours} HEAD\none\n{'=' * 7}\ntwo\n{theirs} branch\n")
    (tmp_path / "windows.txt").write_bytes(f"a\r\n{theirs} branch\r\n".encode())
    (tmp_path / "fine.md").write_text(f"Heading\n{'=' * 7}\n see {ours} HEAD\n{ours}\n{theirs}> print\n")
    (tmp_path / "picture.png").write_bytes(f"\0\n{ours} HEAD\n".encode())
    names = sorted(path.name for path in tmp_path.iterdir())
    assert half_merged(tmp_path, names) == ["merged.md:2", "merged.md:6", "windows.txt:2"]
