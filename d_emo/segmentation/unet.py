"""U-EMOv2 and the plain UNet-S5-D16 beside it: one encoder-decoder, told apart by what a stage's pair is.

Sources: "EMOv2: Pushing 5M Vision Model Frontier", arXiv 2412.06674, Table XII, its published configuration and log
(github:zhangzjn/EMOv2 at 582a96f); "U-Net", arXiv 1505.04597, in mmsegmentation's variant of 5 stages. The table's
run of U-EMOv2 has no published log: the published file has windows of 10, and the published log LayerNorm and GELU in
the depthwise branch, other scores and other multiply-adds than the table. Windows of 8 and this package's BatchNorm
and SiLU there, the defaults, give the table's parameters and its 228G at 512 x 512.

Shapes: B batch, H x W image, C channels of a skip, D = 2^(depth - 1) the smallest grid's reduction.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import nn

from d_emo.classification.checks import check_pixels, refuse_single_values
from d_emo.classification.emov2 import EMOBlock
from d_emo.common.ranges import checked
from d_emo.models.checkpointing import checkpoint_block
from d_emo.segmentation.heads import ConvUnit
from d_emo.segmentation.unet_ranges import UNET, pairs_fit


class Pair(nn.Module):
    """Two blocks of one grid; the first one changes the channels.

    Args:
        blocks: two of (B, C, H, W) -> (B, O, H, W), or of channels last.
        channels_last: which of the two they are.

    Attributes:
        gradient_checkpointing: compute activations again in the backward pass instead of keeping them; BatchNorm's
            running statistics stay exact.
    """

    def __init__(self, blocks: Sequence[nn.Module], channels_last: bool):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.channels_last = channels_last
        self.gradient_checkpointing = False

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) -> (B, O, H, W)."""
        if self.channels_last:
            features = features.permute(0, 2, 3, 1)  # (B, H, W, C)
        again = self.gradient_checkpointing and self.training and torch.is_grad_enabled()
        for block in self.blocks:
            features = checkpoint_block(block, features) if again else block(features)
        return features.permute(0, 3, 1, 2) if self.channels_last else features  # (B, O, H, W)


class UpStage(nn.Module):
    """A step of the decoder: doubles the grid, brings the skip in, and works on both with a pair.

    Args:
        coarse_channels: of what comes from below.
        channels: C, of the skip.
        pair: (B, 2C, H, W) -> (B, C, H, W).
    """

    def __init__(self, coarse_channels: int, channels: int, pair: Pair):
        super().__init__()
        self.reduce = ConvUnit(coarse_channels, channels, 1)
        self.pair = pair

    def forward(self, coarse: torch.Tensor, skip: torch.Tensor) -> torch.Tensor:
        """(B, coarse, H / 2, W / 2) and (B, C, H, W) -> (B, C, H, W)."""
        finer = F.interpolate(coarse, scale_factor=2, mode="bilinear", align_corners=False)  # (B, coarse, H, W)
        return self.pair(torch.cat((skip, self.reduce(finer)), dim=1))  # (B, 2C, H, W) -> (B, C, H, W)


