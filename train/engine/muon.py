"""Muon for the matrices of a network's blocks and AdamW for the rest, as one optimizer.

Muon (Jordan et al., kellerjordan.github.io/posts/muon; PyTorch's, `torch.optim.Muon`) moves a matrix along its momentum
with all singular values made about 1, by five Newton-Schulz iterations in bfloat16. Its step is scaled by 0.2 times the
root of the longer side, as Moonlight does (arXiv 2502.16982, section 2.2): that is the size of AdamW's steps, so that
one learning rate and one decay serve both.

Muon's sources leave to AdamW what is no inner matrix: embeddings, the first and the last layer, vectors. Here that is
the patch embedding, time and label embeddings, the output head, and in the blocks norms, biases, depthwise kernels
(which have one input channel each) and modulations (which map the condition, not tokens, and begin at zero).
"""

import re
from collections.abc import Callable, Sequence
from typing import Any

import torch

# Inner matrices of every diffusion transformer here: linear layers of blocks, all but the modulation.
MATRICES = re.compile(r"blocks\.\d+\.(?!modulation\.).*weight")
ADJUSTMENT = "match_rms_adamw"


def is_muons(name: str, parameter: torch.Tensor) -> bool:
    """Whether Muon moves a parameter of that name."""
    return parameter.ndim == 2 and MATRICES.fullmatch(name) is not None


class MuonWithAdamW(torch.optim.Optimizer):
    """Both optimizers over groups and states that they share with this one, which schedules and checkpoints see.

    Args:
        matrices: Muon's groups, tables with "params" and "weight_decay".
        others: AdamW's.
        lr: of both.
        betas: AdamW's. Muon's momentum is 0.95, Nesterov's, as in its sources.
    """

    def __init__(
        self,
        matrices: Sequence[dict[str, Any]],
        others: Sequence[dict[str, Any]],
        lr: float,
        betas: tuple[float, float],
    ):
        muon = torch.optim.Muon([*matrices], lr=lr, adjust_lr_fn=ADJUSTMENT)
        adamw = torch.optim.AdamW([*others], lr=lr, betas=betas, fused=True)
        super().__init__([*muon.param_groups, *adamw.param_groups], {})
        self.parts: tuple[torch.optim.Optimizer, ...] = (muon, adamw)
        self.shares = (slice(0, len(matrices)), slice(len(matrices), None))

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """A step of both; the closure's loss if there is one."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part, share in zip(self.parts, self.shares, strict=True):
            # Loading a state makes new groups and a new table of states.
            part.param_groups, part.state = self.param_groups[share], self.state
            part.step()
        return loss
