"""Frozen stages and fixed statistics: no gradient, no change, whatever is done with the network around them."""

import copy

import pytest
import torch
from helpers.detectors import BUILDERS, NARROW, detector, target, trained_folder
from helpers.models import randomize
from torch import nn

from d_emo import create_classifier
from d_emo.classification.timm_models import TimmEMOv2
from d_emo.detection import mask_rcnn, retinanet, ssdlite
from d_emo.kernels import use_backend


def network(**options):
    return randomize(create_classifier("EMOv2-1M", **{**NARROW, "num_classes": 3, "drop_path": 0.0, **options}))


def state(module):
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def changed(module, before):
    return {name for name, tensor in module.state_dict().items() if not torch.equal(tensor, before[name])}


def trained_a_little(model, steps=2):
    """Some steps of a network inside of another module, which is told to train before each."""
    whole = nn.ModuleDict({"inside": model})
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    torch.manual_seed(0)
    for _ in range(steps):
        whole.train()
        model(torch.randn(2, 3, 64, 64)).square().mean().backward()
        optimizer.step()
    return whole


def assert_frozen(model, before, stages):
    frozen = [name for name, _ in model.named_parameters() if name.startswith(prefixes(stages))]
    gradients = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert frozen and not gradients & set(frozen)
    assert not {name for name in changed(model, before) if name.startswith(prefixes(stages))}
    assert not {name for name in changed(model, before) if "running" in name or "batches" in name}
    learned = {name for name, _ in model.named_parameters() if not name.startswith(prefixes(stages))}
    assert learned <= gradients
    norms = {name for name in learned if "norm." in name and "stages.1" in name}
    assert len(norms) >= 4 and norms <= changed(model, before)  # scale and shift


def prefixes(stages):
    return ("stem.", *(f"stages.{stage}." for stage in range(stages)))


@pytest.mark.parametrize("stages", [1, 3])
def test_frozen_stages_keep_weights_and_statistics_and_the_others_only_statistics(stages):
    model = network()
    model.freeze(stages, statistics=True)
    before = state(model)
    trained_a_little(model)
    if stages == 1:
        assert_frozen(model, before, 1)
    assert {name.split(".")[0] for name in changed(model, before)} <= {"stages", "norm", "head"}
    assert not {name for name in changed(model, before) if name.startswith(prefixes(stages))}


def test_statistics_of_what_is_not_frozen_move_where_they_are_not_fixed():
    model = network()
    model.freeze(1, statistics=False)
    before = state(model)
    trained_a_little(model)
    moved = {name for name in changed(model, before) if "running" in name}
    assert moved and not {name for name in moved if name.startswith(prefixes(1))}


def test_fixed_statistics_alone_let_every_parameter_learn():
    model = network()
    model.freeze(0)
    before = state(model)
    trained_a_little(model, steps=1)
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert not {name for name in changed(model, before) if "running" in name or "batches" in name}


@pytest.mark.parametrize("assign", [False, True])
def test_copies_loaded_weights_checkpointing_and_synchronised_norms_stay_frozen(assign):
    model = network()
    model.freeze(1)
    other = copy.deepcopy(model)
    other.load_state_dict({name: tensor.clone() for name, tensor in network().state_dict().items()}, assign=assign)
    other.set_grad_checkpointing()
    synchronised = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(model))
    assert not any(norm.training for norm in synchronised.train().modules() if isinstance(norm, nn.SyncBatchNorm))
    before = state(other)
    trained_a_little(other)
    assert_frozen(other, before, 1)


def test_gradients_are_the_same_with_kernels_checkpoints_and_plain_pytorch():
    model = network(**{**NARROW, "widths": (16, 16, 32, 64)})
    model.freeze(1)
    pixels = torch.randn(2, 3, 64, 64)
    found = {}
    for name, backend, again in (("plain", "reference", False), ("kernels", "auto", False), ("again", "auto", True)):
        other = copy.deepcopy(model).train()
        other.set_grad_checkpointing(again)
        with use_backend(backend):
            other(pixels).square().mean().backward()
        found[name] = {key: parameter.grad for key, parameter in other.named_parameters()}
    for name in ("kernels", "again"):
        for key, gradient in found["plain"].items():
            assert (gradient is None) == (found[name][key] is None)
            if gradient is not None:  # another order of sums in float32
                torch.testing.assert_close(found[name][key], gradient, atol=1e-5, rtol=1e-3)


