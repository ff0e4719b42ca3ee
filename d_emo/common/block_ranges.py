"""What the blocks of all networks may be made of; the networks' own tables are built on this one.

Upper bounds are far beyond any published size. They are there so that a mistaken or hostile file ends in one line
instead of an allocation that takes the machine down.
"""

from collections.abc import Mapping
from typing import Any

from d_emo.common.ranges import Flag, Maybe, OneOf, Real, Table, Whole

Values = Mapping[str, Any]
ATTENTION_TYPES = ("none", "neighborhood", "remote", "spanning")
ACTIVATIONS, NORMS = ("gelu", "silu"), ("batch", "layer")
LOCAL_KINDS, ARRANGEMENTS = ("conv", "deformable", "none"), ("cascaded", "parallel")
ATTENDED = ("values", "inputs")
# The largest published class-conditional transformers have less than a tenth; in float32 these are 40 GB.
MAX_PARAMETERS = 10**10

CHANNELS, SIDE, HEADS = Whole(1, 65_536), Whole(1, 65_536), Whole(1, 4096)
LAYERS, CLASSES = Whole(1, 1000), Whole(0, 10_000_000, "0 is for no classes")
EXPANSION, EPSILON = Real(0, 64, positive=True), Real(0, 1, positive=True)
WINDOW, KERNEL = Whole(1, 1024), Whole(1, 63, odd=True)

# SpanningWindowAttention, I2RMB and the blocks beside it.
BLOCK: Table = {
    "dim": CHANNELS,
    "num_heads": HEADS,
    "expansion": EXPANSION,
    "window_size": WINDOW,
    "kernel_size": KERNEL,
    "attention_type": OneOf(ATTENTION_TYPES),
    "clip_window": Flag(),
    "out_dim": Maybe(CHANNELS),
    "stride": Whole(1, 8),
    "dilation": Whole(1, 64),
    "activation": OneOf(ACTIVATIONS),
    "local": OneOf(LOCAL_KINDS),
    "local_skip": Flag(),
    "attend": OneOf(ATTENDED),
    "arrangement": OneOf(ARRANGEMENTS),
    "mlp_ratio": EXPANSION,
    "norm_eps": EPSILON,
}


def undivided(heads: int, *channels: int, name: str = "num_heads") -> str:
    """What is wrong with a number of heads that does not divide each of these numbers of channels."""
    if not any(number % heads for number in channels):
        return ""
    listed = " and ".join(map(str, channels))
    return f"{name}={heads} does not divide {listed} channels; choose a number of heads that does"


def expands(values: Values) -> str:
    """A block has at least one inner channel."""
    for dim in ("dim", "hidden_size"):
        for factor in ("expansion", "mlp_ratio"):
            if dim in values and factor in values and int(values[dim] * values[factor]) < 1:
                return f"{factor}={values[factor]} leaves no inner channel of {dim}={values[dim]}"
    return ""


def heads_divide_block(values: Values) -> str:
    """The rule for a block whose values are expanded before its heads part them."""
    return undivided(values["num_heads"], values["dim"], int(values["dim"] * values["expansion"]))
