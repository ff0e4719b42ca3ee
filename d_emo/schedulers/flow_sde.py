"""The stochastic sampler of SiT (arXiv 2401.08740, section 2.4 and appendix) as a Diffusers scheduler.

Euler-Maruyama on the reverse SDE of a flow, and a last deterministic step. In Diffusers' convention time s is 1 for
noise and 0 for data, the timestep is 1000 s, and the velocity is v = dx/ds. Towards the data, with t = 1 - s:

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
from d_emo.schedulers.flow_paths import MAX_STEPS, PATHS, SAMPLE_MARGIN, TRAIN_TIMESTEPS, PathPoint, path_numbers

DIFFUSIONS = ("sigma", "sbdm", "constant", "linear", "decreasing", "increasing-decreasing")
LAST_STEPS = ("mean", "tweedie", "euler")
RANGES: Table = {
    "num_train_timesteps": TRAIN_TIMESTEPS,
    "last_step_size": Real(0, 1, "SiT uses 0.04", positive=True, below=True),
    "flow_path": OneOf(PATHS),
    "diffusion": OneOf(DIFFUSIONS),
    "diffusion_norm": Real(0, 1e3, "SiT uses 1.0"),
    "last_step": OneOf(LAST_STEPS),
}
STEPPING: Table = {
    "num_inference_steps": Whole(2, MAX_STEPS, "this sampler takes at least 2 steps, SiT 250"),
    "start": Real(0, 1, positive=True),
}


@dataclass
class FlowMatchEulerMaruyamaSchedulerOutput(BaseOutput):
    """The sample after a step, (B, C, H, W)."""

    prev_sample: torch.Tensor


class FlowMatchEulerMaruyamaScheduler(SchedulerMixin, ConfigMixin):
    """Stochastic sampler for flow models. `DEMOPipeline` hands it velocities, whatever the model predicts.

    Args:
        num_train_timesteps: the timestep of pure noise.
        last_step_size: length in s of the last step, which adds no noise (0.04 in SiT).
        flow_path: the model's path, "linear", "gvp" or "vp".
        diffusion: form of the coefficient w(s): "sigma" (of the path, SiT's default), "sbdm" (that of the forward
            SDE), "constant", "linear" (s), "decreasing" or "increasing-decreasing" (SiT's cosine and sine forms).
        diffusion_norm: factor of w; 0 makes the sampler deterministic for all forms but "decreasing".
        last_step: "mean" (the SDE without its noise), "tweedie" (the data's posterior mean) or "euler" (the ODE).

    Raises:
        ValueError: an unknown word, or a number out of its range.
    """

    order = 1
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
    ):
        self.sigmas = torch.empty(0)
        self.timesteps = torch.empty(0)
        self._step_index = 0

    @checked(STEPPING)
    def set_timesteps(
        self, num_inference_steps: int, device: torch.device | str | None = None, start: float = 1.0
    ) -> None:
        """Lay `num_inference_steps` steps: even ones from `start` to `last_step_size`, then one to 0.

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
        sigmas = torch.linspace(start, self.config.last_step_size, num_inference_steps, dtype=torch.float64)
        self.sigmas = torch.cat([sigmas, torch.zeros(1, dtype=torch.float64)])
        self.timesteps = (sigmas * self.config.num_train_timesteps).to(torch.float32).to(device)
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
        time, following = self.sigmas[self._step_index].item(), self.sigmas[self._step_index + 1].item()
        length = time - following
        point = path_numbers(self.config.flow_path, time)
        score = -point.noise_of(model_output, sample) / point.sigma
        diffusion = self._diffusion(time, point)
        if following > 0:
            noise = randn_tensor(sample.shape, generator=generator, device=sample.device, dtype=sample.dtype)
            moved = sample + (diffusion * score - model_output) * length + math.sqrt(2 * diffusion * length) * noise
        elif self.config.last_step == "mean":
            moved = sample + (diffusion * score - model_output) * length
        elif self.config.last_step == "tweedie":
            moved = (sample + point.sigma**2 * score) / point.alpha
        else:
            moved = sample - model_output * length
        self._step_index += 1
        if not return_dict:
            return (moved,)
        return FlowMatchEulerMaruyamaSchedulerOutput(prev_sample=moved)

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
