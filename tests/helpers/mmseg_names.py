"""mmsegmentation's names of a head's tensors, under which `tests/golden/dense_heads.json` has its weights, as ours."""

import re

import torch

# What a name of theirs begins with, by head; the first that fits counts.
PARTS = {
    "deeplabv3": [(r"image_pool\.1\.", "pooled."), (r"aspp_modules\.(\d)\.", r"branches.\1.")],
    "pspnet": [(r"psp_modules\.(\d)\.1\.", r"branches.\1.")],
    "segformer": [(r"convs\.(\d)\.", r"branches.\1."), (r"fusion_conv\.", "fusion.")],
    "auxiliary": [(r"convs\.0\.", "unit.")],
    "fpn_neck": [
        (r"lateral_convs\.(\d)\.conv\.", r"inner_blocks.\1.0."),
        (r"fpn_convs\.(\d)\.conv\.", r"layer_blocks.\1.0."),
    ],
    "fpn_head": [(r"scale_heads\.(\d)\.", r"branches.\1.")],
}
SHARED = [(r"conv_seg\.", "classifier."), (r"bottleneck\.", "bottleneck.")]


def ours(head: str, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A head's state dictionary under this package's names.

    Raises:
        KeyError: a name that no rule has.
    """
    renamed = {}
    for name, tensor in state.items():
        rule = next(((old, new) for old, new in [*PARTS[head], *SHARED] if re.match(old, name)), None)
        if rule is None:
            raise KeyError(name)
        renamed[re.sub(rf"^{rule[0]}", rule[1], name)] = tensor
    return renamed
