"""Sampling. Installed as `d_emo.pipelines`."""

from .loading import open_pipeline
from .pipeline_demo import DEMOPipeline, DEMOPipelineOutput

__all__ = ["DEMOPipeline", "DEMOPipelineOutput", "open_pipeline"]
