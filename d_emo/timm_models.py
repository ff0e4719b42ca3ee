"""EMOv1 and EMOv2 under timm's names, from the import of this module on; see `d_emo.classification.timm_models`."""

from d_emo.classification.timm_models import TimmEMOv2, timm_name

__all__ = ["TimmEMOv2", "timm_name"]
