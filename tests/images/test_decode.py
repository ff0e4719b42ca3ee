"""The one decode: every mode and format, orientation, transparency, limits, and failures that are always named."""

import io
import itertools
import os
import socket
import struct
import warnings

import numpy as np
import PIL.Image
import PIL.ImageCms
import pytest
import torch
from transformers.image_utils import load_image

from d_emo.eval.classification.accuracy import PreparedImages
from d_emo.eval.fid.image_sets import open_set
from d_emo.images import decode as rules
from d_emo.images.decode import UnreadableImageError, center_crop, decode, to_tensor, trim_strip
from d_emo.train.data.batches import Pixels, TrainingImages
from d_emo.train.data.options import DataOptions
from d_emo.train.data.sources import load_source

WIDTH, HEIGHT = 24, 20


def picture(alpha=False) -> PIL.Image.Image:
    """Colours from corner to corner, RGB or RGBA; where alpha is 0 there is noise under it."""
    down, across = np.mgrid[0:HEIGHT, 0:WIDTH]
    bands = [across * 10, down * 12, 255 - across * 5 - down * 5]
    if alpha:
        noise = np.random.RandomState(0).randint(0, 256, (3, HEIGHT, WIDTH))
        opacity = np.clip((across - 4) * 16, 0, 255)
        bands = [*np.where(opacity == 0, noise, bands), opacity]
    return PIL.Image.fromarray(np.stack(bands, axis=-1).astype(np.uint8))


def in_mode(mode: str) -> PIL.Image.Image:
    """The picture in one of Pillow's modes."""
    if mode == "P with transparency":
        indexed = picture().convert("P")
        indexed.info["transparency"] = bytes(range(256))
        return indexed
    if mode == "LAB":
        profiles = PIL.ImageCms.createProfile("sRGB"), PIL.ImageCms.createProfile("LAB")
        return PIL.ImageCms.profileToProfile(picture(), *profiles, outputMode="LAB")
    grey = np.asarray(picture().convert("L"))
    if mode == "I;16":
        return PIL.Image.fromarray(grey.astype(np.uint16) * 257)
    if mode == "F":
        return PIL.Image.fromarray(grey.astype(np.float32) / 255)
    if mode in SEE_THROUGH:
        return picture(alpha=True).convert(mode)
    return picture().convert(mode)


MODES = ("1", "L", "LA", "P", "P with transparency", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "LAB", "I;16", "F")
SEE_THROUGH = ("LA", "P with transparency", "PA", "RGBA")
# Modes in which transformers' own reading of the file is right as well: no transparency, 8 bits a value.
PLAIN = ("1", "L", "P", "RGB", "RGBX", "CMYK", "YCbCr")
LOSSLESS = {"PNG", "TIFF", "BMP", "TGA", "PPM", "PCX", "QOI", "SGI", "WEBP", "JPEG2000"}


def files() -> dict[str, bytes]:
    """A file of every format and mode that Pillow writes and reads, by "FORMAT MODE"."""
    PIL.Image.init()
    made = {}
    for name, mode in itertools.product(sorted(PIL.Image.SAVE), MODES):
        if name not in rules.readable_formats() or name in ("SPIDER", "XBM") or (name, mode) == ("IM", "F"):
            continue  # SPIDER has measurements
        if name == "WEBP" and mode in ("I;16", "F"):
            continue  # Pillow writes them as white and black
        target = io.BytesIO()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                in_mode(mode).save(target, name, **({"lossless": True} if name == "WEBP" else {}))
                written = PIL.Image.open(io.BytesIO(target.getvalue()))
                written.load()
        except Exception:  # Pillow does not write this mode so
            continue
        if rules._has_transparency(written) == (mode in SEE_THROUGH):  # some formats leave it out
            made[f"{name} {mode}"] = target.getvalue()
    return made


FILES = files()


def test_the_table_of_files_is_not_empty():
    formats = {entry.split()[0] for entry in FILES}
    assert {"PNG", "TIFF", "JPEG", "WEBP", "GIF", "BMP", "JPEG2000", "PPM", "TGA", "ICO"} <= formats
    assert {entry.split(" ", 1)[1] for entry in FILES} == {*MODES}


def suffix_of(name: str) -> str:
    return next(suffix for suffix, other in PIL.Image.registered_extensions().items() if other == name)


