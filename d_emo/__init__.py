"""D-EMOv2: class-conditional image generation with i2RMB blocks on Hugging Face Diffusers.

This module is the public face of the package: the models and schedulers below it, and the pipeline built on them.
"""

__version__ = "0.1.0.dev0"

from d_emo.classification.transformers_models import (
    EMOv2Backbone,
    EMOv2Config,
    EMOv2ForImageClassification,
    register_with_transformers,
)
from d_emo.classification.variants import create_classifier, list_classifiers
from d_emo.models import DEMOTransformer2DModel, DiTBaselineTransformer2DModel, create_model, list_models
from d_emo.pipelines import DEMOPipeline
from d_emo.registration import register_with_diffusers
from d_emo.schedulers import FlowMatchEulerMaruyamaScheduler, FlowMatchODESolverScheduler

register_with_diffusers(DEMOPipeline)
register_with_transformers()

__all__ = [
    "DEMOPipeline",
    "DEMOTransformer2DModel",
    "DiTBaselineTransformer2DModel",
    "EMOv2Backbone",
    "EMOv2Config",
    "EMOv2ForImageClassification",
    "FlowMatchEulerMaruyamaScheduler",
    "FlowMatchODESolverScheduler",
    "create_classifier",
    "create_model",
    "list_classifiers",
    "list_models",
]
