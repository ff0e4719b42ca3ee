"""V-EMOv2 in transformers: folders, Auto classes, processors, pipeline, labels, types of numbers, Trainer."""

import json
import math
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from helpers.extras import needs
from helpers.videos import large, numbers_of, write_video
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForVideoClassification,
    AutoVideoProcessor,
    Trainer,
    TrainingArguments,
    VideoClassificationPipeline,
    pipeline,
)

from d_emo import (
    EMOv2ForImageClassification,
    VEMOv2Config,
    VEMOv2ForVideoClassification,
    create_video_classifier,
    make_video_processor,
    read_clip,
)

TINY = {"depths": [1, 1, 2, 2], "widths": [8, 8, 16, 16], "head_dims": [8, 8, 8, 8], "image_size": 32,
        "layer_scale": 1.0}  # fmt: skip


def classifier(**options):
    return large(VEMOv2ForVideoClassification(VEMOv2Config(**{**TINY, "num_labels": 4, **options})))


def clips(batch=2, frames=4, side=32, channels=3):
    return torch.randn(batch, frames, channels, side, side, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("video_classifier")
    classifier(id2label=["left", "right", "up", "down"]).save_pretrained(place)
    return place


# ---- folders ---------------------------------------------------------------------------------------------------------


def test_one_call_saves_all_that_a_pipeline_needs(folder):
    assert {path.name for path in folder.iterdir()} == {
        "config.json",
        "model.safetensors",
        "video_preprocessor_config.json",
        "preprocessor_config.json",
    }
    config = json.loads((folder / "config.json").read_text())
    assert (config["model_type"], config["num_frames"], config["image_size"]) == ("v_emov2", 4, 32)


def test_auto_classes_open_the_folder(folder):
    assert isinstance(AutoConfig.from_pretrained(folder), VEMOv2Config)
    model = AutoModelForVideoClassification.from_pretrained(folder)
    assert isinstance(model, VEMOv2ForVideoClassification) and model.config.id2label[2] == "up"
    assert torch.equal(model.eval()(clips()).logits, classifier(num_labels=4)(clips()).logits)
    assert type(AutoVideoProcessor.from_pretrained(folder)) is type(make_video_processor())
    assert list(AutoImageProcessor.from_pretrained(folder).image_mean) == [0.45] * 3


def test_processors_that_are_there_are_kept_and_other_channels_have_none(tmp_path):
    make_video_processor(96, 8).save_pretrained(tmp_path / "own")
    classifier().save_pretrained(tmp_path / "own")
    assert AutoVideoProcessor.from_pretrained(tmp_path / "own").num_frames == 8
    classifier(num_channels=1).save_pretrained(tmp_path / "grey")
    assert {path.name for path in (tmp_path / "grey").iterdir()} == {"config.json", "model.safetensors"}
    with pytest.raises(ValueError, match=r"save_directory='.*config\.json' is a file; pass a folder"):
        classifier().save_pretrained(tmp_path / "own" / "config.json")


def test_other_folders_and_half_a_network_are_refused(folder, tmp_path):
    with pytest.raises(ValueError, match=r"is of a VEMOv2ForVideoClassification .*not of a EMOv2ForImage"):
        EMOv2ForImageClassification.from_pretrained(folder)
    model = classifier()
    model.save_pretrained(
        tmp_path, state_dict={name: t for name, t in model.state_dict().items() if "stem" not in name}
    )
    with pytest.raises(ValueError, match=r"missing in the file: v_emov2\.stem"):
        VEMOv2ForVideoClassification.from_pretrained(tmp_path)


def test_other_classes_get_a_new_head(folder):
    with pytest.raises(ValueError, match=r"v_emov2\.head\.bias .* pass ignore_mismatched_sizes=True"):
        VEMOv2ForVideoClassification.from_pretrained(folder, num_labels=9)
    with pytest.warns(UserWarning, match=r"v_emov2\.head\.bias, v_emov2\.head\.weight are newly initialised"):
        model = VEMOv2ForVideoClassification.from_pretrained(folder, num_labels=9, ignore_mismatched_sizes=True)
    assert model(clips()).logits.shape == (2, 9)
    assert model.v_emov2.head.weight.std().item() == pytest.approx(0.02, rel=0.3)


def test_weights_that_no_file_has_are_drawn_as_the_network_draws_them():
    torch.manual_seed(0)
    model = create_video_classifier("V-EMOv2-1M", num_classes=3)
    state = {name: tensor for name, tensor in model.v_emov2.state_dict().items() if tensor.is_floating_point()}
    assert all(tensor.isfinite().all() for tensor in state.values())
    stem = state["stem.conv.weight"]
    assert stem.abs().max().item() == pytest.approx(math.sqrt(1 / stem[0].numel()), rel=0.05)
    assert (state["stages.3.blocks.1.layer_scale"] == 1e-6).all() and (state["norm.weight"] == 1).all()
    assert (state["stages.0.blocks.0.i2rmb.conv_norm.running_var"] == 1).all()


# ---- clips -----------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(
    not hasattr(VideoClassificationPipeline, "_load_video_processor"),
    reason="pipelines of this transformers know no video processors",
)
def test_the_pipeline_takes_the_published_frames(folder, tmp_path):
    # Every frame is another grey, so that every choice of frames gives another answer.
    path = write_video(tmp_path / "a.mp4", 27, 64, 48)
    found = pipeline("video-classification", model=str(folder))(str(path), top_k=4)
    assert numbers_of(read_clip(path)) == [3, 10, 16, 23]
    pixels = make_video_processor(32)(read_clip(path), return_tensors="pt")["pixel_values"]
    model = AutoModelForVideoClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        expected = model(pixels).logits.softmax(-1)[0].tolist()
        first = model(
            make_video_processor(32)(first_frames(path, 4), return_tensors="pt")["pixel_values"]
        ).logits.softmax(-1)[0]
    scores = {entry["label"]: entry["score"] for entry in found}
    assert [scores[name] for name in ("left", "right", "up", "down")] == pytest.approx(expected, abs=1e-4)
    assert not np.allclose(first, expected, atol=1e-2)