class UNet(nn.Module):
    """Encoder and decoder without a head; `create_segmenter("U-EMOv2-5M")` and `("UNet-S5-D16")` build the published.

    Encoder: two 3x3 units from the image; then, a stage, 2x2 max pooling and a pair. Decoder: see `UpStage`. Each
    stage halves the grid and doubles the channels.

    Args:
        block: what pairs are made of, "i2rmb" (U-EMOv2) or "conv" (3x3 units, the plain UNet). The first stage's pair
            is two 3x3 units in both.
        in_channels: of the images.
        base_channels: of the first stage.
        depth: stages of the encoder; H and W are multiples of D = 2^(depth - 1).
        expansion: E / C of an i2RMB block.
        head_dim: channels of a query or key head; divides base_channels.
        window_size: window side in tokens; 8 divides every grid of 256 x 256 images, 10 is the published file's.
        clip_window: shrink windows to grids smaller than them, which are otherwise padded up, as published.
        kernel_size: odd side of a block's depthwise convolution.
        layer_scale: initial scale of a block's branch, None for none.

    The last five say nothing to the plain UNet. Weights begin as PyTorch's; `UEMOv2ForSemanticSegmentation` draws the
    published.

    Raises:
        ValueError: a value out of range, or heads that do not divide the channels.
    """

    @checked(UNET, pairs_fit)
    def __init__(
        self,
        block: str = "i2rmb",
        in_channels: int = 3,
        base_channels: int = 64,
        depth: int = 5,
        expansion: float = 2.0,
        head_dim: int = 32,
        window_size: int = 8,
        clip_window: bool = False,
        kernel_size: int = 5,
        layer_scale: float | None = 1e-6,
    ):
        super().__init__()
        self.reduction = 2 ** (depth - 1)
        widths = [base_channels * 2**stage for stage in range(depth)]

        def conv_pair(channels: int, width: int) -> Pair:
            return Pair([ConvUnit(channels, width, 3), ConvUnit(width, width, 3)], channels_last=False)

        def i2rmb_pair(channels: int, width: int) -> Pair:
            blocks = [
                EMOBlock(
                    before,
                    width,
                    expansion=expansion,
                    head_dim=head_dim,
                    norm="layer",
                    activation="gelu",
                    attention_type="spanning",
                    attend="values",
                    window_size=window_size,
                    clip_window=clip_window,
                    kernel_size=kernel_size,
                    dilation=1,
                    local="conv",
                    arrangement="cascaded",
                    stride=1,
                    # Neither around the block nor around its convolution, where the channels change.
                    skip=before == width,
                    layer_scale=layer_scale,
                    drop_path=0.0,
                )
                for before in (channels, width)
            ]
            return Pair(blocks, channels_last=True)

        make_pair = conv_pair if block == "conv" else i2rmb_pair
        self.encoder = nn.ModuleList([conv_pair(in_channels, base_channels)])
        self.decoder = nn.ModuleList()  # coarse to fine
        for coarse, width in pairwise(widths):
            self.encoder.append(make_pair(coarse, width))
        for width in reversed(widths[:-1]):
            self.decoder.append(UpStage(2 * width, width, make_pair(2 * width, width)))
        self.channels = [*reversed(widths)]  # of what `forward` gives

    @property
    def first_layer(self) -> nn.Module:
        """The convolution that takes the images."""
        return next(layer for layer in self.modules() if isinstance(layer, nn.Conv2d))

    def forward(self, pixels: torch.Tensor) -> list[torch.Tensor]:
        """(B, 3, H, W) -> the decoder's outputs from coarse to fine, (B, C, H / s, W / s) for s = D, ..., 2, 1.

        The first is the encoder's last output. C doubles with s, from `base_channels` at s = 1.

        Raises:
            ValueError: images of another shape or type, or whose sides are no multiples of D.
        """
        self.check(pixels)
        skips = [self.encoder[0](pixels)]  # (B, C, H, W)
        for pair in self.encoder[1:]:
            skips.append(pair(F.max_pool2d(skips[-1], 2)))  # (B, 2C, H / 2, W / 2)
        outputs = [skips.pop()]  # (B, C, H / D, W / D)
        for stage in self.decoder:
            outputs.append(stage(outputs[-1], skips.pop()))  # (B, C / 2, 2H / D, 2W / D)
        return outputs

    def check(self, pixels: torch.Tensor) -> None:
        """Refuse images that the network cannot take; see `forward`."""
        check_pixels(pixels, self.first_layer)
        if torch.jit.is_tracing():
            return
        (height, width), multiple = pixels.shape[2:], self.reduction
        if height % multiple or width % multiple:
            raise ValueError(
                f"images of {height} x {width} have sides that are no multiples of {multiple}; resize or pad them, "
                "or cut them into windows by d_emo.predict_in_windows."
            )
        refuse_single_values(self, pixels, multiple)
