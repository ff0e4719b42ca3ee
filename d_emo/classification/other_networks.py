"""DeiT-Tiny and PVT-Tiny, and both with the blocks of EMOv1 or EMOv2 in place of their own.

    from d_emo.classification.other_networks import deit_tiny, pvt_tiny
    model = deit_tiny("i2rmb", num_classes=10)

Source: Table III of arXiv 2412.06674 gives sizes and accuracies, not how the blocks were put in. Inferred is all that
follows; it has the published parameters and multiply-adds: kernel 3 in iRMB and 5 in i2RMB, expansion 4 in DeiT, PVT's
own expansions and its own shortening of keys and values in PVT, a mean over the last grid in place of the class token,
which has no place on a grid. DeiT (arXiv 2012.12877) is timm's; PVT (arXiv 2102.12122), which timm has not, is written
out here.

Shapes: B batch, H x W token grid, C channels, N tokens, h heads.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from d_emo.classification.checks import check_pixels
from d_emo.classification.emov2 import initialize
from d_emo.classification.irmb import make_block
from d_emo.classification.ranges import CLASSIFIER
from d_emo.common.block_ranges import CLASSES, SIDE
from d_emo.common.ranges import Maybe, OneOf, OneOrPair, Relation, Table, Whole, checked

BLOCKS = ("irmb", "i2rmb")
NETWORK: Table = {
    "block": Maybe(OneOf(BLOCKS)),
    "num_classes": Whole(1, CLASSES.high),
    "image_size": OneOrPair(SIDE),
    "in_channels": CLASSIFIER["in_channels"],
}
DEIT_PATCH, DEIT_WIDTH, DEIT_HEADS, DEIT_DEPTH = 16, 192, 3, 12
# Stages of PVT-Tiny: width, heads, expansion, side that keys and values are shortened by, patch.
PVT_STAGES = ((64, 1, 8, 8, 4), (128, 2, 8, 4, 2), (320, 5, 4, 2, 2), (512, 8, 4, 1, 2))
PVT_DEPTH, PVT_REDUCTION = 2, 32
NORM_EPS = 1e-6


def _whole_patches(reduction: int) -> Relation:
    def relation(values: Mapping[str, Any]) -> str:
        if any(side % reduction for side in _sides(values["image_size"])):
            return f"image_size={values['image_size']} is not a multiple of {reduction}; choose one, such as 224"
        return ""

    return relation


def _sides(image_size: Any) -> tuple[int, int]:
    return (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)


@checked(NETWORK, _whole_patches(DEIT_PATCH))
def deit_tiny(
    block: str | None = None, num_classes: int = 1000, image_size: int | tuple[int, int] = 224, in_channels: int = 3
) -> nn.Module:
    """timm's DeiT-Tiny with fresh weights, (B, in_channels, H, W) -> logits (B, num_classes).

    Args:
        block: None for its own attention and perceptron; "irmb" (EMOv1) or "i2rmb" (EMOv2) in their place.
        num_classes: of the head.
        image_size: side of the images in pixels, or height and width: multiples of 16. Only such images are taken.
        in_channels: of the images.

    Raises:
        ValueError: a value is out of range; in the forward pass: images of another size, channels or type.
        ImportError: timm is missing.
    """
    try:
        from timm.models import create_model
    except ImportError as error:
        raise ImportError("deit_tiny needs timm; pip install 'd-emo[timm]'.") from error

    sides = _sides(image_size)
    own: dict[str, Any] = {} if block is None else {"class_token": False, "global_pool": "avg", "fc_norm": False}
    model: Any = create_model(
        "deit_tiny_patch16_224", num_classes=num_classes, img_size=sides, in_chans=in_channels, **own
    )
    if block is not None:
        grid = sides[0] // DEIT_PATCH, sides[1] // DEIT_PATCH
        model.blocks = nn.Sequential(*(TokenBlock(DEIT_WIDTH, DEIT_HEADS, block, grid) for _ in range(DEIT_DEPTH)))
        model.blocks.apply(initialize)
    model.register_forward_pre_hook(_SizeCheck(sides, model.patch_embed.proj))
    return model


@checked(NETWORK, _whole_patches(PVT_REDUCTION))
def pvt_tiny(
    block: str | None = None, num_classes: int = 1000, image_size: int | tuple[int, int] = 224, in_channels: int = 3
) -> "PVTTiny":
    """PVT-Tiny with fresh weights; arguments as of `deit_tiny`, sides are multiples of 32.

    Raises:
        ValueError: a value is out of range; in the forward pass: images of another size, channels or type.
    """
    return PVTTiny(block, num_classes, _sides(image_size), in_channels)


class _SizeCheck:
    """A hook before the forward pass: images of the network's own size only, whose positions it has."""

    def __init__(self, sides: tuple[int, int], conv: nn.Module):
        self.sides, self.conv = sides, conv

    def __call__(self, module: nn.Module, arguments: tuple[Any, ...]) -> None:
        check_size(arguments[0], self.conv, self.sides)


