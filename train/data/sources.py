"""The images that the options name, as a source to train on."""

from dataclasses import replace
from pathlib import Path

import numpy as np

from d_emo.common.files import check_apart
from d_emo.images.latent_cache import latents_source
from d_emo.images.open_source import open_source
from d_emo.images.source import ImageSource
from d_emo.train.data.options import FOLDERS, DataOptions


def load_source(options: DataOptions, named: str | None = None) -> ImageSource:
    """Open the source that the options name.

    Args:
        options: of the data.
        named: how the user named it, for messages; None for the options' own names.

    Raises:
        ValueError: no images, no such folder, dataset or column; the message gives the remedy.
    """
    if options.train_data_dir:
        flag = f"--train-data-dir {options.train_data_dir}"
    elif options.dataset:
        flag = f"--dataset {options.dataset}"
    elif options.latents:
        flag = f"--latents {options.latents}"
    else:
        flag = "no data was named"
    try:
        source = _open_source(options)
        if options.on_bad_image == "stop":
            source.refuse_unreadable("Repair or remove them, or go on: --on-bad-image skip.")
    except ValueError as error:
        raise ValueError(f"{named or flag}: {error}") from error
    if options.unconditional:
        return replace(source, labels=np.zeros(len(source.labels), dtype=np.int64), id2label={})
    return source


def check_output(data: DataOptions, folder: Path) -> None:
    """Refuse an output folder among the pictures.

    Raises:
        ValueError: it lies in a folder that the options of data name.
    """
    check_apart(folder, "--output-dir", {f"--{name.replace('_', '-')}": getattr(data, name, None) for name in FOLDERS})


def _open_source(options: DataOptions) -> ImageSource:
    if options.latents:
        return latents_source(Path(options.latents))
    return open_source(
        options.train_data_dir,
        options.dataset,
        config=options.dataset_config,
        split=options.dataset_split,
        image_column=options.image_column,
        label_column=options.label_column,
        class_names=options.class_names,
        unconditional=options.unconditional,
        stream_buffer=options.stream_buffer if options.streaming else None,
    )
