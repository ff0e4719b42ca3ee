"""What a recipe adds to the objective's loss: terms of a network's whole answer, each with its weight.

Shapes: B samples, C channels, H x W.
"""

from dataclasses import dataclass
from typing import Protocol

import torch

from d_emo.models.transformer_base import ClassConditionalOutput
from d_emo.train.diffusion.objectives import Objective
from d_emo.train.diffusion.recipe_options import RecipeOptions


@dataclass(frozen=True)
class Drawn:
    """What a micro batch was trained on.

    Attributes:
        data: (B, C, H, W) clean images or latents.
        labels: (B,) class ids, some of them dropped.
        noise: (B, C, H, W) standard normal.
        time: (B,) uniform in [0, 1).
    """

    data: torch.Tensor
    labels: torch.Tensor
    noise: torch.Tensor
    time: torch.Tensor


class Term(Protocol):
    """A part of the loss."""

    @property
    def features_after(self) -> int | None:
        """The number of blocks after which it wants the network's tokens, if it does."""

    def __call__(self, output: ClassConditionalOutput, drawn: Drawn) -> torch.Tensor:
        """Its weighted mean over the micro batch, a number with its graph."""


@dataclass(frozen=True)
class GuideTerm:
    """The objective's own loss of the second head's prediction (internal guidance)."""

    objective: Objective
    weight: float
    features_after = None

    def __call__(self, output: ClassConditionalOutput, drawn: Drawn) -> torch.Tensor:
        """See `Term`."""
        guide = output.guide
        assert guide is not None
        losses = self.objective.losses(lambda *_: guide, drawn.data, drawn.labels, drawn.noise, drawn.time)
        return self.weight * losses["loss"].mean()


def make_terms(options: RecipeOptions, objective: Objective, guide_block: int | None) -> list[Term]:
    """The terms that the options ask for, and that of the network's second head, after `guide_block`, if it has one."""
    return [] if guide_block is None else [GuideTerm(objective, options.guide_weight)]
