"""What a configuration of V-EMOv2 may say; light, since transformers reads its own part while it is imported."""

from d_emo.classification.ranges import CLASSIFIER, STAGES, stages_agree
from d_emo.common.block_ranges import BLOCK, WINDOW, Values
from d_emo.common.ranges import Each, Real, Table, Whole

WINDOWS = Each(WINDOW, 3, 3)
# The attention and the block in time and space: as those of images, but for the window's three sides.
VIDEO_BLOCK: Table = {**BLOCK, "window_size": WINDOWS, "strides": Each(BLOCK["stride"], 3, 3)}
_OF_IMAGES_ALONE = ("version", "local", "dilation", "arrangement", "output_stride")
FRAMES = Whole(1, 65_536)
# The network's and the configuration's fields.
VIDEO: Table = {
    **{name: rule for name, rule in CLASSIFIER.items() if name not in _OF_IMAGES_ALONE},
    "window_size": WINDOWS,
    "temporal_strides": Each(Whole(1, 8), 1, STAGES + 1),
    "dropout": Real(0, 1, below=True),
    "num_frames": FRAMES,
}


def video_agrees(values: Values) -> str:
    """What holds for images, and a temporal stride for the stem and each stage."""
    strides, stages = values["temporal_strides"], len(values["depths"])
    if len(strides) != stages + 1:
        return (
            f"temporal_strides={strides} has {len(strides)} entries; pass {stages + 1}: the stem's and {stages} stages'"
        )
    return stages_agree({**values, "version": 2})