def first_frames(path, count):
    """The first frames of a video, which a pipeline without our processor would take."""
    from d_emo.video.reading import Video

    with Video(path) as video:
        return video.frames(range(count))


@needs("video")
def test_the_shared_clip_runs_through_the_pipeline(folder, shared):
    path = shared / "data" / "dense" / "video" / "nasa_13013.mp4"
    answers = pipeline("video-classification", model=str(folder))([str(path)] * 2)
    assert [len(answer) for answer in answers] == [4, 4]
    assert sum(entry["score"] for entry in answers[0]) == pytest.approx(1, abs=1e-3)


def test_the_processor_prepares_as_the_published_validation():
    processor = make_video_processor()
    pixels = processor(torch.full((4, 3, 320, 480), 128, dtype=torch.uint8), return_tensors="pt")["pixel_values"]
    assert pixels.shape == (1, 4, 3, 160, 160)
    torch.testing.assert_close(pixels, torch.full_like(pixels, (128 - 114.75) / 57.375), atol=1e-5, rtol=0)
    marked = torch.zeros(4, 3, 160, 480, dtype=torch.uint8)
    marked[..., 160:320] = 255  # the middle is what stays
    assert (processor(marked, return_tensors="pt")["pixel_values"] > 2).all()


def test_every_kind_of_video_gives_the_same_clip(folder, tmp_path):
    path = str(write_video(tmp_path / "a.mp4", 8, 64, 48))
    processor = make_video_processor(32)
    chosen = read_clip(path)
    kinds = [
        path,
        [path],
        Path(path),
        [Path(path)],
        chosen,
        chosen.numpy(),
        chosen.permute(0, 2, 3, 1).numpy(),
        [PIL.Image.fromarray(frame.permute(1, 2, 0).numpy()) for frame in chosen],
        first_frames(path, 8),  # of which the processor takes four
    ]
    clips = [processor(kind, return_tensors="pt")["pixel_values"] for kind in kinds]
    assert all(torch.equal(clip, clips[0]) for clip in clips) and clips[0].shape == (1, 4, 3, 32, 32)
    assert processor([path, path], return_tensors="pt")["pixel_values"].shape == (2, 4, 3, 32, 32)
    assert processor(path, num_frames=2, return_tensors="pt")["pixel_values"].shape[1] == 2
    assert processor(path, do_sample_frames=False, return_tensors="pt")["pixel_values"].shape[1] == 8
    for fps, frames in ((2.5, 2), (10, 8), (0.1, 1)):  # of 0.8 s at 10 a second
        assert processor(path, fps=fps, return_tensors="pt")["pixel_values"].shape[1] == frames
    frames = AutoImageProcessor.from_pretrained(folder)(kinds[7], return_tensors="pt")["pixel_values"]
    assert frames.shape == (1, 4, 3, 32, 32)
    torch.testing.assert_close(frames, clips[0], atol=0.05, rtol=0)


