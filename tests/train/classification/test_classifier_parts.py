"""Augmentation, targets, distillation, schedule and optimizer of the classification trainer, each against a peer."""

import random
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from helpers.data import photo, source
from timm.data import create_transform

from d_emo import create_classifier
from d_emo.images.source import held_out
from d_emo.train.classification.augmentation import Augmentation, Targets, seeded
from d_emo.train.classification.config import (
    AugmentationOptions,
    DistillationOptions,
    parse_classifier_config,
)
from d_emo.train.classification.distillation import Teacher
from d_emo.train.classification.plan import make_classifier_optimizer, make_classifier_schedule
from d_emo.train.data.sources import same_classes

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@pytest.mark.parametrize("crop", ["resized", "padded", "center"])
def test_augmentation_is_a_function_of_seed_and_position(crop):
    augment = Augmentation(AugmentationOptions(crop=crop, random_erasing=0.9), 32, True, MEAN, STD, 3)
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    expected = random.random(), np.random.random(), torch.rand(1).item()
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    first = augment(photo(), 5)
    assert (random.random(), np.random.random(), torch.rand(1).item()) == expected  # nothing was drawn from them
    assert first.shape == (3, 32, 32)
    assert torch.equal(first, augment(photo(), 5))
    assert not torch.equal(first, augment(photo(), 6))


@pytest.mark.parametrize("interpolation", ["bicubic", "random"])
def test_augmentation_equals_timms_own_from_the_same_generators(interpolation):
    options = AugmentationOptions(random_erasing=0.5, crop_interpolation=interpolation)
    ours = Augmentation(options, 32, True, MEAN, STD, 3)
    timms = create_transform(32, is_training=True, auto_augment="rand-m9-mstd0.5-inc1", interpolation=interpolation,
                             re_prob=0.5, re_mode="pixel")  # fmt: skip
    for position in range(20):
        with seeded(3, "augmentation", position):
            expected = timms(photo())
        assert torch.equal(ours(photo(), position), expected)


def test_a_center_crop_without_a_policy_is_what_validation_sees():
    from d_emo.classification.transformers_models import make_image_processor

    options = AugmentationOptions(crop="center", auto_augment="none", color_jitter=0)
    ours = Augmentation(options, 32, False, MEAN, STD, 0)(photo(), 0)
    theirs = make_image_processor(32, options.validation_crop)(images=photo(), return_tensors="pt")["pixel_values"][0]
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)


def test_smoothed_targets_give_torchs_smoothed_loss():
    labels, logits = torch.tensor([0, 3, 2]), torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    _, targets = Targets(AugmentationOptions(label_smoothing=0.1), 5, 0)(torch.zeros(3, 3, 4, 4), labels, [0, 1, 2])
    expected = F.cross_entropy(logits, labels, label_smoothing=0.1)
    torch.testing.assert_close(F.cross_entropy(logits, targets), expected, atol=1e-6, rtol=0)


def test_mixup_blends_images_and_targets_alike():
    """Images that are their class's one-hot vector stay equal to their targets."""
    mix = Targets(AugmentationOptions(mixup=0.8, label_smoothing=0), 4, 7)
    labels = torch.tensor([0, 1, 2, 3])
    images = F.one_hot(labels, 4).float()[:, :, None, None].expand(4, 4, 2, 2).clone()
    mixed, targets = mix(images.clone(), labels, [8, 9, 10, 11])
    torch.testing.assert_close(mixed[:, :, 0, 0], targets, atol=1e-6, rtol=0)
    assert 0 < targets[0, 3] < 1
    again, _ = mix(images.clone(), labels, [8, 9, 10, 11])
    assert torch.equal(mixed, again)
    assert not torch.equal(mixed, mix(images.clone(), labels, [12, 13, 14, 15])[0])


