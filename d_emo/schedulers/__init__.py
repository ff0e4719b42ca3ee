"""What Diffusers' schedulers lack: SiT's stochastic samplers, and a bridge to a library of ODE solvers."""

from .flow_ode import FlowMatchODESolverScheduler
from .flow_sde import FlowMatchEulerMaruyamaScheduler, FlowMatchSDEHeunScheduler

__all__ = ["FlowMatchEulerMaruyamaScheduler", "FlowMatchODESolverScheduler", "FlowMatchSDEHeunScheduler"]
