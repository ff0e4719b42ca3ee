"""The training objectives, each with the Diffusers scheduler that samples its models; flow maps are in `flow_map.py`.

DiT: epsilon and learned range variance with the hybrid loss, from "Improved Denoising Diffusion Probabilistic Models"
(arXiv 2102.09672, equations 14 to 16) as in DiT and ADM. SiT: flows along its paths (arXiv 2401.08740), and JiT's
prediction of clean data (arXiv 2511.13720).

Shapes: B samples, C channels, H x W; losses are means over (C, H, W), one a sample.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler, SchedulerMixin

from d_emo.schedulers.flow_paths import SHIFT, PathPoint, dimension_shift, path_point, shift_time, train_interval
from d_emo.train.data.stream import Purpose
from d_emo.train.diffusion.config import OptimizationOptions

# model(noisy, timestep, labels) -> prediction; of flow maps model(noisy, timestep, labels, end_timestep)
Network = Callable[..., torch.Tensor]

NUM_TRAIN_TIMESTEPS = 1000
# --prediction, and what a model's configuration calls it.
PREDICTIONS = {"velocity": "flow_prediction", "noise": "epsilon", "score": "score", "data": "sample"}


def prediction_of(prediction_type: str) -> str:
    """The value of --prediction that a model's configuration stands for."""
    return next(word for word, name in PREDICTIONS.items() if name == prediction_type)


@dataclass(frozen=True)
class Jumps:
    """What a flow map's objective needs besides (`flow_map.py`).

    Attributes:
        end: (B,) uniform in [0, 1), for where a jump ends.
        teacher: the averaged network, in eval mode.
        null_label: the label of no class.
    """

    end: torch.Tensor
    teacher: Network
    null_label: int


class Objective(Protocol):
    """What the trainer needs of an objective."""

    prediction_type: str
    flow_path: str | None
    time_shift: float
    learn_sigma: bool
    draws: tuple[Purpose, ...]  # uniform numbers that it wants besides the time

    def losses(
        self,
        network: Network,
        data: torch.Tensor,
        labels: torch.Tensor,
        noise: torch.Tensor,
        time: torch.Tensor,
        jumps: Jumps | None = None,
    ) -> dict[str, torch.Tensor]:
        """Per-sample losses (B,); "loss" is the one to minimise.

        Args:
            network: the model.
            data: (B, C, H, W) clean images or latents.
            labels: (B,) class ids.
            noise: (B, C, H, W) standard normal.
            time: (B,) uniform in [0, 1).
            jumps: what flow maps need besides; the others look at nothing else.
        """

    def make_scheduler(self) -> SchedulerMixin:
        """The scheduler to save with models of this objective."""


