"""The segmenters' loss, and the images and labels that they refuse."""

import PIL.Image
import pytest
import torch
import torch.nn.functional as F
from helpers.segmenters import HEADS, labels, pixels, segmenter

from d_emo.segmentation.losses import dice_loss


def cross_entropy(logits, ids):
    resized = F.interpolate(logits, size=ids.shape[-2:], mode="bilinear", align_corners=False)
    return F.cross_entropy(resized, ids, ignore_index=255)


@pytest.mark.parametrize("head", HEADS)
def test_the_loss_is_at_the_labels_size_and_leaves_255_out(head):
    model = segmenter(head)
    for ids in (labels(), labels(2, 32, 32), labels(2, 128, 128)):
        output = model(pixels(), labels=ids)
        torch.testing.assert_close(output.loss, cross_entropy(output.logits, ids))


@pytest.mark.parametrize("head", ["deeplabv3", "pspnet"])
def test_the_auxiliary_heads_loss_is_added_in_training_only(head):
    model = segmenter(head, dropout=0.0, backbone={"drop_path": 0.0}).train()
    seen = []
    model.auxiliary_head.register_forward_hook(lambda module, args, output: seen.append((args[0], output)))
    output = model(pixels(), labels=labels(), output_hidden_states=True)
    ((features, auxiliary),) = seen
    assert features is output.hidden_states[-2] and auxiliary.shape == (2, 3, 4, 4)
    expected = cross_entropy(output.logits, labels()) + 0.4 * cross_entropy(auxiliary, labels())
    torch.testing.assert_close(output.loss, expected)
    model.config.auxiliary_weight = 1.0
    torch.testing.assert_close(
        model(pixels(), labels=labels()).loss - output.loss, 0.6 * cross_entropy(auxiliary, labels())
    )
    output = model.eval()(pixels(), labels=labels())
    torch.testing.assert_close(output.loss, cross_entropy(output.logits, labels()))
    assert len(seen) == 2


def test_pictures_without_a_label_cost_nothing():
    model = segmenter("pspnet").train()
    loss = model(pixels(), labels=torch.full((2, 64, 64), 255)).loss
    loss.backward()
    assert loss == 0 and all(not parameter.grad.any() for parameter in model.parameters())


def test_the_loss_may_be_a_mean_over_all_pixels_as_mmsegmentations():
    plain, all_pixels = segmenter("segformer"), segmenter("segformer", loss_over_ignored=True)
    known = (labels() != 255).float().mean()
    torch.testing.assert_close(
        all_pixels(pixels(), labels=labels()).loss, plain(pixels(), labels=labels()).loss * known
    )


def test_dice_equals_another_librarys_and_leaves_out_what_has_no_label():
    from segmentation_models_pytorch.losses import DiceLoss

    logits, ids = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1)), labels()
    expected = DiceLoss("multiclass", eps=0.0, ignore_index=255)(logits, ids)
    assert expected > 0.1
    torch.testing.assert_close(dice_loss(logits, ids, 255), expected, atol=1e-6, rtol=0)
    # Of classes that no label shows there is nothing to find: by hand on one pixel of class 1.
    one = torch.tensor([[[1, 255]]])
    pair = torch.log(torch.tensor([[0.25, 0.7], [0.5, 0.2], [0.25, 0.1]])).view(1, 3, 1, 2)
    torch.testing.assert_close(dice_loss(pair, one, 255), torch.tensor(1 - 2 * 0.5 / 1.5))
    assert dice_loss(pair, torch.full((1, 1, 2), 255), 255) == 0


def test_dice_is_added_by_its_weight_and_saved_with_the_model(tmp_path):
    plain, both = segmenter("segformer"), segmenter("segformer", dice_weight=3.0)
    output = plain(pixels(), labels=labels())
    resized = F.interpolate(output.logits, size=(64, 64), mode="bilinear", align_corners=False)
    expected = output.loss + 3 * dice_loss(resized, labels(), 255)
    torch.testing.assert_close(both(pixels(), labels=labels()).loss, expected)
    both.save_pretrained(tmp_path)
    assert type(both.config).from_pretrained(tmp_path).dice_weight == 3.0


