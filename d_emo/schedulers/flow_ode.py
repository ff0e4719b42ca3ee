"""Solvers of torchdiffeq, adaptive ones among them, where `DEMOPipeline` takes a Diffusers scheduler.

An adaptive solver decides by itself when to ask the model, so the pipeline hands it the velocity field instead of
stepping. SiT's script uses `dopri5` with the tolerances that are the defaults here (arXiv 2401.08740).
"""

from collections.abc import Callable

import torch
from diffusers import ConfigMixin, SchedulerMixin
from diffusers.configuration_utils import register_to_config

from d_emo.common.ranges import OneOf, Real, Table, checked
from d_emo.schedulers.flow_paths import SHIFT, STEPS, TRAIN_TIMESTEPS, shifted_steps

ADAPTIVE = ("dopri5", "dopri8", "bosh3", "fehlberg2", "adaptive_heun")
FIXED = ("euler", "midpoint", "heun2", "heun3", "rk4")
RANGES: Table = {
    "num_train_timesteps": TRAIN_TIMESTEPS,
    "method": OneOf(ADAPTIVE + FIXED),
    "atol": Real(0, 1, "SiT uses 1e-6", positive=True),
    "rtol": Real(0, 1, "SiT uses 1e-3", positive=True),
    "shift": SHIFT,
}
WAY: Table = {"start": Real(0, 1), "end": Real(0, 1), "num_inference_steps": STEPS}


class FlowMatchODESolverScheduler(SchedulerMixin, ConfigMixin):
    """An ODE solver of torchdiffeq for flow models.

    An adaptive solver chooses its steps for a whole batch: an image then depends, within the tolerances, on the others
    of its batch. `evaluations` tells how often the last run asked the model.

    Args:
        num_train_timesteps: the timestep of pure noise.
        method: adaptive ("dopri5", "dopri8", "bosh3", "fehlberg2", "adaptive_heun"), which ignores
            `num_inference_steps` and `shift`, or of fixed steps ("euler", "midpoint", "heun2", "heun3", "rk4").
        atol, rtol: absolute and relative tolerance of adaptive methods.
        shift: of the steps of a fixed method (`d_emo.schedulers.flow_paths.shift_time`): the one that the model was
            trained with.

    Raises:
        ValueError: unknown method, or a number out of its range.
        ImportError: torchdiffeq is not installed; it comes with the extra `ode`.
    """

    order = 1
    init_noise_sigma = 1.0

    @checked(RANGES)
    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        method: str = "dopri5",
        atol: float = 1e-6,
        rtol: float = 1e-3,
        shift: float = 1.0,
    ):
        try:
            import torchdiffeq  # noqa: F401
        except ImportError as error:
            raise ImportError(f"method={method!r} needs torchdiffeq; pip install 'd-emo[ode]'.") from error
        self.evaluations = 0

    @checked(WAY)
    def integrate(
        self,
        velocity: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
        sample: torch.Tensor,
        start: float,
        end: float,
        num_inference_steps: int,
    ) -> torch.Tensor:
        """Follow the velocity from `start` to `end`.

        Args:
            velocity: (timestep, sample) -> dx/ds, (B, C, H, W).
            sample: (B, C, H, W) noise.
            start, end: times s, noise at 1.
            num_inference_steps: steps of a fixed method.

        Returns:
            The sample at `end`, (B, C, H, W).
        """
        from torchdiffeq import odeint

        self.evaluations = 0

        def field(time: torch.Tensor, current: torch.Tensor) -> torch.Tensor:
            self.evaluations += 1
            return -velocity((1 - time) * self.config.num_train_timesteps, current)

        config, device = self.config, sample.device
        times = torch.tensor([1 - start, 1 - end], device=device)  # torchdiffeq counts upwards
        if config.method in ADAPTIVE:
            # Without `step_t` the last step would go beyond the end, to times that no model was trained on.
            options = {"step_t": times[-1:]}
            solved = odeint(
                field, sample, times, method=config.method, atol=config.atol, rtol=config.rtol, options=options
            )
            return solved[-1]
        # The grid as an option: as `times`, every point's sample would be kept.
        grid = (1 - shifted_steps(start, end, num_inference_steps + 1, config.shift)).to(times)
        return odeint(field, sample, times, method=config.method, options={"grid_constructor": lambda *_: grid})[-1]
