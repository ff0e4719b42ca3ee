"""What a configuration of each diffusion transformer may say: its fields' ranges, and the rules between fields."""

from d_emo.common.block_ranges import (
    ATTENTION_TYPES,
    CHANNELS,
    EPSILON,
    EXPANSION,
    HEADS,
    KERNEL,
    LAYERS,
    MAX_PARAMETERS,
    SIDE,
    WINDOW,
    Values,
    expands,
    undivided,
)  # fmt: skip
from d_emo.common.ranges import Flag, Maybe, OneOf, OneOrPair, Real, Table, Whole
from d_emo.schedulers.flow_paths import FLOW_PREDICTIONS, PATHS, path_of

# Of Diffusers' DiTTransformer2DModel; its other fields are compared with DiT's (`diffusers_dit.py`).
DIFFUSERS_DIT: Table = {
    "num_attention_heads": HEADS,
    "attention_head_dim": CHANNELS,
    "in_channels": Whole(1, 4096),
    "out_channels": Maybe(Whole(1, 8192)),
    "num_layers": LAYERS,
    "sample_size": SIDE,
    "patch_size": Whole(1, 1024),
    "num_embeds_ada_norm": Whole(0, 10_000_000),
    "norm_eps": EPSILON,
}

# What all diffusion transformers have.
TRANSFORMER: Table = {
    "sample_size": OneOrPair(SIDE),
    "patch_size": Whole(1, 1024),
    "in_channels": Whole(1, 4096),
    "hidden_size": CHANNELS,
    "num_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_classes": Whole(0, 10_000_000, "0 makes an unconditional model"),
    "learn_sigma": Flag(),
    "prediction_type": OneOf(FLOW_PREDICTIONS),
    "norm_eps": EPSILON,
    "flow_path": Maybe(OneOf(PATHS)),
    "patch_bottleneck": Maybe(CHANNELS),
    "guide_block": Maybe(LAYERS),
    "end_block": Maybe(LAYERS),
    "distilled_guidance": Real(1, 1e6, "1 is none"),
}
DEMO: Table = {
    **TRANSFORMER,
    "expansion": EXPANSION,
    "window_size": WINDOW,
    "kernel_size": KERNEL,
    "attention_type": OneOf(ATTENTION_TYPES),
    "dense_blocks": Maybe(LAYERS),
}
DIT: Table = {
    **TRANSFORMER,
    "mlp_ratio": EXPANSION,
    "timestep_offset": Real(-1e6, 1e6),
    "timestep_factor": Real(-1e6, 1e6),
    "timestep_freq_shift": Whole(0, 1, "1 for weights from Diffusers' DiT"),
    "mlp_norm_eps": Maybe(EPSILON),
    "dense_blocks": Maybe(LAYERS),
}
LIGHTNINGDIT: Table = {**TRANSFORMER, "mlp_ratio": EXPANSION, "qk_norm": Flag()}
JIT: Table = {
    **TRANSFORMER,
    "mlp_ratio": EXPANSION,
    "context_length": Whole(0, 65_536, "0 is for no class tokens"),
    "context_start": Maybe(Whole(0, LAYERS.high)),
    "noise_scale": Real(0, 1e6, positive=True),
}


def heads_divide_demo(values: Values) -> str:
    """Heads part the channels, and the expanded values, of D-EMOv2."""
    dim = values["hidden_size"]
    return undivided(values["num_attention_heads"], dim, int(dim * values["expansion"]), name="num_attention_heads")


def heads_divide_dit(values: Values) -> str:
    """Heads part the channels of DiT."""
    return undivided(values["num_attention_heads"], values["hidden_size"], name="num_attention_heads")


def rotary_heads_fit(values: Values) -> str:
    """Heads part the channels into pairs for two axes; for networks and their block."""
    dim, heads = ("hidden_size", "num_attention_heads") if "hidden_size" in values else ("dim", "num_heads")
    if wrong := undivided(values[heads], values[dim], name=heads):
        return wrong
    channels = values[dim] // values[heads]
    return (
        f"{heads}={values[heads]} makes heads of {channels} channels, and rotary positions need a multiple of 4"
        if channels % 4
        else ""
    )


def gate_expands(values: Values) -> str:
    """A gated MLP has at least one inner channel; for networks and their block."""
    dim = "hidden_size" if "hidden_size" in values else "dim"
    if 2 * int(values[dim] * values["mlp_ratio"]) // 3:
        return ""
    return f"mlp_ratio={values['mlp_ratio']} leaves no inner channel of {dim}={values[dim]}"


