"""Names of the published segmenters, and the function that builds one by name.

Source: tables XI and A4 of arXiv 2412.06674, the configurations and logs of its authors (github:zhangzjn/EMOv2 at
582a96f).
"""

import fnmatch
from collections.abc import Callable
from typing import Any

from d_emo.classification.variants import CLASSIFIERS
from d_emo.common.messages import shown
from d_emo.segmentation.transformers_models import SegmentationPreTrainedModel

# Windows other than 10 tokens (config). EMOv1-20M's and 50M's were not published: 10, as the rest.
WINDOW_SIZES = {"EMOv1-1M": 7, "EMOv1-2M": 7, "EMOv1-5M": 16}
# Channels of SegFormer's head other than 288 (log of EMOv2-1M; EMOv1-1M has the same by inference).
SEGFORMER_CHANNELS = {"EMOv2-1M": 180, "EMOv1-1M": 180}
# Networks that are segmenters as a whole: name -> function of (num_classes, overrides).
WHOLE_NETWORKS: dict[str, Callable[[int, dict[str, Any]], SegmentationPreTrainedModel]] = {}


def list_segmenters(pattern: str = "*") -> list[str]:
    """Names that `create_segmenter` takes, optionally those matching a shell pattern such as `"EMOv2-*"`.

    Names of backbones take each of the heads "deeplabv3", "pspnet", "segformer" and "semantic_fpn".
    """
    if not isinstance(pattern, str):
        raise ValueError(f"pattern={shown(pattern)} is a {type(pattern).__name__}; pass a string such as 'EMOv2-*'.")
    return fnmatch.filter([*CLASSIFIERS, *WHOLE_NETWORKS], pattern)