def check_size(pixels: Any, conv: nn.Module, sides: tuple[int, int]) -> None:
    """Refuse images that are not of the one size that a network is made for.

    Raises:
        ValueError: they are not, or no such tensor (`check_pixels`).
    """
    check_pixels(pixels, conv)
    if tuple(pixels.shape[2:]) != sides:
        given = " x ".join(map(str, pixels.shape[2:]))
        wanted = " x ".join(map(str, sides))
        raise ValueError(f"pixel_values are {given}, the network takes {wanted}; resize them, or choose image_size=.")


def _kernel_size(block: str) -> int:
    return 3 if block == "irmb" else 5


class TokenBlock(nn.Module):
    """norm and a block's inside on the grid that a sequence of tokens stands for, added to it.

    Args:
        dim, heads: C and h.
        block: "irmb" (remote windows of 14, on the input itself) or "i2rmb" (spanning windows of 7, on the values).
        grid: H and W; windows shrink to smaller grids.
    """

    def __init__(self, dim: int, heads: int, block: str, grid: tuple[int, int]):
        super().__init__()
        self.grid = grid
        self.norm = nn.LayerNorm(dim, eps=NORM_EPS)
        kind: dict[str, Any] = {"attention_type": "remote", "window_size": 14, "attend": "inputs"}
        if block == "i2rmb":
            kind = {"attention_type": "spanning", "window_size": 7, "attend": "values"}
        self.inside = make_block(dim, heads, 4.0, kernel_size=_kernel_size(block), **kind)

    def forward(self, tokens: torch.Tensor, **_: object) -> torch.Tensor:
        """(B, N, C) -> (B, N, C); timm passes masks by name, of which there are none."""
        grid = self.norm(tokens).unflatten(1, self.grid)  # (B, H, W, C)
        return tokens + self.inside(grid).flatten(1, 2)


class ReducedAttention(nn.Module):
    """PVT's attention: keys and values from a shortened grid.

    Args:
        dim, heads: C and h.
        reduction: side of the patches that become one key and value.
        projects_values: whether it has a projection of values of its own, as PVT's block; others project later.
    """

    def __init__(self, dim: int, heads: int, reduction: int, projects_values: bool):
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(dim, dim)
        self.key = nn.Linear(dim, dim)
        self.value = nn.Linear(dim, dim) if projects_values else nn.Identity()
        self.shorten = nn.Conv2d(dim, dim, reduction, reduction) if reduction > 1 else None
        self.norm = nn.LayerNorm(dim) if reduction > 1 else None

    def forward(self, grid: torch.Tensor) -> torch.Tensor:
        """(B, H, W, C) -> (B, H, W, C)."""
        short = grid
        if self.shorten is not None and self.norm is not None:
            short = self.norm(self.shorten(grid.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))  # (B, H / r, W / r, C)
        query, key, value = self._split(self.query(grid)), self._split(self.key(short)), self._split(self.value(short))
        weights = (query @ key.transpose(2, 3) / query.shape[-1] ** 0.5).softmax(-1)  # (B, h, N, N / r^2)
        return (weights @ value).transpose(1, 2).reshape(grid.shape)

    def _split(self, tokens: torch.Tensor) -> torch.Tensor:
        """(B, H, W, C) -> (B, h, H * W, C / h)."""
        return tokens.flatten(1, 2).unflatten(-1, (self.heads, -1)).transpose(1, 2)


