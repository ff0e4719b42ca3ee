"""What a recipe adds to the objective's loss: terms of a network's whole answer, each with its weight.

Shapes: B samples, C channels, H x W.
"""

import math
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F

from d_emo.common.options import require
from d_emo.images.source import ImageSource
from d_emo.models.transformer_base import ClassConditionalOutput
from d_emo.train.diffusion.alignment import AlignTerm
from d_emo.train.diffusion.objectives import FlowObjective, Objective
from d_emo.train.diffusion.recipe_options import RecipeOptions


@dataclass(frozen=True)
class Drawn:
    """What a micro batch was trained on.

    Attributes:
        data: (B, C, H, W) clean images or latents.
        labels: (B,) class ids, some of them dropped.
        noise: (B, C, H, W) standard normal.
        time: (B,) uniform in [0, 1).
        wanted: (B, h', w', T), what a teacher says of the images.
    """

    data: torch.Tensor
    labels: torch.Tensor
    noise: torch.Tensor
    time: torch.Tensor
    wanted: torch.Tensor | None = None


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


@dataclass(frozen=True)
class ContrastiveTerm:
    """Contrastive flow matching (arXiv 2506.05350): minus the distance to the velocity of another sample.

    The velocity that is predicted at x_t of sample i shall be far from that which sample j has at the time of i,
    alpha'(t) data_j + sigma'(t) noise_j. j is the one before i in the micro batch, whose order is random already. Only
    samples with a class count, as the paper's code has it by an option: without one, all have the same target.

    Attributes:
        objective: of velocities or data; of data the velocities are compared, with the floor that its loss has.
        weight: lambda.
        null_label: the label of no class.
    """

    objective: FlowObjective
    weight: float
    null_label: int
    features_after = None

    def __call__(self, output: ClassConditionalOutput, drawn: Drawn) -> torch.Tensor:
        """See `Term`."""
        kind = self.objective.prediction_type
        _, point = self.objective.place(drawn.time)
        given = point.velocity_of(kind, output.sample.float(), point.sample(drawn.data, drawn.noise))
        other = point.velocity(drawn.data.roll(1, 0), drawn.noise.roll(1, 0))  # (B, C, H, W)
        if kind == "sample":
            other = other * (point.sigma * point.data_rate)
        distances = (given - other).square().flatten(1).mean(1)  # (B,)
        counted = (drawn.labels != self.null_label).float()
        return -self.weight * (distances * counted).sum() / counted.sum().clamp(min=1)


@dataclass(frozen=True)
class DispersiveTerm:
    """Dispersive regularisation (arXiv 2506.09027): the samples of a micro batch shall lie apart inside the network.

    InfoNCE without positives, by squared distances: log of the mean over all pairs, those with oneself too, of
    exp(-|z_i - z_j|^2 / D), D numbers a sample, as in the paper's code.

    Attributes:
        weight: of it.
        features_after: the number of blocks after which it looks.
    """

    weight: float
    features_after: int

    def __call__(self, output: ClassConditionalOutput, drawn: Drawn) -> torch.Tensor:
        """See `Term`."""
        assert output.features is not None
        flat = output.features.float().flatten(1)  # (B, h w D)
        # Differences, not products: near samples would lose their digits.
        apart = F.pdist(flat).square() / flat.shape[1]  # (B (B - 1) / 2,)
        pairs = torch.cat([apart, apart, apart.new_zeros(len(flat))])  # each pair both ways, and with oneself
        return self.weight * (torch.logsumexp(-pairs, 0) - math.log(len(pairs)))


def check_terms(options: RecipeOptions, source: ImageSource, micro_batch: int, depth: int) -> None:
    """Refuse terms that would have nothing to work on.

    Args:
        options: say which.
        source: of the data.
        micro_batch: images.
        depth: the network's blocks.

    Raises:
        ValueError: one has nothing.
    """
    require(
        not options.contrastive or len(source.id2label) > 0,
        "contrastive",
        options.contrastive,
        "it tells classes apart, and the data has none; leave it out",
    )
    for name in ("contrastive", "dispersive"):
        weight = getattr(options, name)
        rule = "it compares the samples of a micro batch, which has 1; use --micro-batch-size 2 or more"
        require(not weight or micro_batch > 1, name, weight, rule)
    for name, block in options.blocks_looked_after().items():
        require(block <= depth, name, block, f"the network has {depth} blocks")


def make_terms(options: RecipeOptions, objective: Objective, guide_block: int | None, null_label: int) -> list[Term]:
    """The terms that the options ask for.

    Args:
        options: see there.
        objective: of the run.
        guide_block: the depth of the network's second head, if it has one, which has a term of its own.
        null_label: the label of no class.
    """
    terms: list[Term] = [] if guide_block is None else [GuideTerm(objective, options.guide_weight)]
    if options.contrastive:
        assert isinstance(objective, FlowObjective)
        terms.append(ContrastiveTerm(objective, options.contrastive, null_label))
    if options.dispersive:
        terms.append(DispersiveTerm(options.dispersive, options.dispersive_block))
    if options.align is not None:
        terms.append(AlignTerm(options.align_weight, options.align_block))
    return terms


def depth_of_features(terms: list[Term]) -> int | None:
    """The number of blocks after which terms want the network's tokens."""
    return next((term.features_after for term in terms if term.features_after is not None), None)
