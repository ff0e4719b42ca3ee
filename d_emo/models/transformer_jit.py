"""JiT ("just image transformers"), a baseline of 2025 on pixels: large patches, a bottleneck, class tokens in context.

Source: "Back to Basics: Let Denoising Generative Models Denoise", arXiv 2511.13720, and its code (LTH14/JiT,
model_jit.py). The block is in `rotary.py`, the frame in `transformer_base.py`; `train/convert_dit.py` takes the
published weights.

Shapes: B batch, h x w token grid, K class tokens, D hidden size, d channels of a head.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import FirstBlockCacheConfig
from diffusers.configuration_utils import register_to_config
from torch import nn

from d_emo.common.ranges import checked

from .ranges import JIT, RULES, context_fits, gate_expands, rotary_heads_fit
from .rotary import RMSNorm, RotaryBlock, rotary_angles, time_from_data
from .transformer_base import ClassConditionalTransformer2DModel


class JiTTransformer2DModel(ClassConditionalTransformer2DModel):
    """JiT, in the frame and with the interface of `DEMOTransformer2DModel`.

    `d_emo.create_model("JiT-B-16")` builds the published sizes, which predict data from pictures of 256 x 256 pixels.
    The network itself sees the time of its paper, 1 at the data; `forward` takes Diffusers' timestep. Arguments not
    listed: see `DEMOTransformer2DModel`.

    Args:
        mlp_ratio: see `RotaryBlock`.
        context_length: class tokens K that join the sequence, each the label's embedding and a learned position; 0 for
            none.
        context_start: the block before which they join; None for a third of the depth, as in all published sizes.
        noise_scale: standard deviation k of the noise that the network itself sees; 2 in the published models of 512 x
            512 pixels. `forward` takes samples with noise of deviation 1 all the same: (1 - s) data + s k noise is the
            sample at s k / (1 - s + s k) of the path with plain noise, times 1 - s + s k.

    Raises:
        ValueError: a value is out of its range (`d_emo/models/ranges.py`), or values do not belong together.
    """

    _no_split_modules = ["RotaryBlock"]
    _repeated_blocks = ["RotaryBlock"]

    @checked(JIT, *RULES, gate_expands, rotary_heads_fit, context_fits)
    @register_to_config
    def __init__(
        self,
        sample_size: int | tuple[int, int] = 256,
        patch_size: int = 16,
        in_channels: int = 3,
        hidden_size: int = 768,
        num_layers: int = 12,
        num_attention_heads: int = 12,
        mlp_ratio: float = 4.0,
        num_classes: int = 1000,
        learn_sigma: bool = False,
        prediction_type: str = "sample",
        norm_eps: float = 1e-6,
        flow_path: str | None = "linear",
        patch_bottleneck: int | None = 128,
        context_length: int = 32,
        context_start: int | None = None,
        noise_scale: float = 1.0,
        guide_block: int | None = None,
        end_block: int | None = None,
        distilled_guidance: float = 1.0,
    ):
        super().__init__()
        self.context_start = num_layers // 3 if context_start is None else context_start
        self.context_embed = nn.Parameter(torch.zeros(context_length, hidden_size))

        def make_block() -> RotaryBlock:
            return RotaryBlock(hidden_size, num_attention_heads, mlp_ratio, norm_eps)

        self.build(make_block, RMSNorm(hidden_size, eps=norm_eps))

    def enable_cache(self, config: Any) -> None:
        """See Diffusers' `CacheMixin`.

        Raises:
            ValueError: a cache that compares sequences across blocks between which class tokens join.
        """
        if self.config.context_length and isinstance(config, FirstBlockCacheConfig):
            raise ValueError(
                "FirstBlockCacheConfig: it needs sequences that keep their length from block to block, and "
                f"context_length={self.config.context_length} class tokens join this network's; use MagCacheConfig."
            )
        super().enable_cache(config)

    @torch.no_grad()
    def initialize_weights(self) -> None:
        """DiT's initialisation, and 0.02 for the class tokens' positions."""
        super().initialize_weights()
        nn.init.normal_(self.context_embed, std=0.02)

    def run_blocks(
        self, tokens: torch.Tensor, conditioning: Sequence[torch.Tensor], label: torch.Tensor
    ) -> Iterator[torch.Tensor]:
        """The tokens (B, h, w, D) after each block, which sees them as a sequence that class tokens join."""
        _, rows, columns, dim = tokens.shape
        angles = rotary_angles(rows, columns, dim // self.config.num_attention_heads, tokens.device)  # (h * w, d / 2)
        context = label[:, None] + self.context_embed.to(label.dtype)        # (B, K, D)
        tokens = tokens.flatten(1, 2)                                        # (B, h, w, D) -> (B, h * w, D)
        for index, (block, condition) in enumerate(zip(self.blocks, conditioning, strict=True)):
            if index == self.context_start:
                tokens = torch.cat([context.to(tokens.dtype), tokens], dim=1)  # (B, K + h * w, D)
                angles = F.pad(angles, (0, 0, len(self.context_embed), 0))   # class tokens are not turned
            tokens = self.run_block(block, tokens, condition, angles)
            yield tokens[:, -rows * columns :].unflatten(1, (rows, columns))  # (B, h, w, D)

    def seen_sample(self, hidden_states: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        """The sample with noise of the network's own deviation."""
        scale = self.config.noise_scale
        if scale == 1:
            return hidden_states
        factor = scale / (scale - (scale - 1) * timestep / 1000.0)           # (B,)
        return hidden_states * factor[:, None, None, None].to(hidden_states.dtype)

    def seen_time(self, timestep: torch.Tensor) -> torch.Tensor:
        """The network's own time."""
        scale = self.config.noise_scale
        return time_from_data(timestep / (scale - (scale - 1) * timestep / 1000.0))
