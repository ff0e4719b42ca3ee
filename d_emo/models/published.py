"""Published DiT and SiT weights in the DiT baseline's names, and back.

Sources: the state dictionaries of the authors' trainers, as their papers define the network (arXiv 2212.09748, arXiv
2401.08740). Both name their tensors alike:
x_embedder.proj, pos_embed, t_embedder.mlp.{0,2}, y_embedder.embedding_table,
blocks.N.{attn.qkv, attn.proj, mlp.fc1, mlp.fc2, adaLN_modulation.1}, final_layer.{adaLN_modulation.1, linear}.
"""

import math
import re
from collections.abc import Mapping
from typing import Any

import torch

from d_emo.schedulers.flow_paths import path_of

from .checks import load_strictly
from .transformer_dit import DiTBaselineTransformer2DModel
from .variants import heads_of

# Published name -> ours; "N" stands for a block's number.
NAMES = {
    "x_embedder.proj": "patch_embed",
    "t_embedder.mlp.0": "time_embed.linear_1",
    "t_embedder.mlp.2": "time_embed.linear_2",
    "y_embedder.embedding_table": "label_embed",
    "blocks.N.attn.qkv": "blocks.N.to_qkv",
    "blocks.N.attn.proj": "blocks.N.to_out",
    "blocks.N.mlp.fc1": "blocks.N.mlp_in",
    "blocks.N.mlp.fc2": "blocks.N.mlp_out",
    "blocks.N.adaLN_modulation.1": "blocks.N.modulation",
    "final_layer.adaLN_modulation.1": "norm_out.modulation",
    "final_layer.linear": "proj_out",
}
POSITIONS = "pos_embed"
OBJECTIVES = ("dit", "sit")
# SiT's network sees t in [0, 1] with 1 for data; Diffusers' timestep is 1000 (1 - t).
SIT_TIME = {"timestep_offset": 1.0, "timestep_factor": -0.001}


def published_config(
    state: Mapping[str, torch.Tensor],
    objective: str,
    num_heads: int | None = None,
    flow_path: str = "linear",
    prediction_type: str = "flow_prediction",
) -> dict[str, Any]:
    """The DiT baseline's configuration of a published state dictionary.

    Args:
        state: tensors by published name.
        objective: "dit" or "sit"; the tensors do not tell.
        num_heads: attention heads, which the tensors do not tell either; None for a published size.
        flow_path, prediction_type: of a SiT network; the published ones predict velocities on the linear path.

    Raises:
        ValueError: a tensor is missing, the objective is unknown, or heads are needed: the size is not a published one.
    """
    if objective not in OBJECTIVES:
        raise ValueError(f"objective {objective!r} is unknown; use dit or sit.")
    try:
        hidden_size, in_channels, patch, _ = state["x_embedder.proj.weight"].shape
        classes = len(state["y_embedder.embedding_table.weight"]) - 1
        tokens = state[POSITIONS].shape[1]
        out_channels = len(state["final_layer.linear.bias"]) // patch**2
        mlp_ratio = len(state["blocks.0.mlp.fc1.bias"]) / hidden_size
    except KeyError as error:
        raise ValueError(f"no DiT or SiT weights: {error} is missing among {len(state)} tensors.") from None
    layers = len({name.split(".")[1] for name in state if name.startswith("blocks.")})
    heads = heads_of(layers, hidden_size) if num_heads is None else num_heads
    flow = objective == "sit"
    return {
        "sample_size": math.isqrt(tokens) * patch,  # published grids are square
        "patch_size": patch,
        "in_channels": in_channels,
        "hidden_size": hidden_size,
        "num_layers": layers,
        "num_attention_heads": heads,
        "mlp_ratio": mlp_ratio,
        "num_classes": classes,
        "learn_sigma": not flow and out_channels == 2 * in_channels,
        **({"prediction_type": prediction_type, "flow_path": flow_path, **SIT_TIME} if flow else {}),
    }


def import_state(state: Mapping[str, torch.Tensor], model: DiTBaselineTransformer2DModel) -> None:
    """Load published tensors into a model of `published_config`, every one of them.

    SiT's velocity is data - noise, this package's noise - data: the last layer changes its sign. SiT networks also have
    output channels for a variance that nothing reads; they are left out.

    Raises:
        ValueError: a tensor is missing, left over, or of another shape.
    """
    config = model.config
    ours = {}
    for name, tensor in state.items():
        if name == POSITIONS:
            ours[POSITIONS] = tensor.reshape(model.pos_embed.shape)
            continue
        ours[translated(name, NAMES)] = tensor
    if path_of(config) is not None:
        sign = -1 if config.prediction_type == "flow_prediction" else 1
        for part in ("weight", "bias"):
            rows = without_variance(ours[f"proj_out.{part}"], config.patch_size, config.in_channels)
            ours[f"proj_out.{part}"] = sign * rows
    load_strictly(ours, model)


def without_variance(tensor: torch.Tensor, patch: int, channels: int) -> torch.Tensor:
    """The rows of the last layer that are no variance. Rows are (patch, patch, channels)."""
    rows = tensor.unflatten(0, (patch * patch, -1))[:, :channels]
    return rows.flatten(0, 1)


def export_state(model: DiTBaselineTransformer2DModel) -> dict[str, torch.Tensor]:
    """A model's tensors under the published names, for the authors' DiT scripts.

    Raises:
        ValueError: a flow model, whose time and sign differ from SiT's, or one that is no DiT.
    """
    if not isinstance(model, DiTBaselineTransformer2DModel):
        raise ValueError(f"{type(model).__name__} is not the DiT network; only DiT-* models can be exported.")
    if model.config.patch_bottleneck is not None:
        raise ValueError(
            f"patch_bottleneck={model.config.patch_bottleneck} is not in DiT's own scripts, which would not take it."
        )
    if path_of(model.config) is not None:
        raise ValueError(
            "flow models of this package see 1000 sigma and predict dx/dsigma, SiT's see t = 1 - sigma and predict "
            "dx/dt: the weights would not work in SiT's scripts."
        )
    inverse = {ours: published for published, ours in NAMES.items()}
    state = {translated(name, inverse): tensor for name, tensor in model.state_dict().items() if name != POSITIONS}
    return {POSITIONS: model.pos_embed.detach().flatten(0, 1)[None], **state}


def translated(name: str, names: Mapping[str, str]) -> str:
    """A tensor's name by a table of module names; unknown names pass, to be reported."""
    module, _, part = name.rpartition(".")
    numbers = re.findall(r"^blocks\.(\d+)\.", name)
    generic = re.sub(r"^blocks\.\d+\.", "blocks.N.", module)
    if generic not in names:
        return name
    translated = names[generic]
    return f"{translated.replace('N', numbers[0], 1) if numbers else translated}.{part}"
