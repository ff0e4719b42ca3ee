"""What a step holds in memory, counted before it is made, against what it then holds."""

import subprocess
import sys

import pytest
import torch
from helpers.models import tiny_model
from helpers.paths import TESTS
from helpers.step_memory import CPU, counted, output, train
from torch import nn

from d_emo import create_model
from d_emo.common.messages import readable_size
from d_emo.kernels import use_backend
from d_emo.train.engine.memory import Launch, TrainingMemory, told, training_memory
from d_emo.train.engine.rehearsal import HeldBytes, held_at_most, shapes_only, size_of


def passes(model, autocast):
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        result = output(model, 3)
    result.float().square().mean().backward()


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("family", ["D-EMOv2", "DiT"])
def test_tensors_without_content_take_what_real_ones_take(family, autocast, checkpointing, backend):
    """To the byte in float32; in bfloat16 casts of biases go a little later: 1% of so small a model."""
    model = tiny_model(family).train()
    if checkpointing:
        model.enable_gradient_checkpointing()
    with use_backend(backend):
        model.zero_grad()
        passes(model, autocast)  # gradients are there from now on
        real = held_at_most(lambda: passes(model, autocast))
        assert counted(model, 3, Launch(CPU, autocast=autocast)).activations == pytest.approx(
            real, rel=0.01 if autocast else 0
        )


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", ["D-EMOv2-N-4", "DiT-S-8"])
def test_real_steps_hold_what_was_counted(name, checkpointing):
    """Of all tensors from the model's first weight on. Tolerance 2%: the loss, and what an optimizer step makes."""
    model = create_model(name, num_layers=4).train()
    if checkpointing:
        model.enable_gradient_checkpointing()
    total = counted(model, 8).total
    with HeldBytes() as held:
        train(name, 8, checkpointing, num_layers=4)
    assert held.most == pytest.approx(total, rel=0.02)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads the process's memory from /proc")
@pytest.mark.parametrize("more", [(), ("checkpointing",)], ids=["kept", "checkpointing"])
@pytest.mark.parametrize("name", ["D-EMOv2-S-2", "DiT-S-2"])
def test_a_process_takes_what_was_counted(name, more):
    """Its peak, each tensor in pages of its own. Tolerance 5%: kernels' own buffers, and the interpreter."""
    command = [sys.executable, str(TESTS / "helpers" / "step_memory.py"), name, "8", "apart", *more]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    total, peak = map(int, printed.split())
    assert total == pytest.approx(peak, rel=0.05)


def test_checkpointing_keeps_little_more_than_one_block():
    model = create_model("D-EMOv2-N-4", num_layers=8).train()
    kept = counted(model, 8).activations
    model.enable_gradient_checkpointing()
    assert kept / 8 < counted(model, 8).activations < kept / 3


def test_large_models_are_counted_without_being_made():
    """XL at patch 1 on 16 x 16 x 768 latents would hold 17 GiB at micro batch 32."""
    with torch.device("meta"):
        model = create_model("D-EMOv2-XL-2", patch_size=1, in_channels=768, sample_size=16).train()
    memory = counted(model, 32)
    assert memory.weights == size_of(model.state_dict()) and memory.optimizer == pytest.approx(2 * memory.gradients)
    assert 16 * 2**30 < memory.activations < 20 * 2**30


def test_the_model_is_as_before_also_after_a_failure():
    model = tiny_model().train()
    before = dict([*model.named_parameters(), *model.named_buffers()])
    values = {name: tensor.clone() for name, tensor in before.items()}
    counted(model, 2)
    with pytest.raises(RuntimeError), shapes_only(CPU, model):
        model.label_embed.weight.sum().item()
    after = dict([*model.named_parameters(), *model.named_buffers()])
    assert all(after[name] is before[name] and torch.equal(after[name], values[name]) for name in values)
    assert all(parameter.grad is None for parameter in model.parameters())


class _Curious(nn.Linear):
    """Looks at values, as a mixture of experts may."""

    def forward(self, inputs):
        return super().forward(inputs) if inputs.sum() > 0 else inputs


def test_networks_that_look_at_values_are_not_counted_and_say_so():
    model = _Curious(4, 4)
    line = told(lambda: training_memory(model, Launch(CPU), None, lambda: model(torch.ones(2, 4))).describe("", ""))
    assert line.startswith("not counted (")


def test_what_is_not_trained_has_neither_gradient_nor_optimizer():
    model = tiny_model().train().requires_grad_(False)
    model.label_embed.requires_grad_(True)
    memory = counted(model, 2)
    rows = size_of(model.label_embed.weight)
    assert memory.gradients == rows and memory.optimizer == 2 * rows + 4  # and a counter
    assert memory.weights > 10 * rows


def test_processes_share_a_sharded_model_and_otherwise_keep_buckets():
    model = tiny_model().train()
    alone, ddp, sharded = (
        counted(model, 2, Launch(CPU, processes=processes, sharded=sharded))
        for processes, sharded in ((1, False), (4, False), (4, True))
    )
    assert ddp.gradients == 2 * alone.gradients and ddp.weights == alone.weights
    assert [sharded.weights, sharded.gradients, sharded.optimizer, sharded.average] == [
        part // 4 for part in (alone.weights, alone.gradients, alone.optimizer, alone.average)
    ]
    assert alone.activations == ddp.activations == sharded.activations


def test_encoding_and_activations_are_not_there_at_once():
    parts = {"weights": 1, "gradients": 2, "optimizer": 4, "average": 8, "encoder": 16}
    assert TrainingMemory(**parts, activations=32, encoding=64).total == 31 + 64
    assert TrainingMemory(**parts, activations=64, encoding=32).total == 31 + 64


def test_held_bytes_count_what_exists_and_not_views():
    with HeldBytes() as held:
        first = torch.zeros(1000)
        views = first.view(10, 100), first[5:]
        assert held.now == 4000
        second = first + 1
        del first, views
        assert held.now == 4000
        second.add_(1)
        del second
    assert (held.now, held.most) == (0, 8000)


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 bytes"), (999, "999 bytes"), (1000, "1.0 KiB"), (10 * 2**20, "10 MiB"), (1000 * 2**20, "1.0 GiB"),
     (int(157.4 * 2**30), "157 GiB"), (5000 * 2**40, "5000 TiB")],
)  # fmt: skip
def test_sizes_are_readable(count, text):
    assert readable_size(count) == text
