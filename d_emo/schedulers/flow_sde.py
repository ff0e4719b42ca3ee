"""The stochastic samplers of SiT (arXiv 2401.08740, section 2.4 and appendix) as Diffusers schedulers.

Euler-Maruyama and Heun on the reverse SDE of a flow, and a last deterministic step. In Diffusers' convention time s is
1 for noise and 0 for data, the timestep is 1000 s, and the velocity is v = dx/ds. Towards the data, with t = 1 - s:

    dx = (-v + w score) dt + sqrt(2 w) dB,  score = -noise / sigma,  w the diffusion coefficient.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import ConfigMixin, SchedulerMixin
from diffusers.configuration_utils import register_to_config
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor

from d_emo.common.messages import shown
from d_emo.common.ranges import OneOf, Real, Table, Whole, checked
from d_emo.schedulers.flow_paths import (
    MAX_STEPS,
    PATHS,
    SAMPLE_MARGIN,
    SHIFT,
    TRAIN_TIMESTEPS,
    PathPoint,
    path_numbers,
    shifted_steps,
)

DIFFUSIONS = ("sigma", "sbdm", "constant", "linear", "decreasing", "increasing-decreasing")
LAST_STEPS = ("mean", "tweedie", "euler")
RANGES: Table = {
    "num_train_timesteps": TRAIN_TIMESTEPS,
    "last_step_size": Real(0, 1, "SiT uses 0.04", positive=True, below=True),
    "flow_path": OneOf(PATHS),
    "diffusion": OneOf(DIFFUSIONS),
    "diffusion_norm": Real(0, 1e3, "SiT uses 1.0"),
    "last_step": OneOf(LAST_STEPS),
    "shift": SHIFT,
}
STEPPING: Table = {
    "num_inference_steps": Whole(2, MAX_STEPS, "this sampler takes at least 2 steps, SiT 250"),
    "start": Real(0, 1, positive=True),
}


@dataclass
class FlowMatchSDESchedulerOutput(BaseOutput):
    """The sample after a step, (B, C, H, W)."""

    prev_sample: torch.Tensor


class FlowMatchSDEScheduler(SchedulerMixin, ConfigMixin):
    """What both stochastic samplers share. `DEMOPipeline` hands them velocities, whatever the model predicts.

    Args:
        num_train_timesteps: the timestep of pure noise.
        last_step_size: length in s of the last step, which adds no noise (0.04 in SiT).
        flow_path: the model's path, "linear", "gvp" or "vp".
        diffusion: form of the coefficient w(s): "sigma" (of the path, SiT's default), "sbdm" (that of the forward
            SDE), "constant", "linear" (s), "decreasing" or "increasing-decreasing" (SiT's cosine and sine forms).
        diffusion_norm: factor of w; 0 makes the sampler deterministic for all forms but "decreasing".
        last_step: "mean" (the SDE without its noise), "tweedie" (the data's posterior mean) or "euler" (the ODE).
        shift: of the steps (`d_emo.schedulers.flow_paths.shift_time`): the one that the model was trained with.

    Raises:
        ValueError: an unknown word, or a number out of its range.
    """

    init_noise_sigma = 1.0

    @checked(RANGES)
    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        last_step_size: float = 0.04,
        flow_path: str = "linear",
        diffusion: str = "sigma",
        diffusion_norm: float = 1.0,
        last_step: str = "mean",
        shift: float = 1.0,
    ):
        self.sigmas = torch.empty(0)
        self.timesteps = torch.empty(0)
        self._step_index = 0

    @checked(STEPPING)
    def set_timesteps(
        self, num_inference_steps: int, device: torch.device | str | None = None, start: float = 1.0
    ) -> None:
        """Lay `num_inference_steps` steps: from `start` to `last_step_size`, even before the shift, then one to 0.

        Args:
            num_inference_steps: how many.
            device: where the timesteps are wanted.
            start: time of the noise; below 1 for models that cannot be asked there.

        Raises:
            ValueError: fewer than two steps, or a start that leaves no room for them.
        """
        if start <= self.config.last_step_size:
            raise ValueError(
                f"{type(self).__name__}: start={start} is not above last_step_size={self.config.last_step_size}, where "
                "the last step begins."
            )
        if self.config.diffusion == "sbdm" and self.config.flow_path != "vp":
            start = min(start, 1.0 - SAMPLE_MARGIN)  # w is infinite at s = 1
        sigmas = shifted_steps(start, self.config.last_step_size, num_inference_steps, self.config.shift)
        self.sigmas = torch.cat([sigmas, torch.zeros(1, dtype=torch.float64)])
        self.timesteps = self._asked(sigmas * self.config.num_train_timesteps).to(torch.float32).to(device)
        self._step_index = 0

    def step(
        self,
        model_output: torch.Tensor,
        timestep: torch.Tensor,
        sample: torch.Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
    ) -> Any:
        """Take the next step, in the order of `timesteps`.

        Args:
            model_output: (B, C, H, W) velocity dx/ds.
            timestep: the current element of `timesteps`; steps are counted, this is for the common interface.
            sample: (B, C, H, W) at the current time.
            generator: one, or one an image.
            return_dict: return an output object instead of a tuple.

        Raises:
            ValueError: all steps are done; call `set_timesteps` first.
        """
        if self._step_index >= len(self.timesteps):
            raise ValueError("no step is left; call set_timesteps before sampling.")
        for name, value in (("model_output", model_output), ("sample", sample)):
            if not isinstance(value, torch.Tensor) or value.shape != getattr(sample, "shape", None):
                raise ValueError(f"{name} is {shown(value)}; model_output and sample are tensors of one shape.")
        if self._step_index == len(self.timesteps) - 1:
            moved = self._last_step(model_output, sample)
        else:
            moved = self._moved(model_output, sample, generator)
        self._step_index += 1
        if not return_dict:
            return (moved,)
        return FlowMatchSDESchedulerOutput(prev_sample=moved)

    def _asked(self, timesteps: torch.Tensor) -> torch.Tensor:
        """The timesteps at which the model is asked, of those between the steps."""
        raise NotImplementedError

    def _moved(self, velocity: torch.Tensor, sample: torch.Tensor, generator: Any) -> torch.Tensor:
        """The sample after any step but the last."""
        raise NotImplementedError

    def _last_step(self, velocity: torch.Tensor, sample: torch.Tensor) -> torch.Tensor:
        """The sample at 0."""
        time = self.config.last_step_size
        if self.config.last_step == "mean":
            return sample + self._drift(time, velocity, sample) * time
        if self.config.last_step == "euler":
            return sample - velocity * time
        point = path_numbers(self.config.flow_path, time)
        return (sample + point.sigma**2 * self._score(point, velocity, sample)) / point.alpha

    def _drift(self, time: float, velocity: torch.Tensor, sample: torch.Tensor) -> torch.Tensor:
        """-v + w score: where a sample at a time s goes on its way to the data, but for the noise."""
        point = path_numbers(self.config.flow_path, time)
        return self._diffusion(time, point) * self._score(point, velocity, sample) - velocity

    @staticmethod
    def _score(point: PathPoint, velocity: torch.Tensor, sample: torch.Tensor) -> torch.Tensor:
        return -point.noise_of(velocity, sample) / point.sigma

    def _noise(self, step: int, sample: torch.Tensor, generator: Any) -> torch.Tensor:
        """What a step adds at random to a sample like this one."""
        noise = randn_tensor(sample.shape, generator=generator, device=sample.device, dtype=sample.dtype)
        return self._deviation(step) * noise

    def _deviation(self, step: int) -> float:
        """sqrt(2 w dt) of a step."""
        time, following = self._ends(step)
        diffusion = self._diffusion(time, path_numbers(self.config.flow_path, time))
        return math.sqrt(2 * diffusion * (time - following))

    def _ends(self, step: int) -> tuple[float, float]:
        """The times at which a step begins and ends."""
        return self.sigmas[step].item(), self.sigmas[step + 1].item()

    def _diffusion(self, time: float, point: PathPoint) -> float:
        """The coefficient w at a time s; SiT's forms, written for s."""
        form, norm = self.config.diffusion, self.config.diffusion_norm
        if form == "sigma":
            return norm * point.sigma
        if form == "sbdm":
            return norm * point.score_rate
        if form == "constant":
            return norm
        if form == "linear":
            return norm * time
        if form == "decreasing":
            return 0.25 * (norm * math.cos(math.pi * (1 - time)) + 1) ** 2
        return norm * math.sin(math.pi * time) ** 2


class FlowMatchEulerMaruyamaScheduler(FlowMatchSDEScheduler):
    """SiT's usual stochastic sampler, which asks the model once a step; arguments as of `FlowMatchSDEScheduler`."""

    order = 1

    def _asked(self, timesteps: torch.Tensor) -> torch.Tensor:
        return timesteps

    def _moved(self, velocity: torch.Tensor, sample: torch.Tensor, generator: Any) -> torch.Tensor:
        time, following = self._ends(self._step_index)
        drifted = sample + self._drift(time, velocity, sample) * (time - following)
        return drifted + self._noise(self._step_index, sample, generator)


class FlowMatchSDEHeunScheduler(FlowMatchSDEScheduler):
    """SiT's other stochastic sampler: a step adds its noise, then follows the drift by Heun's method.

    The model is asked twice a step and once in the last, as by Diffusers' Heun. A step's noise belongs before its first
    evaluation, so the call of `step` before adds it; that of the first step is in `init_noise_sigma`, by which
    pipelines multiply the noise that they start from. Arguments as of `FlowMatchSDEScheduler`.
    """

    order = 2

    @property
    def init_noise_sigma(self) -> float:  # type: ignore[override]
        """The deviation of the noise to start from, the first step's own included; known once steps are laid."""
        return math.hypot(1.0, self._deviation(0)) if len(self.sigmas) else 1.0

    def _asked(self, timesteps: torch.Tensor) -> torch.Tensor:
        return torch.cat([timesteps[:1], timesteps[1:].repeat_interleave(2)])

    def _moved(self, velocity: torch.Tensor, sample: torch.Tensor, generator: Any) -> torch.Tensor:
        step, second = divmod(self._step_index, 2)
        time, following = self._ends(step)
        if not second:
            self._start, self._first_drift = sample, self._drift(time, velocity, sample)
            return sample + self._first_drift * (time - following)
        drift = (self._first_drift + self._drift(following, velocity, sample)) / 2
        moved = self._start + drift * (time - following)
        if self._step_index == len(self.timesteps) - 2:
            return moved  # the last step adds no noise
        return moved + self._noise(step + 1, sample, generator)
