"""D-EMOv2: the i2RMB block in place of DiT's attention and MLP.

Source: "EMOv2: Pushing 5M Vision Model Frontier", arXiv 2412.06674, section 4.5 and Table XIV. The generation code was
never released. The definition here is inferred: it reproduces the four published parameter counts exactly and the
FLOPs to rounding (eval/tables/model_table.py prints them). The frame around the blocks is in `transformer_base.py`.

Shapes: B batch, h x w token grid, D hidden size.
"""

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import register_to_config
from torch import nn

from d_emo.common.ranges import checked

from .i2rmb import I2RMB
from .ranges import DEMO, RULES, heads_divide_demo
from .transformer_base import ClassConditionalTransformer2DModel


class DEMOBlock(nn.Module):
    """x + gate * I2RMB(norm(x) * (1 + scale) + shift), with shift, scale and gate from the conditioning.

    The modulation is initialised to zero (adaLN-Zero), so a fresh block is the identity.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        expansion: float,
        window_size: int,
        kernel_size: int,
        attention_type: str,
        norm_eps: float,
    ):
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=norm_eps)
        self.modulation = nn.Linear(dim, 3 * dim)
        self.i2rmb = I2RMB(dim, num_heads, expansion, window_size, kernel_size, attention_type)

    def forward(self, hidden_states: torch.Tensor, conditioning: torch.Tensor) -> torch.Tensor:
        """(B, h, w, D) and (B, D) -> (B, h, w, D)."""
        modulation = self.modulation(F.silu(conditioning))[:, None, None]    # (B, 1, 1, 3D)
        shift, scale, gate = modulation.chunk(3, dim=-1)                     # (B, 1, 1, D) each
        normed = self.norm(hidden_states) * (1 + scale) + shift              # (B, h, w, D)
        return hidden_states + gate * self.i2rmb(normed)                     # (B, h, w, D)


class DEMOTransformer2DModel(ClassConditionalTransformer2DModel):
    """D-EMOv2, a class-conditional diffusion transformer made of i2RMB blocks.

    `d_emo.create_model("D-EMOv2-S-2")` builds the published sizes. Inputs and outputs: see `forward`.

    Args:
        sample_size: side, or (height, width), of the image or latent that the stored positions are for.
        patch_size: side p of a patch.
        in_channels: channels C of the image or latent.
        hidden_size: D, a multiple of 4 and of `num_attention_heads`.
        num_layers: number of blocks.
        num_attention_heads: heads of the window attention.
        expansion: inner channels of a block over D.
        window_size: window side in tokens; clipped to smaller grids.
        kernel_size: odd side of the depthwise convolution.
        attention_type: "spanning" (the paper's), "neighborhood", "remote" or "none".
        num_classes: classes; the label table has one row more, for "no class". 0 makes an unconditional model.
        learn_sigma: predict the variance too (DiT objective), which doubles the output channels.
        prediction_type: "epsilon" (noise; DiT's objective), "flow_prediction" (velocity, on the linear path noise -
            data; SiT's objective), "score", or "sample" (clean data, on the linear path; JiT's). The pipeline turns a
            flow model's prediction into a velocity, and checks that the scheduler takes it.
        norm_eps: epsilon of the LayerNorms.
        flow_path: the path that a flow model was trained on, "linear", "gvp" or "vp" (`d_emo.schedulers.flow_paths`).
            None: linear for "flow_prediction" and "sample", DiT's discrete diffusion for "epsilon".
        patch_bottleneck: channels that patches pass on their way to D (arXiv 2511.13720; 128 or 256 there, for patches
            of 16 x 16 pixels); None embeds them by one product.
        guide_block: number of blocks after which a second output head predicts the same, more weakly, which internal
            guidance steers away from (arXiv 2512.24176); None for no such head.
        end_block: number of blocks that see the present time, which makes the network a flow map; those after it and
            the output see the time that it is taken to, `end_timestep` (decoupled MeanFlow, arXiv 2510.24474). None for
            a network of one time.
        distilled_guidance: of a flow map, the guidance that was trained into its weights, 1 is none; sampling adds none
            to it.
        dense_blocks: number of first, and of last, blocks that see all tokens, which a linear layer fuses with those of
            the blocks between; these may be trained on one of each 2 x 2 tokens (SPRINT, arXiv 2510.21986). None for no
            such layer.

    Raises:
        ValueError: a value is out of its range (`d_emo/models/ranges.py`), or values do not belong together.
    """

    _no_split_modules = ["DEMOBlock"]
    _repeated_blocks = ["DEMOBlock"]

    @checked(DEMO, *RULES, heads_divide_demo)
    @register_to_config
    def __init__(
        self,
        sample_size: int | tuple[int, int] = 32,
        patch_size: int = 2,
        in_channels: int = 4,
        hidden_size: int = 384,
        num_layers: int = 12,
        num_attention_heads: int = 6,
        expansion: float = 4.0,
        window_size: int = 8,
        kernel_size: int = 5,
        attention_type: str = "spanning",
        num_classes: int = 1000,
        learn_sigma: bool = True,
        prediction_type: str = "epsilon",
        norm_eps: float = 1e-6,
        flow_path: str | None = None,
        patch_bottleneck: int | None = None,
        guide_block: int | None = None,
        end_block: int | None = None,
        distilled_guidance: float = 1.0,
        dense_blocks: int | None = None,
    ):
        super().__init__()

        def make_block() -> DEMOBlock:
            return DEMOBlock(
                hidden_size, num_attention_heads, expansion, window_size, kernel_size, attention_type, norm_eps
            )

        self.build(make_block, nn.LayerNorm(hidden_size, eps=norm_eps))
