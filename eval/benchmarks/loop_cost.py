"""What the trainer itself costs: its loop over latents with a network that computes next to nothing.

    python eval/benchmarks/loop_cost.py
    python eval/benchmarks/loop_cost.py --noise-on device --batch 256
    python eval/benchmarks/loop_cost.py --side 8      # a sixteenth of the arithmetic, a GPU's where there is one

Random latents (4 x 32 x 32) lie in a folder as `encode_latents.py` writes them and are read, drawn for, moved,
stepped on and averaged as in a run. `main thread` is the time that the thread which feeds the device spends on a batch
while it does not wait for the next one: above it no device can be kept busy. `images/s` is what the loop reaches here.
"""

import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from d_emo.common.command_line import CommandParser
from d_emo.common.commands import command
from d_emo.common.numbers import whole_from
from d_emo.eval.benchmarks.loader_speed import SD_VAE, random_latents
from d_emo.models.transformer_base import ClassConditionalOutput

# Pixels of an image's side for one of its latents'.
FACTOR = 8
SIDES = (8, 16, 32, 64)


class Nothing(torch.nn.Module):
    """A network of one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))

    def forward(self, noisy: torch.Tensor, *_: Any, **__: Any) -> ClassConditionalOutput:
        """As a diffusion transformer is called."""
        return ClassConditionalOutput(sample=noisy * self.weight)


def make_run(latents: Path, batch: int, noise_on: str, steps: int) -> Any:
    """A run of the diffusion trainer whose network is `Nothing`."""
    from d_emo.train.data.sources import load_source
    from d_emo.train.diffusion import trainer
    from d_emo.train.diffusion.config import parse_config
    from d_emo.train.diffusion.plan import make_plan
    from d_emo.train.engine.averaging import WeightAverage
    from d_emo.train.engine.batch_norm import StepStatistics
    from d_emo.train.engine.finite import FiniteSteps

    words = [
        "--latents",
        str(latents),
        "--vae",
        str(latents.parent / "vae"),
        "--model",
        "D-EMOv2-N-8",
        "--objective",
        "sit",
    ]
    words += ["--global-batch-size", str(batch), "--micro-batch-size", str(batch), "--max-train-steps", str(steps)]
    config = parse_config([*words, "--noise-on", noise_on, "--report-to", "none"])
    accelerator = Accelerator()
    run = trainer.make_run(make_plan(config, load_source(config.data), accelerator), accelerator)
    model = Nothing().to(accelerator.device)
    run.model, run.average = model, WeightAverage(model, config.optimization)
    run.optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    run.lr_schedule = torch.optim.lr_scheduler.LambdaLR(run.optimizer, lambda _: 1.0)
    run.statistics, run.finite = StepStatistics(model), FiniteSteps(model, run.optimizer)
    return run


def measure(run: Any, steps: int) -> tuple[float, float]:
    """Median seconds of the main thread for a batch, waiting aside, and images a second of the whole loop."""
    from d_emo.train.diffusion import trainer
    from d_emo.train.engine import loop

    batches, waited, busy = iter(trainer.make_loader(run)), 0.0, []

    def next_ones() -> Any:
        nonlocal waited
        while True:
            started = time.perf_counter()
            batch = next(batches)
            waited += time.perf_counter() - started
            yield batch

    source = next_ones()
    warm, began = steps // 5, 0.0
    for step in range(steps):
        if step == warm:
            began = time.perf_counter()
        before, start = waited, time.perf_counter()
        loop.train_step(run, source, lambda batch: trainer.batch_loss(run, batch))
        busy.append(time.perf_counter() - start - (waited - before))
    seconds = time.perf_counter() - began
    return statistics.median(busy[warm:]), (steps - warm) * run.plan.layout.global_batch_size / seconds


@command("loop_cost", extra="train")
def main(arguments: list[str]) -> None:
    """Read the options, measure, print."""
    parser = CommandParser("loop_cost", __doc__)
    parser.add_argument("--batch", type=whole_from(1), default=256, help="Latents a step.")
    parser.add_argument("--side", type=int, choices=SIDES, default=32, help="Of the latents.")
    parser.add_argument("--steps", type=whole_from(1), default=60, help="Steps, of which a fifth is not counted.")
    parser.add_argument("--noise-on", nargs="+", choices=("cpu", "device"), default=["cpu", "device"])
    options = parser.parse_args(arguments)
    from diffusers import AutoencoderKL

    with tempfile.TemporaryDirectory() as folder:
        narrow = {**SD_VAE, "block_out_channels": (8, 8, 8, 8), "norm_num_groups": 8}  # never run
        vae = AutoencoderKL(**narrow, latent_channels=4)
        vae.save_pretrained(Path(folder) / "vae")
        random_latents(Path(folder) / "latents", 4 * options.batch, FACTOR * options.side, vae)
        print("| noise on | main thread, ms a batch | images/s |\n|---|---|---|", flush=True)
        for noise_on in options.noise_on:
            run = make_run(Path(folder) / "latents", options.batch, noise_on, options.steps)
            busy, speed = measure(run, options.steps)
            print(f"| {noise_on} | {1e3 * busy:.1f} | {speed:,.0f} |", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
