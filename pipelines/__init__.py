"""Sampling. Installed as `d_emo.pipelines`."""

from .checks import NonFiniteSampleError, default_steps
from .loading import open_pipeline
from .pipeline_demo import DEMOPipeline, DEMOPipelineOutput

__all__ = ["DEMOPipeline", "DEMOPipelineOutput", "NonFiniteSampleError", "default_steps", "open_pipeline"]
