"""Maps of classes laid over their pictures: truth beside prediction."""

from collections.abc import Collection, Mapping

import numpy as np
import PIL.Image

from d_emo.eval.reports.panels import above, beside, class_colour, class_names, fitted, legend, scaled

OPACITY = 0.6
# Pixels without a label are laid over with this, wrong ones drawn with that.
UNLABELLED, WRONG = (128, 128, 128), (230, 0, 60)
# Classes of these names are not laid over: what is seen there is the picture.
BACKGROUNDS = ("background", "other", "unlabeled", "unlabelled", "void")


def backgrounds(names: Mapping[int, str]) -> set[int]:
    """Ids of the classes that say that nothing is there: by name, and of two classes without names the first."""
    if dict(names) == {0: "0", 1: "1"}:
        return {0}
    return {label for label, name in names.items() if str(name).strip().lower() in BACKGROUNDS}


def overlay(
    picture: PIL.Image.Image,
    labels: np.ndarray,
    *,
    ignored: int = 255,
    clear: Collection[int] = (),
    opacity: float = OPACITY,
) -> PIL.Image.Image:
    """A map of classes over a picture, each class in its colour.

    Args:
        picture: of the map's size.
        labels: (H, W) class ids.
        ignored: id of pixels without a label, which turn grey.
        clear: ids of classes that leave the picture as it is.
        opacity: of the colours, in [0, 1].
    """
    pixels = np.asarray(picture.convert("RGB"), dtype=np.float32)  # (H, W, 3)
    if pixels.shape[:2] != labels.shape:
        raise ValueError(f"labels have the shape {labels.shape}, the picture {pixels.shape[:2]}; they must be equal.")
    ids, places = np.unique(labels, return_inverse=True)
    colours = np.array([UNLABELLED if label == ignored else class_colour(int(label)) for label in ids], np.float32)
    shares = np.array([0.0 if label in clear else opacity for label in ids], np.float32)
    places = places.reshape(labels.shape)
    share = shares[places][..., None]  # (H, W, 1)
    mixed = pixels * (1 - share) + colours[places] * share
    return PIL.Image.fromarray(mixed.round().astype(np.uint8))


def errors(
    picture: PIL.Image.Image, truth: np.ndarray, predicted: np.ndarray, *, ignored: int = 255
) -> PIL.Image.Image:
    """The picture in pale grey, the pixels red of which the prediction is wrong; those without a label are grey."""
    pale = np.asarray(picture.convert("L"), dtype=np.float32)[..., None].repeat(3, axis=2) * 0.4 + 150  # (H, W, 3)
    known = truth != ignored
    pale[~known] = UNLABELLED
    pale[known & (truth != predicted)] = WRONG
    return PIL.Image.fromarray(pale.round().astype(np.uint8))


def compare_maps(
    picture: PIL.Image.Image,
    truth: np.ndarray,
    predicted: np.ndarray,
    names: Mapping[int, str],
    *,
    ignored: int = 255,
    side: int = 400,
) -> PIL.Image.Image:
    """Picture, truth, prediction and wrong pixels in a row, over a legend of the classes that occur.

    Args:
        picture: of any size.
        truth: (H, W) class ids, of the picture's size.
        predicted: (H, W) class ids.
        names: of all classes.
        ignored: id of pixels without a label.
        side: the longer side of each of the four, in pixels.
    """
    size = scaled(picture.size, side)
    small = fitted(picture, side)
    clear = backgrounds(names)
    true_map, found_map = (_resized(labels, size) for labels in (truth, predicted))
    row = beside(
        [
            small,
            overlay(small, true_map, ignored=ignored, clear=clear),
            overlay(small, found_map, ignored=ignored, clear=clear),
            errors(small, true_map, found_map, ignored=ignored),
        ],
        ["picture", "truth", "prediction", "wrong pixels"],
    )
    counts = {label: int((truth == label).sum() + (predicted == label).sum()) for label in _ids(truth, predicted)}
    shown = [label for label in sorted(counts, key=lambda label: -counts[label]) if label not in {ignored, *clear}]
    entries = class_names(shown, names)
    if ignored in counts:
        entries.append(("no label", UNLABELLED))
    return above([row, legend(entries, row.width)]) if entries else row


def _ids(truth: np.ndarray, predicted: np.ndarray) -> list[int]:
    return [int(label) for label in np.union1d(truth, predicted)]


def _resized(labels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """A map of (width, height): each pixel the class of the one that lies there."""
    picture = PIL.Image.fromarray(labels.astype(np.int32))
    return np.asarray(picture.resize(size, PIL.Image.Resampling.NEAREST))
