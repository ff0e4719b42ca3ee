"""The stochastic sampler of SiT (arXiv 2401.08740, section 2.4 and appendix) as a Diffusers scheduler.

Euler-Maruyama on the reverse SDE of linear flow matching, diffusion coefficient w = sigma, and a last deterministic
step. In Diffusers' convention sigma is 1 for noise and 0 for data, the timestep is 1000 sigma, and the model predicts
noise - data. With v = data - noise and the score (t v - x) / sigma at t = 1 - sigma, the drift is
v + w score = (2 - sigma) v - x.
"""

from dataclasses import dataclass
from typing import Any

import torch
from diffusers import ConfigMixin, SchedulerMixin
from diffusers.configuration_utils import register_to_config
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor


@dataclass
class FlowMatchEulerMaruyamaSchedulerOutput(BaseOutput):
    """The sample after a step, (B, C, H, W)."""

    prev_sample: torch.Tensor


class FlowMatchEulerMaruyamaScheduler(SchedulerMixin, ConfigMixin):
    """Stochastic sampler for models that predict the flow, noise - data.

    Args:
        num_train_timesteps: the timestep of pure noise.
        last_step_size: length in sigma of the last step, which adds no noise (SiT's "Mean"; 0.04 there).
    """

    order = 1
    init_noise_sigma = 1.0

    @register_to_config
    def __init__(self, num_train_timesteps: int = 1000, last_step_size: float = 0.04):
        if not 0 < last_step_size < 1:
            raise ValueError(f"last_step_size={last_step_size} is not between 0 and 1; SiT uses 0.04.")
        self.sigmas = torch.empty(0)
        self.timesteps = torch.empty(0)
        self._step_index = 0

    def set_timesteps(self, num_inference_steps: int, device: torch.device | str | None = None) -> None:
        """Lay `num_inference_steps` steps: even ones from sigma 1 to `last_step_size`, then one to 0.

        Raises:
            ValueError: fewer than two steps.
        """
        if num_inference_steps < 2:
            raise ValueError(f"num_inference_steps={num_inference_steps}: this sampler takes at least 2 steps.")
        sigmas = torch.linspace(1.0, self.config.last_step_size, num_inference_steps, dtype=torch.float64)
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
            model_output: (B, C, H, W) predicted noise - data.
            timestep: the current element of `timesteps`; steps are counted, this is for the common interface.
            sample: (B, C, H, W) at the current sigma.
            generator: one, or one an image.
            return_dict: return an output object instead of a tuple.

        Raises:
            ValueError: all steps are done; call `set_timesteps` first.
        """
        if self._step_index >= len(self.timesteps):
            raise ValueError("no step is left; call set_timesteps before sampling.")
        sigma, following = self.sigmas[self._step_index].item(), self.sigmas[self._step_index + 1].item()
        length = sigma - following
        drift = (2.0 - sigma) * -model_output - sample
        moved = sample + drift * length
        if following > 0:
            noise = randn_tensor(sample.shape, generator=generator, device=sample.device, dtype=sample.dtype)
            moved = moved + (2.0 * sigma * length) ** 0.5 * noise
        self._step_index += 1
        if not return_dict:
            return (moved,)
        return FlowMatchEulerMaruyamaSchedulerOutput(prev_sample=moved)
