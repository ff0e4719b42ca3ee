"""Networks: the i2RMB block, D-EMOv2, the DiT baseline, and the table of their sizes."""

from .i2rmb import I2RMB, SpanningWindowAttention
from .transformer_base import ClassConditionalTransformer2DModel
from .transformer_demo import DEMOBlock, DEMOTransformer2DModel
from .transformer_dit import DiTBaselineTransformer2DModel, DiTBlock
from .variants import create_model, list_models

__all__ = [
    "I2RMB",
    "ClassConditionalTransformer2DModel",
    "DEMOBlock",
    "DEMOTransformer2DModel",
    "DiTBaselineTransformer2DModel",
    "DiTBlock",
    "SpanningWindowAttention",
    "create_model",
    "list_models",
]
