"""Flow maps: a network that jumps from one time of a flow to another, so that a few steps draw a picture.

u(x, t, r) is the mean velocity between the times t and r < t: x - (t - r) u(x, t, r) is where the flow takes x. Two
conditions make it so (MeanFlow, arXiv 2505.13447): without a way, u(x, t, t) is the flow's velocity; and a jump is the
sum of its parts. With s between the times, at a share a of the way,

    u(x, t, r) = a u(x, t, s) + (1 - a) u(x - (t - s) u(x, t, s), s, r),   s = t - a (t - r).

MeanFlow takes the limit a -> 0, whose derivative along the flow needs forward-mode differentiation, which fused kernels
lack. alpha-Flow (arXiv 2510.20771) keeps a finite; a = 1/2 is the rule of shortcut models (arXiv 2410.12557). Here both
parts are the averaged network's own jumps, as in the latter: the condition is then exact for every a, its target has no
variance of its own, and no difference is divided by a small number, which half precision would not survive. Two times
without new weights, the networks' side of it, are decoupled MeanFlow's (arXiv 2510.24474).

Shapes: B samples, C channels, H x W.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from diffusers import FlowMapEulerDiscreteScheduler, SchedulerMixin

from d_emo.schedulers.flow_paths import path_point
from d_emo.train.data.stream import Purpose
from d_emo.train.diffusion.config import OptimizationOptions
from d_emo.train.diffusion.flow_map_options import FlowMapOptions
from d_emo.train.diffusion.objectives import NUM_TRAIN_TIMESTEPS, FlowObjective, Jumps, Network


@dataclass(frozen=True)
class Times:
    """What samples are trained on, all (B,): whether on the flow alone, and times, end <= middle <= start."""

    flow: torch.Tensor
    start: torch.Tensor
    middle: torch.Tensor
    end: torch.Tensor


class FlowMapObjective(FlowObjective):
    """A share of the samples trains the flow, u(x, t, t); the others that a jump is the sum of its two parts.

    Args:
        options: of the flow: its path, and how times are drawn; the two times of a jump are two such draws.
        flow_map: see there.
        shape: see `FlowObjective`.
    """

    draws: tuple[Purpose, ...] = ("end",)

    def __init__(
        self, options: OptimizationOptions, flow_map: FlowMapOptions, shape: Sequence[int] | None = None
    ) -> None:
        super().__init__(options, shape)
        self.options = flow_map

    def make_scheduler(self) -> SchedulerMixin:
        """Jumps from each time to the next, from 1 to 0, with the shift of training."""
        return FlowMapEulerDiscreteScheduler(num_train_timesteps=NUM_TRAIN_TIMESTEPS, shift=self.time_shift)

    def losses(
        self,
        network: Network,
        data: torch.Tensor,
        labels: torch.Tensor,
        noise: torch.Tensor,
        time: torch.Tensor,
        jumps: Jumps | None = None,
    ) -> dict[str, torch.Tensor]:
        """See `Objective.losses`."""
        assert jumps is not None and self.flow_path is not None
        times = self.times(time, jumps.end)
        point = path_point(self.flow_path, times.start[:, None, None, None])
        noisy, velocity = point.sample(data, noise), point.velocity(data, noise)  # (B, C, H, W)
        with torch.no_grad():
            target = self.targets(noisy, velocity, labels, times, jumps)  # (B, C, H, W)
        # Last, since who adds terms to the loss looks at the last answer.
        output = network(noisy, NUM_TRAIN_TIMESTEPS * times.start, labels, NUM_TRAIN_TIMESTEPS * times.end).float()
        return {"loss": (output - target).square().flatten(1).mean(1)}

    def times(self, time: torch.Tensor, end: torch.Tensor) -> Times:
        """The times of samples, of two numbers (B,) in [0, 1) each."""
        share, split = self.options.flow_map_share, self.options.flow_map_split
        flow = end < share
        # The later and the earlier of two even draws are distributed as root(a) and root(a) b.
        later = torch.where(flow, time, time.sqrt())
        start = self._spread(later)
        stop = torch.where(flow, start, self._spread(later * (1 - (end - share) / (1 - share)).clamp(0, 1)))
        return Times(flow, start, start - split * (start - stop), stop)

    def targets(
        self, noisy: torch.Tensor, velocity: torch.Tensor, labels: torch.Tensor, times: Times, jumps: Jumps
    ) -> torch.Tensor:
        """What the network is to answer, (B, C, H, W).

        With guidance w the flow of a sample with a class is w velocity + (1 - w) u(x, t, t) without class, as in
        MeanFlow; jumps, being sums of it, need no more.

        Args:
            noisy, velocity: of the path between data and noise, (B, C, H, W).
            labels: (B,) class ids, some of them dropped.
            times: of the samples.
            jumps: the network that is asked.
        """
        split, guidance = self.options.flow_map_split, self.options.flow_map_guidance
        start, middle, end = (NUM_TRAIN_TIMESTEPS * moment for moment in (times.start, times.middle, times.end))
        # The first part of a jump; of the flow, which is asked for where it stands, what it is without class.
        asked = labels.masked_fill(times.flow, jumps.null_label) if guidance > 1 else labels
        first = jumps.teacher(noisy, start, asked, middle).float()
        there = noisy - (times.start - times.middle)[:, None, None, None] * first
        second = jumps.teacher(there, middle, labels, end).float()
        if guidance > 1:
            guided = (labels != jumps.null_label)[:, None, None, None]
            velocity = torch.where(guided, guidance * velocity + (1 - guidance) * first, velocity)
        return torch.where(times.flow[:, None, None, None], velocity, split * first + (1 - split) * second)