def plain_processor(images, return_tensors):
    """An image processor that hands on what it is given."""
    return {"pixel_values": torch.from_numpy(np.array(images, dtype=np.uint8)).permute(2, 0, 1)[None]}


@pytest.mark.parametrize("entry", FILES)
def test_training_fid_accuracy_and_transformers_see_the_same_pixels(tmp_path, entry):
    name, mode = entry.split(" ", 1)
    path = tmp_path / "one" / f"a{suffix_of(name)}"
    path.parent.mkdir()
    path.write_bytes(FILES[entry])
    source = load_source(DataOptions(train_data_dir=str(tmp_path)))
    seen = np.asarray(source.read(0))
    assert seen.shape[2] == 3 and seen.dtype == np.uint8
    trained, _, _, bad = TrainingImages(source, Pixels(3, 20, flip=False, seed=0))[(0, 0)]
    assert not bad and torch.equal(trained, to_tensor(source.read(0), 3, 20))
    np.testing.assert_array_equal(open_set(str(tmp_path)).read(0, 1)[0], seen)
    scored, _ = PreparedImages(source, plain_processor)(0)
    np.testing.assert_array_equal(scored.permute(1, 2, 0).numpy(), seen)
    np.testing.assert_array_equal(np.asarray(load_image(decode(path, "a"))), seen)  # given our picture
    if mode in PLAIN:
        np.testing.assert_array_equal(np.asarray(load_image(str(path))), seen)  # given the file


def expected(mode: str) -> np.ndarray:
    """What a picture of a mode looks like on white, in float arithmetic."""
    shown = np.asarray(picture(alpha=mode in SEE_THROUGH).convert("RGBA"), dtype=np.float64)
    if mode in ("L", "LA", "I;16", "F"):
        shown[..., :3] = np.asarray(picture(alpha=mode == "LA").convert("L"))[..., None]
    if mode == "P with transparency":
        indexed = picture().convert("P")
        shown[..., :3] = np.asarray(indexed.convert("RGB"))
        shown[..., 3] = np.asarray(indexed)
    opacity = shown[..., 3:] / 255
    return shown[..., :3] * opacity + 255 * (1 - opacity)


@pytest.mark.parametrize(
    "entry",
    [
        entry
        for entry in FILES
        if entry.split()[0] in LOSSLESS and entry.split(" ", 1)[1] not in ("1", "P", "PA", "LAB")
    ],
)
def test_pixels_are_those_of_the_picture_on_white(entry):
    mode = entry.split(" ", 1)[1]
    seen = np.asarray(decode(io.BytesIO(FILES[entry]), entry), dtype=np.float64)
    # YCbCr itself rounds; a byte of alpha rounds once more.
    np.testing.assert_allclose(seen, expected(mode), atol=3 if mode == "YCbCr" else 1)


def test_lab_is_converted_as_the_cie_defines_it():
    lab = np.array([[[60, 20, -30], [30, -10, 15], [100, 0, 0], [0, 0, 0]]], dtype=np.float64)
    stored = np.stack([lab[..., 0] * 2.55, lab[..., 1] % 256, lab[..., 2] % 256], axis=-1).round().astype(np.uint8)
    image = PIL.Image.frombytes("LAB", (4, 1), stored.tobytes())
    f = (lab[..., 0] + 16) / 116
    f = np.stack([f + lab[..., 1] / 500, f, f - lab[..., 2] / 200], axis=-1)
    xyz = np.where(f > 6 / 29, f**3, 3 * (6 / 29) ** 2 * (f - 4 / 29)) * [0.9642, 1, 0.8249]  # white of D50
    to_srgb = np.array([[3.1339, -1.6169, -0.4906], [-0.9788, 1.9161, 0.0335], [0.0719, -0.2290, 1.4052]])  # from D50
    linear = np.clip(xyz @ to_srgb.T, 0, 1)
    srgb = np.where(linear > 0.0031308, 1.055 * linear ** (1 / 2.4) - 0.055, 12.92 * linear)
    seen = np.asarray(decode(encoded(image, "TIFF"), "a"), dtype=np.float64)
    np.testing.assert_allclose(seen, srgb * 255, atol=3)  # the bytes of LAB round by half a unit each


# --- wide and odd values


def encoded(image: PIL.Image.Image, name: str, **options) -> io.BytesIO:
    target = io.BytesIO()
    image.save(target, name, **options)
    target.seek(0)
    return target


