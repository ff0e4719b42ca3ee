"""Names and sizes of the video classifiers.

Source: V-EMOv2-5M of arXiv 2412.06674, Table XIII. The others are this package's: EMOv2-1M, -2M and -20M by the same
rule, which is EMOv2 with every convolution and window in time, kernels of 5 x 5 x 5 in all blocks.
"""

import fnmatch
from typing import Any

from d_emo.classification.variants import CLASSIFIERS
from d_emo.common.messages import nearest, shown

# What differs from V-EMOv2-5M, which is the network's default.
VIDEO_CLASSIFIERS: dict[str, dict[str, Any]] = {
    f"V-{name}": CLASSIFIERS[name] for name in ("EMOv2-1M", "EMOv2-2M", "EMOv2-5M", "EMOv2-20M")
}


def list_video_classifiers(pattern: str = "*") -> list[str]:
    """Names that `create_video_classifier` takes, optionally those matching a shell pattern such as `"*-5M"`."""
    if not isinstance(pattern, str):
        raise ValueError(f"pattern={shown(pattern)} is a {type(pattern).__name__}; pass a string such as '*-5M'.")
    return fnmatch.filter(VIDEO_CLASSIFIERS, pattern)


def video_config(name: str) -> dict[str, Any]:
    """What a size has other than V-EMOv2-5M.

    Raises:
        ValueError: the name is unknown, the message offers the nearest ones.
    """
    if not isinstance(name, str) or name not in VIDEO_CLASSIFIERS:
        raise ValueError(f"video classifier {shown(name)} is unknown; {nearest(name, VIDEO_CLASSIFIERS)}")
    return dict(VIDEO_CLASSIFIERS[name])
