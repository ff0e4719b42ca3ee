"""Damaged pictures, tar files, tables and archives: whatever they hold, a reader answers or names them, nothing else.

A few hundred mutations run with the other tests, ten thousand with `pytest -m slow`.
"""

import io
import json
import tarfile

import numpy as np
import PIL.Image
import pytest
from helpers.mutation import mutated

from d_emo.eval.fid.image_sets import open_set
from d_emo.images.decode import UnreadableImageError, decode
from d_emo.images.shards import tar_source
from d_emo.images.tables import datasets_source

datasets = pytest.importorskip("datasets")
FORMATS = ["JPEG", "PNG", "GIF", "TIFF", "WEBP", "BMP", "JPEG2000", "TGA", "ICO", "ICNS", "PPM", "DDS", "PCX", "SGI",
           "QOI", "AVIF", "MPO", "IM", "MSP", "BLP", "DIB", "XBM"]  # fmt: skip


def seeds() -> list[bytes]:
    """A picture of every format, and some with what surrounds pixels."""
    pixels = np.random.RandomState(0).randint(0, 256, (24, 20, 4), dtype=np.uint8)
    made = []
    for name in FORMATS:
        for mode in ("RGB", "RGBA", "L", "1", "P"):
            target = io.BytesIO()
            try:
                PIL.Image.fromarray(pixels).convert(mode).save(target, name)
            except Exception:  # not every format has every mode
                continue
            made.append(target.getvalue())
            break
    exif = PIL.Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "description"
    picture = PIL.Image.fromarray(pixels[..., :3])
    for name, options in (("JPEG", {"exif": exif, "progressive": True}), ("PNG", {"exif": exif}),
                          ("WEBP", {"exif": exif}), ("TIFF", {"compression": "tiff_lzw"}),
                          ("TIFF", {"compression": "tiff_deflate"}),
                          ("GIF", {"save_all": True, "append_images": [picture] * 2})):  # fmt: skip
        target = io.BytesIO()
        picture.save(target, name, **options)
        made.append(target.getvalue())
    wide = io.BytesIO()
    PIL.Image.fromarray(pixels[..., 0].astype(np.uint16) * 257).save(wide, "PNG")
    return [*made, wide.getvalue()]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("count", [600, pytest.param(8000, marks=pytest.mark.slow)])
def test_damaged_pictures_are_read_or_named(count):
    random, originals, read = np.random.RandomState(count), seeds(), 0
    for number in range(count):
        content = mutated(originals[number % len(originals)], random)
        try:
            picture = decode(io.BytesIO(content), "damaged")
        except UnreadableImageError as error:
            assert str(error).startswith("damaged cannot be read (")
        else:
            assert picture.mode == "RGB" and min(picture.size) > 0
            read += 1
    assert 0.05 * count < read < 0.95 * count  # the mutations matter, and do not ruin everything


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("count", [150, pytest.param(1000, marks=pytest.mark.slow)])
def test_damaged_archives_are_read_or_named(tmp_path, count):
    random, opened, target = np.random.RandomState(count), 0, io.BytesIO()
    np.savez(target, random.randint(0, 256, (3, 8, 8, 3), dtype=np.uint8))
    for number in range(count):
        path = tmp_path / f"{number}.npz"
        path.write_bytes(mutated(target.getvalue(), random))
        try:
            images = open_set(str(path))
            images.read(0, len(images))
        except ValueError as error:
            assert f"{number}.npz" in str(error)
        else:
            opened += 1
    assert opened


def shard() -> bytes:
    target = io.BytesIO()
    with tarfile.open(fileobj=target, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for number in range(4):
            picture = io.BytesIO()
            PIL.Image.new("RGB", (8, 8), (number, 0, 0)).save(picture, "PNG")
            label = {"label": number, "text": "é"} if number % 2 else None
            members = {"png": picture.getvalue(), **({"json": json.dumps(label).encode()} if label else {"cls": b"3"})}
            for suffix, content in members.items():
                info = tarfile.TarInfo(f"ü{number}.{suffix}")
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    return target.getvalue()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("count", [200, pytest.param(1500, marks=pytest.mark.slow)])
def test_damaged_shards_are_read_or_named(tmp_path, monkeypatch, count):
    monkeypatch.setenv("D_EMO_CACHE", str(tmp_path / "d_emo"))
    random, original, opened = np.random.RandomState(count), shard(), 0
    for number in range(count):
        path = tmp_path / f"{number}.tar"
        data = bytearray(original)
        header = 512 * random.randint(len(data) // 512)  # of a member, more often than chance would have it
        data[header : header + 512] = mutated(bytes(data[header : header + 512]), random)
        path.write_bytes(bytes(data) if number % 2 else mutated(original, random))
        try:
            source = tar_source(str(path), "label")
        except ValueError as error:  # the one kind that the trainer ends with a line for
            assert str(error)
        else:
            opened += 1
            for index in range(source.size):
                try:
                    source.read(index)
                except UnreadableImageError as error:
                    assert ".tar, image" in str(error)
    assert opened


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("count", [12, pytest.param(500, marks=pytest.mark.slow)])
def test_damaged_tables_are_read_or_named(tmp_path, monkeypatch, count):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    picture = io.BytesIO()
    PIL.Image.new("RGB", (8, 8)).save(picture, "PNG")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    rows = {"image": [{"bytes": picture.getvalue(), "path": "é.png"}] * 6, "label": [0, 1] * 3}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "whole.parquet")
    original, random, opened = (tmp_path / "whole.parquet").read_bytes(), np.random.RandomState(count), 0
    for number in range(count):
        path = tmp_path / f"{number}.parquet"
        path.write_bytes(mutated(original, random) if number else original)
        try:
            source = datasets_source(str(path))
        except ValueError as error:
            assert str(error)
        else:
            opened += 1
            for index in range(source.size):
                try:
                    source.read(index)
                except UnreadableImageError as error:
                    assert "row" in str(error)
    assert opened
