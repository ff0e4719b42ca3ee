"""The DiT network, the baseline of the same trainer (SiT is this network with the flow objective).

Source: "Scalable Diffusion Models with Transformers", arXiv 2212.09748, and its definition of the adaLN-Zero block.
Diffusers' own `DiTTransformer2DModel` has a label embedder in every block, each dropping labels on its own;
`from_pretrained` converts its folders, and `to_diffusers` makes one.

Shapes: B batch, h x w token grid, L = h w tokens, D hidden size, n heads, d = D / n.
"""

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import register_to_config
from torch import nn

from d_emo.common.block_ranges import BLOCK, expands, undivided
from d_emo.common.ranges import checked

from .diffusers_dit import (
    config_from_diffusers,
    import_diffusers_state,
    is_diffusers_dit,
    load_diffusers_dit,
    to_diffusers,
)
from .ranges import DIT, RULES, heads_divide_dit, time_passes
from .transformer_base import ClassConditionalTransformer2DModel

if TYPE_CHECKING:
    from diffusers import DiTTransformer2DModel


class DiTBlock(nn.Module):
    """Self-attention and MLP, each modulated and gated by the conditioning (adaLN-Zero)."""

    @checked(BLOCK, expands, lambda values: undivided(values["num_heads"], values["dim"]))
    def __init__(
        self, dim: int, num_heads: int, mlp_ratio: float, norm_eps: float = 1e-6, mlp_norm_eps: float | None = None
    ):
        super().__init__()
        self.num_heads = num_heads
        self.norm1 = nn.LayerNorm(dim, eps=norm_eps, elementwise_affine=False)
        self.to_qkv = nn.Linear(dim, 3 * dim)
        self.to_out = nn.Linear(dim, dim)
        self.norm2 = nn.LayerNorm(dim, eps=mlp_norm_eps or norm_eps, elementwise_affine=False)
        self.mlp_in = nn.Linear(dim, int(dim * mlp_ratio))
        self.mlp_out = nn.Linear(int(dim * mlp_ratio), dim)
        self.modulation = nn.Linear(dim, 6 * dim)

    def forward(self, hidden_states: torch.Tensor, conditioning: torch.Tensor) -> torch.Tensor:
        """(B, h, w, D) and (B, D) -> (B, h, w, D)."""
        modulation = self.modulation(F.silu(conditioning))[:, None, None]    # (B, 1, 1, 6D)
        shift_attn, scale_attn, gate_attn, shift_mlp, scale_mlp, gate_mlp = modulation.chunk(6, dim=-1)
        normed = self.norm1(hidden_states) * (1 + scale_attn) + shift_attn   # (B, h, w, D)
        hidden_states = hidden_states + gate_attn * self._attend(normed)     # (B, h, w, D)
        normed = self.norm2(hidden_states) * (1 + scale_mlp) + shift_mlp     # (B, h, w, D)
        mlp = self.mlp_out(F.gelu(self.mlp_in(normed), approximate="tanh"))  # (B, h, w, D)
        return hidden_states + gate_mlp * mlp                                # (B, h, w, D)

    def _attend(self, tokens: torch.Tensor) -> torch.Tensor:
        batch, rows, columns, dim = tokens.shape
        qkv = self.to_qkv(tokens).view(batch, rows * columns, 3, self.num_heads, dim // self.num_heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)             # (B, n, L, d) each
        attended = F.scaled_dot_product_attention(query, key, value)         # (B, n, L, d)
        attended = attended.transpose(1, 2).reshape(batch, rows, columns, dim)
        return self.to_out(attended)                                         # (B, h, w, D)


class DiTBaselineTransformer2DModel(ClassConditionalTransformer2DModel):
    """DiT, in the frame and with the interface of `DEMOTransformer2DModel`.

    `d_emo.create_model("DiT-S-2")` builds the published sizes. Arguments not listed: see `DEMOTransformer2DModel`.

    Args:
        mlp_ratio: hidden channels of the MLP over D.
        timestep_offset, timestep_factor: the network sees offset + factor * timestep; (1, -0.001) for imported SiT
            weights, whose time is 1 at the data and 0 at the noise.
        timestep_freq_shift: the sinusoids' frequencies are 10000^(-i / (128 - shift)), i from 0 to 127. 0 is DiT's and
            SiT's; 1 is that of Diffusers' `DiTTransformer2DModel`, for weights from there or on the way there.
        mlp_norm_eps: epsilon of the norm before the MLP, None for `norm_eps`; Diffusers' DiT has two.

    Raises:
        ValueError: a value is out of its range (`d_emo/models/ranges.py`), or values do not belong together.
    """

    _no_split_modules = ["DiTBlock"]
    _repeated_blocks = ["DiTBlock"]

    @checked(DIT, *RULES, heads_divide_dit, time_passes)
    @register_to_config
    def __init__(
        self,
        sample_size: int | tuple[int, int] = 32,
        patch_size: int = 2,
        in_channels: int = 4,
        hidden_size: int = 384,
        num_layers: int = 12,
        num_attention_heads: int = 6,
        mlp_ratio: float = 4.0,
        num_classes: int = 1000,
        learn_sigma: bool = True,
        prediction_type: str = "epsilon",
        norm_eps: float = 1e-6,
        timestep_offset: float = 0.0,
        timestep_factor: float = 1.0,
        flow_path: str | None = None,
        timestep_freq_shift: int = 0,
        mlp_norm_eps: float | None = None,
        patch_bottleneck: int | None = None,
        guide_block: int | None = None,
        end_block: int | None = None,
        distilled_guidance: float = 1.0,
        dense_blocks: int | None = None,
    ):
        super().__init__()

        def make_block() -> DiTBlock:
            return DiTBlock(hidden_size, num_attention_heads, mlp_ratio, norm_eps, mlp_norm_eps)

        self.build(make_block, nn.LayerNorm(hidden_size, eps=norm_eps, elementwise_affine=False))

    def seen_time(self, timestep: torch.Tensor) -> torch.Tensor:
        """The time that the network was trained on."""
        return self.config.timestep_offset + self.config.timestep_factor * timestep

    @classmethod
    def _converted(cls, name: Any, config: dict[str, Any], options: dict[str, Any]) -> Any:
        """Folders of Diffusers' `DiTTransformer2DModel`, in eval mode."""
        if not is_diffusers_dit(config):
            return None
        wants_information = options.pop("output_loading_info", False)
        dtypes = [options.pop(key, None) for key in ("dtype", "torch_dtype")]
        model = cls(**config_from_diffusers(config)).eval()
        try:
            import_diffusers_state(load_diffusers_dit(name, options), model)
        except ValueError as error:
            raise ValueError(f"{name} of Diffusers' DiT: {error}") from error
        dtype = dtypes[0] or dtypes[1]
        if isinstance(dtype, torch.dtype):  # anything else is float32 to Diffusers
            positions = model.pos_embed.detach().clone()
            nn.Module.to(model, dtype)
            model.pos_embed.data = positions  # stays float32, as in other ways of loading
        model.register_to_config(_name_or_path=str(name))
        return (model, {"missing_keys": [], "unexpected_keys": []}) if wants_information else model

    def to_diffusers(self) -> "DiTTransformer2DModel":
        """See `diffusers_dit.to_diffusers`."""
        return to_diffusers(self)