def context_fits(values: Values) -> str:
    """Class tokens join before a block that is there."""
    start, layers = values["context_start"], values["num_layers"]
    if start is None or start < layers:
        return ""
    return f"context_start={start} is beyond the last of num_layers={layers} blocks; use 0 to {layers - 1}"


def positions_fit(values: Values) -> str:
    """Two-dimensional sines and cosines come in fours."""
    size = values["hidden_size"]
    return f"hidden_size={size} is not a multiple of 4, which 2D sine-cosine positions need" if size % 4 else ""


def patch_divides(values: Values) -> str:
    """The patch divides both sides."""
    size, patch = values["sample_size"], values["patch_size"]
    height, width = (size, size) if isinstance(size, int) else size
    if not (height % patch or width % patch):
        return ""
    fitting = [max(patch, side - side % patch) for side in (height, width)]
    return (
        f"sample_size={size} is not a multiple of patch_size={patch}; use {fitting[0]} x {fitting[1]}, or another patch"
    )


def objective_fits(values: Values) -> str:
    """Prediction, path and learned variance belong together."""
    path = path_of(values)
    if path is None and values["prediction_type"] != "epsilon":
        return (
            f"prediction_type={values['prediction_type']!r} needs a flow_path ({', '.join(PATHS)}); without one only "
            "epsilon is known"
        )
    if values["prediction_type"] == "sample" and path != "linear":
        return f"prediction_type='sample' belongs to flow_path='linear', not to {path!r}"
    if values["learn_sigma"] and path is not None:
        return "learn_sigma=True belongs to prediction_type='epsilon' without a flow_path; set learn_sigma=False"
    return ""


def guide_fits(values: Values) -> str:
    """A weaker prediction is made before the last block."""
    block, layers = values["guide_block"], values["num_layers"]
    if block is None or block < layers:
        return ""
    return f"guide_block={block} is not before the last of num_layers={layers} blocks; use 1 to {layers - 1}"


def end_fits(values: Values) -> str:
    """Flow maps answer with velocities, have blocks for both times, and one prediction."""
    block, layers = values["end_block"], values["num_layers"]
    if block is None:
        if values["distilled_guidance"] == 1:
            return ""
        return f"distilled_guidance={values['distilled_guidance']} belongs to a flow map; set end_block, too"
    if block > layers:
        return f"end_block={block} is beyond the last of num_layers={layers} blocks; use 1 to {layers}"
    if values["prediction_type"] != "flow_prediction":
        return f"end_block={block} belongs to prediction_type='flow_prediction', not to {values['prediction_type']!r}"
    if values["guide_block"] is not None:
        return f"end_block={block} and guide_block={values['guide_block']} exclude each other; leave one out"
    return ""


def dense_fits(values: Values) -> str:
    """There are blocks between those that see all tokens, and no head among them."""
    dense, layers, guide = values.get("dense_blocks"), values["num_layers"], values["guide_block"]
    if dense is None:
        return ""
    if 2 * dense >= layers:
        return (
            f"dense_blocks={dense} at both ends leave none of num_layers={layers} between; use 1 to {(layers - 1) // 2}"
        )
    if guide is not None and dense < guide <= layers - dense:
        return f"guide_block={guide} is among the blocks that dense_blocks={dense} leaves between; use 1 to {dense}"
    return ""


def time_passes(values: Values) -> str:
    """A factor of 0 would show the network one time only."""
    if values["timestep_factor"]:
        return ""
    return "timestep_factor=0 hides the time from the network; 1.0 leaves it as it is"


def of_a_size(values: Values) -> str:
    """Fewer parameters than any machine has room for."""
    size, patch, dim = values["sample_size"], values["patch_size"], values["hidden_size"]
    height, width = (size, size) if isinstance(size, int) else size
    inner = dim * values.get("expansion", values.get("mlp_ratio", 4))
    block = 5 * dim * dim + 2 * dim * inner if "expansion" in values else 10 * dim * dim + 2 * dim * inner
    entry = max(dim, values["patch_bottleneck"] or 0) * (patch * patch * values["in_channels"] + dim)
    tokens = height * width // patch**2 + values.get("context_length", 0)
    tables = dim * (values["num_classes"] + 2 * patch * patch * values["in_channels"] + tokens)
    total = values["num_layers"] * block + entry + tables
    if total <= MAX_PARAMETERS:
        return ""
    named = ", ".join(f"{name}={values[name]}" for name in ("num_layers", "hidden_size", "num_classes", "sample_size"))
    return f"{named} and the rest make about {total:.0e} parameters, above {MAX_PARAMETERS:.0e}; use a smaller model"


# Of all diffusion transformers.
RULES = (positions_fit, patch_divides, objective_fits, guide_fits, end_fits, dense_fits, expands, of_a_size)
