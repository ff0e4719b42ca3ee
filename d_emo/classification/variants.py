"""Names and sizes of the classification backbones, and the function that builds one by name.

Source: Tables IV and XVI of arXiv 2412.06674 (EMOv2) and its comparison rows (EMOv1, arXiv 2301.01146).
"""

import fnmatch
from typing import Any

from d_emo.classification.emov2 import EMOv2
from d_emo.common.block_ranges import SIDE
from d_emo.common.messages import nearest, shown
from d_emo.common.ranges import checked

# EMOv1: remote windows of the input, no layer scale, kernels of 3 in the first two stages.
_V1 = {"version": 1, "attention_type": "remote", "kernel_sizes": (3, 3, 5, 5), "layer_scale": None}
_TINY = {"depths": (2, 2, 8, 3), "expansions": (2.0, 2.5, 3.0, 3.5)}
_SMALL = {"depths": (3, 3, 9, 3), "expansions": (2.0, 2.5, 3.0, 3.5)}
_LARGE = {"widths": (64, 128, 320, 448), "head_dims": (16, 32, 32, 32)}

# What differs from EMOv2-5M, which is the network's default. EMOv1-20M's head sizes were not published: EMOv2-20M's.
CLASSIFIERS: dict[str, dict[str, Any]] = {
    "EMOv2-1M": {**_TINY, "widths": (32, 48, 80, 180), "head_dims": (16, 16, 20, 20), "drop_path": 0.04036},
    "EMOv2-2M": {**_SMALL, "widths": (32, 48, 120, 200), "head_dims": (16, 16, 20, 20)},
    "EMOv2-5M": {},
    "EMOv2-20M": {**_LARGE, "depths": (3, 3, 13, 3), "drop_path": 0.1},
    "EMOv2-50M": {**_LARGE, "depths": (5, 8, 20, 7), "widths": (64, 128, 384, 512), "drop_path": 0.2},
    "EMOv1-1M": {**_V1, **_TINY, "widths": (32, 48, 80, 168), "head_dims": (16, 16, 20, 21), "drop_path": 0.04036},
    "EMOv1-2M": {**_V1, **_SMALL, "widths": (32, 48, 120, 200), "head_dims": (16, 16, 20, 20)},
    "EMOv1-5M": {**_V1, "head_dims": (24, 24, 32, 32)},
    "EMOv1-20M": {**_V1, **_LARGE, "depths": (3, 3, 13, 3), "drop_path": 0.1},
}
# Window sides by image side: 7 tokens at 224, where the last stage's grid is 7 x 7; 8 at 256 and 512.
WINDOW_SIZES = {224: 7, 256: 8, 512: 8}


def list_classifiers(pattern: str = "*") -> list[str]:
    """Names that `create_classifier` takes, optionally those matching a shell pattern such as `"EMOv2-*"`."""
    if not isinstance(pattern, str):
        raise ValueError(f"pattern={shown(pattern)} is a {type(pattern).__name__}; pass a string such as 'EMOv2-*'.")
    return fnmatch.filter(CLASSIFIERS, pattern)


@checked({"image_size": SIDE})
def classifier_config(name: str, image_size: int = 224, **overrides: Any) -> dict[str, Any]:
    """Constructor arguments of a published size.

    Args:
        name: one of `list_classifiers()`.
        image_size: decides the window: 7 tokens where 224 divides it evenly, else 8; `window_size` overrides. Below
            224 windows are clipped to the grid, which would otherwise be padded to a multiple of its size.
        **overrides: other arguments of `EMOv2`.

    Raises:
        ValueError: the name is unknown, the message offers the nearest ones; or no image has such a side.
    """
    if not isinstance(name, str) or name not in CLASSIFIERS:
        raise ValueError(f"classifier {shown(name)} is unknown; {nearest(name, CLASSIFIERS)}")
    window = WINDOW_SIZES.get(image_size, 7 if image_size % 224 == 0 else 8)
    return {**CLASSIFIERS[name], "window_size": window, "clip_window": image_size < min(WINDOW_SIZES), **overrides}


def create_classifier(name: str, image_size: int = 224, **overrides: Any) -> EMOv2:
    """Build a backbone with fresh weights.

    Args:
        name: "EMOv2-1M" to "EMOv2-50M", "EMOv1-1M" to "EMOv1-20M".
        image_size: side of the images that it is for, in pixels; any other runs too.
        **overrides: arguments of `EMOv2`, such as `num_classes=10`, `attention_type="remote"`, `drop_path=0.0`.

    Raises:
        ValueError: unknown name, or a value out of range.
        TypeError: an override that the network does not have.
    """
    return EMOv2(**classifier_config(name, image_size, **overrides))
