"""BatchNorm's running statistics on two processes: the mean over both, held by both."""

import subprocess

import torch
from conftest import offline_environment, torchrun
from safetensors.torch import load_file

SCRIPT = """
import sys
import torch
from accelerate.utils import DistributedDataParallelKwargs
from safetensors.torch import save_file
from d_emo.processes import start_processes
from d_emo.train.batch_norm import average_statistics

torch.manual_seed(0)
accelerator = start_processes(kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)])
accelerator.gradient_accumulation_steps = 2
plain = torch.nn.Sequential(torch.nn.Conv2d(3, 5, 1), torch.nn.BatchNorm2d(5))
model = accelerator.prepare(plain)
for step in range(3):
    for micro in range(2):
        with accelerator.accumulate(model):
            rank = accelerator.process_index
            generator = torch.Generator().manual_seed(100 * step + 10 * micro + rank)
            data = torch.randn(4, 3, 6, 6, generator=generator) * (1 + rank)
            accelerator.backward(model(data).square().mean())
    average_statistics(accelerator.unwrap_model(model), accelerator)
save_file(plain.state_dict(), f"{sys.argv[1]}/{accelerator.process_index}.safetensors")
accelerator.end_training()
"""


def test_running_statistics_are_averaged_over_processes_and_micro_batches(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    done = subprocess.run(
        torchrun(2, tmp_path / "script.py", tmp_path), env=offline_environment(), capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    found = [load_file(tmp_path / f"{rank}.safetensors") for rank in (0, 1)]
    torch.testing.assert_close(found[0], found[1], atol=0, rtol=0)
    # Each process alone, then the mean: running statistics are linear in the batches'.
    alone = []
    for rank in (0, 1):
        torch.manual_seed(0)
        plain = torch.nn.Sequential(torch.nn.Conv2d(3, 5, 1), torch.nn.BatchNorm2d(5))
        for step in range(3):
            for micro in range(2):
                generator = torch.Generator().manual_seed(100 * step + 10 * micro + rank)
                plain(torch.randn(4, 3, 6, 6, generator=generator) * (1 + rank))
        alone.append(plain.state_dict())
    for name in ("1.running_mean", "1.running_var"):
        expected = (alone[0][name] + alone[1][name]) / 2
        torch.testing.assert_close(found[0][name], expected, atol=1e-6, rtol=1e-5)
        assert (alone[0][name] - expected).abs().max() > 1e-3