@pytest.mark.parametrize("mode", ["L", "1", "P", "LA", "RGBA", "CMYK"])
def test_pictures_of_every_mode_are_taken_as_rgb(mode):
    picture = PIL.Image.new("RGB", (40, 40), (0, 0, 0)).convert(mode)
    prepared = make_video_processor(32)([picture] * 4, return_tensors="pt")["pixel_values"]
    assert prepared.shape == (1, 4, 3, 32, 32) and (prepared + 2).abs().max() < 0.1


FRAMES = torch.rand(6, 3, 40, 40, generator=torch.Generator().manual_seed(0)) * 255


@pytest.mark.parametrize(
    ("video", "options", "message"),
    [
        (FRAMES / 255, {}, r"videos\[0\] has values from \S+ to 0\S+; pass 0 to 255, or do_rescale=False"),
        (FRAMES > 99, {}, "pass 0 to 255, or do_rescale=False"),
        (FRAMES, {"do_rescale": False}, r"to 25\S+; pass 0 to 1\."),
        ((FRAMES * 257).to(torch.int32).to(torch.uint16), {}, r"to 65\d+; pass 0 to 255\."),
        (FRAMES.numpy() * 257, {}, r"pass 0 to 255\."),
        (FRAMES * math.nan, {}, "values from nan to nan"),
        ([FRAMES, FRAMES / 255], {}, r"videos\[1\] has values"),
        (FRAMES[:0], {}, "a video has no frame; pass one frame at least"),
        (FRAMES[:0], {"do_sample_frames": False}, r"videos\[0\] has the shape \(0, 3, 40, 40\): no pixel"),
        ([], {}, "videos are none"),
        ([[]], {}, "videos are none"),
        ({}, {}, "videos is a dict"),
        ([PIL.Image.new("I;16", (40, 40))], {}, "a picture is of mode I;16, whose range is unknown"),
        (FRAMES, {"num_frames": 0}, "num_frames=0 is not a whole number from 1"),
        (FRAMES, {"num_frames": -1}, "num_frames=-1 is not a whole number from 1"),
        (FRAMES, {"fps": 0}, "fps=0 is not a number above 0"),
        (FRAMES, {"fps": 2}, "fps=2 needs to know how fast a video is"),
        (FRAMES, {"fps": 2, "num_frames": 2}, "num_frames=2 and fps=2 are two choices"),
    ],
)
def test_videos_that_would_come_out_wrong_are_refused_in_one_line(video, options, message):
    with pytest.raises(ValueError, match=message) as caught:
        make_video_processor(32)(video, return_tensors="pt", **options)
    assert "\n" not in str(caught.value)


def test_frames_from_0_to_1_are_taken_as_they_are_and_dark_ones_are_no_mistake():
    processor = make_video_processor(32)
    options = {"do_resize": False, "do_center_crop": False, "return_tensors": "pt"}
    whole = processor(FRAMES, **options)["pixel_values"]
    torch.testing.assert_close(processor(FRAMES / 255, do_rescale=False, **options)["pixel_values"], whole)
    assert (processor(FRAMES * 0, **options)["pixel_values"] == -2).all()


