"""What V-EMOv2 refuses: clips that it cannot work on, in one line each."""

from typing import Any

import torch
from torch import nn

from d_emo.classification.checks import check_tensor, check_type


def check_clips(clips: Any, conv: nn.Module) -> None:
    """Refuse clips that the first layer cannot take.

    Args:
        clips: (B, T, C, H, W), normalised.
        conv: the first layer, whose parameters say how many channels and which type of numbers it takes.

    Raises:
        ValueError: it is no such tensor.
    """
    if torch.jit.is_tracing():  # every comparison would be warned of
        return
    channels = getattr(conv, "in_channels", None)
    shape = f"(B, T, {channels or 'C'}, H, W)"
    check_tensor(clips, shape, "V-EMOv2", "video processor")
    given = f"pixel_values have the shape {tuple(clips.shape)}"
    if clips.dim() != 5:
        remedy = "; for one clip pass pixel_values[None]" if clips.dim() == 4 else ""
        raise ValueError(f"{given}, not {shape}{remedy}.")
    if channels and clips.shape[2] != channels:
        remedy = ""
        if clips.shape[1] == channels:
            remedy = " (frames come before channels: permute(0, 2, 1, 3, 4))"
        elif clips.shape[4] == channels:
            remedy = " (channels come third: permute(0, 1, 4, 2, 3))"
        raise ValueError(f"{given}: {clips.shape[2]} channels, the model takes {channels}{remedy}.")
    if 0 in clips.shape:
        raise ValueError(f"{given}: no pixel; leave out empty batches.")
    check_type(clips, conv)
