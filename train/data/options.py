"""The options that name a source of images, for every trainer."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from d_emo.common.options import Recipe, at_most_one_of, below_one, goes_with, option, positive, zero_or_more

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
        zero_or_more(self, "num_workers")


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
        at_most_one_of(self, *DATA_SOURCES)
        if self.streaming and not self.dataset:
            raise ValueError("--streaming reads a --dataset, and none is named; folders and latents are read by index.")
        if "://" in (self.dataset or "") and not self.streaming:
            raise ValueError(f"--dataset {self.dataset} is a URL, which cannot be read by index; add --streaming.")
        positive(self, "stream_buffer")


@dataclass(frozen=True, kw_only=True)
class ValidationOptions(LoaderOptions):
    """What trainers of tasks are validated on; beside `dataset` and `train_data_dir`, which they name themselves.

    Each takes the place of the others in a file, such as the share of a recipe for fine-tuning.
    """

    validation_split: str | None = option(
        None, "Validate on this split of --dataset.", "validation_dataset", "validation_dir", "validation_share"
    )
    validation_dataset: str | None = option(
        None,
        "Validate on this dataset, named as --dataset is.",
        "validation_split", "validation_dir", "validation_share",
    )  # fmt: skip
    validation_dir: str | None = option(
        None,
        "Validate on this folder, named as --train-data-dir is.",
        "validation_split", "validation_dataset", "validation_share",
    )  # fmt: skip
    validation_share: float | None = option(
        None,
        "Hold this share of the training data out and validate on it. Default: 0.2 for the digits, else none.",
        "validation_split", "validation_dataset", "validation_dir",
    )  # fmt: skip

    def __post_init__(self):
        super().__post_init__()
        at_most_one_of(self, "train_data_dir", "dataset")
        at_most_one_of(self, "validation_split", "validation_dataset", "validation_dir", "validation_share")
        goes_with(self, "dataset", "validation_split")
        below_one(self, "validation_share")