def test_half_precision_and_autocast(folder):
    model = AutoModelForVideoClassification.from_pretrained(folder, dtype=torch.bfloat16).eval()
    whole = AutoModelForVideoClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        expected = whole(clips()).logits
        torch.testing.assert_close(model(clips().bfloat16()).logits.float(), expected, atol=0.1, rtol=0.1)
        with pytest.raises(ValueError, match=r"pass pixel_values\.to\(torch\.bfloat16\)"):
            model(clips())
        with torch.autocast("cpu", torch.bfloat16):
            assert whole(clips()).logits.dtype == torch.bfloat16


# ---- labels and training ---------------------------------------------------------------------------------------------


def test_the_loss_is_the_mean_cross_entropy():
    model, labels = classifier(), torch.tensor([3, 0])
    output = model(clips(), labels=labels, output_hidden_states=True)
    torch.testing.assert_close(output.loss, torch.nn.functional.cross_entropy(output.logits, labels))
    assert [tuple(stage.shape[2:]) for stage in output.hidden_states] == [(2, 16 // 2**i, 16 // 2**i) for i in range(5)]
    plain = model(clips(), labels=labels, return_dict=False)
    assert torch.equal(plain[0], output.loss) and torch.equal(plain[1], output.logits)


def test_several_labels_and_regression_have_their_losses():
    several = classifier()(clips(), labels=torch.eye(4)[:2])
    expected = torch.nn.functional.binary_cross_entropy_with_logits(several.logits, torch.eye(4)[:2])
    torch.testing.assert_close(several.loss, expected)
    one = classifier(num_labels=1)(clips(), labels=torch.tensor([0.5, 2.0]))
    torch.testing.assert_close(one.loss, (one.logits[:, 0] - torch.tensor([0.5, 2.0])).square().mean())


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.tensor([0, 4]), r"labels have 4, the model has 4 classes"),
        (torch.tensor([0]), r"labels have the shape \(1,\)"),
        ([0, 1], r"labels is a list"),
    ],
)
def test_labels_of_no_class_are_refused(labels, message):
    with pytest.raises(ValueError, match=message):
        classifier()(clips(), labels=labels)


def test_checkpointing_is_switched_by_transformers():
    model = classifier(drop_path=0.0, dropout=0.0).train()
    model(clips(), labels=torch.tensor([0, 1])).loss.backward()
    expected = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()  # transformers 5.4
    assert all(stage.gradient_checkpointing for stage in model.v_emov2.stages)
    model(clips(), labels=torch.tensor([0, 1])).loss.backward()
    torch.testing.assert_close([parameter.grad for parameter in model.parameters()], expected)


@pytest.mark.slow
def test_the_trainer_learns_a_motion_that_no_frame_tells(tmp_path):
    # A bright column moves to the left or to the right, from every place: single frames are alike.
    clips, labels = torch.zeros(64, 4, 3, 32, 32), torch.arange(64) % 2
    for index in range(64):
        for t in range(4):
            clips[index, t, :, :, (index // 2 + (1, -1)[index % 2] * 5 * t + np.arange(6)) % 32] = 3.0
    torch.manual_seed(0)
    model = VEMOv2ForVideoClassification(VEMOv2Config(**{**TINY, "dropout": 0.0, "drop_path": 0.0}, num_labels=2))
    arguments = TrainingArguments(
        str(tmp_path), max_steps=50, per_device_train_batch_size=16, learning_rate=2e-2, report_to="none", use_cpu=True,
        save_strategy="no", logging_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    data = [{"pixel_values": clip, "labels": int(label)} for clip, label in zip(clips, labels, strict=True)]
    Trainer(model, arguments, train_dataset=data).train()

    @torch.no_grad()
    def share_right(seen):
        return (model.eval()(seen).logits.argmax(-1) == labels).float().mean()

    assert share_right(clips) > 0.9
    assert share_right(clips.flip(1)) < 0.1
    assert share_right(clips[:, :1].expand(-1, 4, -1, -1, -1)) == 0.5
