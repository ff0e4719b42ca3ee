"""Files of classifiers' weights that others wrote: the authors', and those of timm's trainer."""

from collections.abc import Mapping
from pathlib import Path

import torch

from d_emo.classification.published import checkpoint_state
from d_emo.classification.variants import CLASSIFIERS, create_classifier
from d_emo.common.tensor_files import read_state, read_tensors

# Where full checkpoints hold the two kinds of weights: the authors', and those of timm's trainer.
WEIGHTS = {"averaged": ("net_E", "state_dict_ema"), "raw": ("net", "state_dict")}


def read_classifier(path: Path, weights: str = "averaged") -> tuple[str, int, dict[str, torch.Tensor]]:
    """A checkpoint's size, number of classes, and tensors under this package's names.

    Args:
        path: a bare state dictionary, an author's full checkpoint, or one of timm's train.py; no code in it is run.
        weights: "averaged" or "raw", which ones of a full checkpoint.

    Raises:
        ValueError: there is no such file, or its tensors are of no published size.
    """
    content = read_tensors(path)
    of_timm = isinstance(content, dict) and "state_dict_ema" in content
    parts = {kind: names[of_timm] for kind, names in WEIGHTS.items()}
    state = checkpoint_state(read_state(path, tuple(parts.values()), parts[weights]))
    return *size_of(state), state


def size_of(state: Mapping[str, torch.Tensor]) -> tuple[str, int]:
    """The size and number of classes that a state dictionary under this package's names is of.

    Raises:
        ValueError: it is none of the published sizes.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    if "head.weight" not in shapes:
        raise ValueError(f"no EMOv1 or EMOv2 weights: head.weight is missing among {len(shapes)} tensors.")
    num_classes = shapes["head.weight"][0]
    for name in CLASSIFIERS:
        with torch.device("meta"):
            expected = create_classifier(name, num_classes=num_classes).state_dict()
        if {key: tuple(tensor.shape) for key, tensor in expected.items()} == shapes:
            return name, num_classes
    raise ValueError(f"its tensors fit none of {', '.join(CLASSIFIERS)}.")