class PVTBlock(nn.Module):
    """PVT's own block (None), or the convolution of EMOv1's ("irmb") or EMOv2's ("i2rmb") behind its attention.

    Args:
        dim, heads, expansion, reduction: of the stage.
        block: see above.
    """

    def __init__(self, dim: int, heads: int, expansion: int, reduction: int, block: str | None):
        super().__init__()
        inner = dim * expansion
        self.norm = nn.LayerNorm(dim, eps=NORM_EPS)
        self.attention = ReducedAttention(dim, heads, reduction, projects_values=block is None)
        self.project = self.mlp = self.inside = None
        if block is None:
            self.project = nn.Linear(dim, dim)
            self.mlp = nn.Sequential(
                nn.LayerNorm(dim, eps=NORM_EPS), nn.Linear(dim, inner), nn.GELU(), nn.Linear(inner, dim)
            )
        else:
            # Without attention of its own: expansion, depthwise convolution, projection.
            kernel = _kernel_size(block)
            self.inside = make_block(dim, heads, expansion, kernel_size=kernel, attention_type="none")

    def forward(self, grid: torch.Tensor) -> torch.Tensor:
        """(B, H, W, C) -> (B, H, W, C)."""
        attended = self.attention(self.norm(grid))
        if self.project is None or self.mlp is None:
            assert self.inside is not None
            return grid + self.inside(attended)
        grid = grid + self.project(attended)
        return grid + self.mlp(grid)


class PVTTiny(nn.Module):
    """PVT-Tiny; see `pvt_tiny`. With its own blocks it reads a class token, else the mean of the last grid."""

    def __init__(self, block: str | None, num_classes: int, sides: tuple[int, int], in_channels: int):
        super().__init__()
        self.sides = sides
        self.embeddings, self.norms, self.stages = (nn.ModuleList() for _ in range(3))
        self.positions = nn.ParameterList()
        channels, (height, width) = in_channels, sides
        for number, (dim, heads, expansion, reduction, patch) in enumerate(PVT_STAGES):
            height, width = height // patch, width // patch
            self.embeddings.append(nn.Conv2d(channels, dim, patch, patch))
            self.norms.append(nn.LayerNorm(dim))
            extra = block is None and number == len(PVT_STAGES) - 1  # the class token's
            self.positions.append(nn.Parameter(torch.zeros(height * width + extra, dim)))
            self.stages.append(
                nn.Sequential(*(PVTBlock(dim, heads, expansion, reduction, block) for _ in range(PVT_DEPTH)))
            )
            channels = dim
        self.class_token = nn.Parameter(torch.zeros(1, 1, channels)) if block is None else None
        self.norm = nn.LayerNorm(channels, eps=NORM_EPS)
        self.head = nn.Linear(channels, num_classes)
        self.apply(initialize)
        for parameter in (*self.positions, *([] if self.class_token is None else [self.class_token])):
            nn.init.trunc_normal_(parameter, std=0.02)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """(B, in_channels, H, W) -> logits (B, num_classes)."""
        check_size(pixels, self.embeddings[0], self.sides)
        maps = pixels
        for number, (embed, norm, stage) in enumerate(zip(self.embeddings, self.norms, self.stages, strict=True)):
            grid = norm(embed(maps).permute(0, 2, 3, 1))  # (B, H, W, C)
            batch, height, width, _ = grid.shape
            position = self.positions[number]  # (N, C)
            if self.class_token is not None and number == len(self.stages) - 1:
                tokens = torch.cat([self.class_token.expand(batch, -1, -1), grid.flatten(1, 2)], 1) + position
                tokens = stage(tokens[:, None])  # (B, 1, N, C), a grid of one row
                return self.head(self.norm(tokens[:, 0, 0]))
            grid = stage(grid + position.view(1, height, width, -1))
            maps = grid.permute(0, 3, 1, 2)
        return self.head(self.norm(maps.mean((2, 3))))