SIXTEEN = np.array([[0, 1, 128, 129, 256, 257], [32768, 40000, 65406, 65407, 65534, 65535]], dtype=np.uint16)


@pytest.mark.parametrize("name", ["PNG", "TIFF", "PPM"])
@pytest.mark.parametrize("big_endian", [False, True])
def test_sixteen_bits_are_divided_by_257(name, big_endian):
    image = PIL.Image.fromarray(SIXTEEN.astype(">u2") if big_endian else SIXTEEN)
    if big_endian and name == "PPM":
        image = PIL.Image.fromarray(SIXTEEN.astype(np.int32))  # mode I, which PPM keeps in 16 bits
    seen = np.asarray(decode(encoded(image, name), "a"))[..., 0]
    np.testing.assert_array_equal(seen, [[0, 0, 0, 1, 1, 1], [128, 156, 254, 255, 255, 255]])


def tiff(values: np.ndarray, bits: int, sample_format: int, photometric: int) -> io.BytesIO:
    """A grey TIFF file of one strip, little-endian, written by hand."""
    height, width = values.shape
    data = values.tobytes()
    tags = [(256, width), (257, height), (258, bits), (259, 1), (262, photometric), (273, 8), (277, 1), (278, height),
            (279, len(data)), (339, sample_format)]  # fmt: skip
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    return io.BytesIO(struct.pack("<2sHI", b"II", 42, 8 + len(data)) + data + struct.pack("<H", len(tags)) + entries
                      + struct.pack("<I", 0))  # fmt: skip


def test_a_tiff_whose_white_is_zero_is_not_a_negative():
    values = np.array([[0, 65535, 257 * 30]], dtype="<u2")
    seen = np.asarray(decode(tiff(values, 16, 1, photometric=0), "a"))[..., 0]
    np.testing.assert_array_equal(seen, [[255, 0, 225]])


@pytest.mark.parametrize(
    ("file", "message"),
    [
        (tiff(np.array([[-5, 300]], dtype="<i2"), 16, 2, 1), "whose white is not defined"),
        (tiff(np.array([[5, 300]], dtype="<i4"), 32, 2, 1), "whose white is not defined"),
        (tiff(np.array([[5, 300]], dtype="<u4"), 32, 1, 1), "whose white is not defined"),
        (tiff(np.array([[0.5, 2.0]], dtype="<f4"), 32, 3, 1), "floats beyond 0 to 1"),
        (tiff(np.array([[-0.1, 0.5]], dtype="<f4"), 32, 3, 1), "floats beyond 0 to 1"),
        (tiff(np.array([[np.nan, 0.5]], dtype="<f4"), 32, 3, 1), "floats beyond 0 to 1"),
    ],
)
def test_values_without_a_defined_white_are_refused_by_name(file, message):
    with pytest.raises(UnreadableImageError, match=rf"scan\.tif cannot be read.*{message}.*8 or 16 bits"):
        decode(file, "scan.tif")


def test_floats_between_zero_and_one_are_scaled():
    values = np.array([[0, 0.5, 1, 0.2]], dtype="<f4")
    np.testing.assert_array_equal(np.asarray(decode(tiff(values, 32, 3, 1), "a"))[..., 0], [[0, 128, 255, 51]])


def test_one_transparent_value_of_wide_grey_is_white():
    target = encoded(PIL.Image.fromarray(SIXTEEN), "PNG", transparency=32768)
    assert np.asarray(decode(target, "a"))[1, 0].tolist() == [255, 255, 255]
    for mode, value in (("L", 7), ("RGB", (7, 7, 7))):
        image = PIL.Image.new(mode, (2, 1), value)
        image.putpixel((1, 0), 9 if mode == "L" else (9, 9, 9))
        seen = np.asarray(decode(encoded(image, "PNG", transparency=value), "a"))
        assert seen[0, :, 0].tolist() == [255, 9]


@pytest.mark.parametrize(("mode", "premultiplied"), [("LA", "La"), ("RGBA", "RGBa")])
def test_colours_multiplied_by_alpha_beforehand_are_laid_on_white(monkeypatch, mode, premultiplied):
    image = picture(alpha=True).convert(mode).convert(premultiplied)
    monkeypatch.setattr(rules, "_open", lambda _: image)  # no writer of Pillow makes such files
    seen = np.asarray(decode(io.BytesIO(), "a"), dtype=np.float64)
    np.testing.assert_allclose(seen, expected(mode), atol=4)  # 8 bits of colour times alpha lose as much


