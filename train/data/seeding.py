"""Other libraries' transforms, which draw from global generators, as functions of (seed, purpose, position)."""

import contextlib
import random
import threading
from collections.abc import Iterator

import numpy as np
import torch

from d_emo.train.data import stream

# Threads of a stream's loader augment one after the other: timm and torchvision draw from generators that they share.
_GLOBAL_GENERATORS = threading.Lock()


@contextlib.contextmanager
def seeded(seed: int, purpose: stream.Purpose, position: int) -> Iterator[None]:
    """Python's, NumPy's and torch's global generators set by (seed, purpose, position), and put back at the end."""
    value = int(stream.generator(seed, purpose, position).integers(2**32))
    with _GLOBAL_GENERATORS:
        former = random.getstate(), np.random.get_state(), torch.get_rng_state()
        random.seed(value)
        np.random.seed(value)
        torch.default_generator.manual_seed(value)
        try:
            yield
        finally:
            random.setstate(former[0])
            np.random.set_state(former[1])
            torch.set_rng_state(former[2])
