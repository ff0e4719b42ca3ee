"""The one listing: which files of a folder are pictures, in which order, and which of its folders are classes."""

from pathlib import Path

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm", ".pgm"})


def is_picture(name: str) -> bool:
    """Whether a file's name, of a folder or of a tar file, is that of a picture."""
    return Path(name).suffix.lower() in IMAGE_SUFFIXES


def list_pictures(folder: Path) -> list[Path]:
    """The pictures of a folder at any depth, in the order of their paths."""
    return sorted(path for path in folder.rglob("*") if is_picture(path.name))


def class_folders(root: Path) -> list[Path]:
    """The folders in `root`, in the order of the class ids that they stand for."""
    return sorted(path for path in root.iterdir() if path.is_dir())
