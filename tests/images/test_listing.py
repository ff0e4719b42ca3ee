"""The one listing: what of a folder or a tar file is seen by trainer and evaluators alike, and in which order."""

import io
import os
import socket
import tarfile
import unicodedata

import numpy as np
import PIL.Image
import pytest

from d_emo.eval.fid.image_sets import open_set
from d_emo.images.folders import folder_source
from d_emo.images.listing import is_hidden, picture_suffixes
from d_emo.images.open_source import open_source
from d_emo.train.data.options import DataOptions
from d_emo.train.data.sources import load_source


def png(value=0) -> bytes:
    target = io.BytesIO()
    PIL.Image.new("RGB", (16, 16), (value, value, value)).save(target, "PNG")
    return target.getvalue()


def write(root, *names):
    """Pictures at paths below a folder, each of its own grey."""
    for value, name in enumerate(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(value))
    return root


def seen(root) -> dict[str, int]:
    """How many pictures every class has, the same for trainer and classifier evaluator; FID's and an unconditional
    run's number agree with it."""
    source = load_source(DataOptions(train_data_dir=str(root)))
    scored = open_source(str(root), None)
    assert scored.id2label == source.id2label and scored.labels.tolist() == source.labels.tolist()
    unconditional = load_source(DataOptions(train_data_dir=str(root), unconditional=True))
    assert len(open_set(str(root))) == unconditional.size == source.size
    return {name: int((source.labels == label).sum()) for label, name in source.id2label.items()}


HIDDEN = [".git", ".ipynb_checkpoints", ".cache", ".Trash-1000", "__MACOSX", "@eaDir", "$RECYCLE.BIN", "$Recycle.Bin",
          "System Volume Information", "lost+found", "#recycle", "@Recycle", "__pycache__"]  # fmt: skip
HIDDEN_FILES = ["._a.jpg", ".hidden.png", "Thumbs.db", "desktop.ini", "ehthumbs.db", "Icon\r", ".DS_Store"]


@pytest.mark.parametrize("name", HIDDEN)
def test_hidden_and_system_folders_are_not_classes_nor_parts_of_one(tmp_path, name):
    write(tmp_path, "cat/a.png", "dog/b.png", f"{name}/c.png", f"cat/{name}/d.png")
    assert seen(tmp_path) == {"cat": 1, "dog": 1}


@pytest.mark.parametrize("name", HIDDEN_FILES)
def test_hidden_and_system_files_are_not_pictures(tmp_path, name):
    write(tmp_path, "cat/a.png", f"cat/{name}")
    assert is_hidden(name) and seen(tmp_path) == {"cat": 1}
    assert "1 hidden or of a system" in folder_source(tmp_path, False).describe_size()


def test_a_hidden_root_is_what_the_user_named(tmp_path):
    assert seen(write(tmp_path / ".data" / "@eaDir", "cat/a.png")) == {"cat": 1}


def test_links_are_followed_and_loops_guarded(tmp_path):
    write(tmp_path / "elsewhere", "photos/a.png", "photos/more/b.png", "one.png")
    root = write(tmp_path / "root", "cat/c.png")
    (root / "dog").symlink_to(tmp_path / "elsewhere" / "photos")
    (root / "cat" / "linked.png").symlink_to(tmp_path / "elsewhere" / "one.png")
    (root / "cat" / "again").symlink_to(root / "cat")
    (root / "cat" / "up").symlink_to(root)
    (root / "cat" / "more").symlink_to(tmp_path / "elsewhere" / "photos" / "more")
    (root / "cat" / "even more").symlink_to(tmp_path / "elsewhere" / "photos" / "more")
    assert seen(root) == {"cat": 3, "dog": 2}
    assert "3 links to folders that are listed already" in folder_source(root, False).note


def test_links_across_do_not_multiply(tmp_path):
    folders = [tmp_path / f"c{number}" for number in range(9)]
    for folder in folders:
        write(folder, "a.png")
    for folder in folders:
        for other in folders:
            if other != folder:
                (folder / other.name).symlink_to(other)
    assert seen(tmp_path) == {folder.name: 9 for folder in folders}


