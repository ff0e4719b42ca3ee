"""Images a second of training and sampling steps, with and without dropped tokens, in turns on one machine.

    python eval/benchmarks/token_dropping.py --models D-EMOv2-S-2 DiT-S-2 --latent 32 --batch 4

A training step is a forward and a backward pass; one step in eight of those that drop has all tokens. Sampling keeps
all; beside the network without the fusion layer it shows what this layer costs.
"""

import statistics
import sys
import time
from collections.abc import Callable

import torch

from d_emo import create_model
from d_emo.common.command_line import CommandParser
from d_emo.common.commands import command
from d_emo.common.numbers import whole_from
from d_emo.train.diffusion.recipe_options import RecipeOptions

# Steps of which one has all tokens, as --drop-pause is by default.
PAUSE = RecipeOptions.drop_pause
COLUMNS = ("model", "training", "with the layer", "dropping", "speed", "sampling", "with the layer")


def seconds_of(steps: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """The median time of each step; they take turns, after one that does not count."""
    found: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(repeats + 1):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            found[name].append(time.perf_counter() - start)
    return {name: statistics.median(times[1:]) for name, times in found.items()}


def row(name: str, latent: int, batch: int, dense_blocks: int, repeats: int) -> list[str]:
    """A model's line of the table."""
    flow = {"sample_size": latent, "learn_sigma": False, "prediction_type": "flow_prediction"}
    plain, fused = create_model(name, **flow), create_model(name, dense_blocks=dense_blocks, **flow)
    noisy = torch.randn(batch, 4, latent, latent)
    times, labels = torch.full((batch,), 500.0), torch.zeros(batch, dtype=torch.long)
    side = latent // plain.config.patch_size // 2
    kept = torch.randint(0, 4, (batch, side, side))

    def train(model: torch.nn.Module, kept: torch.Tensor | None = None) -> None:
        model.train()
        model(noisy, times, labels, kept=kept).sample.square().mean().backward()

    @torch.inference_mode()
    def sample(model: torch.nn.Module) -> None:
        model.eval()
        model(noisy, times, labels)

    took = seconds_of(
        {
            "plain": lambda: train(plain),
            "fused": lambda: train(fused),
            "sparse": lambda: train(fused, kept),
            "sample": lambda: sample(plain),
            "sample fused": lambda: sample(fused),
        },
        repeats,
    )
    dropping = ((PAUSE - 1) * took["sparse"] + took["fused"]) / PAUSE
    training = [f"{batch / seconds:.3g}" for seconds in (took["plain"], took["fused"], dropping)]
    sampling = [f"{batch / took[kind]:.3g}" for kind in ("sample", "sample fused")]
    return [name, *training, f"{took['plain'] / dropping:.2f}", *sampling]


@command("token_dropping")
def main(arguments: list[str]) -> None:
    """Print the table, a model a line as it is measured."""
    parser = CommandParser("token_dropping", __doc__)
    parser.add_argument("--models", nargs="+", default=["D-EMOv2-S-2", "DiT-S-2"], help="D-EMOv2 and DiT, by name.")
    parser.add_argument("--latent", type=whole_from(4), default=32, help="Side of the latent.")
    parser.add_argument("--batch", type=whole_from(1), default=4, help="Latents a step.")
    parser.add_argument("--dense-blocks", type=whole_from(1), default=2, help="Blocks at each end that see all tokens.")
    parser.add_argument("--repeats", type=whole_from(1), default=5, help="Measured steps of each kind.")
    options = parser.parse_args(arguments)
    print(f"| {' | '.join(COLUMNS)} |\n{'|---' * len(COLUMNS)}|")
    for name in options.models:
        cells = row(name, options.latent, options.batch, options.dense_blocks, options.repeats)
        print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