@pytest.fixture
def teacher_folder(tmp_path):
    """A timm network with random weights, saved as timm saves it; its images have mean 0.5 and deviation 0.25."""
    torch.manual_seed(0)
    network = timm.create_model("mobilenetv3_small_050", num_classes=4)
    network.pretrained_cfg.update(mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
    timm.models.save_for_hf(network, tmp_path)
    return tmp_path, network.eval()


def test_the_teacher_sees_its_own_normalisation_and_its_loss_is_the_divergence(teacher_folder):
    folder, network = teacher_folder
    options = DistillationOptions(teacher=f"timm:local-dir:{folder}", teacher_weight=5, teacher_tau=2)
    teacher = Teacher(options, 4, MEAN, STD)
    raw = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    images = (raw - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    with torch.no_grad():
        expected = network((raw - 0.5) / 0.25)
    torch.testing.assert_close(teacher.logits(images), expected, atol=1e-4, rtol=1e-4)
    student = torch.randn(3, 4, generator=torch.Generator().manual_seed(1))
    p, q = (expected / 2).softmax(-1), (student / 2).softmax(-1)
    by_hand = 5 * 4 * (p * (p / q).log()).sum(-1).mean()
    torch.testing.assert_close(teacher.loss(student, images), by_hand, atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match="has 4 classes, the data 7"):
        Teacher(options, 7, MEAN, STD)


def plan(steps=1000, warmup=100, **options):
    given = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    config = parse_classifier_config(["--train-data-dir", "photos", *given])
    return SimpleNamespace(config=config, max_train_steps=steps, warmup_steps=warmup)


def rates(the_plan):
    optimizer = make_classifier_optimizer(create_classifier("EMOv2-1M", num_classes=2), the_plan)
    schedule = make_classifier_schedule(optimizer, the_plan)
    values = []
    for _ in range(the_plan.max_train_steps):
        values.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return values


def test_the_learning_rate_is_the_papers():
    values = rates(plan())
    assert values[0] == pytest.approx(1.5e-3 / 6000) and max(values) == pytest.approx(1.5e-3)
    assert values[99] == pytest.approx(1.5e-3) and values[-1] < 1.5e-3 / 6000 + 1e-8
    middle = 1.5e-3 / 6000 + (1.5e-3 - 1.5e-3 / 6000) * 0.5
    assert values[549] == pytest.approx(middle, rel=1e-3)


def test_steps_multiply_the_learning_rate():
    values = rates(plan(steps=100, warmup=10, epochs=20, lr_decay="step", decay_epochs=4, decay_rate=0.5,
                        warmup_epochs=2))  # fmt: skip
    assert values[9] < values[10] == pytest.approx(1.5e-3)
    assert values[35] == pytest.approx(0.75e-3) and values[55] == pytest.approx(0.375e-3)


def test_vectors_do_not_decay():
    model = create_classifier("EMOv2-1M", num_classes=2)
    optimizer = make_classifier_optimizer(model, plan())
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        assert decay[id(parameter)] == (0 if parameter.ndim == 1 else 0.05), name
    assert len(decay) == len(list(model.parameters()))


def test_validation_classes_take_the_training_ids():
    other = same_classes(source(["b", "a"], [0, 1, 0]), source(["a", "b", "c"], [0, 1, 2]))
    assert other.labels.tolist() == [1, 0, 1] and other.id2label[2] == "c"


def test_holding_out_takes_the_same_share_of_every_class():
    whole = source(["a", "b"], [0] * 30 + [1] * 10)
    train, held = held_out(whole, 0.2)
    assert np.bincount(held.labels).tolist() == [6, 2] and train.size == 32
    assert np.array_equal(held.labels, held_out(whole, 0.2)[1].labels)
    pixels = {np.asarray(s.read(index)).tobytes() for s in (train, held) for index in range(s.size)}
    assert len(pixels) == 40  # every image once
    with pytest.raises(ValueError, match="least populated class"):
        held_out(source(["a", "b"], [0, 0, 1]), 0.5)
