"""Small pictures as one tensor on the device, decoded once."""

import io
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from d_emo.images.decode import decode, to_pixels
from d_emo.images.tables import datasets_source

DECODERS = 16


@dataclass(frozen=True)
class Pictures:
    """Pictures of one size.

    Attributes:
        pixels: (n, 3, H, W) uint8.
        labels: (n,) class ids.
        id2label: their names.
    """

    pixels: torch.Tensor
    labels: torch.Tensor
    id2label: dict[int, str]


def load_pictures(path: Path, device: torch.device, count: int | None = None) -> Pictures:
    """The pictures of a parquet file.

    Args:
        path: the file, with the columns image and label.
        device: where the tensors go.
        count: how many of them, from the first on. Default: all.

    Raises:
        ValueError: it cannot be read, or its pictures have several sizes or are not square.
    """
    import pyarrow.parquet

    try:
        source = datasets_source(str(path))
        column = pyarrow.parquet.read_table(path, columns=["image"]).column("image").to_pylist()[:count]
    except (ValueError, OSError) as error:
        raise ValueError(f"{path}: {error}") from error

    def pixels_of(numbered: tuple[int, Any]) -> np.ndarray:
        row, stored = numbered
        return to_pixels(decode(io.BytesIO(stored["bytes"]), f"{path}, row {row}"), 3)

    with ThreadPoolExecutor(DECODERS) as pool:
        decoded = list(pool.map(pixels_of, enumerate(column)))
    shapes = {array.shape for array in decoded}
    if len(shapes) > 1 or decoded[0].shape[0] != decoded[0].shape[1]:
        raise ValueError(
            f"{path}: its pictures are of {len(shapes)} shapes ({decoded[0].shape} first); take square ones."
        )
    pixels = torch.from_numpy(np.stack(decoded)).permute(0, 3, 1, 2).contiguous()
    labels = torch.from_numpy(source.labels[: len(decoded)].astype(np.int64))
    return Pictures(pixels.to(device), labels.to(device), source.id2label)
