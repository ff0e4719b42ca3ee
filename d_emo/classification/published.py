"""Published EMOv1 and EMOv2 checkpoints in this package's names.

Source: the state dictionaries of the authors' classifiers (arXiv 2412.06674, arXiv 2301.01146), whose stages are
stage0 (the stem) to stage4, with 1x1 convolutions where this package has linear layers.
"""

import re
from collections.abc import Mapping

import torch

from d_emo.classification.checks import check_tensors
from d_emo.classification.emov2 import EMOv2
from d_emo.models.checks import load_strictly

# Published part of a block -> ours; attention's parts are joined below.
BLOCK = {
    "norm.norm": "norm",
    "norm": "norm",
    "conv_local.conv": "i2rmb.conv",
    "conv_local.norm": "i2rmb.conv_norm",
    "proj.conv": "i2rmb.proj_out",
}
STEM_V2 = {"0.conv": "conv", "0.norm": "conv_norm", "1.conv": "depthwise", "1.norm": "depthwise_norm",
           "2.conv": "pointwise"}  # fmt: skip
STEM_V1 = {"0.convs.0.0": "conv", "0.convs.0.1": "conv_norm", "1.conv_local.conv": "depthwise",
           "1.conv_local.norm": "depthwise_norm", "1.se.conv_reduce": "squeeze", "1.se.conv_expand": "excite",
           "1.proj.conv": "pointwise"}  # fmt: skip
# Published parts that make up ours, in order along the output channels.
VALUES_V2 = (("eops.0.net.conv",), ("eops.0.qk.conv", "eops.0.v.conv"))


def published_state(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A published state dictionary under this package's names; 1x1 kernels become matrices, q, k and v one.

    Raises:
        ValueError: a tensor has a name that no published model has.
    """
    check_tensors(state)
    ours: dict[str, torch.Tensor] = {}
    is_v1 = "stage0.0.convs.0.0.weight" in state
    for name, tensor in state.items():
        module, _, part = name.rpartition(".")
        numbered = re.fullmatch(r"stage(\d)\.(.*)", module)
        if module in ("norm.norm", "head"):
            ours[f"{module.split('.')[0]}.{part}"] = tensor
        elif numbered is None:
            raise ValueError(f"no EMOv1 or EMOv2 weights: unknown tensor {name}.")
        elif numbered[1] == "0":
            stem = (STEM_V1 if is_v1 else STEM_V2).get(numbered[2])
            if stem is None:
                raise ValueError(f"no EMOv1 or EMOv2 weights: unknown tensor {name}.")
            ours[f"stem.{stem}.{part}"] = tensor
        else:
            _add_block_tensor(ours, state, int(numbered[1]) - 1, numbered[2], part, tensor)
    return ours


def _add_block_tensor(
    ours: dict[str, torch.Tensor],
    state: Mapping[str, torch.Tensor],
    stage: int,
    rest: str,
    part: str,
    tensor: torch.Tensor,
) -> None:
    index, _, module = rest.partition(".")
    prefix, published = f"stages.{stage}.blocks.{index}", f"stage{stage + 1}.{index}"
    if module == "ls":
        ours[f"{prefix}.layer_scale"] = tensor.flatten()
    elif module in BLOCK:
        matrix = module == "proj.conv"
        ours[f"{prefix}.{BLOCK[module]}.{part}"] = tensor.flatten(1) if matrix else tensor
    elif module in ("eops.0.net.conv", "eops.0.qk.conv"):
        names = VALUES_V2[0] if module.endswith("net.conv") else VALUES_V2[1]
        parts = [f"{published}.{name}.{part}" for name in names]
        if absent := [name for name in parts if name not in state]:
            raise ValueError(f"no EMOv1 or EMOv2 weights: {absent[0]} is missing among {len(state)} tensors.")
        joined = torch.cat([state[name] for name in parts])
        ours[f"{prefix}.i2rmb.attn.to_qkv.{part}"] = joined.flatten(1) if part == "weight" else joined
    elif module in ("qk.conv", "v.conv"):
        target = "to_qk" if module == "qk.conv" else "to_v"
        ours[f"{prefix}.i2rmb.attn.{target}.{part}"] = tensor.flatten(1) if part == "weight" else tensor
    elif module != "eops.0.v.conv":  # joined with its queries and keys
        raise ValueError(f"no EMOv1 or EMOv2 weights: unknown tensor {published}.{module}.{part}.")


def checkpoint_state(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A classifier's tensors under this package's names: its own, those of a transformers folder, or published ones.

    Args:
        state: without wrappers' prefixes (`strip_wrappers`).

    Raises:
        ValueError: a tensor has a name that no classifier has.
    """
    check_tensors(state)
    prefix = "emov2." if all(name.startswith("emov2.") for name in state) else ""
    own = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
    return own if "stem.conv.weight" in own else published_state(state)


def import_classifier(state: Mapping[str, torch.Tensor], model: EMOv2) -> None:
    """Load a checkpoint's tensors (see `checkpoint_state`) into a model, every one of them.

    Raises:
        ValueError: a tensor is missing, left over, or of another shape; the message names some.
    """
    load_strictly(checkpoint_state(state), model)
