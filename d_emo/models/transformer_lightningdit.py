"""LightningDiT, a baseline of 2025: DiT with RMSNorm, SwiGLU, rotary positions, normed queries and keys.

Source: "Reconstruction vs. Generation: Taming Optimization Dilemma in Latent Diffusion Models", arXiv 2501.01423, and
its code (hustvl/LightningDiT, models/lightningdit.py). The block is in `rotary.py`, the frame in `transformer_base.py`;
`train/convert_dit.py` takes the published weights.

Shapes: B batch, h x w token grid, D hidden size, d channels of a head.
"""

from collections.abc import Iterator, Sequence

import torch
from diffusers.configuration_utils import register_to_config

from d_emo.common.ranges import checked

from .ranges import LIGHTNINGDIT, RULES, gate_expands, rotary_heads_fit
from .rotary import RMSNorm, RotaryBlock, rotary_angles, time_from_data
from .transformer_base import ClassConditionalTransformer2DModel


class LightningDiTTransformer2DModel(ClassConditionalTransformer2DModel):
    """LightningDiT, in the frame and with the interface of `DEMOTransformer2DModel`.

    `d_emo.create_model("LightningDiT-XL-1")` builds the published sizes. The network itself sees the time of its paper,
    1 at the data; `forward` takes Diffusers' timestep. Arguments not listed: see `DEMOTransformer2DModel`.

    Args:
        mlp_ratio: see `RotaryBlock`.
        qk_norm: norm queries and keys. The published XL weights are of a network without, as its code's options allow.

    Raises:
        ValueError: a value is out of its range (`d_emo/models/ranges.py`), or values do not belong together.
    """

    _no_split_modules = ["RotaryBlock"]
    _repeated_blocks = ["RotaryBlock"]

    @checked(LIGHTNINGDIT, *RULES, gate_expands, rotary_heads_fit)
    @register_to_config
    def __init__(
        self,
        sample_size: int | tuple[int, int] = 16,
        patch_size: int = 1,
        in_channels: int = 32,
        hidden_size: int = 768,
        num_layers: int = 12,
        num_attention_heads: int = 12,
        mlp_ratio: float = 4.0,
        num_classes: int = 1000,
        learn_sigma: bool = False,
        prediction_type: str = "flow_prediction",
        norm_eps: float = 1e-6,
        flow_path: str | None = None,
        patch_bottleneck: int | None = None,
        qk_norm: bool = True,
        guide_block: int | None = None,
        end_block: int | None = None,
        distilled_guidance: float = 1.0,
    ):
        super().__init__()

        def make_block() -> RotaryBlock:
            return RotaryBlock(hidden_size, num_attention_heads, mlp_ratio, norm_eps, qk_norm)

        self.build(make_block, RMSNorm(hidden_size, eps=norm_eps))

    def run_blocks(
        self, tokens: torch.Tensor, conditioning: Sequence[torch.Tensor], label: torch.Tensor
    ) -> Iterator[torch.Tensor]:
        """The tokens (B, h, w, D) after each block, which sees them as a sequence."""
        _, rows, columns, dim = tokens.shape
        angles = rotary_angles(rows, columns, dim // self.config.num_attention_heads, tokens.device)  # (h * w, d / 2)
        tokens = tokens.flatten(1, 2)                                        # (B, h, w, D) -> (B, h * w, D)
        for block, condition in zip(self.blocks, conditioning, strict=True):
            tokens = self.run_block(block, tokens, condition, angles)     # (B, h * w, D)
            yield tokens.unflatten(1, (rows, columns))                       # (B, h, w, D)

    def seen_time(self, timestep: torch.Tensor) -> torch.Tensor:
        """The network's own time."""
        return time_from_data(timestep)
