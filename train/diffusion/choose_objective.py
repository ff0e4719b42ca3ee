"""The objective that a run's options name."""

from collections.abc import Sequence

from d_emo.train.diffusion.config import OptimizationOptions
from d_emo.train.diffusion.flow_map import FlowMapObjective
from d_emo.train.diffusion.flow_map_options import FlowMapOptions
from d_emo.train.diffusion.objectives import DiTObjective, FlowObjective, Objective


def make_objective(
    options: OptimizationOptions, shape: Sequence[int] | None = None, flow_map: FlowMapOptions | None = None
) -> Objective:
    """The objective of a model that sees (C, H, W); see `FlowObjective`."""
    if options.objective == "dit":
        return DiTObjective(options.min_snr_gamma)
    if options.objective == "sit":
        return FlowObjective(options, shape)
    return FlowMapObjective(options, flow_map or FlowMapOptions(), shape)
