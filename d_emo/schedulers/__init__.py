"""What Diffusers' schedulers lack: SiT's stochastic sampler, and a bridge to a library of ODE solvers."""

from .flow_ode import FlowMatchODESolverScheduler
from .flow_sde import FlowMatchEulerMaruyamaScheduler

__all__ = ["FlowMatchEulerMaruyamaScheduler", "FlowMatchODESolverScheduler"]
