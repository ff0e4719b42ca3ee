"""Blocks that see one of each 2 x 2 tokens in training, and the fusion of what they make with all tokens.

Source: SPRINT, arXiv 2510.21986: sparse tokens in the middle, dense ones before and after, a linear fusion. One of each
2 x 2 is kept, so that the kept ones are a grid of half the sides, which windows and convolutions take as any other.

Shapes: B batch, h x w token grid with even sides, D channels.
"""

import torch
from torch import nn

from d_emo.common.messages import shown

# Tokens of a group, in the order of `kept`: top left, top right, bottom left, bottom right.
GROUP = 4


class TokenFusion(nn.Module):
    """A linear layer from the tokens before and after the middle blocks to those that the last blocks see.

    Fresh, it is the mean of both: what passes through fresh blocks, which are the identity, stays as it is.

    Args:
        dim: D.
    """

    def __init__(self, dim: int):
        super().__init__()
        self.mask_token = nn.Parameter(torch.zeros(dim))
        self.proj = nn.Linear(2 * dim, dim)

    def reset(self) -> None:
        """Fresh weights."""
        half = torch.eye(len(self.mask_token)) / 2
        self.proj.weight.copy_(torch.cat([half, half], dim=1))
        nn.init.zeros_(self.proj.bias)
        nn.init.zeros_(self.mask_token)

    def forward(self, before: torch.Tensor, after: torch.Tensor, kept: torch.Tensor | None) -> torch.Tensor:
        """(B, h, w, D) tokens, and those after the middle, all of them or the kept -> (B, h, w, D)."""
        if kept is not None:
            after = put_back(after, kept, self.mask_token.to(after.dtype))  # (B, h, w, D)
        elif self.training and torch.is_grad_enabled():
            # Part of every step's graph, with a gradient of zeros: DDP waits for each parameter's.
            after = after + 0 * self.mask_token.to(after.dtype)
        return self.proj(torch.cat([before, after], dim=-1))  # (B, h, w, 2D) -> (B, h, w, D)


def keep(tokens: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """(B, h, w, D) tokens and (B, h / 2, w / 2) places, 0 to 3 -> (B, h / 2, w / 2, D)."""
    batch, rows, columns, dim = tokens.shape
    groups = tokens.view(batch, rows // 2, 2, columns // 2, 2, dim).transpose(2, 3)  # (B, h / 2, w / 2, 2, 2, D)
    groups = groups.reshape(batch, rows // 2, columns // 2, GROUP, dim)
    return torch.take_along_dim(groups, kept[..., None, None].long(), dim=3).squeeze(3)


def put_back(tokens: torch.Tensor, kept: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """The kept tokens (B, h / 2, w / 2, D) in their places, the same (D,) token in all others -> (B, h, w, D)."""
    batch, rows, columns, dim = tokens.shape
    here = torch.arange(GROUP, device=kept.device) == kept[..., None]  # (B, h / 2, w / 2, 4)
    groups = torch.where(here[..., None], tokens[..., None, :], others)  # (B, h / 2, w / 2, 4, D)
    groups = groups.view(batch, rows, columns, 2, 2, dim).transpose(2, 3)
    return groups.reshape(batch, 2 * rows, 2 * columns, dim)


def check_kept(kept: torch.Tensor | None, dense_blocks: int | None, grid: tuple[int, int, int]) -> None:
    """Refuse places of kept tokens that do not fit a network or its (B, h, w) tokens."""
    if kept is None:
        return
    if dense_blocks is None:
        raise ValueError("kept: the network has no dense_blocks and sees all tokens; leave it out.")
    batch, rows, columns = grid
    if rows % 2 or columns % 2:
        raise ValueError(f"kept: one of each 2 x 2 tokens needs a grid of even sides, and it is {rows} x {columns}.")
    given = tuple(kept.shape) if isinstance(kept, torch.Tensor) else shown(kept)
    if given != (batch, rows // 2, columns // 2) or kept.is_floating_point():
        raise ValueError(f"kept is {given}; pass whole numbers from 0 to 3, ({batch}, {rows // 2}, {columns // 2}).")
