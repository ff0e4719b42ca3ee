"""What becomes of a training picture and its mask: alike in place, never beyond what is asked for."""

import numpy as np
import PIL.Image
import pytest
import torch
from helpers.masks import COLORS, blocks, picture_of
from torchvision import tv_tensors

from d_emo.images.decode import UnreadableImageError
from d_emo.images.pixels import LabelledPicture
from d_emo.train.segmentation.augmentation import PhotometricDistortion, SegmentationAugmentation
from d_emo.train.segmentation.config import SegmentationAugmentationOptions

PLAIN = {"scale_min": 1, "scale_max": 1, "random_flip": False, "photometric": False, "crop_max_share": 1}


def augmentation(side=32, seed=0, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0), **options):
    return SegmentationAugmentation(SegmentationAugmentationOptions(**{**PLAIN, **options}), side, mean, std, seed)


def sample(seed=0, size=(48, 40)):
    labels = blocks(seed, size)
    return LabelledPicture(picture_of(labels), labels.astype(np.int32), "a.png")


def colors(pixels):
    return (255 * pixels.permute(1, 2, 0)).round().numpy().astype(int)


@pytest.mark.parametrize("flip", [False, True])
def test_picture_and_mask_stay_together(flip):
    """Without resizing every pixel has exactly its class's colour, wherever the crop and the mirror put it."""
    prepare, seen = augmentation(random_flip=flip), set()
    for position in range(20):
        pixels, labels = prepare(sample(), position)
        assert pixels.shape == (3, 32, 32) and labels.shape == (32, 32) and labels.dtype == torch.uint8
        assert np.array_equal(colors(pixels), COLORS[labels.numpy()])
        seen.add(labels.numpy().tobytes())
    assert len(seen) > 10


@pytest.mark.parametrize(("low", "high"), [(2.0, 2.0), (0.5, 0.5), (0.7, 1.7)])
def test_they_stay_together_where_they_are_resized(low, high):
    """Away from the edges of blocks, where bilinear mixes, colours are the classes'."""
    prepare = augmentation(scale_min=low, scale_max=high)
    for position in range(10):
        pixels, labels = prepare(sample(size=(96, 80)), position)
        known = labels.numpy() != 255
        same = (np.abs(colors(pixels) - COLORS[labels.numpy() % 3]) <= 1).all(-1)[known]
        assert same.mean() > 0.75  # half a pixel of shift leaves more, a class in the wrong place far less
        assert np.abs(colors(pixels) - COLORS[labels.numpy() % 3]).max(-1)[known].mean() < 15


def test_a_part_that_is_resized_is_the_part_of_the_resized_picture():
    """To Pillow's own resize of the whole: labels equal, colours within 2 of 255."""
    prepare = augmentation(side=24, scale_min=0.6, scale_max=1.8)
    for position in range(10):
        torch.manual_seed(position)
        size = prepare.scaled_size(sample())
        box = prepare.drawn_box(*size)
        torch.manual_seed(position)
        image, labels = prepare.scaled_crop(sample())
        whole = sample().image.resize(size, PIL.Image.Resampling.BILINEAR).crop(box)
        assert np.abs(np.asarray(image).astype(int) - np.asarray(whole).astype(int)).max() <= 2
        plain = PIL.Image.fromarray(blocks()).resize(size, PIL.Image.Resampling.NEAREST).crop(box)
        assert (np.asarray(labels) == np.asarray(plain)).mean() > 0.99


def test_what_is_smaller_than_the_crop_is_filled_with_zeros_and_255():
    pixels, labels = augmentation(side=64, mean=(0.5,) * 3, std=(0.25,) * 3)(sample(), 0)
    assert (labels[40:] == 255).all() and (labels[:, 48:] == 255).all() and (labels[:40, :48] != 255).all()
    assert (pixels[:, 40:] == 0).all() and (pixels[:, :, 48:] == 0).all()  # zero after normalisation
    expected = (torch.from_numpy(COLORS[blocks()]).permute(2, 0, 1) / 255 - 0.5) / 0.25
    assert torch.allclose(pixels[:, :40, :48], expected, atol=1e-5)


