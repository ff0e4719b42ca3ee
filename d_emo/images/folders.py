"""Pictures in folders: a sub-folder a class, or, where classes are not wanted, in any way."""

from pathlib import Path

import numpy as np

from d_emo.images.decode import decode
from d_emo.images.labels import english_names
from d_emo.images.listing import class_folders, list_pictures
from d_emo.images.source import ImageSource


def folder_source(root: Path, unconditional: bool) -> ImageSource:
    """A folder with one sub-folder a class, images at any depth below; names in order are the class ids.

    Folders named by ImageNet's WordNet ids get their English class names. For unconditional training the images may
    also lie in `root` itself.
    """
    if not root.is_dir():
        raise ValueError("there is no such folder.")
    folders = [root] if unconditional else class_folders(root)
    files = [list_pictures(folder) for folder in folders]
    if not any(files):
        what = "no images in it" if unconditional else "no class folders with images in it"
        raise ValueError(f"there are {what}; expected {root}/CLASS/IMAGE.jpg.")
    empty = [folder.name for folder, found in zip(folders, files, strict=True) if not found]
    if empty:
        raise ValueError(f"class folders without images: {', '.join(empty[:10])}; remove them or add images.")
    paths = [path for found in files for path in found]
    return ImageSource(
        name=root.resolve().name,
        size=len(paths),
        read=lambda index: decode(paths[index], str(paths[index])),
        labels=np.repeat(np.arange(len(folders)), [len(found) for found in files]),
        id2label=dict(enumerate(english_names(folder.name for folder in folders))),
        files=paths,
    )
