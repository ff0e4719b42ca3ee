"""D-EMOv2: class-conditional image generation with i2RMB blocks on Hugging Face Diffusers.

This module is the public face of the package: the models and schedulers below it, and the pipeline built on them. A
name is looked up where it lives when it is first used, and Diffusers and transformers hear of the package's classes
when they are imported themselves (`registration`); `import d_emo` alone loads none of them, nor PyTorch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from d_emo.registration import register

if TYPE_CHECKING:
    from d_emo import detection as detection
    from d_emo import export as export
    from d_emo import kernels as kernels
    from d_emo import timm_models as timm_models
    from d_emo.classification.transformers_models import (
        EMOv2Backbone,
        EMOv2Config,
        EMOv2ForImageClassification,
        EMOv2Model,
        make_image_processor,
    )
    from d_emo.classification.variants import create_classifier, list_classifiers
    from d_emo.common.averaging import WeightAverage
    from d_emo.common.float16 import save_float16
    from d_emo.common.packaged import list_packaged, packaged
    from d_emo.models import (
        DEMOTransformer2DModel,
        DiTBaselineTransformer2DModel,
        JiTTransformer2DModel,
        LightningDiTTransformer2DModel,
        create_model,
        list_models,
    )
    from d_emo.pipelines import DEMOPipeline
    from d_emo.schedulers import (
        FlowMatchEulerMaruyamaScheduler,
        FlowMatchODESolverScheduler,
        FlowMatchSDEHeunScheduler,
    )
    from d_emo.segmentation.sliding import predict_in_windows
    from d_emo.segmentation.transformers_config import EMOv2SegmentationConfig
    from d_emo.segmentation.transformers_models import EMOv2ForSemanticSegmentation
    from d_emo.segmentation.unet_config import UEMOv2Config
    from d_emo.segmentation.unet_models import UEMOv2ForSemanticSegmentation
    from d_emo.segmentation.variants import create_segmenter, list_segmenters
    from d_emo.video.processing import make_video_processor
    from d_emo.video.reading import read_clip
    from d_emo.video.sizes import list_video_classifiers
    from d_emo.video.transformers_models import VEMOv2Config, VEMOv2ForVideoClassification
    from d_emo.video.variants import create_video_classifier

__version__ = "0.1.0"

__all__ = [
    "DEMOPipeline",
    "DEMOTransformer2DModel",
    "DiTBaselineTransformer2DModel",
    "EMOv2Backbone",
    "EMOv2Config",
    "EMOv2ForImageClassification",
    "EMOv2ForSemanticSegmentation",
    "EMOv2Model",
    "EMOv2SegmentationConfig",
    "FlowMatchEulerMaruyamaScheduler",
    "FlowMatchODESolverScheduler",
    "FlowMatchSDEHeunScheduler",
    "JiTTransformer2DModel",
    "LightningDiTTransformer2DModel",
    "UEMOv2Config",
    "UEMOv2ForSemanticSegmentation",
    "VEMOv2Config",
    "VEMOv2ForVideoClassification",
    "WeightAverage",
    "create_classifier",
    "create_model",
    "create_segmenter",
    "create_video_classifier",
    "list_classifiers",
    "list_models",
    "list_packaged",
    "list_segmenters",
    "list_video_classifiers",
    "make_image_processor",
    "make_video_processor",
    "packaged",
    "predict_in_windows",
    "read_clip",
    "save_float16",
]

# Where the names of `__all__` live.
_HOMES = {
    "DEMOPipeline": "d_emo.pipelines",
    "DEMOTransformer2DModel": "d_emo.models",
    "DiTBaselineTransformer2DModel": "d_emo.models",
    "EMOv2Backbone": "d_emo.classification.transformers_models",
    "EMOv2Config": "d_emo.classification.transformers_models",
    "EMOv2ForImageClassification": "d_emo.classification.transformers_models",
    "EMOv2ForSemanticSegmentation": "d_emo.segmentation.transformers_models",
    "EMOv2Model": "d_emo.classification.transformers_models",
    "EMOv2SegmentationConfig": "d_emo.segmentation.transformers_config",
    "FlowMatchEulerMaruyamaScheduler": "d_emo.schedulers",
    "FlowMatchODESolverScheduler": "d_emo.schedulers",
    "FlowMatchSDEHeunScheduler": "d_emo.schedulers",
    "JiTTransformer2DModel": "d_emo.models",
    "LightningDiTTransformer2DModel": "d_emo.models",
    "UEMOv2Config": "d_emo.segmentation.unet_config",
    "UEMOv2ForSemanticSegmentation": "d_emo.segmentation.unet_models",
    "VEMOv2Config": "d_emo.video.transformers_models",
    "VEMOv2ForVideoClassification": "d_emo.video.transformers_models",
    "WeightAverage": "d_emo.common.averaging",
    "create_classifier": "d_emo.classification.variants",
    "create_model": "d_emo.models",
    "create_segmenter": "d_emo.segmentation.variants",
    "create_video_classifier": "d_emo.video.variants",
    "list_classifiers": "d_emo.classification.variants",
    "list_models": "d_emo.models",
    "list_packaged": "d_emo.common.packaged",
    "list_segmenters": "d_emo.segmentation.variants",
    "list_video_classifiers": "d_emo.video.sizes",
    "make_image_processor": "d_emo.classification.transformers_models",
    "make_video_processor": "d_emo.video.processing",
    "packaged": "d_emo.common.packaged",
    "predict_in_windows": "d_emo.segmentation.sliding",
    "read_clip": "d_emo.video.reading",
    "save_float16": "d_emo.common.float16",
}
# Modules that are there as attributes without an import of their own.
_MODULES = (
    "classification", "common", "detection", "eval", "export", "images", "kernels", "models", "pipelines",
    "schedulers", "segmentation", "timm_models", "train", "video",
)  # fmt: skip


def __getattr__(name: str) -> Any:
    """The class, function or module of that name, imported at its first use (PEP 562)."""
    if name in _MODULES:
        return import_module(f"d_emo.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module 'd_emo' has no attribute {name!r}")
    found = globals()[name] = getattr(import_module(_HOMES[name]), name)
    return found


def __dir__() -> list[str]:
    """What is there now, and what would be at its first use."""
    return sorted({*globals(), *__all__, *_MODULES})


register()
