"""A table of small pictures, as CIFAR-10 comes."""

import io

import datasets
import numpy as np
import PIL.Image
import pytest


@pytest.fixture(scope="session")
def picture_table(tmp_path_factory):
    """48 pictures of 16 x 16 in three classes, as a parquet file."""
    random = np.random.default_rng(0)
    encoded = []
    for _ in range(48):
        content = io.BytesIO()
        PIL.Image.fromarray(random.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(content, "PNG")
        encoded.append({"bytes": content.getvalue(), "path": None})
    names = ["cat", "dog", "frog"]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})
    rows = {"image": encoded, "label": [number % 3 for number in range(48)]}
    path = tmp_path_factory.mktemp("pictures") / "pictures.parquet"
    datasets.Dataset.from_dict(rows, features=features).to_parquet(path)
    return path
