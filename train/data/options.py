"""The options that name a source of images, for every trainer."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from d_emo.common.options import Recipe, option, require

# The options that name a source of data.
DATA_SOURCES = ("dataset", "train_data_dir", "latents")
# Those that may be folders, of any trainer.
FOLDERS = (*DATA_SOURCES, "mask_dir", "validation_dir", "validation_dataset", "validation_mask_dir")


# Options of the digits' recipes that go with another: given that one, they are left out.
TOGETHER = {"micro_batch_size": "global_batch_size", "model_config": "model"}


def digits_recipe(name: str, given: Mapping[str, Any]) -> Recipe | None:
    """The recipe of `train/configs` for the digits, which are trained on where no source is given."""
    if any(given.get(source) is not None for source in DATA_SOURCES):
        return None
    without = [option for option, other in TOGETHER.items() if other in given]
    return Recipe(Path(__file__).parents[1] / "configs" / name, ("output_dir", *without))


@dataclass(frozen=True, kw_only=True)
class LoaderOptions:
    """How any trainer's data are read."""

    on_bad_image: Literal["stop", "skip"] = option("stop", "An unreadable image stops the run, or is skipped aloud.")
    num_workers: int | None = option(
        None, "Loader processes. Default: 0 for the digits and latents, for others 4, or a core each."
    )

    def __post_init__(self):
        require(self.num_workers is None or self.num_workers >= 0, "num_workers", self.num_workers, "must not be < 0")


@dataclass(frozen=True, kw_only=True)
class DataOptions(LoaderOptions):
    """What it is trained on; without a source, scikit-learn's handwritten digits."""

    dataset: str | None = option(
        None,
        "Hub id of a dataset, a local dataset folder, .parquet files, or WebDataset shards (train-{0000..0127}.tar).",
    )
    streaming: bool = option(
        False, "Read the dataset as it comes, never storing it: for Hub ids and URLs, and for more data than disk."
    )
    stream_buffer: int = option(10_000, "With --streaming: images in memory from which the next one is drawn.")
    class_names: str | None = option(
        None, "Names of classes that the data give by number only: a file (one a line, or JSON), or 'imagenet'."
    )
    dataset_config: str | None = option(None, "Configuration name of a Hub dataset.")
    dataset_split: str = option("train", "Split of the dataset.")
    image_column: str = option("image", "Column that holds the images.")
    label_column: str = option("label", "Column that holds the classes.")
    train_data_dir: str | None = option(None, "Folder with one sub-folder of images a class.")
    latents: str | None = option(None, "Folder of latents that train/encode_latents.py wrote.")
    unconditional: bool = option(False, "Ignore the labels and train a model without classes.")
    random_flip: bool | None = option(None, "Mirror images at random (true/false). Default: true, but not for digits.")

    def __post_init__(self):
        super().__post_init__()
        named = [f"--{name.replace('_', '-')}" for name in DATA_SOURCES if getattr(self, name)]
        if len(named) > 1:
            raise ValueError(f"{' and '.join(named)} are both given; choose one source.")
        if self.streaming and not self.dataset:
            raise ValueError("--streaming reads a --dataset, and none is named; folders and latents are read by index.")
        if "://" in (self.dataset or "") and not self.streaming:
            raise ValueError(f"--dataset {self.dataset} is a URL, which cannot be read by index; add --streaming.")
        require(self.stream_buffer > 0, "stream_buffer", self.stream_buffer, "must be positive")


@dataclass(frozen=True, kw_only=True)
class ValidationOptions(LoaderOptions):
    """What trainers of labelled data are validated on; beside `dataset`, which the trainers name themselves."""

    validation_split: str | None = option(None, "Validate on this split of --dataset.")
    validation_dataset: str | None = option(None, "Validate on this dataset, named as --dataset is.")
    validation_dir: str | None = option(None, "Validate on this folder of class folders.")
    validation_share: float | None = option(
        None, "Hold this share of the training data out and validate on it. Default: 0.2 for the digits, else none."
    )

    def __post_init__(self):
        super().__post_init__()
        names = ("validation_split", "validation_dataset", "validation_dir", "validation_share")
        given = [f"--{name.replace('_', '-')}" for name in names if getattr(self, name)]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} are both given; choose one.")
        if self.validation_split and not getattr(self, "dataset", None):
            raise ValueError(f"--validation-split {self.validation_split}: it is one of a --dataset; none is named.")
        require(
            self.validation_share is None or 0 <= self.validation_share < 1,
            "validation_share",
            self.validation_share,
            "must be in [0, 1)",
        )
