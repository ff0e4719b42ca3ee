"""Sampling. Installed as `d_emo.pipelines`."""

from .pipeline_demo import DEMOPipeline, DEMOPipelineOutput
from .scheduling_flow_sde import FlowMatchEulerMaruyamaScheduler

__all__ = ["DEMOPipeline", "DEMOPipelineOutput", "FlowMatchEulerMaruyamaScheduler"]
