"""Parts of the video trainer: clips as they are drawn and augmented, where weights come from, recipes."""

import json

import numpy as np
import pytest
import torch
import yaml
from accelerate import Accelerator
from helpers.models import enliven
from helpers.paths import ROOT
from helpers.videos import large, numbers_of, write_bars, write_video

from d_emo import EMOv2Config, EMOv2ForImageClassification, VEMOv2Config, VEMOv2ForVideoClassification
from d_emo.train.engine.task_optimizer import rate_factor
from d_emo.train.video.augmentation import ClipAugmentation
from d_emo.train.video.config import (
    ClipAugmentationOptions,
    VideoConfig,
    VideoModelOptions,
    VideoOptimizationOptions,
    parse_video_config,
)
from d_emo.train.video.plan import make_video_plan
from d_emo.train.video.start import look_up
from d_emo.video.folders import VideoFile, folder_videos
from d_emo.video.inflation import inflated
from d_emo.video.processing import make_video_processor

PLAIN = {"crop": "center", "rand_augment": 0}
RECIPES = ROOT / "train" / "configs" / "video"
NAMES = sorted(path.stem for path in RECIPES.glob("*.yaml"))
SMALL = {"depths": (1, 1, 2, 2), "widths": (8, 8, 16, 16), "head_dims": (8, 8, 8, 8), "layer_scale": 1.0}


def augmentation(side=32, flip=False, seed=0, mean=(0.0,) * 3, std=(1.0,) * 3, frames=4, **options):
    return ClipAugmentation(ClipAugmentationOptions(**{**PLAIN, **options}), frames, side, flip, mean, std, seed)


def video(tmp_path, **options):
    path = write_video(tmp_path / "a.mkv", **{"count": 20, "width": 32, "height": 32, **options})
    return VideoFile(path, "a.mkv")


def noise(number):
    return np.random.default_rng(number).integers(0, 256, (40, 56, 3), dtype=np.uint8)


def test_one_frame_of_each_part_is_drawn_by_the_position(tmp_path):
    prepare, source = augmentation(), video(tmp_path)
    clips = [numbers_of(255 * prepare(source, position)) for position in range(12)]
    assert all(5 * part <= number < 5 * part + 5 for clip in clips for part, number in enumerate(clip))
    assert len({tuple(clip) for clip in clips}) > 9
    assert clips == [numbers_of(255 * prepare(source, position)) for position in range(12)]
    assert clips[0] != numbers_of(255 * augmentation(seed=1)(source, 0))


def test_all_frames_of_a_clip_are_augmented_alike(tmp_path):
    # Of equal frames, whatever is drawn makes equal frames; and of other positions other ones.
    source = video(tmp_path, width=56, height=40, picture=lambda number: noise(0), codec="ffv1")
    prepare = augmentation(flip=True, crop="resized", rand_augment=4, rand_augment_probability=1.0)
    clips = [prepare(source, position) for position in range(6)]
    assert all(torch.equal(clip, clip[:1].expand_as(clip)) for clip in clips)
    assert len({clip.numpy().tobytes() for clip in clips}) == 6
    assert all(torch.equal(clip, prepare(source, position)) for position, clip in enumerate(clips))


def test_draws_leave_the_global_generators_alone(tmp_path):
    source = video(tmp_path)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    augmentation(crop="resized", rand_augment=4)(source, 3)
    assert torch.equal(before[0], torch.get_rng_state()) and (before[1] == np.random.get_state()[1]).all()


def test_mirroring_is_an_option_and_mirrors_whole_clips(tmp_path):
    ramp = np.tile(np.arange(32, dtype=np.uint8)[None, :, None] * 4, (32, 1, 3))
    source = video(tmp_path, picture=lambda number: ramp)
    still, mirrored = augmentation(), augmentation(flip=True)
    kinds = set()
    for position in range(12):
        plain, other = still(source, position), mirrored(source, position)
        kinds.add(torch.equal(other, plain))
        assert torch.equal(other, plain) or torch.equal(other, plain.flip(-1))
    assert kinds == {True, False}


