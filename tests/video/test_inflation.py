"""An image classifier's weights in a video classifier."""

import pytest
import torch
from helpers.videos import large

from d_emo import EMOv2Config, EMOv2ForImageClassification, create_classifier, create_video_classifier
from d_emo.video.inflation import inflate

TINY = {"depths": (1, 1, 2, 2), "widths": (8, 8, 16, 16), "head_dims": (8, 8, 8, 8), "layer_scale": 1.0}
NEW_HEAD = r"head\.weight, head\.bias are newly initialised, and have to be trained"


def image_classifier(classes=7, **options):
    return large(EMOv2ForImageClassification(EMOv2Config(**{**TINY, "window_size": 5, **options}, num_labels=classes)))


def moving_clip(frames=4, side=160):
    generator = torch.Generator().manual_seed(0)
    picture = torch.nn.functional.interpolate(torch.randn(1, 3, 30, 30, generator=generator), 2 * side, mode="bicubic")
    return torch.stack([picture[0, :, 8 * t : 8 * t + side, 5 * t : 5 * t + side] for t in range(frames)])[None]


def test_a_still_clip_gives_what_the_image_gives_and_motion_does_not():
    # The published size, at the published 4 frames of 160.
    images = large(create_classifier("EMOv2-5M", window_size=5, num_classes=400))
    videos = create_video_classifier("V-EMOv2-5M", image_classifier=images).eval()
    clip = moving_clip()
    still = clip[:, :1].expand(-1, 4, -1, -1, -1)
    with torch.no_grad():
        expected = images(clip[:, 0])
        assert (videos(still).logits - expected).abs().max() < 1e-5
        logits = videos(clip).logits
        others = [videos(clip.flip(1)).logits, videos(clip.roll(40, -1)).logits, videos(still).logits]
    assert all((other - logits).abs().max() > 0.05 for other in others)


def test_a_kernel_goes_into_the_middle_slice_and_all_else_is_copied():
    source = image_classifier()
    model = create_video_classifier("V-EMOv2-5M", 7, source, **TINY)
    found, given = model.v_emov2.state_dict(), source.emov2.state_dict()
    assert found.keys() == given.keys()
    for name, tensor in found.items():
        if tensor.dim() == 5:
            middle = tensor.shape[2] // 2
            assert torch.equal(tensor[:, :, middle], given[name])
            assert tensor.count_nonzero() == given[name].count_nonzero()
        else:
            assert torch.equal(tensor, given[name])


def test_the_head_stays_fresh_where_the_classes_differ():
    source = image_classifier(classes=3)
    with pytest.warns(UserWarning, match=NEW_HEAD):
        model = create_video_classifier(num_classes=7, image_classifier=source, **TINY)
    assert model.v_emov2.head.weight.shape == (7, 16)
    assert model.v_emov2.head.weight.std().item() == pytest.approx(0.02, rel=0.3)
    without = create_video_classifier(num_classes=0, image_classifier=source, **TINY)  # nothing new, nothing said
    assert torch.equal(without.v_emov2.norm.weight, source.emov2.norm.weight)


def test_folders_networks_and_models_are_taken(tmp_path):
    source = image_classifier()
    source.save_pretrained(tmp_path)
    models = [create_video_classifier(num_classes=7, image_classifier=given, **TINY).eval()
              for given in (tmp_path, str(tmp_path), source, source.emov2)]  # fmt: skip
    clip = moving_clip(side=64)
    with torch.no_grad():
        logits = [model(clip).logits for model in models]
    assert all(torch.equal(logits[0], other) for other in logits)
    network = inflate(models[0].v_emov2, source)
    assert network is models[0].v_emov2


@pytest.mark.parametrize(
    "options",
    [
        {"widths": (8, 8, 16, 24)},
        {"depths": (1, 1, 2, 3)},
        {"kernel_sizes": (5, 5, 5, 3)},
        {"num_channels": 1},
        {"version": 1, "attention_type": "remote"},
        {"norms": ("batch", "batch", "batch", "batch")},
    ],
    ids=str,
)
def test_another_size_is_refused_in_one_line_and_changes_nothing(options):
    model = create_video_classifier(num_classes=7, **TINY)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"the classifier does not inflate to this video classifier \(.*; pass an EMO"):
        inflate(model, image_classifier(**options))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attention_type": "remote"}, r"stages\.2\.blocks\.1\.i2rmb: attention remote, not spanning"),
        ({"head_dims": (8, 8, 16, 8)}, r"stages\.2\.blocks\.1\.i2rmb: heads 1, not 2"),
        ({"activations": ("gelu",) * 4}, r"stages\.0\.blocks\.0\.i2rmb: activation gelu, not silu"),
        ({"dilation": 2}, r"dilation 2, not 1"),
        ({"output_stride": 16}, r"stages\.3\.blocks\.0\.i2rmb: stride 1, not 2"),
        ({"arrangement": "parallel"}, r"arrangement parallel, not cascaded"),
    ],
    ids=str,
)
def test_weights_that_fit_and_mean_something_else_are_refused(options, message):
    source = image_classifier(**options)
    with pytest.raises(ValueError, match=rf"\(.*{message}.*\); pass an EMOv2 of the same .* kind of attention"):
        create_video_classifier(num_classes=7, image_classifier=source, **TINY)
    if options.keys() <= {"attention_type", "head_dims", "activations"}:
        create_video_classifier(num_classes=7, image_classifier=source, **{**TINY, **options})


def test_other_things_are_no_classifiers(tmp_path):
    for wrong in (3, "", torch.nn.Linear(2, 2)):
        with pytest.raises(ValueError, match=r"image classifier .* is a \w+; pass a folder or Hub id of an EMOv2"):
            create_video_classifier(image_classifier=wrong, **TINY)
    with pytest.raises(ValueError, match=r"image classifier '.*nowhere' does not load as an EMOv2 .*; pass a folder"):
        create_video_classifier(image_classifier=tmp_path / "nowhere", **TINY)
    with pytest.raises(ValueError, match=r"model is a Linear; pass a VEMOv2ForVideoClassification or VEMOv2"):
        inflate(torch.nn.Linear(2, 2), image_classifier())
    create_video_classifier(num_classes=7, **TINY).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"config\.json is of a VEMOv2ForVideoClassification .*not of a EMOv2ForImage"):
        create_video_classifier(image_classifier=tmp_path, **TINY)


@pytest.mark.parametrize("kept", [4, 400, 0.5])
def test_a_damaged_file_is_named_in_one_line(tmp_path, kept):
    image_classifier().save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[: kept if kept > 1 else int(file.stat().st_size * kept)])
    for load in (
        lambda: create_video_classifier(num_classes=7, image_classifier=tmp_path, **TINY),
        lambda: EMOv2ForImageClassification.from_pretrained(tmp_path),
    ):
        with pytest.raises(ValueError, match=r"its weights are damaged .*; restore the file") as caught:
            load()
        assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)


@pytest.mark.parametrize("name", ["EMOv2-5M", "EMOv2-6M", "/nowhere/model"])
def test_a_size_or_a_missing_folder_is_not_asked_of_the_hub(name, monkeypatch):
    monkeypatch.setattr(EMOv2ForImageClassification, "from_pretrained", lambda name: pytest.fail("the Hub was asked"))
    with pytest.raises(ValueError, match=r"\(there is no such folder\); pass a folder or Hub id"):
        create_video_classifier("V-EMOv2-1M", image_classifier=name)