def test_training_with_fixed_statistics_gives_what_evaluation_gives():
    model = network()
    model.freeze(1)
    pixels = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(model.train()(pixels), model.eval()(pixels), atol=1e-5, rtol=1e-5)


def test_one_small_image_trains_where_statistics_are_fixed_and_is_refused_else():
    model = network()
    pixels = torch.randn(1, 3, 32, 32)
    with pytest.raises(ValueError, match="leaves BatchNorm a single value"):
        model.train()(pixels)
    model.freeze(0, statistics=True)
    model.train()(pixels).sum().backward()


def test_another_choice_undoes_the_one_before_and_nothing_else():
    model = network()
    model.head.weight.requires_grad_(False)
    model.freeze(3)
    model.freeze(1)
    trains = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert not any(name.startswith(prefixes(1)) for name in trains)
    assert any(name.startswith("stages.1") for name in trains) and "head.weight" not in trains
    model.train().freeze(0, statistics=False)
    assert all(module.training for module in model.modules())
    assert {name for name, parameter in model.named_parameters() if not parameter.requires_grad} == {"head.weight"}


@pytest.mark.parametrize(
    ("stages", "statistics", "message"),
    [
        (5, True, "stages=5 is not 0 to 4, the stages of this network"),
        (-1, True, "stages=-1 is not a whole number from 0"),
        (True, True, "stages=True is not a whole number"),
        (1, 1, "statistics=1 is not True or False"),
    ],
)
def test_wrong_choices_are_refused_in_a_line(stages, statistics, message):
    with pytest.raises(ValueError, match=message) as caught:
        network().freeze(stages, statistics)
    assert "\n" not in str(caught.value)


def test_timms_model_freezes_alike():
    model = TimmEMOv2(**NARROW, num_classes=3)
    model.freeze(1)
    assert not model.train().stem.training and model.stages[1].training


# ---- detectors -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("build", "stages"), [(retinanet, 1), (mask_rcnn, 1), (ssdlite, 0)])
def test_trained_backbones_are_frozen_as_published_and_fresh_ones_are_not(tmp_path, build, stages):
    trained = detector(build, trained_folder(tmp_path)).backbone.backbone.emov2
    assert (trained.frozen_stages, trained.fixed_statistics) == (stages, True)
    for fresh in (detector(build), detector(build, str(tmp_path), frozen_stages=0, fixed_statistics=False)):
        network = fresh.backbone.backbone.emov2
        assert (network.frozen_stages, network.fixed_statistics) == (0, False)
        assert all(parameter.requires_grad for parameter in network.parameters())


@pytest.mark.parametrize("build", BUILDERS)
def test_a_detector_trains_all_but_what_is_frozen(tmp_path, build):
    model = detector(build, trained_folder(tmp_path), frozen_stages=1).train()
    before = state(model)
    images = [torch.rand(3, 64, 64), torch.rand(3, 64, 64)]
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    sum(model(images, [target(image) for image in images]).values()).backward()
    optimizer.step()
    frozen = {name for name in before if ".stem." in name or ".stages.0." in name}
    moved = changed(model, before)
    assert len(frozen) > 20 and not moved & frozen
    assert not {name for name in moved if "backbone.backbone" in name and ("running" in name or "batches" in name)}
    assert {name for name in moved if "backbone.backbone" in name and "norm.weight" in name}
    assert bool({name for name in moved if "running_mean" in name}) == (build is ssdlite)  # its own norms learn


@pytest.mark.parametrize("build", BUILDERS)
def test_more_stages_than_there_are_cannot_be_frozen(build):
    with pytest.raises(ValueError, match="frozen_stages=5 is not 0 to 4, the stages of this backbone"):
        build("EMOv2-1M", frozen_stages=5)
