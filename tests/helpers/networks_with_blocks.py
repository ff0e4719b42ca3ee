"""DeiT-Tiny and PVT-Tiny with iRMB and i2RMB blocks in place of their own, as in the paper's table of other networks.

How the paper put the blocks in is not published; this is the construction that gives its sizes: kernel 3 in iRMB,
5 in i2RMB, expansion 4 in DeiT, PVT's own expansions and its own shortening of keys and values in PVT.
"""

import timm
import torch
import torch.nn.functional as F
from torch import nn

from d_emo.classification.irmb import make_block

# Stages of PVT-Tiny (arXiv 2102.12122): width, heads, expansion, side that keys and values are shortened by, patch.
PVT_STAGES = ((64, 1, 8, 8, 4), (128, 2, 8, 4, 2), (320, 5, 4, 2, 2), (512, 8, 4, 1, 2))


class TokenBlock(nn.Module):
    """norm and a block's inside on the grid that a sequence of tokens stands for, added to it."""

    def __init__(self, dim: int, heads: int, version: int):
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        kind = {"kernel_size": 3, "attention_type": "remote", "window_size": 14, "attend": "inputs"}
        if version == 2:
            kind = {"kernel_size": 5, "attention_type": "spanning", "window_size": 7, "attend": "values"}
        self.inside = make_block(dim, heads, 4.0, clip_window=False, **kind)

    def forward(self, tokens: torch.Tensor, **_: object) -> torch.Tensor:
        batch, count, dim = tokens.shape
        side = int(count**0.5)
        grid = self.norm(tokens).view(batch, side, side, dim)
        return tokens + self.inside(grid).view(batch, count, dim)


def deit_tiny(version: int | None) -> nn.Module:
    """timm's DeiT-Tiny, with its own blocks (None) or with those of EMOv1 (1) or EMOv2 (2)."""
    if version is None:
        return timm.create_model("deit_tiny_patch16_224")
    model = timm.create_model("deit_tiny_patch16_224", class_token=False, global_pool="avg", fc_norm=False)
    model.blocks = nn.Sequential(*(TokenBlock(192, 3, version) for _ in range(12)))
    return model


class ReducedAttention(nn.Module):
    """PVT's attention: keys and values from a shortened grid. Its own projections, or those that a block needs."""

    def __init__(self, dim: int, heads: int, reduction: int, values_dim: int, projects_values: bool):
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(dim, dim)
        self.key = nn.Linear(dim, dim)
        self.value = nn.Linear(dim, values_dim) if projects_values else nn.Identity()
        self.shorten = nn.Conv2d(dim, dim, reduction, reduction) if reduction > 1 else None
        self.norm = nn.LayerNorm(dim) if reduction > 1 else None

    def forward(self, grid: torch.Tensor) -> torch.Tensor:
        """(B, H, W, C) -> (B, H, W, values)."""
        batch, height, width, _ = grid.shape
        short = grid
        if self.shorten is not None:
            short = self.norm(self.shorten(grid.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))

        def split(tokens: torch.Tensor) -> torch.Tensor:
            return tokens.reshape(batch, -1, self.heads, tokens.shape[-1] // self.heads).transpose(1, 2)

        query, key, value = split(self.query(grid)), split(self.key(short)), split(self.value(short))
        weights = (query @ key.transpose(2, 3) / query.shape[-1] ** 0.5).softmax(-1)
        return (weights @ value).transpose(1, 2).reshape(batch, height, width, -1)


class PVTBlock(nn.Module):
    """PVT's own block (None), or the block of EMOv1 (1) or EMOv2 (2) around its attention."""

    def __init__(self, dim: int, heads: int, expansion: int, reduction: int, version: int | None):
        super().__init__()
        inner = dim * expansion
        self.version = version
        self.norm = nn.LayerNorm(dim)
        self.attention = ReducedAttention(dim, heads, reduction, dim, projects_values=version is None)
        if version is None:
            self.project = nn.Linear(dim, dim)
            self.mlp = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, inner), nn.GELU(), nn.Linear(inner, dim))
        else:
            # Without attention of its own: expansion, depthwise convolution, projection.
            self.inside = make_block(dim, heads, expansion, kernel_size=2 * version + 1, attention_type="none")

    def forward(self, grid: torch.Tensor) -> torch.Tensor:
        """(B, H, W, C) -> (B, H, W, C)."""
        attended = self.attention(self.norm(grid))
        if self.version is not None:
            return grid + self.inside(attended)
        grid = grid + self.project(attended)
        return grid + self.mlp(grid)


class PVTTiny(nn.Module):
    """PVT-Tiny, whose network timm does not have; see `PVTBlock` for `version`."""

    def __init__(self, version: int | None, num_classes: int = 1000):
        super().__init__()
        self.embeddings, self.norms, self.positions, self.stages = (nn.ModuleList() for _ in range(4))
        channels, side = 3, 224
        for number, (dim, heads, expansion, reduction, patch) in enumerate(PVT_STAGES):
            side //= patch
            self.embeddings.append(nn.Conv2d(channels, dim, patch, patch))
            self.norms.append(nn.LayerNorm(dim))
            class_token = number == len(PVT_STAGES) - 1
            self.positions.append(nn.ParameterList([nn.Parameter(torch.zeros(side * side + class_token, dim))]))
            self.stages.append(nn.Sequential(*(PVTBlock(dim, heads, expansion, reduction, version) for _ in range(2))))
            channels = dim
        self.class_token = nn.Parameter(torch.zeros(1, channels))
        self.norm, self.head = nn.LayerNorm(channels), nn.Linear(channels, num_classes)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """(B, 3, 224, 224) -> logits; pooled, where PVT reads its class token."""
        for embed, norm, (position,), stage in zip(
            self.embeddings, self.norms, self.positions, self.stages, strict=True
        ):
            grid = norm(embed(pixels).permute(0, 2, 3, 1))
            side = grid.shape[1]
            grid = stage(grid + position[: side * side].view(1, side, side, -1))
            pixels = grid.permute(0, 3, 1, 2)
        return self.head(F.layer_norm(pixels.mean((2, 3)), (pixels.shape[1],), self.norm.weight, self.norm.bias))
