"""Small parts that the diffusion transformers share: positions, patches by a bottleneck, modulated output norm.

The timestep embedding is Diffusers' own, with DiT's frequencies (see `transformer_base.py`).
"""

import torch
from torch import nn


def sincos_positions(height: int, width: int, dim: int) -> torch.Tensor:
    """Fixed 2D sine-cosine positions of any grid, as in DiT and MAE.

    The first half of the channels encodes the column, the second half the row; each half holds sines, then cosines, of
    position / 10000^(i / (dim / 4)).

    Args:
        height, width: grid in tokens.
        dim: channels; a multiple of 4.

    Returns:
        (height, width, dim), float32, values in [-1, 1].
    """
    if dim % 4:
        raise ValueError(f"dim={dim} is not a multiple of 4, which 2D sine-cosine positions need.")
    frequencies = 10000.0 ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))

    def encode(length: int) -> torch.Tensor:
        angles = torch.arange(length, dtype=torch.float64)[:, None] * frequencies
        return torch.cat([angles.sin(), angles.cos()], dim=-1)               # (length, dim / 2)

    columns = encode(width)[None].expand(height, -1, -1)                     # (height, width, dim / 2)
    rows = encode(height)[:, None].expand(-1, width, -1)                     # (height, width, dim / 2)
    return torch.cat([columns, rows], dim=-1).float()


class BottleneckPatchEmbed(nn.Module):
    """Patches by way of a few channels: raw patches of p * p * C values lie near a space of fewer dimensions.

    Source: JiT, arXiv 2511.13720, and its code (LTH14/JiT, model_jit.py): a product without bias, then one
    with it, and nothing between them.
    """

    def __init__(self, in_channels: int, patch: int, bottleneck: int, dim: int):
        super().__init__()
        self.reduce = nn.Conv2d(in_channels, bottleneck, kernel_size=patch, stride=patch, bias=False)
        self.expand = nn.Conv2d(bottleneck, dim, kernel_size=1)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) -> (B, D, h, w)."""
        return self.expand(self.reduce(hidden_states))                       # (B, N, h, w) between them


class AdaNormOut(nn.Module):
    """A norm, then shift and scale predicted from the conditioning (DiT's final layer, before its projection)."""

    def __init__(self, norm: nn.Module, dim: int):
        super().__init__()
        self.norm = norm
        self.modulation = nn.Linear(dim, 2 * dim)

    def forward(self, hidden_states: torch.Tensor, conditioning: torch.Tensor) -> torch.Tensor:
        """(B, h, w, D) and (B, D) -> (B, h, w, D)."""
        modulation = self.modulation(nn.functional.silu(conditioning))[:, None, None]
        shift, scale = modulation.chunk(2, dim=-1)                           # (B, 1, 1, D) each
        return self.norm(hidden_states) * (1 + scale) + shift
