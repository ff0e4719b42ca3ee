"""What the diffusion trainer draws for the samples of a batch, as functions of (seed, position)."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from d_emo.train.data import stream
from d_emo.train.data.batches import Batch
from d_emo.train.diffusion.plan import Plan
from d_emo.train.diffusion.token_dropping import draw_kept


@dataclass(frozen=True)
class Draws:
    """Draws for batches.

    Args:
        plan: of the run.
        device: that the step is computed on; what is to be drawn there is left to the step.
    """

    plan: Plan
    device: torch.device

    def of(self, positions: Sequence[int]) -> dict[str, torch.Tensor]:
        """Uniform numbers "time", "label_dropout" and the objective's (B,), normal ones "noise" and "vae" (B, C, H, W).

        With --drop-tokens also "kept" (B, h / 2, w / 2), which of each 2 x 2 tokens is, in steps that drop.

        The normal "vae" is of the autoencoder's posteriors, where an image has more than one latent: for RAE's it would
        take as long as the noise.
        """
        seed = self.plan.config.run.seed
        wanted = (*stream.UNIFORM, *self.plan.objective.draws)
        uniform = {purpose: stream.uniform(seed, purpose, positions) for purpose in wanted}
        kept = draw_kept(self.plan.config, self.plan.initial, self.plan.latent_shape[-1], positions)
        return uniform | kept | ({} if self.on_device else self.normal(positions))

    @property
    def on_device(self) -> bool:
        """Whether normal numbers are drawn on the device."""
        return self.plan.config.optimization.noise_on == "device"

    def normal(self, positions: Sequence[int]) -> dict[str, torch.Tensor]:
        """The normal numbers, where they are drawn."""
        plan, seed = self.plan, self.plan.config.run.seed
        drawn: list[stream.Purpose] = ["noise"]
        if plan.space is not None and not plan.space.deterministic:
            drawn.append("vae")
        if self.on_device:
            return {name: stream.normal_on(self.device, seed, name, positions, plan.latent_shape) for name in drawn}
        return {name: stream.normal(seed, name, positions, plan.latent_shape) for name in drawn}

    def ready(self, batch: Batch) -> Batch:
        """The batch with its draws, in memory that a GPU copies from by itself."""
        drawn = replace(batch, draws=self.of(batch.positions))
        return drawn.pin_memory() if self.device.type == "cuda" else drawn