def test_without_augmentation_training_and_validation_see_the_same_pixels(tmp_path):
    source = video(tmp_path, count=4, width=56, height=40, picture=noise, codec="ffv1")
    processor = make_video_processor(32, 4)
    prepared = augmentation(mean=processor.image_mean, std=processor.image_std)(source, 0)
    expected = processor(str(source.file), return_tensors="pt")["pixel_values"][0]
    assert (prepared - expected).abs().max() < 2.5 / 255  # both round to bytes in between


def image_folder(folder, names, **options):
    classes = dict(enumerate(names))
    model = large(EMOv2ForImageClassification(EMOv2Config(**{**SMALL, **options}, window_size=5, id2label=classes)))
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("same", [True, False])
def test_an_image_classifiers_folder_is_inflated_whatever_its_size(tmp_path, same):
    images = image_folder(tmp_path / "images", ("a", "b"))
    options = VideoModelOptions(
        init_from=str(tmp_path / "images"), model_config='{"window_size": [2, 3, 3], "dropout": 0.1}'
    )
    start = look_up(options)
    model = start.build({0: "a", 1: "b"} if same else {0: "b", 1: "a"})
    state, given = model.v_emov2.state_dict(), images.emov2.state_dict()
    expected = inflated(given, state)
    body = [name for name in state if not name.startswith("head")]
    assert all(torch.equal(state[name], expected[name]) for name in body) and len(body) > 50
    assert torch.equal(state["head.weight"], given["head.weight"]) == same
    assert model.config.window_size == [2, 3, 3] and model.config.dropout == 0.1
    assert (model.config.num_frames, model.config.image_size) == (4, 160)
    assert model.config.id2label == ({0: "a", 1: "b"} if same else {0: "b", 1: "a"})
    assert "inflated" in start.describe()


def test_a_published_file_is_inflated(tmp_path):
    from d_emo import create_classifier

    images = create_classifier("EMOv2-1M", num_classes=5)
    torch.save({"net": images.state_dict(), "net_E": enliven(images).state_dict()}, tmp_path / "emov2.pth")
    start = look_up(VideoModelOptions(init_from=str(tmp_path / "emov2.pth"), frames=8))
    model = start.build({0: "a", 1: "b"})
    state = model.v_emov2.state_dict()
    assert sum(tensor.numel() for tensor in model.parameters()) == 1_772_996 - 398 * 181
    kernel = images.state_dict()["stages.3.blocks.1.i2rmb.conv.weight"]  # the averaged ones
    assert torch.equal(state["stages.3.blocks.1.i2rmb.conv.weight"][:, :, 2], kernel)
    assert model.config.num_frames == 8 and start.processor().num_frames == 8


def test_a_trained_video_classifier_is_trained_further(tmp_path):
    trained = large(VEMOv2ForVideoClassification(VEMOv2Config(
        **SMALL, window_size=(2, 2, 2), num_frames=6, image_size=64, id2label=["a", "b"]
    )))  # fmt: skip
    trained.save_pretrained(tmp_path / "trained")
    start = look_up(VideoModelOptions(init_from=str(tmp_path / "trained"), resolution=32))
    assert (start.frames, start.resolution, start.of_video) == (6, 32, True)
    same, other = start.build({0: "a", 1: "b"}), start.build({0: "a", 1: "b", 2: "c"})
    assert all(torch.equal(tensor, trained.state_dict()[name]) for name, tensor in same.state_dict().items())
    assert other.v_emov2.head.weight.shape == (3, 16) and other.config.num_labels == 3
    with torch.no_grad():
        assert other.eval()(torch.randn(1, 6, 3, 32, 32)).logits.shape == (1, 3)
    other.save_pretrained(tmp_path / "again")
    again = VEMOv2ForVideoClassification.from_pretrained(tmp_path / "again")
    assert again.config.num_frames == 6 and again.config.image_size == 32 and again.config.id2label[2] == "c"
    with pytest.raises(ValueError, match="is what it is"):
        look_up(VideoModelOptions(init_from=str(tmp_path / "trained"), model_config='{"dropout": 0.1}'))