class DiTObjective:
    """1000 steps, linear betas, epsilon and learned range variance, hybrid loss.

    Args:
        min_snr_gamma: weight epsilon's loss by min(SNR, gamma) / SNR, which spares steps with little noise (arXiv
            2303.09556, 5 there); None for DiT's even weights.
    """

    prediction_type = "epsilon"
    flow_path: str | None = None
    time_shift = 1.0
    learn_sigma = True
    draws: tuple[Purpose, ...] = ()

    def __init__(self, min_snr_gamma: float | None = None) -> None:
        alphas = 1.0 - torch.linspace(1e-4, 0.02, NUM_TRAIN_TIMESTEPS, dtype=torch.float64)
        self.betas = 1.0 - alphas
        self.alphas_cumprod = alphas.cumprod(0)
        previous = torch.cat([torch.ones(1, dtype=torch.float64), self.alphas_cumprod[:-1]])
        variance = self.betas * (1.0 - previous) / (1.0 - self.alphas_cumprod)
        # The true posterior's variance is 0 at t = 0; ADM takes the next one there.
        self.log_variance_min = torch.cat([variance[1:2], variance[1:]]).log()
        self.log_variance_max = self.betas.log()
        self.mean_of_data = self.betas * previous.sqrt() / (1.0 - self.alphas_cumprod)
        snr = self.alphas_cumprod / (1.0 - self.alphas_cumprod)
        self.mse_weight = torch.ones_like(snr) if min_snr_gamma is None else snr.clamp(max=min_snr_gamma) / snr
        self.mean_of_noisy = (1.0 - previous) * alphas.sqrt() / (1.0 - self.alphas_cumprod)

    def make_scheduler(self) -> SchedulerMixin:
        """DiT's ancestral sampler; the wrong spacing or clipping would change every sample."""
        return DDPMScheduler(
            num_train_timesteps=NUM_TRAIN_TIMESTEPS,
            beta_schedule="linear",
            beta_start=1e-4,
            beta_end=0.02,
            variance_type="learned_range",
            clip_sample=False,
            timestep_spacing="linspace",
        )

    def losses(
        self,
        network: Network,
        data: torch.Tensor,
        labels: torch.Tensor,
        noise: torch.Tensor,
        time: torch.Tensor,
        jumps: Jumps | None = None,
    ) -> dict[str, torch.Tensor]:
        """See `Objective.losses`; "mse" on epsilon and "vb" in bits, whose sum is "loss"."""
        steps = (time * NUM_TRAIN_TIMESTEPS).long().clamp(max=NUM_TRAIN_TIMESTEPS - 1)  # (B,)
        noisy = self._at(self.alphas_cumprod.sqrt(), steps) * data
        noisy = noisy + self._at((1.0 - self.alphas_cumprod).sqrt(), steps) * noise  # (B, C, H, W)
        epsilon, variance = network(noisy, steps, labels).float().chunk(2, dim=1)
        mse = (epsilon - noise).square().flatten(1).mean(1) * self._at(self.mse_weight, steps).flatten()  # (B,)
        # The bound trains the variance only: epsilon is detached, as in the hybrid loss's stop-gradient.
        vb = self._variational_bound(data, noisy, steps, epsilon.detach(), variance)
        return {"loss": mse + vb, "mse": mse, "vb": vb}

    def _variational_bound(
        self,
        data: torch.Tensor,
        noisy: torch.Tensor,
        steps: torch.Tensor,
        epsilon: torch.Tensor,
        variance: torch.Tensor,
    ) -> torch.Tensor:
        """KL of the predicted to the true posterior, or the decoder's likelihood at t = 0; bits a dimension, (B,)."""
        at = self._at
        fraction = (variance + 1) / 2
        log_variance = fraction * at(self.log_variance_max, steps) + (1 - fraction) * at(self.log_variance_min, steps)
        predicted_data = at((1 / self.alphas_cumprod).sqrt(), steps) * noisy
        predicted_data = predicted_data - at((1 / self.alphas_cumprod - 1).sqrt(), steps) * epsilon
        noisy_part = at(self.mean_of_noisy, steps) * noisy
        mean = at(self.mean_of_data, steps) * predicted_data + noisy_part
        true_mean = at(self.mean_of_data, steps) * data + noisy_part
        true_log_variance = at(self.log_variance_min, steps)

        kl = 0.5 * (
            log_variance
            - true_log_variance
            - 1
            + (true_log_variance - log_variance).exp()
            + (true_mean - mean).square() * (-log_variance).exp()
        )
        likelihood = discretized_gaussian_log_likelihood(data, mean, 0.5 * log_variance)
        nats = torch.where((steps == 0)[:, None, None, None], -likelihood, kl)
        return nats.flatten(1).mean(1) / math.log(2.0)

    @staticmethod
    def _at(table: torch.Tensor, steps: torch.Tensor) -> torch.Tensor:
        """Values of a float64 table at (B,) steps, as float32 (B, 1, 1, 1)."""
        return table.float().to(steps.device)[steps][:, None, None, None]


def discretized_gaussian_log_likelihood(
    data: torch.Tensor, mean: torch.Tensor, log_scale: torch.Tensor
) -> torch.Tensor:
    """Log-likelihood of 8-bit data scaled to [-1, 1] under a Gaussian, elementwise, in nats.

    The mass of the bin of half width 1/255 around each value; the outer bins are open. ADM's tanh form of the normal
    distribution function is kept, so that losses compare.
    """

    def distribution(x: torch.Tensor) -> torch.Tensor:
        return 0.5 * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3)))

    floor = 1e-12
    centered, inverse_scale = data - mean, (-log_scale).exp()
    upper = distribution(inverse_scale * (centered + 1.0 / 255.0))
    lower = distribution(inverse_scale * (centered - 1.0 / 255.0))
    inside = (upper - lower).clamp(min=floor).log()
    lowest = upper.clamp(min=floor).log()
    highest = (1.0 - lower).clamp(min=floor).log()
    return torch.where(data < -0.999, lowest, torch.where(data > 0.999, highest, inside))


