"""Sliding windows, against an implementation that visits one window at a time and counts in float64."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from helpers.segmenters import segmenter
from torch import nn

from d_emo import predict_in_windows


def pixels(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def neighbours() -> nn.Module:
    """A network whose output at a pixel depends on where the window is cut."""
    torch.manual_seed(0)
    return nn.Conv2d(3, 2, 5, padding=2)


@torch.no_grad()
def naive(model, images: torch.Tensor, window: tuple[int, int], stride: tuple[int, int]) -> torch.Tensor:
    """The mean over windows, image by image: the corner moves on by the stride and is drawn back into the image."""
    results = []
    for image in images:
        _, height, width = image.shape
        added, count = 0, torch.zeros(height, width, dtype=torch.float64)
        corners = set()
        for row in range(-(-max(height - window[0], 0) // stride[0]) + 1):
            for column in range(-(-max(width - window[1], 0) // stride[1]) + 1):
                corners.add((min(row * stride[0], height - window[0]), min(column * stride[1], width - window[1])))
        for y, x in corners:
            logits = model(image[None, :, y : y + window[0], x : x + window[1]])[0].double()
            borders = (x, width - x - window[1], y, height - y - window[0])
            added = added + F.pad(logits, borders)
            count += F.pad(torch.ones(window, dtype=torch.float64), borders)
        results.append(added / count)
    return torch.stack(results).float()


@pytest.mark.parametrize(
    ("height", "width", "window", "stride"),
    [
        (32, 32, (16, 16), (16, 16)),
        (16, 16, (16, 16), (11, 11)),
        (37, 50, (16, 16), (11, 11)),
        (33, 16, (16, 16), (16, 16)),
        (40, 29, (16, 24), (5, 24)),
        (17, 100, (16, 16), (1, 16)),
    ],
)
@pytest.mark.parametrize("batch_size", [1, 3, 1000])
def test_logits_are_the_mean_of_those_of_the_windows_that_hold_a_pixel(height, width, window, stride, batch_size):
    images, model = pixels(2, 3, height, width), neighbours()
    logits = predict_in_windows(model, images, window, stride, batch_size)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, naive(model, images, window, stride), atol=1e-5, rtol=0)


@pytest.mark.parametrize(("height", "width"), [(3, 5), (256, 300), (61, 40), (16, 16)])
def test_a_network_of_single_pixels_sees_no_windows(height, width):
    images, model = pixels(2, 3, height, width), nn.Conv2d(3, 4, 1)
    logits = predict_in_windows(model, images, 16, 11)
    torch.testing.assert_close(logits, model(images).detach(), atol=1e-5, rtol=0)


def test_published_windows_of_a_photo_begin_every_170_pixels():
    seen = []

    def model(windows: torch.Tensor) -> torch.Tensor:
        seen.extend((int(w[0, 0, 0]), int(w[1, 0, 0])) for w in windows)
        assert windows.shape[1:] == (2, 256, 256)
        return windows

    rows, columns = torch.meshgrid(torch.arange(960.0), torch.arange(999.0), indexing="ij")
    logits = predict_in_windows(model, torch.stack((rows, columns))[None])
    expected = [0, 170, 340, 510, 680, 704], [0, 170, 340, 510, 680, 743]
    assert seen == [(y, x) for y in expected[0] for x in expected[1]]
    torch.testing.assert_close(logits[0, 0], rows)


def test_an_image_smaller_than_a_window_is_filled_up_with_zeros():
    image, model = pixels(1, 3, 10, 20), neighbours()
    expected = naive(model, F.pad(image, (0, 0, 0, 6)), (16, 16), (11, 11))[:, :, :10]
    torch.testing.assert_close(predict_in_windows(model, image, 16, 11), expected, atol=1e-5, rtol=0)


def test_coarse_logits_are_resized_to_their_window_before_they_are_averaged():
    images, coarse = pixels(1, 3, 24, 24), nn.Conv2d(3, 2, 4, stride=4)

    def fine(windows):
        return F.interpolate(coarse(windows), (16, 16), mode="bilinear", align_corners=False)

    output = predict_in_windows(lambda windows: SimpleNamespace(logits=coarse(windows)), images, 16, 8)
    torch.testing.assert_close(output, naive(fine, images, (16, 16), (8, 8)), atol=1e-5, rtol=0)


@pytest.mark.parametrize("head", ["segformer", "pspnet"])  # strides of 4 and 32
@pytest.mark.parametrize("return_dict", [True, False])
def test_segmenters_on_a_backbone_are_taken(head, return_dict):
    model, images = segmenter(head, return_dict=return_dict), pixels(1, 3, 90, 70)

    def fine(windows):
        logits = model(windows, return_dict=True).logits
        return F.interpolate(logits, (64, 64), mode="bilinear", align_corners=False)

    expected = naive(fine, images, (64, 64), (40, 40))
    assert expected.std() > 1e-3
    torch.testing.assert_close(predict_in_windows(model, images, 64, 40), expected, atol=1e-4, rtol=1e-4)


def test_half_precision_is_averaged_in_float32():
    images = pixels(1, 3, 40, 40).bfloat16()
    model = neighbours().bfloat16()
    logits = predict_in_windows(model, images, 16, 3)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, naive(model, images, (16, 16), (3, 3)), atol=1e-5, rtol=0)


def test_modules_run_in_eval_mode_and_keep_their_own_afterwards():
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Dropout(0.9), nn.Conv2d(3, 2, 1)).train()
    model[0].eval()  # frozen, as in fine-tuning
    images = pixels(1, 3, 20, 20)
    logits = predict_in_windows(model, images, 16, 8)
    assert [module.training for module in model.modules()] == [True, False, True, True]
    assert not logits.requires_grad
    torch.testing.assert_close(logits, model.eval()(images).detach(), atol=1e-5, rtol=0)


def test_a_model_that_fails_is_in_its_own_mode_afterwards():
    model = nn.Sequential(nn.Conv2d(5, 2, 1)).train()
    with pytest.raises(RuntimeError):
        predict_in_windows(model, pixels(1, 3, 16, 16), 16, 16)
    assert model.training


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stride": 17}, "stride=17 leaves gaps between windows of 16; choose one up to the window"),
        ({"stride": (16, 17)}, r"stride=\(16, 17\) leaves gaps"),
        ({"stride": 0}, "stride=0 is not a whole number from 1"),
        ({"window": 2.5}, "window=2.5 is not a whole number"),
        ({"batch_size": 0}, "batch_size=0 is not a whole number from 1"),
        ({"pixel_values": pixels(3, 20, 20)}, r"shape \(3, 20, 20\), not \(B, C, H, W\); for one image"),
        ({"pixel_values": torch.zeros(1, 3, 20, 20, dtype=torch.uint8)}, "torch.uint8; pass normalised"),
        ({"model": "segmenter"}, "model is a str; pass a segmenter"),
        ({"pixel_values": [1.0]}, "pixel_values is a list; pass a tensor"),
        ({"pixel_values": torch.zeros(0, 3, 20, 20)}, r"shape \(0, 3, 20, 20\)"),
        ({"model": lambda windows: windows.mean((2, 3))}, r"gave \(4, 3\) for 4 windows, not logits \(4, K, h, w\)"),
        ({"model": lambda windows: {"out": windows}}, "gave a dict for 4 windows"),
        ({"model": lambda windows: windows[:1]}, r"gave \(1, 3, 16, 16\) for 4 windows"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(change, message):
    given = {"model": neighbours(), "pixel_values": pixels(1, 3, 20, 20), "window": 16, "stride": 8, **change}
    with pytest.raises(ValueError, match=message) as raised:
        predict_in_windows(**given)
    assert "\n" not in str(raised.value)
