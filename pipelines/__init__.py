"""Sampling. Installed as `d_emo.pipelines`."""

from .loading import open_pipeline
from .pipeline_demo import DEMOPipeline, DEMOPipelineOutput
from .scheduling_flow_sde import FlowMatchEulerMaruyamaScheduler

__all__ = ["DEMOPipeline", "DEMOPipelineOutput", "FlowMatchEulerMaruyamaScheduler", "open_pipeline"]