def test_the_first_frame_of_an_animation_is_taken():
    frames = [PIL.Image.new("RGB", (8, 8), colour) for colour in ((200, 0, 0), (0, 200, 0), (0, 0, 200))]
    for name in ("GIF", "PNG", "WEBP", "TIFF"):
        options = {"lossless": True} if name == "WEBP" else {}
        target = encoded(frames[0], name, save_all=True, append_images=frames[1:], **options)
        assert decode(target, "a").getpixel((4, 4)) == (200, 0, 0)


# --- orientation


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("name", ["JPEG", "AVIF", "PNG", "TIFF", "WEBP"])
def test_pictures_stand_upright_as_transformers_shows_them(tmp_path, name, orientation):
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "a"
    picture().save(path, name, exif=exif, **({"lossless": True} if name == "WEBP" else {}))
    seen = np.asarray(decode(path, "a"))
    np.testing.assert_array_equal(seen, np.asarray(load_image(str(path))))
    if name not in ("JPEG", "AVIF"):
        assert seen[0, 0].tolist() != seen[-1, -1].tolist()
        turned = np.asarray(picture())  # the definition of EXIF 2.3, section 4.6.4: where row 0 and column 0 lie
        turned = {1: turned, 2: turned[:, ::-1], 3: turned[::-1, ::-1], 4: turned[::-1], 5: turned.swapaxes(0, 1),
                  6: turned[::-1].swapaxes(0, 1), 7: turned[::-1, ::-1].swapaxes(0, 1),
                  8: turned[:, ::-1].swapaxes(0, 1)}[orientation]  # fmt: skip
        np.testing.assert_array_equal(seen, turned)


@pytest.mark.parametrize(
    "exif",
    [
        b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x63\0\0\0\0\0\0\0",  # orientation 99
        b"Exif\0\0II*\0\x08\0\0\0\xff\xff\x12\x01",  # more entries than there are
        b"Exif\0\0garbage",
        b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x02\0\x05\0\0\0\x00\x10\0\0\0\0\0\0",  # a word far beyond the end
        b"Exif\0\0",
    ],
)
def test_broken_exif_data_are_tolerated(exif):
    whole = encoded(picture(), "JPEG", quality=95).getvalue()
    damaged = whole[:2] + b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif + whole[2:]
    np.testing.assert_array_equal(np.asarray(decode(io.BytesIO(damaged), "a")),
                                  np.asarray(decode(io.BytesIO(whole), "a")))  # fmt: skip


# --- what cannot be read


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "no format that Pillow knows"),
        (b"no picture", "no format that Pillow knows"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "EPS is PostScript"),
        (b"\xd7\xcd\xc6\x9a" + bytes(40), "WMF is a drawing"),
        (b"\x00\x00\x01\xb3" + bytes(40), "MPEG is a film"),
        (b"\x89HDF\r\n\x1a\n" + bytes(40), "HDF5 is a container"),
        (b"GRIB" + bytes(3) + b"\x01" + bytes(40), "GRIB is a container"),
        (None, "there is no picture"),
    ],
)
def test_what_is_no_picture_is_refused_by_name(content, message):
    with pytest.raises(UnreadableImageError, match=f"a.jpg cannot be read.*{message}"):
        decode(None if content is None else io.BytesIO(content), "a.jpg")


def test_postscript_never_starts_another_program(tmp_path, monkeypatch):
    import subprocess

    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("a program was started"))
    path = tmp_path / "drawing.jpg"
    path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n")
    with pytest.raises(UnreadableImageError, match="EPS is PostScript"):
        decode(path, str(path))


