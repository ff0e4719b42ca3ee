"""What a configuration of a segmenter may say; light, since transformers reads its own part while it is imported."""

from d_emo.common.block_ranges import CHANNELS
from d_emo.common.ranges import Each, Flag, Maybe, OneOf, Real, Table, Whole

HEADS = ("deeplabv3", "pspnet", "segformer", "semantic_fpn")
# Those whose published systems learn with an auxiliary head on stage 3.
WITH_AUXILIARY = ("deeplabv3", "pspnet")
# Published channels by head; SegFormer's is 180 on 1M.
HEAD_CHANNELS = {"deeplabv3": 256, "pspnet": 256, "segformer": 288, "semantic_fpn": 128}
NUM_CLASSES = Whole(2, 10_000, "a single object has 2: background, object")
IGNORED = 255

# What every segmenter's configuration has.
SEGMENTER: Table = {
    "num_labels": NUM_CLASSES,
    "num_classes": NUM_CLASSES,
    "dropout": Real(0, 1, below=True),
    "auxiliary_weight": Real(0, 1e3),
    "semantic_loss_ignore_index": Whole(-(2**31), 2**31 - 1),
    "loss_over_ignored": Flag(),
    "dice_weight": Real(0, 1e3),
    "image_mean": Maybe(Each(Real(-1e3, 1e3), 1, 4096)),
    "image_std": Maybe(Each(Real(0, 1e3, positive=True), 1, 4096)),
}
# Those on EMOv2.
ON_BACKBONE: Table = {
    "head": OneOf(HEADS),
    "head_channels": Maybe(CHANNELS),
    "auxiliary": Maybe(Flag()),
    "auxiliary_channels": CHANNELS,
    "pyramid_channels": CHANNELS,
}