def test_labels_of_every_whole_type_and_another_ignored_one_are_taken():
    model = segmenter("segformer")
    expected = model(pixels(), labels=labels()).loss
    for dtype in (torch.uint8, torch.int16, torch.int32):
        torch.testing.assert_close(model(pixels(), labels=labels().to(dtype)).loss, expected)
    other = segmenter("segformer", semantic_loss_ignore_index=-100)
    ids = labels().masked_fill(labels() == 255, -100)
    torch.testing.assert_close(other(pixels(), labels=ids).loss, expected)


@pytest.mark.parametrize(
    ("dtype", "ignored"), [(torch.uint8, -100), (torch.uint8, 156 + 512), (torch.int16, 156 + 65536)]
)
def test_no_class_is_taken_for_an_ignored_label_that_its_type_cannot_hold(dtype, ignored):
    model = segmenter("segformer", num_labels=200, semantic_loss_ignore_index=ignored)
    ids = torch.full((2, 64, 64), 156, dtype=dtype)  # what 8 and 16 bits leave of `ignored`
    torch.testing.assert_close(model(pixels(), labels=ids).loss, model(pixels(), labels=ids.long()).loss)
    too_few = segmenter("segformer", semantic_loss_ignore_index=ignored)
    with pytest.raises(ValueError, match="labels have 156, the model has 3 classes"):
        too_few(pixels(), labels=ids)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (lambda ids: ids.float(), r"labels are torch.float32; pass integers \(2, 64, 64\) from 0 to 2, 255 where"),
        (lambda ids: ids > 1, r"labels are torch.bool"),
        (lambda ids: ids[:, None], r"labels have the shape \(2, 1, 64, 64\); pass labels\[:, 0\]"),
        (lambda ids: ids[:, 0], r"labels have the shape \(2, 64\)"),
        (lambda ids: ids[:1], r"labels have the shape \(1, 64, 64\)"),
        (lambda ids: ids[:, :0], r"labels have the shape \(2, 0, 64\)"),
        (lambda ids: ids[:, :32], r"labels are 32 x 64, the images 64 x 64"),
        (lambda ids: ids.clone().fill_(3), r"labels have 3, the model has 3 classes; .*do_reduce_labels=True shifts"),
        (lambda ids: ids.clone().fill_(254), r"labels have 254, the model has 3 classes"),
        (lambda ids: ids.clone().fill_(-1), r"labels have -1, the model has 3 classes"),
        (lambda ids: ids.tolist(), r"labels is a list"),
        (lambda ids: ids.numpy(), r"labels is a ndarray"),
    ],
)
def test_labels_that_do_not_fit_are_refused(given, message):
    with pytest.raises(ValueError, match=message) as refusal:
        segmenter("pspnet")(pixels(), labels=given(labels()))
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (lambda: pixels(channels=1), r"pixel_values have 1 channels, the model takes 3"),
        (lambda: pixels()[0], r"pixel_values have the shape \(3, 64, 64\), not \(B, 3, H, W\); .*pixel_values\[None\]"),
        (lambda: pixels().permute(0, 2, 3, 1), r"channels come second"),
        (lambda: pixels()[:0], r"no pixel"),
        (lambda: pixels()[:, :, :0], r"no pixel"),
        (lambda: (pixels() * 255).byte(), r"pixel_values are torch.uint8"),
        (lambda: pixels().half(), r"pixel_values are torch.float16, the model is torch.float32"),
        (lambda: PIL.Image.new("RGB", (90, 70)), r"pixel_values is a Image"),
        (lambda: None, r"pixel_values is a NoneType"),
    ],
)
def test_images_that_do_not_fit_are_refused(given, message):
    with pytest.raises(ValueError, match=message) as refusal:
        segmenter("pspnet")(given())
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("head", HEADS)
def test_one_image_trains_where_no_branch_averages_it_whole(head):
    model = segmenter(head).train()
    if head in ("deeplabv3", "pspnet"):
        with pytest.raises(ValueError, match=r"a batch of 1 image leaves BatchNorm a single value .*drop_last=True"):
            model(pixels(1), labels=labels(1))
    else:
        assert model(pixels(1), labels=labels(1)).loss.isfinite()
        with pytest.raises(ValueError, match=r"one image of 32 x 32 leaves BatchNorm a single value"):
            model(pixels(1, 32, 32))
