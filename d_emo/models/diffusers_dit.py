"""DiT networks of Diffusers (`DiTTransformer2DModel`) as this package's DiT baseline, and back.

Both are the network of arXiv 2212.09748, and their outputs agree to rounding. Diffusers' class differs in where things
are kept (a copy of the timestep and label embeddings in every block, queries, keys and values apart), in the
frequencies of its timestep embedding and in the epsilon of its second norm; the baseline's configuration says both.
"""

import inspect
import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch

from d_emo.common.ranges import take
from d_emo.common.saved_folders import PLACE, RESTORE, different
from d_emo.schedulers.flow_paths import path_of

from .checks import load_strictly
from .ranges import DIFFUSERS_DIT

# Diffusers' class is imported where it is made: with all that it is made of it would cost every user half a second.
if TYPE_CHECKING:
    from diffusers import DiTTransformer2DModel

    from .transformer_dit import DiTBaselineTransformer2DModel

# Of Diffusers' class -> ours, outside of the blocks, and inside of them.
NAMES = {"pos_embed.proj": "patch_embed", "proj_out_1": "norm_out.modulation", "proj_out_2": "proj_out"}
BLOCK_NAMES = {
    "norm1.linear": "modulation",
    "attn1.to_out.0": "to_out",
    "ff.net.0.proj": "mlp_in",
    "ff.net.2": "mlp_out",
}
# In every block there, once here.
SHARED = {
    "norm1.emb.timestep_embedder.linear_1": "time_embed.linear_1",
    "norm1.emb.timestep_embedder.linear_2": "time_embed.linear_2",
    "norm1.emb.class_embedder.embedding_table": "label_embed",
}
QKV = tuple(f"attn1.to_{part}" for part in "qkv")
POSITIONS = "pos_embed.pos_embed"
BLOCK = re.compile(r"transformer_blocks\.(\d+)\.(.+)\.(weight|bias)")
# The epsilon of Diffusers' first norm and of its last one, which its configuration does not have.
NORM_EPS, MLP_RATIO = 1e-6, 4
# What its configuration may say beside sizes, for the network to be DiT's.
EXPECTED = {
    "norm_type": "ada_norm_zero", "activation_fn": "gelu-approximate", "norm_elementwise_affine": False,
    "double_self_attention": False, "only_cross_attention": False, "cross_attention_dim": None,
    "attention_type": "default", "use_linear_projection": False, "num_vector_embeds": None,
}  # fmt: skip
CLASSES = ("DiTTransformer2DModel", "Transformer2DModel")
# Of `from_pretrained`, what a conversion can follow.
OPTIONS = (*PLACE, "variant", "use_safetensors", "low_cpu_mem_usage", "ignore_patterns")