class FlowObjective:
    """A flow along one of SiT's paths (`d_emo.schedulers.flow_paths`): sigma = 1 is noise, the timestep is 1000 sigma.

    Args:
        options: path, what the network predicts, the weighting of its loss, how times are drawn. The weighting "none"
            is the plain squared error; "velocity" and "likelihood" weight noise and score by (r / sigma)^2 and
            r / sigma^2, r the score's share of the velocity (SiT's table of losses). The loss of predicted data is the
            velocity's: both data and prediction become velocities by the rule of the samplers.
        shape: (C, H, W) of what the model sees, for --time-shift auto.

    Raises:
        ValueError: a shift out of range, or "auto" without a shape.
    """

    learn_sigma = False
    draws: tuple[Purpose, ...] = ()

    def __init__(self, options: OptimizationOptions, shape: Sequence[int] | None = None) -> None:
        self.flow_path: str | None = options.flow_path
        self.prediction_type = PREDICTIONS[options.prediction]
        self.weighting = options.loss_weighting
        self.min_snr_gamma = options.min_snr_gamma
        self.time_shift = resolve_shift(options.time_shift, shape)
        self.interval = train_interval(options.flow_path, self.prediction_type)
        self.logit_normal = (
            (options.logit_normal_mean, options.logit_normal_std) if options.time_sampling == "logit-normal" else None
        )

    def make_scheduler(self) -> SchedulerMixin:
        """Euler on sigma from 1 to 0, with the shift of training."""
        return FlowMatchEulerDiscreteScheduler(num_train_timesteps=NUM_TRAIN_TIMESTEPS, shift=self.time_shift)

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
        time, point = self.place(time)
        noisy = point.sample(data, noise)  # (B, C, H, W)
        output = network(noisy, NUM_TRAIN_TIMESTEPS * time, labels).float()
        if self.prediction_type == "flow_prediction":
            error = output - point.velocity(data, noise)
        elif self.prediction_type == "epsilon":
            error = output - noise
        elif self.prediction_type == "sample":
            error = (output - data) * point.data_rate
        else:
            error = output * point.sigma + noise  # the score is -noise / sigma
        if self.weighting == "velocity":
            error = error * point.noise_rate
        elif self.weighting == "likelihood":
            error = error * (point.score_rate.sqrt() / point.sigma)
        loss = error.square().flatten(1).mean(1)  # (B,)
        if self.min_snr_gamma is not None:
            loss = loss * min_snr_weight(self.prediction_type, point, self.min_snr_gamma).flatten()
        return {"loss": loss}

    def place(self, time: torch.Tensor) -> tuple[torch.Tensor, PathPoint]:
        """Times (B,) of the path and its coefficients (B, 1, 1, 1) there, of even draws (B,)."""
        assert self.flow_path is not None
        time = self._spread(time)
        return time, path_point(self.flow_path, time[:, None, None, None])

    def _spread(self, time: torch.Tensor) -> torch.Tensor:
        """Even draws in [0, 1) as times of the path."""
        if self.logit_normal is not None:
            mean, std = self.logit_normal
            # The quantile function turns even draws into normal ones.
            time = torch.sigmoid(mean + std * torch.special.ndtri(time.double())).float()
        low, high = self.interval
        return low + (high - low) * shift_time(time, self.time_shift)


def min_snr_weight(prediction_type: str, point: PathPoint, gamma: float) -> torch.Tensor:
    """The weight of a squared error that makes it min(SNR, gamma) times the error of the data (arXiv 2303.09556).

    SNR = alpha^2 / sigma^2. At a fixed x_t an error of the data is one of the noise by -alpha / sigma, and one of the
    velocity by alpha' - sigma' alpha / sigma; noise therefore has min(1, gamma / SNR), the velocity min(alpha^2, gamma
    sigma^2) / (alpha' sigma - sigma' alpha)^2: on the linear path min((1 - s)^2, gamma s^2).

    Args:
        prediction_type: of the error; of the score it is that of the noise, of data that of the velocity with its
            floor.
        point: of the path, any shape.
        gamma: 5 in the paper.
    """
    limited = torch.minimum(point.alpha.square(), gamma * point.sigma.square())  # sigma^2 min(SNR, gamma)
    if prediction_type == "flow_prediction":
        return limited / (point.d_alpha * point.sigma - point.d_sigma * point.alpha).square()
    if prediction_type == "sample":
        # Below the floor sigma may be 0, where the data have the weight gamma.
        snr = (point.alpha / point.sigma).square().clamp(max=gamma)
        return snr / point.data_rate.square()
    return (gamma * (point.sigma / point.alpha).square()).clamp(max=1)


def resolve_shift(shift: float | str, shape: Sequence[int] | None) -> float:
    """--time-shift as a number; "auto" follows from the (C, H, W) of what the model sees.

    Raises:
        ValueError: it is out of range, or the shape is missing.
    """
    if shift == "auto":
        if shape is None:
            raise ValueError("--time-shift auto: there is no shape to take it from; pass (C, H, W), or a number.")
        shift = dimension_shift(math.prod(shape))
    return float(SHIFT.check(shift, "--time-shift"))
