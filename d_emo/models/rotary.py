"""The block of 2025's transformers: RMSNorm, rotary positions, normed queries and keys, SwiGLU.

Sources: "Reconstruction vs. Generation" (LightningDiT), arXiv 2501.01423, and its code (hustvl/LightningDiT,
models/lightningdit.py, pos_embed.py, swiglu_ffn.py); JiT, arXiv 2511.13720 (LTH14/JiT, model_jit.py,
util/model_util.py). Both have this block; rotary positions over two axes are EVA-02's (arXiv 2303.11331).

Shapes: B batch, L tokens in a sequence, D hidden size, n heads, d = D / n, I = 2/3 mlp_ratio D inner channels.
"""

import torch
import torch.nn.functional as F
from torch import nn

from d_emo.common.block_ranges import BLOCK
from d_emo.common.ranges import Flag, checked

from .ranges import gate_expands, rotary_heads_fit

THETA = 10_000.0


def rotary_angles(rows: int, columns: int, head_dim: int, device: torch.device) -> torch.Tensor:
    """By how much each pair of a head's channels is turned at each place of a grid.

    The first half of the pairs turns with the row, the second half with the column, pair i of a half by
    position * 10000^(-i / (d / 4)).

    Args:
        rows, columns: grid in tokens, of any size.
        head_dim: d, a multiple of 4.
        device: where.

    Returns:
        (rows * columns, d / 2) radians, float32.
    """
    pairs = head_dim // 4
    frequencies = THETA ** (-torch.arange(pairs, device=device, dtype=torch.float32) / pairs)
    by_row = torch.arange(rows, device=device)[:, None] * frequencies  # (h, d / 4)
    by_column = torch.arange(columns, device=device)[:, None] * frequencies  # (w, d / 4)
    by_row = by_row[:, None].expand(-1, columns, -1)  # (h, w, d / 4)
    by_column = by_column[None].expand(rows, -1, -1)  # (h, w, d / 4)
    return torch.cat([by_row, by_column], dim=-1).flatten(0, 1)  # (h * w, d / 2)


def turned(heads: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    """(B, n, L, d) with each pair of neighbouring channels turned by (L, d / 2) angles, float32."""
    cos, sin = angles.cos(), angles.sin()  # (L, d / 2) each
    even, odd = heads.float().unflatten(-1, (-1, 2)).unbind(-1)  # (B, n, L, d / 2) each
    return torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1).flatten(-2)


def time_from_data(timestep: torch.Tensor) -> torch.Tensor:
    """Both networks' own time, 1 at the data and 0 at the noise, of Diffusers' timestep."""
    return 1.0 - timestep / 1000.0


class RMSNorm(nn.RMSNorm):
    """PyTorch's, with its weight in the input's type, so that mixed precision meets one kernel."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., C) -> (..., C); half precision is squared and added in float32."""
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


class RotaryBlock(nn.Module):
    """Self-attention with rotary positions, and a gated MLP, each modulated and gated by the conditioning.

    Args:
        dim: channels D.
        num_heads: heads n; D / n is a multiple of 4.
        mlp_ratio: inner channels of a plain MLP over D; the gated one has two thirds of them, and as many parameters.
        norm_eps: epsilon of all norms.
        qk_norm: norm queries and keys, head by head.
    """

    @checked({**BLOCK, "qk_norm": Flag()}, gate_expands, rotary_heads_fit)
    def __init__(self, dim: int, num_heads: int, mlp_ratio: float, norm_eps: float = 1e-6, qk_norm: bool = True):
        super().__init__()
        self.num_heads = num_heads
        inner = 2 * int(dim * mlp_ratio) // 3
        self.norm1 = RMSNorm(dim, eps=norm_eps)
        self.to_qkv = nn.Linear(dim, 3 * dim)
        self.norm_q = RMSNorm(dim // num_heads, eps=norm_eps) if qk_norm else nn.Identity()
        self.norm_k = RMSNorm(dim // num_heads, eps=norm_eps) if qk_norm else nn.Identity()
        self.to_out = nn.Linear(dim, dim)
        self.norm2 = RMSNorm(dim, eps=norm_eps)
        self.mlp_in = nn.Linear(dim, 2 * inner)
        self.mlp_out = nn.Linear(inner, dim)
        self.modulation = nn.Linear(dim, 6 * dim)

    def forward(self, hidden_states: torch.Tensor, conditioning: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
        """(B, L, D), (B, D) and (L, d / 2) -> (B, L, D)."""
        modulation = self.modulation(F.silu(conditioning))[:, None]  # (B, 1, 6D)
        shift_attn, scale_attn, gate_attn, shift_mlp, scale_mlp, gate_mlp = modulation.chunk(6, dim=-1)
        normed = self.norm1(hidden_states) * (1 + scale_attn) + shift_attn  # (B, L, D)
        hidden_states = hidden_states + gate_attn * self._attend(normed, angles)
        normed = self.norm2(hidden_states) * (1 + scale_mlp) + shift_mlp  # (B, L, D)
        gate, value = self.mlp_in(normed).chunk(2, dim=-1)  # (B, L, I) each
        return hidden_states + gate_mlp * self.mlp_out(F.silu(gate) * value)

    def _attend(self, tokens: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
        qkv = self.to_qkv(tokens).unflatten(-1, (3, self.num_heads, -1))  # (B, L, 3, n, d)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # (B, n, L, d) each
        query = turned(self.norm_q(query), angles).to(value.dtype)
        key = turned(self.norm_k(key), angles).to(value.dtype)
        attended = F.scaled_dot_product_attention(query, key, value)  # (B, n, L, d)
        return self.to_out(attended.transpose(1, 2).flatten(2))  # (B, L, D)