def is_diffusers_dit(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is of Diffusers' DiT; older files call it `Transformer2DModel`, as others are called."""
    return config.get("_class_name") == CLASSES[0] or (
        config.get("_class_name") == CLASSES[1] and config.get("norm_type") == EXPECTED["norm_type"]
    )


def is_diffusers_state(state: Mapping[str, Any]) -> bool:
    """Whether tensors have the names of Diffusers' DiT."""
    return any(BLOCK.fullmatch(name) for name in state)


def config_from_diffusers(config: Mapping[str, Any]) -> dict[str, Any]:
    """The baseline's configuration of Diffusers' one.

    Raises:
        ValueError: a field is out of its range, or describes another network than DiT's; the message names it.
    """
    from diffusers import DiTTransformer2DModel

    defaults = {name: field.default for name, field in inspect.signature(DiTTransformer2DModel).parameters.items()}
    config = take(CLASSES[0], {**defaults, **config}, DIFFUSERS_DIT)
    for name, expected in EXPECTED.items():
        if config.get(name, expected) != expected:
            raise ValueError(
                f"{CLASSES[0]}: {name}={config[name]!r} makes another network than DiT's, which has {expected!r}."
            )
    channels, out = config["in_channels"], config["out_channels"] or config["in_channels"]
    if out not in (channels, 2 * channels):
        raise ValueError(f"{CLASSES[0]}: out_channels={out} is neither in_channels={channels} nor twice as many.")
    return {
        "sample_size": config["sample_size"],
        "patch_size": config["patch_size"],
        "in_channels": channels,
        "hidden_size": config["num_attention_heads"] * config["attention_head_dim"],
        "num_layers": config["num_layers"],
        "num_attention_heads": config["num_attention_heads"],
        "mlp_ratio": float(MLP_RATIO),
        "num_classes": config["num_embeds_ada_norm"],
        "learn_sigma": out == 2 * channels,
        "norm_eps": NORM_EPS,
        "mlp_norm_eps": config["norm_eps"],
        "timestep_freq_shift": 1,
    }


def config_of_state(
    state: Mapping[str, torch.Tensor], heads_of: Callable[[int, int], int], side: int
) -> dict[str, Any]:
    """The same of tensors alone, which tell neither heads nor the grid.

    Args:
        state: tensors under Diffusers' names.
        heads_of: heads of so many layers and channels.
        side: of the latents.

    Raises:
        ValueError: a tensor is missing or has another shape than DiT's.
    """
    try:
        dim, channels, patch, _ = state["pos_embed.proj.weight"].shape
        out = len(state["proj_out_2.bias"]) // patch**2
        classes = len(state[f"transformer_blocks.0.{list(SHARED)[2]}.weight"]) - 1
    except KeyError as error:
        raise ValueError(f"no DiT of Diffusers: {error} is missing among {len(state)} tensors.") from None
    except (ValueError, ZeroDivisionError):
        raise ValueError("no DiT of Diffusers: pos_embed.proj.weight is no square kernel.") from None
    layers = len({found[1] for name in state if (found := BLOCK.fullmatch(name))})
    heads = heads_of(layers, dim)
    if heads < 1 or dim % heads:
        raise ValueError(f"{heads} heads do not divide {dim} channels.")
    return config_from_diffusers(
        {
            "num_attention_heads": heads,
            "attention_head_dim": dim // heads,
            "in_channels": channels,
            "out_channels": out,
            "num_layers": layers,
            "sample_size": side,
            "patch_size": patch,
            "num_embeds_ada_norm": classes,
        }
    )


def import_diffusers_state(state: Mapping[str, torch.Tensor], model: "DiTBaselineTransformer2DModel") -> None:
    """Load tensors under Diffusers' names into a model of `config_from_diffusers`, every one of them.

    Raises:
        ValueError: a tensor is missing, left over or of another shape, or the blocks' embeddings differ.
    """
    ours: dict[str, torch.Tensor] = {"pos_embed": model.pos_embed.detach()}
    apart: dict[tuple[str, str], dict[str, torch.Tensor]] = {}
    for name, tensor in state.items():
        found = BLOCK.fullmatch(name)
        module, _, part = name.rpartition(".")
        if name == POSITIONS:
            _check_positions(tensor, model)
        elif found is None:
            ours[f"{NAMES.get(module, module)}.{part}"] = tensor
        elif found[2] in SHARED:
            target = f"{SHARED[found[2]]}.{part}"
            if not torch.equal(ours.setdefault(target, tensor), tensor):
                raise ValueError(
                    f"{name} differs from the first block's: every block has embeddings of its own, which the "
                    "published DiT and this package's do not have; draw with diffusers.DiTPipeline instead."
                )
        elif found[2] in QKV:
            apart.setdefault((found[1], part), {})[found[2]] = tensor
        else:
            ours[f"blocks.{found[1]}.{BLOCK_NAMES.get(found[2], found[2])}.{part}"] = tensor
    for (number, part), tensors in apart.items():
        if len(tensors) < len(QKV):
            raise ValueError(f"weights do not fit: block {number} lacks one of {', '.join(QKV)}.")
        ours[f"blocks.{number}.to_qkv.{part}"] = torch.cat([tensors[name] for name in QKV])
    for index in range(model.config.num_layers):  # attention_bias=False
        ours.setdefault(f"blocks.{index}.to_qkv.bias", torch.zeros(3 * model.config.hidden_size))
    load_strictly(ours, model)


def _check_positions(stored: torch.Tensor, model: "DiTBaselineTransformer2DModel") -> None:
    positions = model.pos_embed.detach().flatten(0, 1)[None]
    if stored.shape != positions.shape or not torch.allclose(stored.float(), positions, atol=1e-4):
        raise ValueError(f"{POSITIONS} are not DiT's sine-cosine positions of this grid.")


def load_diffusers_dit(name: Any, options: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The tensors of a folder or Hub id of Diffusers' DiT, in float32.

    Args:
        name: folder or Hub id.
        options: of `from_pretrained`: where it lies, and which files.

    Raises:
        ValueError: tensors are missing or left over, or an option is given that a conversion cannot follow.
    """
    from diffusers import DiTTransformer2DModel

    options = {key: value for key, value in options.items() if value is not None}
    if unknown := sorted(set(options) - set(OPTIONS)):
        raise ValueError(
            f"it is converted while it loads, so that {', '.join(unknown)} cannot be followed; save what was "
            "converted, and load that."
        )
    loaded: Any = DiTTransformer2DModel.from_pretrained(name, output_loading_info=True, **options)
    model, information = loaded
    if wrong := different(information["missing_keys"], set(information["unexpected_keys"]) - {POSITIONS}):
        raise ValueError(f"{wrong} {RESTORE}")
    return model.state_dict()


def to_diffusers(model: "DiTBaselineTransformer2DModel") -> "DiTTransformer2DModel":
    """This package's DiT as Diffusers' `DiTTransformer2DModel`, a copy in float32 and eval mode.

    Args:
        model: a `DiTBaselineTransformer2DModel` for DiT's objective, with `timestep_freq_shift=1`: what came from
            Diffusers, or was made with `d_emo.create_model("DiT-B-2", timestep_freq_shift=1)`.

    Raises:
        ValueError: Diffusers' class cannot give the same outputs; the message says why.
    """
    from diffusers import DiTTransformer2DModel

    _check_exportable(model)
    config = model.config
    made = DiTTransformer2DModel(
        num_attention_heads=config.num_attention_heads,
        attention_head_dim=config.hidden_size // config.num_attention_heads,
        in_channels=config.in_channels,
        out_channels=model.out_channels,
        num_layers=config.num_layers,
        sample_size=model.sample_shape[0],
        patch_size=config.patch_size,
        num_embeds_ada_norm=config.num_classes,
        norm_eps=config.mlp_norm_eps or config.norm_eps,
    )
    load_strictly(export_diffusers_state(model), made)
    return made.eval()


def export_diffusers_state(model: "DiTBaselineTransformer2DModel") -> dict[str, torch.Tensor]:
    """A model's tensors under the names of Diffusers' DiT, float32."""
    outside = {ours: theirs for theirs, ours in NAMES.items()}
    inside = {ours: theirs for theirs, ours in BLOCK_NAMES.items()}
    shared = {ours: theirs for theirs, ours in SHARED.items()}
    state: dict[str, torch.Tensor] = {}
    for name, tensor in model.state_dict().items():
        module, _, part = name.rpartition(".")
        copied = tensor.detach().float().clone()
        if found := re.fullmatch(r"blocks\.(\d+)\.(.+)", module):
            block = f"transformer_blocks.{found[1]}"
            if found[2] == "to_qkv":
                state |= {f"{block}.{n}.{part}": t.clone() for n, t in zip(QKV, copied.chunk(3), strict=True)}
            else:
                state[f"{block}.{inside[found[2]]}.{part}"] = copied
        elif module in shared:
            blocks = range(model.config.num_layers)
            state |= {f"transformer_blocks.{n}.{shared[module]}.{part}": copied.clone() for n in blocks}
        elif module in outside:
            state[f"{outside[module]}.{part}"] = copied
    return state


def _check_exportable(model: "DiTBaselineTransformer2DModel") -> None:
    """Refuse what Diffusers' class cannot compute."""
    config: Any = model.config
    if getattr(model, "peft_config", None):
        raise ValueError("the model carries adapters; merge them (fuse_lora) or take them off (unload_lora) first.")
    if path_of(config) is not None:
        raise ValueError(
            f"a flow model (prediction_type={config.prediction_type!r}): SiT is DiT's network with another objective, "
            "of which Diffusers' DiT and its pipeline know nothing; keep the pipeline of this package."
        )
    height, width = model.sample_shape
    cause = ""
    if config.timestep_freq_shift != 1:
        cause = (
            "timestep_freq_shift=0, the timestep embedding of the DiT paper's code, and Diffusers' DiT has another one "
            "(1), so that its outputs would differ. Models for Diffusers are trained with it: "
            'create_model("DiT-B-2", timestep_freq_shift=1). For the authors\' scripts, export a .pt file'
        )
    elif (config.timestep_offset, config.timestep_factor) != (0, 1):
        cause = "timestep_offset and timestep_factor other than 0 and 1, and Diffusers' DiT has neither"
    elif int(config.hidden_size * config.mlp_ratio) != MLP_RATIO * config.hidden_size:
        cause = f"mlp_ratio={config.mlp_ratio}, and Diffusers' DiT has {MLP_RATIO}"
    elif config.norm_eps != NORM_EPS:
        cause = f"norm_eps={config.norm_eps}, and Diffusers' DiT has {NORM_EPS}"
    elif config.patch_bottleneck is not None:
        cause = f"patch_bottleneck={config.patch_bottleneck}, and Diffusers' DiT has none"
    elif config.guide_block is not None:
        cause = f"guide_block={config.guide_block}, and Diffusers' DiT has one output head"
    elif config.dense_blocks is not None:
        cause = f"dense_blocks={config.dense_blocks}, and Diffusers' DiT fuses no tokens"
    elif height != width:
        cause = f"sample_size={config.sample_size}, and Diffusers' DiT is square"
    if cause:
        raise ValueError(f"the model has {cause}.")
