"""U-EMOv2's configuration in transformers, which `d_emo.registration` enters in `AutoConfig`.

It imports no network, no model class and no Auto class: transformers may be in the middle of importing itself.
"""

from importlib import import_module
from typing import Any

from d_emo.common.ranges import checked
from d_emo.segmentation.transformers_config import SegmenterConfig
from d_emo.segmentation.unet_ranges import UNET_SEGMENTER, image_divides, pairs_fit


class UEMOv2Config(SegmenterConfig):
    """Configuration of U-EMOv2-5M, and with `block="conv"` of the plain UNet-S5-D16 beside it.

    Args:
        block, base_channels, depth, expansion, head_dim, window_size, clip_window, kernel_size, layer_scale: see
            `d_emo.segmentation.unet.UNet`.
        num_channels: of the images.
        head_channels: of DeepLabv3's head, on the finest output.
        auxiliary: learn with a second head on the second finest output.
        auxiliary_channels: of that head.
        image_size: side in pixels that the image processor resizes to; a multiple of 2^(depth - 1).
        **more: see `SegmenterConfig`. 2 classes as published: background and vessel.

    Raises:
        ValueError: a value out of range, heads that do not divide the channels, or names of classes that are no list.
    """

    model_type = "u_emov2"

    @checked(UNET_SEGMENTER, pairs_fit, image_divides)
    def __init__(
        self,
        block: str = "i2rmb",
        num_channels: int = 3,
        base_channels: int = 64,
        depth: int = 5,
        expansion: float = 2.0,
        head_dim: int = 32,
        window_size: int = 8,
        clip_window: bool = False,
        kernel_size: int = 5,
        layer_scale: float | None = 1e-6,
        head_channels: int = 16,
        auxiliary: bool = True,
        auxiliary_channels: int = 64,
        image_size: int = 256,
        **more: Any,
    ):
        import_module("d_emo.segmentation.unet_models")  # see SegmenterConfig
        self.num_channels = num_channels
        super().__init__(**more)
        self.block = block
        self.base_channels = base_channels
        self.depth = depth
        self.expansion = expansion
        self.head_dim = head_dim
        self.window_size = window_size
        self.clip_window = clip_window
        self.kernel_size = kernel_size
        self.layer_scale = layer_scale
        self.head_channels = head_channels
        self.auxiliary = auxiliary
        self.auxiliary_channels = auxiliary_channels
        self.image_size = image_size
