"""The recipes of train/configs/segmenter: accepted, and the published ones as the authors' configurations say."""

import pytest
import torch
from accelerate import Accelerator
from helpers.masks import write_masks
from helpers.paths import ROOT

from d_emo.train.engine.task_optimizer import parameter_groups, rate_factor
from d_emo.train.segmentation.config import parse_segmenter_config
from d_emo.train.segmentation.plan import make_segmenter_plan
from d_emo.train.segmentation.sources import load_sources

FOLDER = ROOT / "train" / "configs" / "segmenter"
NAMES = sorted(path.stem for path in FOLDER.glob("*.yaml"))
ON_ADE20K = ("deeplabv3_pspnet", "segformer", "semantic_fpn")


def config(name, *more):
    return parse_segmenter_config(["--config", str(FOLDER / f"{name}.yaml"), *map(str, more)])


def test_there_is_one_for_every_published_system_and_for_ones_own_data():
    assert NAMES == ["deeplabv3_pspnet", "finetune", "overfit", "segformer", "semantic_fpn", "u_emov2", "vessels"]


@pytest.mark.parametrize("name", NAMES)
def test_the_trainer_makes_a_plan_of_every_recipe(name, tmp_path):
    write_masks(tmp_path, [str(number) for number in range(10)])
    options = config(name, "--train-data-dir", tmp_path, "--micro-batch-size", "2")
    source, validation = load_sources(options.data)
    with torch.device("meta"):
        plan = make_segmenter_plan(options, source, validation, Accelerator(cpu=True))
        model = plan.build_model()
        assert parameter_groups(model, options.optimization)
    assert plan.layout.global_batch_size == options.run.global_batch_size
    assert (validation is not None) == (name == "finetune")


@pytest.mark.parametrize("name", ON_ADE20K)
def test_published_on_ade20k(name):
    """Configurations of github:zhangzjn/EMOv2 at 582a96f."""
    options = config(name)
    is_short = name == "deeplabv3_pspnet"
    steps, warmup, start = (80_000, 500, 1e-5) if is_short else (160_000, 1500, 1e-6)
    assert (options.run.max_train_steps, options.run.global_batch_size, options.run.validate_every) == (
        steps, 32, steps // 10
    )  # fmt: skip
    assert options.model.crop_size == 512 and options.data.reduce_zero_label
    assert (options.augmentation.short_side, options.augmentation.longest) == (512, 2048)
    assert options.model.overrides() == {"loss_over_ignored": True}
    factor = rate_factor(options.optimization, steps, warmup, 632.0)
    assert [factor(step) for step in (0, warmup, steps // 2, steps * 3 // 4, steps)] == pytest.approx(
        [start, 1, 1, 0.5, 0], abs=1e-9
    )
    assert options.optimization.max_grad_norm == (0.1 if is_short else 0)
    assert options.optimization.multipliers() == ({} if is_short else {"decode_head.": 10.0})


def test_published_on_hrf():
    """The log of U-EMOv2-5M."""
    options = config("u_emov2")
    assert (options.model.model, options.model.crop_size) == ("U-EMOv2-5M", 256)
    assert (options.run.max_train_steps, options.run.validate_every) == (40_000, 4000)
    assert (options.run.validation_window, options.run.stride) == (256, 170)
    assert options.augmentation.short_side is None and options.optimization.max_grad_norm == 0.1


def test_a_share_of_a_recipe_gives_way_to_a_folder_to_validate_on():
    options = config("finetune", "--train-data-dir", "a", "--validation-dir", "b")
    assert options.data.validation_share is None and options.data.validation_dir == "b"