def test_what_nothing_can_start_from_is_named(tmp_path, offline):
    def refused(message, name="", **options):
        with pytest.raises(ValueError, match=message):
            look_up(VideoModelOptions(init_from=name or None, **options)).build({0: "a", 1: "b"})

    refused("no such folder or file", "nowhere")
    refused(r"--model-config has \['depth'\]; choose from depths", model_config='{"depth": 3}')
    refused("--model V-EMOv2-3M: .*unknown", model="V-EMOv2-3M")
    refused("--model V-EMOv2-5M: ", model_config='{"widths": [7, 8, 8, 8]}')
    (tmp_path / "a.pth").write_bytes(b"no tensors")
    refused("not a file of tensors", str(tmp_path / "a.pth"))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text(json.dumps({"model_type": "vit"}))
    refused("holds a .*; pass a trained EMOv2 or V-EMOv2", str(tmp_path / "other"))
    image_folder(tmp_path / "remote", ("a", "b"), attention_type="remote")
    refused("does not inflate", str(tmp_path / "remote"), model_config='{"attention_type": "spanning"}')


@pytest.mark.parametrize("name", NAMES)
def test_the_trainer_makes_a_plan_of_every_recipe(name, tmp_path):
    given = yaml.safe_load((RECIPES / f"{name}.yaml").read_text(encoding="utf-8"))
    config = parse_video_config([
        "--config", str(RECIPES / f"{name}.yaml"), "--train-data-dir", "videos", "--micro-batch-size", "2",
        "--validation-share", "0",
    ])  # fmt: skip
    source = folder_videos(write_bars(tmp_path / "bars", 1, 4))
    plan = make_video_plan(config, source, None, Accelerator(cpu=True))
    with torch.device("meta"):
        text = plan.describe()
    flat = config.flat()
    here = ("model_config", "micro_batch_size", "validation_share")
    assert all(flat[option] == value for option, value in given.items() if option not in here)
    assert "3 classes" in text and plan.layout.global_batch_size == given["global_batch_size"]
    if name == "camera_motion":
        assert f"{152_535 - 4 * 65:,} parameters" in text  # of 3 classes in place of 7
        assert not config.data.random_flip


def test_the_published_schedule_and_decay_are_the_logs():
    """github zhangzjn/EMOv2 at 582a96f, resources/Vid: 1e-5 at first, 1e-4 from epoch 30 on, 1.244e-5 at the end."""
    config = parse_video_config(["--config", str(RECIPES / "v_emov2.yaml")])
    options = config.optimization
    factor = rate_factor(options, 200_000, 30_000, 1000)
    rates = [options.learning_rate * factor(step) for step in (0, 30_000, 200_000)]
    assert rates == pytest.approx([1e-5, 1e-4, 1.244e-5], rel=1e-3)
    assert options.undecayed() == ["norm", "bias"] and options.max_grad_norm == 20
    # The trainer's defaults are the recipe's.
    assert VideoOptimizationOptions() == VideoOptimizationOptions(**{
        **vars(options), "lr_warmup_epochs": None, "lr_warmup_steps": VideoOptimizationOptions().lr_warmup_steps,
        "ema_warmup": VideoOptimizationOptions().ema_warmup,
    })  # fmt: skip
    assert config.augmentation == ClipAugmentationOptions(short_side=192)


def test_a_warm_up_in_epochs_counts_the_videos(tmp_path):
    source = folder_videos(write_bars(tmp_path / "bars", 4, 4))  # 12 videos, 3 steps an epoch
    base = ["--global-batch-size", "4", "--epochs", "40", "--train-data-dir", "x"]
    plan = make_video_plan(parse_video_config([*base, "--lr-warmup-epochs", "5"]), source, None, Accelerator(cpu=True))
    assert plan.warmup_steps == 15
    plan = make_video_plan(parse_video_config([*base, "--lr-warmup-epochs", "30"]), source, None, Accelerator(cpu=True))
    assert plan.warmup_steps == 30  # a quarter of the run


def test_one_class_is_refused(tmp_path):
    source = folder_videos(write_bars(tmp_path / "bars", 1, 4, classes=("left",)))
    with pytest.raises(ValueError, match="are of 1 class; a classifier needs two or more"):
        make_video_plan(VideoConfig(), source, None, Accelerator(cpu=True))
