"""The paths between data and noise that flow models are trained on, and what a network predicts along them.

A path is x(s) = alpha(s) data + sigma(s) noise. Time s is Diffusers' sigma for flows: 0 is data, 1 is noise, and the
timestep is 1000 s. Velocities are derivatives by s; on the linear path that is noise - data.

Source: SiT, "Exploring Flow and Diffusion-based Generative Models with Scalable Interpolant Transformers", arXiv
2401.08740, sections 2 and 3 and its table of interpolants. SiT's own time is t = 1 - s, so its velocities have the
opposite sign; noise and score are the same. Predictions of clean data are JiT's (arXiv 2511.13720), the time shift is
Stable Diffusion 3's (arXiv 2403.03206, equation 23), with RAE's rule for its size (arXiv 2510.11690).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from d_emo.common.checks import one_of
from d_emo.common.ranges import Real, Whole

PATHS = ("linear", "gvp", "vp")
# What a network may predict: noise, dx/ds, the gradient of the log-density, or data (on the linear path).
FLOW_PREDICTIONS = ("epsilon", "flow_prediction", "score", "sample")
# Those that have an answer at both ends of the linear path and of GVP.
EVERYWHERE = ("flow_prediction", "sample")
# Velocities of predicted data are divided by the time, and below this one by it (JiT's t_eps).
DATA_FLOOR = 0.05
# The number of values (C x H x W) for which times are not shifted: a 32 x 32 x 4 latent's.
UNSHIFTED_DIMENSION = 4096
# Rates of the variance-preserving path at the data and at the noise (SiT's sigma_min and sigma_max).
VP_RATES = (0.1, 20.0)
# A flow can be cut as finely as one likes; beyond this it is a mistake.
MAX_STEPS = 10_000
STEPS = Whole(1, MAX_STEPS)
SHIFT = Real(1e-3, 1e3, "1 is no shift, RAE's is 6.9")
TRAIN_TIMESTEPS = Whole(1, 1_000_000, "models of this package have 1000")
# How near to an end times may come where a formula has a pole there (SiT's train_eps and sample_eps).
TRAIN_MARGIN, VP_TRAIN_MARGIN, SAMPLE_MARGIN = 1e-3, 1e-5, 1e-3
# The last moment before the data: an interval that lasts to 1 has every step.
LAST_MOMENT = 1.0 - 1e-6


@dataclass(frozen=True)
class PathPoint:
    """A path's coefficients and their derivatives at times s; five tensors or numbers of one shape."""

    alpha: Any
    sigma: Any
    d_alpha: Any
    d_sigma: Any

    @property
    def noise_rate(self) -> Any:
        """sigma' - sigma alpha' / alpha: how much of the velocity each unit of noise adds, the sample held fixed."""
        return self.d_sigma - self.sigma * self.d_alpha / self.alpha

    @property
    def score_rate(self) -> Any:
        """sigma times `noise_rate`: how much of the velocity comes from the score (SiT's drift variance)."""
        return self.sigma * self.noise_rate

    @property
    def data_rate(self) -> Any:
        """1 / max(sigma, DATA_FLOOR): how much of the linear path's velocity a unit of data takes away."""
        if isinstance(self.sigma, torch.Tensor):
            return 1 / self.sigma.clamp(min=DATA_FLOOR)
        return 1 / max(self.sigma, DATA_FLOOR)

    def sample(self, data: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """The point of the path between them."""
        return self.alpha * data + self.sigma * noise

    def velocity(self, data: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """The derivative by s there."""
        return self.d_alpha * data + self.d_sigma * noise

    def velocity_of(self, prediction_type: str, prediction: torch.Tensor, sample: torch.Tensor) -> torch.Tensor:
        """dx/ds of what a network predicted at a sample."""
        if prediction_type == "flow_prediction":
            return prediction
        if prediction_type == "sample":
            return (sample - prediction) * self.data_rate
        noise = prediction if prediction_type == "epsilon" else -self.sigma * prediction
        return self.d_alpha / self.alpha * sample + self.noise_rate * noise

    def noise_of(self, velocity: torch.Tensor, sample: torch.Tensor) -> torch.Tensor:
        """The noise in a sample, of its velocity."""
        return (self.alpha * velocity - self.d_alpha * sample) / (self.alpha * self.d_sigma - self.d_alpha * self.sigma)


def path_point(path: str, s: torch.Tensor) -> PathPoint:
    """Coefficients of a path at times s, elementwise.

    Args:
        path: "linear" (alpha = 1 - s), "gvp" (cosine and sine) or "vp" (the variance-preserving SDE).
        s: times in [0, 1], any shape; "vp" needs s > 0.
    """
    one_of(path, "flow_path", PATHS)
    if path == "linear":
        return PathPoint(1 - s, s, -torch.ones_like(s), torch.ones_like(s))
    if path == "gvp":
        angle = s * (math.pi / 2)
        alpha, sigma = angle.cos(), angle.sin()
        return PathPoint(alpha, sigma, -math.pi / 2 * sigma, math.pi / 2 * alpha)
    low, high = VP_RATES
    log_alpha = -0.25 * s.square() * (high - low) - 0.5 * s * low
    d_log_alpha = -0.5 * (s * (high - low) + low)
    alpha, sigma = log_alpha.exp(), (-torch.expm1(2 * log_alpha)).sqrt()
    d_alpha = alpha * d_log_alpha
    return PathPoint(alpha, sigma, d_alpha, -alpha * d_alpha / sigma)  # alpha^2 + sigma^2 = 1


def path_numbers(path: str, s: float) -> PathPoint:
    """`path_point` at one time, as plain numbers, which any device and type of tensor takes."""
    point = path_point(path, torch.tensor(s, dtype=torch.float64))
    return PathPoint(*(float(value) for value in (point.alpha, point.sigma, point.d_alpha, point.d_sigma)))


def train_interval(path: str, prediction_type: str) -> tuple[float, float]:
    """The times that are trained on: all but what lies next to a pole."""
    if path == "vp":
        return VP_TRAIN_MARGIN, 1.0
    return (0.0, 1.0) if prediction_type in EVERYWHERE else (TRAIN_MARGIN, 1.0 - TRAIN_MARGIN)


def sample_interval(path: str, prediction_type: str) -> tuple[float, float]:
    """From which time, the lower one, to which time a sampler may ask for velocities."""
    if path == "vp":
        return SAMPLE_MARGIN, 1.0
    return (0.0, 1.0) if prediction_type in EVERYWHERE else (SAMPLE_MARGIN, 1.0 - SAMPLE_MARGIN)


def shift_time(s: Any, shift: float) -> Any:
    """Times s in [0, 1], a number or tensor, moved towards noise by a shift above 1, towards data by one below.

    0 and 1 stay; the shift 1 / k undoes the shift k.
    """
    return shift * s / (1 + (shift - 1) * s)


def dimension_shift(dimension: int) -> float:
    """The shift for `dimension` values (C x H x W): its square root, over that of 4096 (RAE, RiT)."""
    return math.sqrt(dimension / UNSHIFTED_DIMENSION)


def shifted_steps(start: float, end: float, count: int, shift: float) -> torch.Tensor:
    """`count` times from `start` to `end`, both kept, that are even before the shift; (count,) float64."""
    even = torch.linspace(shift_time(start, 1 / shift), shift_time(end, 1 / shift), count, dtype=torch.float64)
    times = shift_time(even, shift)
    times[0], times[-1] = start, end
    return times


def path_of(config: Mapping[str, Any]) -> str | None:
    """The path of a model's configuration; None for DiT's discrete diffusion, which is no flow."""
    if config.get("flow_path"):
        return str(config["flow_path"])
    return "linear" if config["prediction_type"] in EVERYWHERE else None


def way_done(timesteps: torch.Tensor, num_train_timesteps: int | None) -> list[float]:
    """How much of the way from noise (0) to data (1) lies behind each step.

    Args:
        timesteps: of all steps, in their order.
        num_train_timesteps: the timestep of pure noise of a flow, whose way is its time, 1 - s: intervals of guidance
            then mean what papers mean, on shifted steps too. None for diffusion in steps: the share of the steps.
    """
    if num_train_timesteps is None:
        return [step / len(timesteps) for step in range(len(timesteps))]
    times = (timestep / num_train_timesteps for timestep in timesteps.tolist())
    return [min(round(1 - time, 6), LAST_MOMENT) for time in times]  # timesteps are float32