def test_broken_links_are_counted_and_named(tmp_path):
    write(tmp_path, "cat/a.png")
    (tmp_path / "cat" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    (tmp_path / "cat" / "self.png").symlink_to(tmp_path / "cat" / "self.png")
    assert seen(tmp_path) == {"cat": 1}
    assert "2 broken links (first cat/gone.png)" in folder_source(tmp_path, False).describe_size()
    (tmp_path / "dog").mkdir()
    (tmp_path / "dog" / "b.png").symlink_to(tmp_path / "nowhere.png")
    with pytest.raises(ValueError, match=r"class folders without images: dog.*3 broken links"):
        folder_source(tmp_path, False)


def test_pipes_sockets_and_devices_are_never_opened(tmp_path, monkeypatch):
    write(tmp_path, "cat/a.png")
    os.mkfifo(tmp_path / "cat" / "pipe.png")
    monkeypatch.chdir(tmp_path / "cat")
    server = socket.socket(socket.AF_UNIX)
    server.bind("socket.png")
    (tmp_path / "cat" / "null.png").symlink_to("/dev/null")
    (tmp_path / "cat" / "folder.png").mkdir()
    assert seen(tmp_path) == {"cat": 1}
    assert "3 pipes, sockets or devices" in folder_source(tmp_path, False).note
    server.close()


READ = [".jpg", ".JPG", ".jpeg", ".jfif", ".jpe", ".png", ".apng", ".webp", ".avif", ".jp2", ".j2k", ".jpx", ".bmp",
        ".dib", ".tif", ".TIFF", ".gif", ".ppm", ".pgm", ".pbm", ".pnm", ".tga", ".ico", ".icns", ".dds", ".pcx",
        ".psd", ".qoi", ".sgi", ".mpo"]  # fmt: skip
LEFT_OUT = [".eps", ".ps", ".pdf", ".wmf", ".emf", ".mpg", ".h5", ".grib", ".bufr", ".svg", ".txt", ".json", ".npy",
            ".mp4", ".jpg~", ".part", ""]  # fmt: skip


@pytest.mark.parametrize("suffix", READ)
def test_every_suffix_that_pillow_decodes_is_listed(tmp_path, suffix):
    assert suffix.lower() in picture_suffixes()
    assert seen(write(tmp_path, "cat/a.png", f"cat/b{suffix}")) == {"cat": 2}


@pytest.mark.parametrize("suffix", LEFT_OUT)
def test_other_files_are_counted_in_a_line(tmp_path, suffix):
    write(tmp_path, "cat/a.png", f"cat/b{suffix}", f"cat/c{suffix}", f"d{suffix}")
    assert seen(tmp_path) == {"cat": 1}
    line = folder_source(tmp_path, False).describe_size()
    assert line.startswith("1 images (left out: ") and f"2 {suffix or 'without a suffix'}" in line
    assert "1 beside the class folders" in line


NUMBERED = ["0", "1", "2", "10", "11", "9", "20", "100"]


@pytest.mark.parametrize("zeros", [1, 3])
def test_numbered_folders_are_in_the_order_of_their_numbers(tmp_path, zeros):
    write(tmp_path, *(f"{name.zfill(zeros)}/a.png" for name in NUMBERED))
    source = folder_source(tmp_path, False)
    assert [int(name) for name in source.id2label.values()] == sorted(map(int, NUMBERED))
    assert source.id2label[0] == "0".zfill(zeros)


def test_one_word_among_numbers_makes_all_of_them_words(tmp_path):
    source = folder_source(write(tmp_path, "2/a.png", "10/a.png", "x/a.png"), False)
    assert list(source.id2label.values()) == ["10", "2", "x"]


@pytest.mark.parametrize("names", [("1", "01"), ("é", "e\u0301"), ("cat", "cat ")])
def test_a_class_in_two_ways_of_writing_is_refused(tmp_path, names):
    write(tmp_path, *(f"{name}/a.png" for name in names), "other/a.png")
    with pytest.raises(ValueError, match="are the same class, written in two ways"):
        folder_source(tmp_path, False)


@pytest.mark.parametrize(
    "parts", [("train", "val"), ("train", "test"), ("Training", "Validation", "extra"), ("train", "valid", "test")]
)
def test_a_root_of_train_and_val_gets_a_hint(tmp_path, parts):
    write(tmp_path, *(f"{part}/{name}/a.png" for part in parts for name in ("cat", "dog")))
    with pytest.raises(
        ValueError, match=rf"parts of a data set with class folders in them.*name one: .*/{sorted(parts)[0]}"
    ):
        load_source(DataOptions(train_data_dir=str(tmp_path)))
    assert seen(tmp_path / parts[0]) == {"cat": 1, "dog": 1}
    together = load_source(DataOptions(train_data_dir=str(tmp_path), unconditional=True))
    assert "are read together" in together.describe_size()
    assert any("are read together" in note for note in open_set(str(tmp_path)).notes)


def test_classes_may_be_called_train_and_test(tmp_path):
    assert seen(write(tmp_path, "train/a.png", "test/b.png")) == {"test": 1, "train": 1}


def test_names_are_kept_in_their_composed_form(tmp_path):
    apart = unicodedata.normalize("NFD", "Äpfel")
    source = folder_source(write(tmp_path, f"{apart}/a.png", "Birnen/b.png"), False)
    assert list(source.id2label.values()) == [unicodedata.normalize("NFC", "Äpfel"), "Birnen"] or list(
        source.id2label.values()
    ) == ["Birnen", unicodedata.normalize("NFC", "Äpfel")]


def test_names_that_are_not_utf8_are_shown_escaped_and_kept_as_text(tmp_path):
    root = os.fsencode(tmp_path)
    for name in (b"caf\xe9", b"dog"):
        (tmp_path / os.fsdecode(name)).mkdir()
        with open(root + b"/" + name + b"/\xff.png", "wb") as file:  # noqa: PTH123
            file.write(png())
    source = folder_source(tmp_path, False)
    assert list(source.id2label.values()) == ["caf\\xe9", "dog"]
    for text in (*source.id2label.values(), source.describe_size(), source.name):
        text.encode("utf-8")
    assert source.read(0).size == (16, 16)
    assert len(open_set(str(tmp_path))) == 2
    with open(root + b"/dog/\xff.png", "wb") as file:  # noqa: PTH123
        file.write(b"broken")
    with pytest.raises(ValueError, match=r"dog/\\xff\.png cannot be read"):
        source.read(1)


def test_a_folder_that_is_closed_is_named(tmp_path, monkeypatch):
    write(tmp_path, "cat/a.png", "dog/b.png")
    original = os.scandir

    def closed(path):
        if str(path).endswith("dog"):
            raise PermissionError(13, "Permission denied")
        return original(path)

    monkeypatch.setattr(os, "scandir", closed)
    with pytest.raises(ValueError, match="dog cannot be listed"):
        load_source(DataOptions(train_data_dir=str(tmp_path)))


# --- tar files


@pytest.fixture(autouse=True)
def private_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("D_EMO_CACHE", str(tmp_path / "d_emo"))


def write_tar(path, members, **kinds):
    """Members by name; a value that is no bytes is a function of a TarInfo."""
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            if callable(content):
                content(info)
                archive.addfile(info)
            else:
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    return str(path)


def test_a_tar_file_is_listed_by_the_same_rule(tmp_path):
    def fifo(info):
        info.type = tarfile.FIFOTYPE

    def twin(info):
        info.type, info.linkname = tarfile.LNKTYPE, "a/0.jfif"

    def soft(info):
        info.type, info.linkname = tarfile.SYMTYPE, "0.jfif"

    hidden = {f"{name}/x.png": png() for name in HIDDEN}
    files = {f"a/{name}": png() for name in HIDDEN_FILES}
    path = write_tar(tmp_path / "a.tar", {"a/0.jfif": png(1), "a/0.cls": b"0", **hidden, **files, "a/pipe.png": fifo,
                                          "a/1.jfif": twin, "a/1.cls": b"1", "a/2.png": soft, "a/3.eps": b"%!PS",
                                          "./a/4.TGA": png(4), "./a/4.cls": b"2"})  # fmt: skip
    source = load_source(DataOptions(dataset=path))
    assert source.labels.tolist() == [0, 1, 2]
    assert [source.read(index).getpixel((0, 0))[0] for index in range(3)] == [1, 1, 4]
    assert f"{len(HIDDEN) + len(HIDDEN_FILES)} hidden or of a system" in source.note and "1 .eps" in source.note
    assert "2 links or special members" in source.note
    assert load_source(DataOptions(dataset=path)).note == source.note  # from the cache, too
    np.testing.assert_array_equal(np.sort(open_set(path).read(0, 3)[:, 0, 0, 0]), [1, 1, 4])


def test_a_sample_of_two_pictures_is_refused(tmp_path):
    path = write_tar(tmp_path / "a.tar", {"0.jpg": png(), "0.png": png(), "0.cls": b"1"})
    with pytest.raises(ValueError, match=r"0 has two pictures, \.jpg and \.png"):
        load_source(DataOptions(dataset=path))


def test_member_names_that_are_not_utf8_are_shown_escaped(tmp_path):
    path = write_tar(tmp_path / "a.tar", {os.fsdecode(b"caf\xe9.png"): b"broken", "b.png": png()})
    with pytest.raises(ValueError, match=r"2 images have no label, first caf\\xe9"):
        load_source(DataOptions(dataset=path))
    assert load_source(DataOptions(dataset=path, unconditional=True)).size == 2