def test_special_files_are_never_opened(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe.png")
    server = socket.socket(socket.AF_UNIX)
    monkeypatch.chdir(tmp_path)
    server.bind("s.png")
    for name in ("pipe.png", "s.png", "nowhere.png", "."):
        with pytest.raises(UnreadableImageError, match="no such file, or no regular one"):
            decode(tmp_path / name, name)
    server.close()


@pytest.mark.parametrize(
    "error",
    [OSError, ValueError, SyntaxError, struct.error, EOFError, MemoryError, OverflowError, IndexError, KeyError,
     TypeError, AttributeError, ZeroDivisionError, RecursionError, NotImplementedError,
     PIL.Image.DecompressionBombError, PIL.Image.DecompressionBombWarning, UserWarning],
)  # fmt: skip
def test_every_failure_of_a_decoder_is_named(monkeypatch, error):
    def fail(*_, **__):
        raise error("in the depths")

    file = encoded(picture(), "PNG")
    monkeypatch.setattr(PIL.PngImagePlugin.PngImageFile, "load", fail)
    with pytest.raises(UnreadableImageError, match="holiday cannot be read"):
        decode(file, "holiday")


def png_header(width: int, height: int) -> io.BytesIO:
    """A PNG file that promises a size."""
    import zlib

    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return io.BytesIO(b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
                      + struct.pack(">I", 0) + b"IDAT" + struct.pack(">I", zlib.crc32(b"IDAT")))  # fmt: skip


@pytest.mark.parametrize("size", [(2**14, 2**14), (10**9, 1), (30000, 30000), (0, 5), (2**31 - 1, 2**31 - 1)])
def test_sizes_beyond_the_limit_are_refused_by_name_before_memory_is_taken(size):
    with pytest.raises(UnreadableImageError, match="huge cannot be read"):
        decode(png_header(*size), "huge")


def test_the_limit_names_the_size(monkeypatch):
    monkeypatch.setattr(rules, "MAX_PIXELS", 100)
    with pytest.raises(UnreadableImageError, match=r"24 x 20 pixels; from 1 to 100 in all are read"):
        decode(encoded(picture(), "PNG"), "a")


def test_names_that_are_not_utf8_are_shown_escaped():
    name = os.fsdecode(b"caf\xe9\n.png")
    with pytest.raises(UnreadableImageError, match=r"caf\\xe9\\x0a\.png cannot be read") as caught:
        decode(io.BytesIO(b""), name)
    str(caught.value).encode("utf-8")


# --- crops


@pytest.mark.parametrize("size", [(3, 6000), (6000, 3), (60000, 1), (1, 60000), (1, 1)])
def test_strips_take_little_memory(monkeypatch, size):
    image = PIL.Image.new("RGB", size, (10, 20, 30))
    sizes = []
    original = PIL.Image.Image.resize

    def watched(self, size, *arguments, **options):
        sizes.append(size[0] * size[1])
        return original(self, size, *arguments, **options)

    monkeypatch.setattr(PIL.Image.Image, "resize", watched)
    tensor = to_tensor(image, 3, 256)
    assert tensor.shape == (3, 256, 256) and max(sizes) <= rules.MAX_ENLARGED_PIXELS
    torch.testing.assert_close(tensor[:, 0, 0], torch.tensor([10, 20, 30]) / 127.5 - 1)
    assert max(trim_strip(image).size) <= rules.LONGEST_STRIP * min(size)


@pytest.mark.parametrize("size", [(3, 90), (200, 7), (5, 33)])
def test_a_strip_that_is_cut_before_it_is_enlarged_gives_the_same_crop(monkeypatch, size):
    pixels = np.random.RandomState(0).randint(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    image = PIL.Image.fromarray(pixels)
    whole = np.asarray(center_crop(image, 32), dtype=int)
    monkeypatch.setattr(rules, "MAX_ENLARGED_PIXELS", 0)
    # The place of the cut is a float32 in Pillow: 1 of 255.
    np.testing.assert_allclose(np.asarray(center_crop(image, 32), dtype=int), whole, atol=1)


@pytest.mark.parametrize(
    ("size", "wanted"), [((48, 16), (48, 16)), ((100, 90), (48, 16)), ((20, 49), (16, 48)), ((9, 9), (7, 3))]
)
def test_crops_of_unequal_sides_cover_and_are_cut_in_the_middle(size, wanted):
    across = np.arange(size[0])[None, :, None] * np.ones((size[1], 1, 3))
    image = PIL.Image.fromarray((across * 255 / (size[0] - 1)).astype(np.uint8))
    cropped = center_crop(image, *wanted)
    assert cropped.size == wanted
    middle = np.asarray(cropped, dtype=float)[0, :, 0]
    assert abs(middle.mean() - 127.5) < 4 and (np.diff(middle) >= -1).all()
    if size == wanted:
        np.testing.assert_array_equal(np.asarray(cropped), np.asarray(image))
