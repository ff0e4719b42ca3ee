"""Published LightningDiT and JiT weights in this package's names.

Sources: the state dictionaries of the authors' trainers (hustvl/LightningDiT, models/lightningdit.py; LTH14/JiT,
model_jit.py and denoiser.py). Both name their blocks' tensors alike:
blocks.N.{norm1, norm2, attn.qkv, attn.q_norm, attn.k_norm, attn.proj, mlp.w12, mlp.w3, adaLN_modulation.1}.

In both, time t is 1 at the data. LightningDiT predicts data - noise, the opposite of this package's velocity; JiT
predicts data, on which everybody agrees.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F

from d_emo.common.messages import first_line

from .checks import load_strictly
from .published import NAMES as DIT_NAMES
from .published import POSITIONS, translated, without_variance
from .rotary import rotary_angles
from .transformer_jit import JiTTransformer2DModel
from .transformer_lightningdit import LightningDiTTransformer2DModel

# Published name -> ours; "N" stands for a block's number.
NAMES = {
    **{theirs: ours for theirs, ours in DIT_NAMES.items() if ".mlp.fc" not in theirs},
    "x_embedder.proj1": "patch_embed.reduce",
    "x_embedder.proj2": "patch_embed.expand",
    "blocks.N.attn.q_norm": "blocks.N.norm_q",
    "blocks.N.attn.k_norm": "blocks.N.norm_k",
    "blocks.N.mlp.w12": "blocks.N.mlp_in",
    "blocks.N.mlp.w3": "blocks.N.mlp_out",
    "final_layer.norm_final": "norm_out.norm",
}
CONTEXT = "in_context_posemb"
# Tables of cosines and sines, which this package computes; older JiT code stores its own, too.
ROTARY, ROTARY_CONTEXT = "feat_rope", "feat_rope_incontext"
GATED = "blocks.0.mlp.w12.weight"
PLAIN_PATCHES, BOTTLENECK = "x_embedder.proj.weight", "x_embedder.proj1.weight"
# JiT's noise has a deviation of 1 for pictures up to this side, 2 for twice the side (its README).
JIT_SIDE = 256

RotaryModel = LightningDiTTransformer2DModel | JiTTransformer2DModel


def is_rotary_state(state: Mapping[str, Any]) -> bool:
    """Whether tensors have the names of LightningDiT or JiT."""
    return GATED in state and (PLAIN_PATCHES in state or BOTTLENECK in state)


def rotary_model(state: Mapping[str, torch.Tensor]) -> RotaryModel:
    """The network of a published state dictionary, in eval mode.

    Everything is in the tensors: JiT has a bottleneck, LightningDiT none; heads have as many channels as their norm, or
    as the table of rotary positions.

    Raises:
        ValueError: a tensor is missing, left over, or of another shape, or tables are not those of rotary positions.
    """
    try:
        config = _shared_config(state) | (_jit_config(state) if BOTTLENECK in state else _lightningdit_config(state))
    except KeyError as error:
        raise ValueError(f"no LightningDiT or JiT weights: {error} is missing among {len(state)} tensors.") from None
    except (IndexError, TypeError, ValueError, ZeroDivisionError) as error:
        raise ValueError(f"no LightningDiT or JiT weights: a tensor has other dimensions ({error}).") from None
    model = (JiTTransformer2DModel if BOTTLENECK in state else LightningDiTTransformer2DModel)(**config)
    try:
        _import(state, model)
    except RuntimeError as error:
        raise ValueError(f"weights do not fit: {first_line(error)}.") from None
    return model.eval()


def _shared_config(state: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    width = state[POSITIONS].shape[2]
    _, in_channels, patch, _ = state[BOTTLENECK if BOTTLENECK in state else PLAIN_PATCHES].shape
    return {
        "sample_size": math.isqrt(state[POSITIONS].shape[1]) * patch,  # published grids are square
        "patch_size": patch,
        "in_channels": in_channels,
        "hidden_size": width,
        "num_layers": len({name.split(".")[1] for name in state if name.startswith("blocks.")}),
        "num_classes": len(state["y_embedder.embedding_table.weight"]) - 1,
        "learn_sigma": False,
    }


def _lightningdit_config(state: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """Heads by the rotary table, which every file with rotary positions has; without it the network has none."""
    head_dim = state[f"{ROTARY}.freqs_cos"].shape[1]
    return {
        "num_attention_heads": state[POSITIONS].shape[2] // head_dim,
        "prediction_type": "flow_prediction",
        "qk_norm": "blocks.0.attn.q_norm.weight" in state,
    }


def _jit_config(state: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    tokens, width = state[POSITIONS].shape[1:]
    bottleneck, _, patch, _ = state[BOTTLENECK].shape
    return {
        "num_attention_heads": width // len(state["blocks.0.attn.q_norm.weight"]),
        "patch_bottleneck": bottleneck,
        "context_length": state[CONTEXT].shape[1],
        "noise_scale": max(1.0, math.isqrt(tokens) * patch / JIT_SIDE),
    }


def _import(state: Mapping[str, torch.Tensor], model: RotaryModel) -> None:
    """Load published tensors, every one of them.

    LightningDiT's last layer changes its sign; its option for a variance that nothing reads is left out, as SiT's.
    """
    ours: dict[str, torch.Tensor] = {}
    for name, tensor in state.items():
        if name.startswith((f"{ROTARY}.", f"{ROTARY_CONTEXT}.")):
            _check_rotary(name, tensor, model)
        elif name == POSITIONS:
            ours[POSITIONS] = tensor.reshape(model.pos_embed.shape)
        elif name == CONTEXT:
            ours["context_embed"] = tensor.flatten(0, 1)
        else:
            ours[translated(name, NAMES)] = tensor
    if isinstance(model, LightningDiTTransformer2DModel):
        for part in ("weight", "bias"):
            if f"proj_out.{part}" in ours:
                rows = without_variance(ours[f"proj_out.{part}"], model.config.patch_size, model.config.in_channels)
                ours[f"proj_out.{part}"] = -rows
    load_strictly(ours, model)


def _check_rotary(name: str, stored: torch.Tensor, model: RotaryModel) -> None:
    """Refuse tables other than those that the network computes: every angle twice, for a pair of channels."""
    config = model.config
    rows, columns, _ = model.pos_embed.shape
    angles = rotary_angles(rows, columns, config.hidden_size // config.num_attention_heads, stored.device)
    table, _, part = name.rpartition(".")
    if table == ROTARY_CONTEXT:
        angles = F.pad(angles, (0, 0, config.get("context_length", 0), 0))
    tables = {"freqs_cos": angles.cos(), "freqs_sin": angles.sin()}
    expected = tables[part].repeat_interleave(2, dim=-1) if part in tables else None
    if expected is None or stored.shape != expected.shape or not torch.allclose(stored.float(), expected, atol=1e-4):
        raise ValueError(f"{name} is no table of rotary positions of a grid of {rows} x {columns} tokens.")
