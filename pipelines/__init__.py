"""Sampling. Installed as `d_emo.pipelines`."""

from .pipeline_demo import DEMOPipeline, DEMOPipelineOutput

__all__ = ["DEMOPipeline", "DEMOPipelineOutput"]
