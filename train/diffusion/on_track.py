"""Is a run on track? Its loss beside the published one at the same step, where the settings are the published ones.

`published_losses.csv` is a thinned copy of the training losses of the EMOv2 paper (arXiv 2412.06674): each row is a
mean over the `window` steps that end at `step`. They are of DiT's objective on ImageNet 256 x 256 with the SD VAE's
latents, mirrored at random, global batch 256, learning rate 1e-4 without decay.
"""

import csv
from dataclasses import dataclass
from importlib import resources

import numpy as np

from d_emo.eval.fid.protocol import SD_LATENTS
from d_emo.images.autoencoders import LatentSpace
from d_emo.train.diffusion.plan import Plan

FILE = "published_losses.csv"
LATENTS = (4, 32, 32)
CLASSES = 1000
# What the published runs used; other values make other losses.
OPTIONS = {
    "objective": "dit",
    "optimizer": "adamw",
    "min_snr_gamma": None,
    "class_dropout_prob": 0.1,
    "global_batch_size": 256,
    "learning_rate": 1e-4,
    "lr_scheduler": "constant",
    "lr_warmup_steps": 0,
    "weight_decay": 0.0,
    "max_grad_norm": None,
    "init_from": None,
    "patch_bottleneck": None,
    "guide_block": None,
    "contrastive": 0.0,
    "dispersive": 0.0,
    "align": None,
    "dense_blocks": None,
}


@dataclass(frozen=True)
class PublishedLoss:
    """A published loss curve.

    Attributes:
        model: its name.
        edges: (N + 1,) steps at which windows begin and end, from 0.
        losses: (N,) means over the windows.
    """

    model: str
    edges: np.ndarray
    losses: np.ndarray

    @property
    def steps(self) -> np.ndarray:
        """Middles of the windows, (N,)."""
        return (self.edges[1:] + self.edges[:-1]) / 2

    def mean(self, first: int, last: int) -> float | None:
        """Mean over the steps after `first` up to `last`; None beyond the curve."""
        if last > self.edges[-1] or last <= first:
            return None
        sums = np.concatenate([[0.0], np.cumsum(self.losses * np.diff(self.edges))])
        start, end = np.interp([first, last], self.edges, sums)
        return float((end - start) / (last - first))


def read_published(model: str) -> PublishedLoss | None:
    """The published curve of a model name, or None."""
    text = resources.files("d_emo.train.diffusion").joinpath(FILE).read_text(encoding="utf-8")
    rows = list(csv.DictReader(text.splitlines()))
    if model not in rows[0] or model in ("step", "window"):
        return None
    edges = np.array([0.0, *(float(row["step"]) for row in rows)])
    return PublishedLoss(model, edges, np.array([float(row[model]) for row in rows]))


def published_loss(plan: Plan) -> PublishedLoss | None:
    """The curve to hold a run against; None where its settings are not the published ones."""
    settings = plan.config.flat()
    same = all(settings[name] == value for name, value in OPTIONS.items()) and _of_sd(plan.space)
    if not (same and plan.latent_shape == LATENTS and len(plan.source.id2label) == CLASSES and plan.flip):
        return None
    return read_published(plan.model_name)


def _of_sd(space: LatentSpace | None) -> bool:
    """Whether latents are the SD VAE's, normalised as it is usual."""
    return space is not None and not space.measured_on and not space.differences(SD_LATENTS)
