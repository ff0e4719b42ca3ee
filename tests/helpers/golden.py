"""Published outputs, and the seeded weights and inputs that they were computed from."""

import json
import zlib

import numpy as np
import torch

from helpers.paths import GOLDEN


def golden(name: str) -> dict:
    """A file of published outputs, copied from the project's shared folder."""
    return json.loads((GOLDEN / f"{name}.json").read_text())


def seeded_weight(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """The matrix or bias that stands for `name` in the golden files (their rule for plain weights and biases)."""
    random = np.random.RandomState(zlib.crc32(name.encode()))
    scale = 0.1 if len(shape) == 1 else 1 / np.sqrt(np.prod(shape[1:]))
    return torch.from_numpy((scale * random.standard_normal(shape)).astype(np.float32))


def seeded_state(shapes: dict[str, list[int]]) -> dict[str, torch.Tensor]:
    """The golden classifiers' state dictionary: each tensor from its name (their rules for every kind of tensor)."""
    state = {}
    for name, shape in shapes.items():
        random = np.random.RandomState(zlib.crc32(name.encode()))
        if name.endswith("num_batches_tracked"):
            state[name] = torch.zeros(shape, dtype=torch.int64)
        elif name.endswith(("running_var", "gamma")):
            state[name] = torch.from_numpy((0.5 + random.random_sample(shape)).astype(np.float32))
        elif len(shape) == 1:
            value = 0.1 * random.standard_normal(shape) + (1.0 if name.endswith("weight") else 0.0)
            state[name] = torch.from_numpy(value.astype(np.float32))
        else:
            state[name] = seeded_weight(name, tuple(shape))
    return state


def seeded_input(seed: int, shape: tuple[int, ...]) -> torch.Tensor:
    """The golden files' standard-normal input."""
    return torch.from_numpy(np.random.RandomState(seed).standard_normal(shape).astype(np.float32))
