"""Whose folders and files are trusted with code."""

import os

import pytest

from d_emo.common import private_folders
from d_emo.common.private_folders import private_folder, read_private

STRANGER = 12345
root_only = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")


@pytest.fixture
def place(tmp_path):
    tmp_path.chmod(0o755)
    return tmp_path


def test_a_folder_is_made_for_its_owner_alone(place):
    before = os.umask(0)
    try:
        made = private_folder(place / "a" / "b", "remedy")
    finally:
        os.umask(before)
    assert made == (place / "a" / "b").resolve()
    assert [path.stat().st_mode & 0o777 for path in (made, made.parent)] == [0o700, 0o700]
    assert private_folder(place / "a" / "b", "remedy") == made


@pytest.mark.parametrize("mode", [0o777, 0o757, 0o1777, 0o2777])
def test_a_folder_that_others_write_is_refused(place, mode):
    (place / "cache").mkdir()
    (place / "cache").chmod(mode)
    with pytest.raises(PermissionError, match=r"cache is writable by others; chmod go-w .*cache, or remedy"):
        private_folder(place / "cache", "remedy")


@pytest.mark.parametrize(("mode", "allowed"), [(0o1777, True), (0o777, False), (0o755, True)])
def test_a_parent_that_others_write_is_fine_if_sticky(place, mode, allowed):
    (place / "parent" / "cache").mkdir(parents=True)
    (place / "parent").chmod(mode)
    if allowed:
        assert private_folder(place / "parent" / "cache", "remedy").is_dir()
    else:
        with pytest.raises(PermissionError, match="parent is writable by others"):
            private_folder(place / "parent" / "cache", "remedy")


def test_a_group_of_ones_own_is_nobody_else(place, monkeypatch):
    (place / "cache").mkdir()
    (place / "cache").chmod(0o775)
    monkeypatch.setattr(private_folders, "_own_group", lambda group: False)
    with pytest.raises(PermissionError, match="writable by others"):
        private_folder(place / "cache", "remedy")
    monkeypatch.setattr(private_folders, "_own_group", lambda group: True)
    assert private_folder(place / "cache", "remedy").is_dir()


@root_only
@pytest.mark.parametrize("whose", ["folder", "parent", "link"])
def test_what_a_stranger_owns_is_refused(place, whose):
    (place / "parent" / "cache").mkdir(parents=True)
    (place / "parent" / "link").symlink_to(place / "parent" / "cache")
    changed = place / "parent" / {"folder": "cache", "parent": "", "link": "link"}[whose]
    os.chown(changed, STRANGER, STRANGER, follow_symlinks=False)
    asked = place / "parent" / ("link" if whose == "link" else "cache")
    with pytest.raises(PermissionError, match=r"belongs to another user; remedy"):
        private_folder(asked, "remedy")


def test_ones_own_link_is_followed(place):
    (place / "real").mkdir()
    (place / "link").symlink_to(place / "real")
    assert private_folder(place / "link", "remedy") == (place / "real").resolve()


def test_only_ones_own_files_are_read(place):
    (place / "file").write_bytes(b"content")
    (place / "file").chmod(0o700)
    assert read_private(place / "file") == b"content"
    (place / "link").symlink_to("file")
    (place / "folder").mkdir()
    os.mkfifo(place / "pipe")
    for name in ("link", "folder", "pipe", "absent"):
        assert read_private(place / name) is None
    (place / "file").chmod(0o666)
    assert read_private(place / "file") is None
    if os.geteuid() == 0:
        (place / "file").chmod(0o600)
        os.chown(place / "file", STRANGER, STRANGER)
        assert read_private(place / "file") is None
