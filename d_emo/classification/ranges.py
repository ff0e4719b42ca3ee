"""What a configuration of EMOv2 or EMOv1 may say; light, since transformers reads its own part while it is imported."""

from d_emo.common.block_ranges import (
    ACTIVATIONS,
    ARRANGEMENTS,
    ATTENTION_TYPES,
    BLOCK,
    CHANNELS,
    EXPANSION,
    KERNEL,
    LAYERS,
    LOCAL_KINDS,
    MAX_PARAMETERS,
    NORMS,
    SIDE,
    WINDOW,
    Values,
    undivided,
)  # fmt: skip
from d_emo.common.ranges import Each, Flag, Maybe, OneOf, Real, Table, Whole

STAGES = 8
# The side of a window in tokens under dense heads, as published (see backbones.py).
DENSE_WINDOW = 10
# EMOv2 and EMOv1; the network's and the configuration's fields.
CLASSIFIER: Table = {
    "version": OneOf((1, 2), "2 is EMOv2, 1 is EMOv1"),
    "depths": Each(LAYERS, 1, STAGES),
    "widths": Each(CHANNELS, 1, STAGES),
    "expansions": Each(EXPANSION, 1, STAGES),
    "head_dims": Each(CHANNELS, 1, STAGES),
    "kernel_sizes": Each(KERNEL, 1, STAGES),
    "num_classes": Whole(0, 10_000_000, "0 leaves the head out"),
    "in_channels": Whole(1, 4096),
    "num_channels": Whole(1, 4096),
    "stem_dim": Maybe(CHANNELS),
    "window_size": WINDOW,
    "clip_window": Flag(),
    "attention_type": OneOf(ATTENTION_TYPES),
    "attending_stages": Each(Whole(1, STAGES), 0, STAGES),
    "local": OneOf(LOCAL_KINDS),
    "dilation": BLOCK["dilation"],
    "arrangement": OneOf(ARRANGEMENTS),
    "norms": Each(OneOf(NORMS), 1, STAGES),
    "activations": Each(OneOf(ACTIVATIONS), 1, STAGES),
    "layer_scale": Maybe(Real(-1e3, 1e3)),
    "drop_path": Real(0, 1, below=True),
    "output_stride": OneOf((8, 16, 32)),
    "image_size": SIDE,
}
# What `EMOv2.freeze` takes.
FREEZING: Table = {"stages": Whole(0, STAGES, "0 freezes none"), "statistics": Flag()}
PER_STAGE = ("widths", "expansions", "head_dims", "kernel_sizes", "norms", "activations")


def stages_agree(values: Values) -> str:
    """One entry a stage in every list, heads that divide the stages' channels, and a size that a machine has."""
    depths = values["depths"]
    for name in PER_STAGE:
        if len(values[name]) != len(depths):
            return f"{name}={values[name]} has {len(values[name])} entries, depths has {len(depths)}"
    total = 0.0
    for stage, (depth, width, expansion) in enumerate(zip(depths, values["widths"], values["expansions"], strict=True)):
        if int(width * expansion) < 1:
            return f"expansions[{stage}]={expansion} leaves no inner channel of widths[{stage}]={width}"
        if depth > 1 and stage + 1 in values["attending_stages"]:  # a stage's first block does not attend
            heads, inner = width // values["head_dims"][stage], int(width * expansion)
            if not heads or undivided(heads, width, *[inner] * (values["version"] == 2)):
                return (
                    f"head_dims[{stage}]={values['head_dims'][stage]} cuts widths[{stage}]={width} and its {inner} "
                    "inner channels into no whole heads; choose a divisor of both"
                )
        total += depth * width * width * (4 + 4 * expansion)
    if total > MAX_PARAMETERS:
        return f"depths={depths} and widths={values['widths']} make about {total:.0e} parameters, above 1e+10"
    return ""
