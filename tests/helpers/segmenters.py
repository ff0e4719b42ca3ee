"""Tiny segmenters with random parameters."""

import torch

from d_emo import EMOv2Config, EMOv2ForSemanticSegmentation, EMOv2SegmentationConfig

HEADS = ("deeplabv3", "pspnet", "segformer", "semantic_fpn")
STRIDES = {"deeplabv3": 32, "pspnet": 32, "segformer": 4, "semantic_fpn": 4}
TINY = {"depths": [1, 1, 2, 2], "widths": [8, 8, 16, 16], "head_dims": [8, 8, 8, 8], "layer_scale": 1.0,
        "window_size": 4, "image_size": 64}  # fmt: skip
NARROW = {"head_channels": 8, "auxiliary_channels": 8, "pyramid_channels": 8}


@torch.no_grad()
def awake(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Random parameters under which the logits depend on the picture: every layer keeps the size of what comes in."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in model.state_dict().items():
        if not tensor.is_floating_point():
            continue
        noise = torch.randn(tensor.shape, generator=generator)
        if tensor.dim() > 1:
            tensor.copy_(noise * 1.5 / tensor[0].numel() ** 0.5)
        elif name.endswith(("running_var", "layer_scale")):
            tensor.copy_(0.5 + noise.abs())
        else:
            tensor.copy_(0.1 * noise + name.endswith("weight"))
    return model


def segmenter(head: str = "deeplabv3", backbone: dict | None = None, **options) -> EMOv2ForSemanticSegmentation:
    """A tiny segmenter of three classes in eval mode."""
    stages = EMOv2Config(**{**TINY, **(backbone or {})})
    names = {} if "id2label" in options else {"num_labels": 3}
    config = EMOv2SegmentationConfig(stages, head, **{**NARROW, **names, **options})
    return awake(EMOv2ForSemanticSegmentation(config)).eval()


def pixels(batch: int = 2, height: int = 64, width: int = 64, channels: int = 3, seed: int = 0) -> torch.Tensor:
    """Normalised images."""
    return torch.randn(batch, channels, height, width, generator=torch.Generator().manual_seed(seed))


def labels(batch: int = 2, height: int = 64, width: int = 64, classes: int = 3, seed: int = 0) -> torch.Tensor:
    """Ids of classes, and a strip of 255."""
    ids = torch.randint(0, classes, (batch, height, width), generator=torch.Generator().manual_seed(seed))
    ids[:, : height // 4] = 255
    return ids
