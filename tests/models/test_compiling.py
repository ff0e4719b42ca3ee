"""What is compiled of a network, by the names that trainers and benchmarks take."""

import pytest
import torch
from helpers.models import tiny_model
from torch import nn

from d_emo.eval import throughput
from d_emo.models.compiling import WAYS, compile_network


@pytest.mark.parametrize(
    ("way", "blocks", "whole"),
    [("blocks", {"fullgraph": True}, None), ("whole", None, {}), ("graphs", None, {"mode": "reduce-overhead"})],
)
def test_what_is_compiled(monkeypatch, way, blocks, whole):
    model, asked = tiny_model("D-EMOv2"), {}
    monkeypatch.setattr(model, "compile_repeated_blocks", lambda **options: asked.update(blocks=options))
    monkeypatch.setattr(model, "compile", lambda **options: asked.update(whole=options))
    compile_network(model, way)
    assert asked == {name: options for name, options in (("blocks", blocks), ("whole", whole)) if options is not None}


def test_a_network_without_repeated_blocks_is_compiled_as_it_is(monkeypatch):
    model, asked = nn.Linear(2, 2), []
    monkeypatch.setattr(model, "compile", lambda **options: asked.append(options))
    compile_network(model, "blocks")
    assert asked == [{}]


def test_the_benchmark_takes_every_way():
    assert ("none", *WAYS) == throughput.COMPILED


@pytest.mark.slow
@pytest.mark.parametrize("way", ["whole", "graphs"])
@pytest.mark.parametrize("family", ["D-EMOv2", "DiT"])
def test_a_whole_network_is_one_graph_and_answers_as_before(family, way):
    """Forward and gradients to 1e-5 of the largest, in training, with statistics that move."""
    answers = []
    torch._dynamo.utils.counters.clear()
    for compiled in (False, True):
        model = tiny_model(family).train()
        if compiled:
            compile_network(model, way)
        channels, side = model.config.in_channels, model.sample_shape[0]
        images = torch.randn(3, channels, side, side, generator=torch.Generator().manual_seed(0))
        output = model(images, torch.tensor([0.1, 5.0, 900.0]), torch.tensor([0, 1, 2])).sample
        output.square().mean().backward()
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        answers.append([output.detach(), *gradients, *model.buffers()])
    for plain, other in zip(*answers, strict=True):
        torch.testing.assert_close(other, plain, atol=1e-5 * float(plain.abs().max() + 1e-9), rtol=1e-4)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert not torch._dynamo.utils.counters["graph_break"]
