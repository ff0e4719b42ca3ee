"""Handwritten digits on photos, as COCO's files: a small set on which a detector of boxes and masks can learn.

    python tests/helpers/pasted_digits.py --photos FOLDER_OR_PARQUET --output-dir runs/pasted-digits

Writes `train` and `test` into the folder, each PNG files and `instances.json`. scikit-learn's scans of 8 x 8 pixels are
enlarged to 16 to 48 pixels, tinted and laid on a square cut of a photo, up to six, none over another; every tenth
picture has none. Digits and photos of `test` are none of `train`'s: the fifth that the house holds out of the digits,
and every fifth photo. Boxes and masks are exact: a mask has the pixels that were changed, its box their bounds.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import PIL.Image

from d_emo.common.files import written_folder
from d_emo.images.decode import center_crop
from d_emo.images.digits import DIGIT_NAMES, digits_source
from d_emo.images.open_source import open_source
from d_emo.images.source import ImageSource, held_out, subset

SMALLEST, LARGEST = 16, 48
MOST_DIGITS = 6
EMPTY_EVERY = 10
PHOTO_OF_TEST = 5
# Of a scan's grey, from where on a pixel is the digit's.
INK = 0.4
# How far a digit's brightness is from that of what it lies on, in [0, 1]; other tints are drawn again.
CONTRAST = 0.35
TRIES = 50


def main(arguments: list[str] | None = None) -> None:
    """Read the options, write both parts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", required=True, help="Folder of photos, or a dataset or .parquet file.")
    parser.add_argument("--output-dir", type=Path, required=True)
    parser.add_argument("--side", type=int, default=128, help="Of the pictures, in pixels.")
    parser.add_argument("--train-images", type=int, default=2000)
    parser.add_argument("--test-images", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    folder = options.photos if Path(options.photos).is_dir() else None
    photos = open_source(folder, None if folder else options.photos, unconditional=True)
    counts = {"train": options.train_images, "test": options.test_images}
    write_pasted_digits(options.output_dir, photos, counts, options.side, options.seed)


def write_pasted_digits(
    folder: Path, photos: ImageSource, counts: dict[str, int], side: int = 128, seed: int = 0
) -> dict[str, Path]:
    """Write `train` and `test`; returns their folders.

    Args:
        folder: in which they appear.
        photos: five or more.
        counts: pictures of each part.
        side: of the pictures, in pixels.
        seed: of all that is drawn; the same one writes the same files.

    Raises:
        ValueError: there are fewer photos.
    """
    if photos.size < PHOTO_OF_TEST:
        raise ValueError(f"{photos.name} has {photos.size} photos; {PHOTO_OF_TEST} or more are needed.")
    parts = parts_of(photos)
    for number, (name, count) in enumerate(counts.items()):
        scans, backgrounds = parts[name]
        random = np.random.default_rng([seed, number])
        with written_folder(folder / name) as partial:
            _write_part(partial, scans, backgrounds, count, side, random)
    return {name: folder / name for name in counts}


def parts_of(photos: ImageSource) -> dict[str, tuple[ImageSource, ImageSource]]:
    """Digits and photos of `train` and `test`, none in both."""
    places = np.arange(photos.size)
    of_test = places % PHOTO_OF_TEST == PHOTO_OF_TEST - 1
    train, test = held_out(digits_source())
    return {"train": (train, subset(photos, places[~of_test])), "test": (test, subset(photos, places[of_test]))}


def _write_part(
    folder: Path, scans: ImageSource, photos: ImageSource, count: int, side: int, random: np.random.Generator
) -> None:
    images, annotations = [], []
    for number in range(count):
        wanted = 0 if number % EMPTY_EVERY == EMPTY_EVERY - 1 else int(random.integers(1, MOST_DIGITS + 1))
        pixels = _background(photos.read(int(random.integers(photos.size))), side, random.uniform)
        taken = np.zeros((side, side), dtype=bool)
        for _ in range(wanted):
            index = int(random.integers(scans.size))
            mask = paste(pixels, taken, scans.read(index), random)
            if mask is None:  # no room was left
                continue
            annotations.append({
                "id": len(annotations) + 1,
                "image_id": number,
                "category_id": int(scans.labels[index]),
                "bbox": bounds(mask),
                "area": int(mask.sum()),
                "iscrowd": 0,
                "segmentation": {"size": [side, side], "counts": runs_of(mask)},
            })  # fmt: skip
        name = f"{number:06d}.png"
        PIL.Image.fromarray(pixels).save(folder / name)
        images.append({"id": number, "file_name": name, "width": side, "height": side})
    categories = [{"id": label, "name": name} for label, name in enumerate(DIGIT_NAMES)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "instances.json").write_text(json.dumps(content), encoding="utf-8")


def paste(
    pixels: np.ndarray, taken: np.ndarray, scan: PIL.Image.Image, random: np.random.Generator
) -> np.ndarray | None:
    """Lay a digit on a picture where nothing lies yet.

    Args:
        pixels: (H, W, 3) uint8, changed in place.
        taken: (H, W) bool, what the boxes of other digits cover; its own is added.
        scan: of a digit, grey, 0 where the paper is.
        random: draws size, place and tint.

    Returns:
        Its mask (H, W) bool; None where no free place of that size was found.
    """
    size = int(random.integers(SMALLEST, LARGEST + 1))
    grey = np.asarray(scan.convert("L").resize((size, size), PIL.Image.Resampling.BICUBIC), dtype=np.float64) / 255
    rows, columns = (np.flatnonzero((grey >= INK).any(axis=axis)) for axis in (1, 0))
    grey = grey[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]  # (h, w), what has ink
    height, width = grey.shape
    for _ in range(TRIES):
        top, left = (int(random.integers(0, most + 1)) for most in np.subtract(taken.shape, grey.shape))
        place = (slice(top, top + height), slice(left, left + width))
        if not taken[place].any():
            break
    else:
        return None
    ink = grey >= INK
    below = pixels[place].astype(np.float64)
    tint = _tint(below[ink].mean() / 255, random)
    shown = np.where(ink, 0.5 + 0.5 * grey, 0)[..., None]  # the pen's strength; nothing changes beside the ink
    pixels[place] = (below * (1 - shown) + tint * shown).round().astype(np.uint8)
    taken[place] = True
    mask = np.zeros(taken.shape, dtype=bool)
    mask[place] = ink
    return mask


def _tint(brightness: float, random: np.random.Generator) -> np.ndarray:
    """A colour (3,), 0 to 255, that can be told from what it lies on."""
    while True:
        colour = random.uniform(0, 255, 3)
        if abs(colour.mean() / 255 - brightness) >= CONTRAST:
            return colour


def _background(photo: PIL.Image.Image, side: int, uniform: Callable[[float, float], float]) -> np.ndarray:
    """A square of a photo, half its shorter side or more, in (side, side, 3) uint8."""
    width = int(min(photo.size) * uniform(0.5, 1))
    left, top = (int(uniform(0, length - width)) for length in photo.size)
    cut = photo.convert("RGB").crop((left, top, left + width, top + width))
    return np.array(center_crop(cut, side))


def bounds(mask: np.ndarray) -> list[int]:
    """x, y, width, height of a mask's pixels."""
    rows, columns = (np.flatnonzero(mask.any(axis=axis)) for axis in (1, 0))
    return [int(columns[0]), int(rows[0]), int(columns[-1] - columns[0] + 1), int(rows[-1] - rows[0] + 1)]


def runs_of(mask: np.ndarray) -> list[int]:
    """COCO's run lengths of a mask, by columns: zeros first."""
    values = np.concatenate([[False], mask.ravel(order="F")])
    changes = np.flatnonzero(values[1:] != values[:-1])
    return np.diff(np.concatenate([[0], changes, [mask.size]])).tolist()


if __name__ == "__main__":
    main()
