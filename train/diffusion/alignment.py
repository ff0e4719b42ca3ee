"""Representation alignment (REPA, arXiv 2410.06940) as iREPA does it (arXiv 2512.10794).

Tokens of a block are projected by a 3 x 3 convolution; their cosine with what a vision model says of the clean image,
its features normalised over the image, is to grow. The projector is trained with the network, lies in the state of its
checkpoints, and belongs to neither its averages nor the pipeline.

Shapes: B samples, h x w tokens of D channels, T channels of the teacher.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from d_emo.models.transformer_base import ClassConditionalOutput, ClassConditionalTransformer2DModel

# Name of the projector in a network that is trained with one.
PROJECTOR = "aligner"
# How much of the mean over the image is taken away from the teacher's features (--zscore-alpha in iREPA's code).
GAMMA = 0.6
EPSILON = 1e-6


class Projector(nn.Conv2d):
    """(B, h, w, D) -> (B, h, w, T) by a 3 x 3 convolution, with zeros around."""

    training_only = True

    def __init__(self, dim: int, wanted: int):
        super().__init__(dim, wanted, kernel_size=3, padding=1)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """See the class."""
        return super().forward(tokens.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


@dataclass
class AlignedOutput(ClassConditionalOutput):
    """What a network with a projector answers where features are asked for.

    Attributes:
        projected: (B, h, w, T).
    """

    projected: torch.Tensor | None = None


def add_projector(model: ClassConditionalTransformer2DModel, wanted: int) -> None:
    """Give a network a fresh projector to T = `wanted` channels, which its forward pass goes through.

    It is a part of the network so that DDP and FSDP2 know of it, and is called by a hook, so that no network's
    definition does.
    """
    model.add_module(PROJECTOR, Projector(model.config.hidden_size, wanted))
    model.register_forward_hook(_project)


def _project(model: nn.Module, inputs: Any, output: Any) -> Any:
    if not isinstance(output, ClassConditionalOutput) or output.features is None or not hasattr(model, PROJECTOR):
        return None  # averages have the hook, but no projector
    return AlignedOutput(**output, projected=model.get_submodule(PROJECTOR)(output.features))


def spatially_normalised(features: torch.Tensor) -> torch.Tensor:
    """(B, h, w, T): minus GAMMA times the mean over an image's tokens, over their standard deviation."""
    mean = features.mean((1, 2), keepdim=True)
    return (features - GAMMA * mean) / (features.std((1, 2), keepdim=True) + EPSILON)


@dataclass(frozen=True)
class AlignTerm:
    """Minus the mean cosine of the projected tokens and the teacher's.

    Attributes:
        weight: of it.
        features_after: the number of blocks after which it looks.
    """

    weight: float
    features_after: int

    def __call__(self, output: ClassConditionalOutput, drawn: Any) -> torch.Tensor:
        """See `Term`; `drawn.wanted` are the teacher's features."""
        assert isinstance(output, AlignedOutput) and output.projected is not None
        given = output.projected.float()  # (B, h, w, T)
        wanted = spatially_normalised(resized(drawn.wanted.float(), (given.shape[1], given.shape[2])))
        return -self.weight * F.cosine_similarity(given, wanted, dim=-1).mean()


def resized(features: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """(B, h', w', T) -> (B, h, w, T), linearly between tokens."""
    if features.shape[1:3] == grid:
        return features
    maps = features.permute(0, 3, 1, 2)
    return F.interpolate(maps, grid, mode="bilinear", antialias=True, align_corners=False).permute(0, 2, 3, 1)
