"""BatchNorm's running statistics on two processes: the mean over both, held by both."""

import pytest
import torch
from helpers.processes import run_script
from safetensors.torch import load_file

from d_emo import create_classifier
from d_emo.train.engine.batch_norm import StepStatistics, average_statistics

SCRIPT = """
import sys
import torch
from accelerate.utils import DistributedDataParallelKwargs
from safetensors.torch import save_file
from d_emo.common.processes import start_processes
from d_emo.train.engine.batch_norm import StepStatistics, average_statistics

torch.manual_seed(0)
accelerator = start_processes(kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)])
accelerator.gradient_accumulation_steps = 2
plain = torch.nn.Sequential(torch.nn.Conv2d(3, 5, 1), torch.nn.BatchNorm2d(5))
statistics = StepStatistics(plain)
model = accelerator.prepare(plain)
for step in range(3):
    for micro in range(2):
        statistics.begin_micro_batch(micro, 2)
        with accelerator.accumulate(model):
            rank = accelerator.process_index
            generator = torch.Generator().manual_seed(100 * step + 10 * micro + rank)
            data = torch.randn(4, 3, 6, 6, generator=generator) * (1 + rank)
            accelerator.backward(model(data).square().mean())
    average_statistics(accelerator.unwrap_model(model), accelerator)
save_file(plain.state_dict(), f"{sys.argv[1]}/{accelerator.process_index}.safetensors")
accelerator.end_training()
"""


@pytest.mark.slow
def test_running_statistics_are_averaged_over_processes_and_micro_batches(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    code, output = run_script(tmp_path / "log", tmp_path / "script.py", tmp_path, processes=2)
    assert code == 0, output
    found = [load_file(tmp_path / f"{rank}.safetensors") for rank in (0, 1)]
    torch.testing.assert_close(found[0], found[1], atol=0, rtol=0)
    # The definition: a step moves the statistics by the momentum towards the mean over all its micro batches.
    torch.manual_seed(0)
    convolution = torch.nn.Conv2d(3, 5, 1)
    mean, variance = torch.zeros(5), torch.ones(5)
    for step in range(3):
        outputs = []
        for micro in range(2):
            for rank in (0, 1):
                generator = torch.Generator().manual_seed(100 * step + 10 * micro + rank)
                outputs.append(convolution(torch.randn(4, 3, 6, 6, generator=generator) * (1 + rank)))
        means = torch.stack([output.mean((0, 2, 3)) for output in outputs])
        variances = torch.stack([output.var((0, 2, 3)) for output in outputs])
        assert (variances - variances.mean(0)).abs().max() > 1e-2
        mean, variance = 0.9 * mean + 0.1 * means.mean(0), 0.9 * variance + 0.1 * variances.mean(0)
    torch.testing.assert_close(found[0]["1.running_mean"], mean, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(found[0]["1.running_var"], variance, atol=1e-6, rtol=1e-5)


def test_with_one_momentum_a_step_moves_as_far_and_weighs_micro_batches_nearly_alike():
    norm = torch.nn.BatchNorm2d(1)
    statistics = StepStatistics(norm, constant=True)
    for index, level in enumerate((1.0, 2.0, 3.0, 4.0)):
        statistics.begin_micro_batch(index, 4)
        norm(torch.full((2, 1, 2, 2), level))
    exact = torch.nn.BatchNorm2d(1)
    statistics = StepStatistics(exact)
    for index, level in enumerate((1.0, 2.0, 3.0, 4.0)):
        statistics.begin_micro_batch(index, 4)
        exact(torch.full((2, 1, 2, 2), level))
    torch.testing.assert_close(exact.running_mean, torch.tensor([0.25]))  # 0.1 of the mean 2.5
    torch.testing.assert_close(norm.running_mean, exact.running_mean, atol=0.005, rtol=0)
    torch.testing.assert_close(norm.running_var, torch.tensor([0.9]))  # the batches have none


@pytest.mark.parametrize(("kind", "shape"), [("1d", (4, 3, 5)), ("2d", (4, 3, 5, 5)), ("3d", (4, 3, 2, 5, 5))])
def test_a_step_weighs_micro_batches_alike_in_norms_of_lines_images_and_volumes(kind, shape):
    norm = getattr(torch.nn, f"BatchNorm{kind}")(3)
    statistics = StepStatistics(torch.nn.Sequential(norm))
    micro = [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * (seed + 1) for seed in range(3)]
    for index, data in enumerate(micro):
        statistics.begin_micro_batch(index, 3)
        norm(data)
    axes = (0, *range(2, len(shape)))
    variance = torch.stack([data.var(axes) for data in micro]).mean(0)
    torch.testing.assert_close(norm.running_var, 0.9 + 0.1 * variance, atol=1e-6, rtol=1e-5)


def test_synchronised_norms_are_counted_as_others():
    assert len(StepStatistics(torch.nn.Sequential(torch.nn.SyncBatchNorm(3))).norms) == 1


class ThreeProcesses:
    """Stands in for an Accelerator: the mean over three processes that hold the same."""

    num_processes = 3

    def reduce(self, values, reduction):
        return (values + values + values) / 3


def test_fixed_statistics_are_not_rounded_by_a_mean_over_processes():
    model = create_classifier("EMOv2-1M", num_classes=2).train()
    for buffer in model.buffers():
        if buffer.is_floating_point():
            buffer.uniform_(generator=torch.Generator().manual_seed(0))
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model.freeze(0, statistics=True)
    average_statistics(model, ThreeProcesses())
    assert all(torch.equal(before[name], buffer) for name, buffer in model.named_buffers())
    model.freeze(0, statistics=False)
    average_statistics(model.train(), ThreeProcesses())
    assert any(not torch.equal(before[name], buffer) for name, buffer in model.named_buffers())
