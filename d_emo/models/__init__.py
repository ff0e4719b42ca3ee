"""Networks: the i2RMB block, D-EMOv2, the baselines DiT, LightningDiT and JiT, and the table of their sizes."""

from .i2rmb import I2RMB, SpanningWindowAttention
from .rotary import RotaryBlock
from .transformer_base import ClassConditionalTransformer2DModel
from .transformer_demo import DEMOBlock, DEMOTransformer2DModel
from .transformer_dit import DiTBaselineTransformer2DModel, DiTBlock
from .transformer_jit import JiTTransformer2DModel
from .transformer_lightningdit import LightningDiTTransformer2DModel
from .variants import create_model, list_models

__all__ = [
    "I2RMB",
    "ClassConditionalTransformer2DModel",
    "DEMOBlock",
    "DEMOTransformer2DModel",
    "DiTBaselineTransformer2DModel",
    "DiTBlock",
    "JiTTransformer2DModel",
    "LightningDiTTransformer2DModel",
    "RotaryBlock",
    "SpanningWindowAttention",
    "create_model",
    "list_models",
]
