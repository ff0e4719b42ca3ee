"""The recipes of train/configs/classifier: accepted, complete, and every value of another paper's with its source."""

import re
from dataclasses import fields

import pytest
import timm
import torch
import yaml
from accelerate import Accelerator
from helpers.data import source
from helpers.made import write_pictures
from helpers.paths import ROOT
from helpers.training import run_here

from d_emo.train import train_classifier
from d_emo.train.classification.config import (
    AugmentationOptions,
    ClassifierConfig,
    ClassifierOptimizationOptions,
    parse_classifier_config,
)
from d_emo.train.classification.plan import (
    make_classifier_optimizer,
    make_classifier_plan,
    make_classifier_schedule,
)
from d_emo.train.engine.options import StepOptions

FOLDER = ROOT / "train" / "configs" / "classifier"
NAMES = sorted(path.stem for path in FOLDER.glob("*.yaml"))
OWN = ("cifar10", "digits", "digits-packaged", "finetune")  # ours, not a paper's
PUBLISHED = [name for name in NAMES if name not in OWN]
OTHERS = ("deit", "edgenext", "mobilenetv3", "vim")
DISTILLED = [name for name in NAMES if "distilled" in name]


def read(name):
    """What a recipe's file holds."""
    return yaml.safe_load((FOLDER / f"{name}.yaml").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", NAMES)
def test_the_trainer_makes_plan_optimizer_and_schedule_of_every_recipe(name):
    given = read(name)
    config = parse_classifier_config(
        ["--config", str(FOLDER / f"{name}.yaml"), "--train-data-dir", "photos", "--micro-batch-size", "2"]
    )
    plan = make_classifier_plan(config, source(["a", "b"], [0, 1] * 8), None, Accelerator(cpu=True))
    module = torch.nn.Linear(2, 2)
    optimizer = make_classifier_optimizer(module, plan)
    schedule = make_classifier_schedule(optimizer, plan)
    assert plan.layout.global_batch_size == given["global_batch_size"]
    assert optimizer.param_groups[0]["initial_lr"] == given["learning_rate"]
    assert schedule.get_last_lr()[0] <= given["learning_rate"]
    assert sorted(group["weight_decay"] for group in optimizer.param_groups) == [0, given.get("weight_decay", 0.05)]
    assert config.distillation.describe().endswith("weight 5, tau 1") == (name in DISTILLED)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_dry_run_of_every_recipe_says_what_it_takes(name, tmp_path, capsys):
    code, output = run_here(
        capsys, "--config", FOLDER / f"{name}.yaml", "--train-data-dir", write_pictures(tmp_path / "pictures"),
        "--validation-share", 0, "--micro-batch-size", 2, "--num-workers", 0, "--output-dir", tmp_path / "run",
        "--dry-run", main=train_classifier.main,
    )  # fmt: skip
    assert code == 0, output
    model = read(name).get("model", "EMOv2-5M")
    assert f"model      {model}: " in output and "parameters" in output and "memory" in output


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_recipe_leaves_nothing_to_the_trainers_defaults(name):
    given = read(name)
    wanted = {f.name for options in (AugmentationOptions, ClassifierOptimizationOptions) for f in fields(options)}
    wanted |= {"epochs", "global_batch_size", "resolution"}
    wanted -= {f.name for f in fields(StepOptions)} - {"ema_warmup"}  # how it is computed, not what
    if given["lr_decay"] == "cosine":
        wanted -= {"decay_epochs", "decay_rate"}
    else:
        wanted -= {"min_lr_ratio"}
    if given["optimizer"] != "adamw":
        wanted -= {"adam_beta1", "adam_beta2"}
    assert wanted <= set(given), sorted(wanted - set(given))


@pytest.mark.parametrize("name", OTHERS)
def test_every_value_of_another_papers_recipe_names_its_source(name):
    text = (FOLDER / f"{name}.yaml").read_text(encoding="utf-8")
    header, values = text.split("\nmodel_config", 1)
    sources = {*re.findall(r'"([\w.]+)": ', header), "table VI", "datasets.py"}
    assert re.search(r"github [\w-]+/[\w-]+ at [0-9a-f]{7}", header)
    for line in ("model_config" + values).splitlines():
        comment = line.partition(" # ")[2]
        assert any(comment.startswith(source) for source in sources) or comment.startswith("timm's configuration"), line


def test_the_papers_recipe_is_the_default_but_for_averaging_and_interpolation():
    """Averaging suits runs of any length; bicubic crops are what validation sees."""
    config, default = parse_classifier_config(["--config", str(FOLDER / "emov2.yaml")]), ClassifierConfig()
    for group in ("augmentation", "optimization"):
        for f in fields(getattr(default, group)):
            expected, given = (getattr(getattr(table, group), f.name) for table in (default, config))
            if f.name in ("ema_warmup", "crop_interpolation"):
                assert given != expected
            elif f.name == "crop_ratio":
                assert given == default.augmentation.validation_crop
            else:
                assert given == (pytest.approx(expected, rel=1e-4) if isinstance(expected, float) else expected), f.name
    assert (config.run.epochs, config.run.global_batch_size) == (300, 1024)


def test_the_longer_larger_and_distilled_recipes_are_the_papers_but_for_what_their_names_say():
    base = read("emov2")
    for name in (name for name in PUBLISHED if name.startswith("emov2_")):
        changed = {"model": "EMOv2-5M"}
        changed |= {"epochs": 1000} if "1000" in name else {}
        changed |= {"resolution": 512} if "512" in name else {}
        if "distilled" in name:
            teacher = "timm:tresnet_v2_l.miil_in21k_ft_in1k"
            changed |= {"teacher": teacher, "teacher_weight": 5, "teacher_tau": 1, "teacher_resolution": 224}
        assert read(name) == {**base, **changed}, name


def test_the_teacher_is_known_to_timm_and_fed_in_zero_to_one():
    for name in DISTILLED:
        cfg = timm.get_pretrained_cfg(read(name)["teacher"].removeprefix("timm:"))
        assert (cfg.mean, cfg.std, cfg.num_classes) == ((0, 0, 0), (1, 1, 1), 1000)
