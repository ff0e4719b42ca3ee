"""What operators take on a GPU that is not here, against sums by hand."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from d_emo import create_model
from d_emo.common.gpus import GPUS, Fleet
from d_emo.kernels import dispatch
from d_emo.train.engine import fleet
from d_emo.train.engine.memory import Launch, TrainingMemory, training_memory
from d_emo.train.engine.rehearsal import cuda_autocast
from d_emo.train.engine.roofline import Shares, Work, count_work

H100 = GPUS["H100"]
CPU = torch.device("cpu")


def on(count=1, *, sharded=False, autocast=True):
    return Launch(CPU, count, sharded, autocast, Fleet(count, H100))


def forward_of(model, batch):
    def forward():
        channels, side = model.config.in_channels, model.sample_shape[0]
        images = torch.empty(batch, channels, side, side)
        return model(images, torch.empty(batch), torch.empty(batch, dtype=torch.long)).sample

    return forward


def test_products_bytes_and_views_are_told_apart():
    weight = torch.randn(64, 32)
    values = torch.randn(16, 32)

    def passes():
        made = torch.mm(values, weight.t())  # a view, and a product
        return made.view(4, 4, 64).relu() + torch.empty(64)

    work = count_work(passes)
    assert work.products == [(2 * 16 * 32 * 64, 4 * (16 * 32 + 32 * 64 + 16 * 64))]
    assert work.rest == [(0, 4 * 2 * 16 * 64), (0, 4 * (2 * 16 * 64 + 64))]
    assert work.kernels == []


def test_attention_is_a_product_on_every_device():
    """Two products of L x L x d forward; backward those of the scores again, and four more (PyTorch's own formulas)."""
    length, width = 48, 16
    heads = [torch.randn(2, 3, length, width, requires_grad=True) for _ in range(3)]
    work = count_work(lambda: nn.functional.scaled_dot_product_attention(*heads).sum().backward())
    product = 2 * 2 * 3 * length * length * width
    assert [flops for flops, _ in work.products] == [2 * product, 5 * product]


def test_an_operator_takes_its_products_or_its_bytes_and_launches_are_a_floor():
    work = Work(products=[(2e12, 1e9), (1e9, 4e9)], kernels=[(0, 3e9)], rest=[(0, 1e9)])
    assert work.least(H100, 1e15) == pytest.approx((2e-3 + 4e9 / 3.35e12, 3e9 / 3.35e12, 1e9 / 3.35e12))
    shares = Shares(products=2.0, kernels=4.0, rest=0.5)
    products, kernels, rest = work.least(H100, 1e15)
    assert work.seconds(H100, 1e15, shares) == pytest.approx(2 * products + 4 * kernels + 0.5 * rest)
    slow = Shares(products=2.0, kernels=4.0, rest=0.5, launch=1.0, kernel_launch=10.0)
    assert work.seconds(H100, 1e15, slow) == 3 * 1.0 + 10.0
    assert work.seconds(H100, 1e15, replace(slow, joined=True)) == 2 * 1.0 + 10.0


def test_a_gpus_kernels_are_counted_without_a_gpu():
    """One of each operator a block and pass, and none after; in float32 attention is PyTorch's products."""
    with torch.device("meta"):
        model = create_model("D-EMOv2-N-4").train()
    blocks = model.config.num_layers
    for autocast, expected in ((True, 4 * blocks), (False, 2 * blocks)):
        launch = on(autocast=autocast)
        with launch.rehearsed(model):
            work = count_work(lambda launch=launch: launch.passes(forward_of(model, 2)))
        assert len(work.kernels) == expected and len(work.products) > 4 * blocks
    assert "Triton" in on().kernels()
    assert dispatch._planned_device is None and not dispatch.takes("window_attention", torch.empty(1, device="meta"))


@pytest.mark.parametrize("name", ["layer_norm", "group_norm", "softmax"])
def test_norms_are_in_float32_under_a_gpus_autocast(name):
    def call():
        values = torch.randn(2, 4, 4).bfloat16()
        arguments = {"layer_norm": ((4,),), "group_norm": (2,), "softmax": (-1,)}[name]
        return getattr(nn.functional, name)(values, *arguments).dtype

    own = getattr(nn.functional, name)
    with cuda_autocast():
        assert call() == torch.bfloat16
        with torch.autocast("cpu", torch.bfloat16):
            assert call() == torch.float32
    assert getattr(nn.functional, name) is own


def test_checkpointed_blocks_are_counted_too():
    with torch.device("meta"):
        model = create_model("D-EMOv2-N-4").train()
    kept = training_memory(model, on(), None, forward_of(model, 8)).activations
    model.enable_gradient_checkpointing()
    assert training_memory(model, on(), None, forward_of(model, 8)).activations < kept / 2


def test_gradients_go_round_and_are_waited_for_where_the_backward_pass_is_too_short():
    """100 million values, 0.4 GB: 7/8 or 63/64 of them pass each GPU twice, under two thirds of 6 ms of passes."""
    for count, rate in ((8, 450e9), (64, 400e9), (9, 50e9)):
        time = fleet.step_time(Fleet(count, H100), 0.010, 0.006, 10**8, 1, False)
        assert time.exchange == pytest.approx(2 * 4e8 * (count - 1) / count / rate)
        assert time.hidden == pytest.approx(0.004)
        assert time.waiting == pytest.approx(max(0, time.exchange - 0.004)) and time.total == 0.010 + time.waiting
    accumulated = fleet.step_time(Fleet(64, H100), 0.07, 0.06, 10**8, 10, False)
    assert accumulated.hidden == pytest.approx(0.004)  # only the last micro batch's gradients are exchanged
    sharded = fleet.step_time(Fleet(64, H100), 0.07, 0.06, 10**8, 10, True)
    assert sharded.exchange == pytest.approx((10 * 2 + 1) * 4e8 * 63 / 64 / 400e9) and sharded.hidden == 0.06
    assert fleet.step_time(Fleet(1, H100), 0.010, 0.006, 10**8, 1, False).exchange == 0


def memory(activations):
    return TrainingMemory(weights=100, gradients=100, optimizer=200, average=100, activations=activations)


def test_the_largest_micro_batch_is_the_one_that_still_fits():
    def count(images):
        return memory(30 + 7 * images)

    def bent(images):  # encoding, or what blocks keep, is more from some number of images on
        return memory(max(40 + images, 12 * images))

    for counted in (count, bent):
        for room in (600, 601, 537 + 7 * 40, 90_000):
            largest = fleet.largest_micro_batch(counted, 1, room)
            assert counted(largest).total <= room < counted(largest + 1).total
        assert fleet.largest_micro_batch(counted, 4, 500) == 0


def test_what_does_not_fit_is_said_loudly():
    gib = 2**30
    assert fleet.verdict(memory(10 * gib), Fleet(1, H100)).startswith("13% of a GPU's 79 GiB")
    assert fleet.verdict(memory(75 * gib), Fleet(1, H100)).startswith("DOES NOT FIT: 95% of")


def test_measured_steps_are_found_by_all_that_they_were():
    assert fleet.measured_seconds("H100", "D-EMOv2-XL-2", 64, 32, True, False) == pytest.approx(0.14295)
    for other in (("A100", "D-EMOv2-XL-2", 64, 32, True, False), ("H100", "D-EMOv2-XL-2", 65, 32, True, False),
                  ("H100", "D-EMOv2-XL-2", 64, 32, True, True)):  # fmt: skip
        assert fleet.measured_seconds(*other) is None