@pytest.mark.parametrize(
    ("size", "options", "expected"),
    [
        ((640, 480), {"short_side": 240}, (320, 240)),
        ((480, 640), {"short_side": 240}, (240, 320)),
        ((4000, 400), {"short_side": 512, "long_side": 2048}, (2048, 205)),  # the long side holds
        ((640, 480), {}, (640, 480)),
        ((640, 480), {"scale_min": 2.0, "scale_max": 2.0}, (1280, 960)),
    ],
)
def test_the_published_sizes(size, options, expected):
    picture = LabelledPicture(PIL.Image.new("RGB", size), np.zeros(size[::-1], dtype=np.int32), "a.png")
    assert augmentation(**options).scaled_size(picture) == expected


def test_a_crop_that_one_class_fills_is_drawn_again():
    """A strip of class 1 in a corner of class 0: with the rule most crops hold 25% of it or more, without few do."""
    labels = np.zeros((200, 200), dtype=np.int32)
    labels[:40, :40] = 1
    picture = LabelledPicture(picture_of(labels), labels, "a.png")

    def filled(share):
        prepare = augmentation(side=48, crop_max_share=share)
        return [bool((prepare(picture, position)[1] == 0).float().mean() >= 0.75) for position in range(100)]

    plain, ruled = sum(filled(1.0)), sum(filled(0.75))
    assert plain > 90 and ruled < plain - 15


def test_labels_of_nothing_do_not_count_and_do_not_hang():
    labels = np.full((40, 48), 255, dtype=np.int32)
    picture = LabelledPicture(picture_of(labels), labels, "a.png")
    assert (augmentation(crop_max_share=0.75)(picture, 0)[1] == 255).all()


def test_every_draw_is_a_function_of_seed_and_position():
    options = {"scale_min": 0.5, "scale_max": 2.0, "random_flip": True, "photometric": True, "crop_max_share": 0.75}
    first = augmentation(**options)(sample(), 7)
    torch.rand(3), np.random.rand(3)
    again = augmentation(**options)(sample(), 7)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    for other in (augmentation(**options)(sample(), 8), augmentation(seed=1, **options)(sample(), 7)):
        assert not torch.equal(first[0], other[0])


def test_colours_change_as_published_and_masks_do_not():
    """One step at a time against NumPy: brightness is added, contrast multiplies, both cut off at 0 and 1."""
    image = tv_tensors.Image(torch.linspace(0, 1, 48).view(3, 4, 4))
    mask = tv_tensors.Mask(torch.arange(16).view(4, 4))
    change, nothing = PhotometricDistortion(), dict.fromkeys(("brightness", "contrast", "saturation", "hue"))
    plain = image.numpy()
    for first in (True, False):
        done = change.transform(image, {**nothing, "brightness": 0.1, "contrast": 1.4, "contrast_first": first})
        assert np.allclose(done.numpy(), np.clip(np.clip(plain + 0.1, 0, 1) * 1.4, 0, 1), atol=1e-6)
    assert change.transform(mask, {**nothing, "brightness": 0.1}) is mask
    grey = change.transform(image, {**nothing, "saturation": 0.0, "contrast_first": True})
    assert torch.allclose(grey[0], grey[2], atol=1e-6)
    torch.manual_seed(0)
    drawn = [change.make_params([]) for _ in range(2000)]
    for name, low, high in (("brightness", -32 / 255, 32 / 255), ("contrast", 0.5, 1.5), ("saturation", 0.5, 1.5),
                            ("hue", -0.1, 0.1)):  # fmt: skip
        values = [params[name] for params in drawn if params[name] is not None]
        assert 900 < len(values) < 1100 and low <= min(values) < 0.9 * low + 0.1 * high
        assert high >= max(values) > 0.1 * low + 0.9 * high


def test_a_picture_that_would_become_too_long_is_named():
    picture = LabelledPicture(PIL.Image.new("RGB", (5000, 2)), np.zeros((2, 5000), dtype=np.int32), "strip.png")
    with pytest.raises(UnreadableImageError, match=r"strip\.png: 5000 x 2 pixels would become 80000 x 32"):
        augmentation(scale_min=16, scale_max=16)(picture, 0)
