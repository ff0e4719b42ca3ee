"""What a configuration of U-EMOv2 or the plain UNet may say; light, as the configuration's module is."""

from d_emo.common.block_ranges import CHANNELS, EXPANSION, KERNEL, MAX_PARAMETERS, SIDE, WINDOW, Values, undivided
from d_emo.common.ranges import Flag, Maybe, OneOf, Real, Table, Whole

# What a stage's pair is made of: blocks of EMOv2, or 3x3 units.
PAIRS = ("i2rmb", "conv")
# The network's arguments, `in_channels` as the configuration's `num_channels`.
UNET: Table = {
    "block": OneOf(PAIRS, "i2rmb is U-EMOv2, conv the plain UNet"),
    "in_channels": Whole(1, 4096),
    "base_channels": CHANNELS,
    "depth": Whole(2, 8, "5 is published"),
    "expansion": EXPANSION,
    "head_dim": CHANNELS,
    "window_size": WINDOW,
    "clip_window": Flag(),
    "kernel_size": KERNEL,
    "layer_scale": Maybe(Real(-1e3, 1e3)),
}
# The configuration's, beside what those of all segmenters have.
UNET_SEGMENTER: Table = {
    **UNET,
    "num_channels": UNET["in_channels"],
    "head_channels": CHANNELS,
    "auxiliary": Flag(),
    "auxiliary_channels": CHANNELS,
    "image_size": SIDE,
}


def pairs_fit(values: Values) -> str:
    """Heads that divide the channels of every attending block, and a size that a machine has."""
    base, depth, expansion = values["base_channels"], values["depth"], values["expansion"]
    widths = [base * 2**stage for stage in range(depth)]
    if 40 * sum(width**2 for width in widths) > MAX_PARAMETERS:
        return f"base_channels={base} and depth={depth} make more than 1e+10 parameters; 64 and 5 are published"
    for width in widths if values["block"] == "i2rmb" else ():
        inner, head_dim = int(width * expansion), values["head_dim"]
        if not inner:
            return f"expansion={expansion} leaves no inner channel of {width}"
        if width % head_dim or undivided(width // head_dim, inner):
            return (
                f"head_dim={head_dim} cuts {width} channels and their {inner} inner ones into no whole heads; "
                f"choose a divisor of base_channels={base}, and an expansion such as 2"
            )
    return ""


def image_divides(values: Values) -> str:
    """The image processor's side is one that the network takes."""
    side, multiple = values["image_size"], 2 ** (values["depth"] - 1)
    if side % multiple:
        return f"image_size={side} is no multiple of {multiple}, which depth={values['depth']} needs (256 is published)"
    return ""
