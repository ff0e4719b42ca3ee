"""Reading and writing .npz files of images and statistics, without pickle and without filling the memory.

ADM's reference files hold `arr_0` (uint8 images, N x H x W x 3) and may hold `mu, sigma, mu_s, sigma_s`; pytorch-fid's
hold `mu, sigma`. Both are plain zip files of .npy files.
"""

import ast
import struct
import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np

from d_emo.common import checks
from d_emo.common.files import refuse_pipe, written_whole
from d_emo.common.messages import first_line, shown

IMAGES_KEY = "arr_0"
STATISTICS_KEYS = ("mu", "sigma")
SPATIAL_STATISTICS_KEYS = ("mu_s", "sigma_s")
# NumPy writes about a hundred.
MAX_HEADER_BYTES = 2**16


def archive_keys(path: Path) -> set[str]:
    """Names of the arrays of an .npz file.

    Raises:
        ValueError: it is no .npz file.
    """
    path = checks.path_named(path, "path")
    try:
        refuse_pipe(path)
        with zipfile.ZipFile(path) as archive:
            return {name.removesuffix(".npy") for name in archive.namelist()}
    except Exception as error:  # damaged archives fail in any way
        raise ValueError(f"{path} is not an .npz file, or is damaged ({first_line(error)}).") from error


def read_array(path: Path, key: str) -> np.ndarray:
    """One array of an .npz file, in memory.

    Raises:
        ValueError: the array is missing, damaged, or holds Python objects.
    """
    path = checks.path_named(path, "path")
    try:
        with np.load(path, allow_pickle=False) as archive:
            return archive[key]
    except Exception as error:  # damaged archives fail in any way
        raise ValueError(f"{path}: array {key!r} cannot be read ({first_line(error)}).") from error


def write_arrays(path: Path, **arrays: Any) -> None:
    """Write an .npz file, whole or not at all. Every array has a CRC-32, which is checked when it is read."""
    with written_whole(path) as partial, zipfile.ZipFile(partial, "w", zipfile.ZIP_STORED) as archive:
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                np.lib.format.write_array(file, np.asanyarray(array), allow_pickle=False)


def map_images(path: Path) -> np.ndarray:
    """The images of an .npz file, (N, H, W, channels) uint8, read from the disk as they are used.

    Raises:
        ValueError: there is no `arr_0`, it is compressed, or it is not uint8 of that shape.
    """
    keys = archive_keys(path)
    if IMAGES_KEY not in keys:
        raise ValueError(f"{path} has no images: there is no {IMAGES_KEY!r} among {', '.join(sorted(keys))}.")
    try:
        with zipfile.ZipFile(path) as archive:
            member = archive.getinfo(f"{IMAGES_KEY}.npy")
            with archive.open(member) as file:
                shape, fortran, dtype = _array_header(file)
                header = file.tell()
    except Exception as error:
        raise ValueError(f"{path}: array {IMAGES_KEY!r} cannot be read ({first_line(error)}).") from error
    if dtype != np.uint8 or len(shape) != 4 or shape[3] not in (1, 3) or fortran:
        raise ValueError(f"{path}: {IMAGES_KEY} is {dtype} of shape {shape}; images are uint8, N x H x W x 3.")
    if member.compress_type != zipfile.ZIP_STORED:
        return read_array(path, IMAGES_KEY)
    if not np.prod(shape):
        return np.empty(shape, dtype=np.uint8)
    try:
        return np.memmap(path, dtype=np.uint8, mode="r", offset=_data_offset(path, member) + header, shape=shape)
    except Exception as error:
        raise ValueError(f"{path}: array {IMAGES_KEY!r} is cut short ({first_line(error)}).") from error


def _array_header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Shape, order and type of a .npy stream (its format is described in NumPy's NEP 1)."""
    magic = file.read(8)
    if magic[:6] != b"\x93NUMPY":
        raise ValueError("an array of the file is no .npy stream.")
    length_format = "<H" if magic[6] == 1 else "<I"
    (length,) = struct.unpack(length_format, file.read(struct.calcsize(length_format)))
    if length > MAX_HEADER_BYTES:
        raise ValueError(f"its header has {length:,} bytes")
    header = ast.literal_eval(file.read(length).decode("latin1"))
    shape = tuple(int(side) for side in header["shape"])
    if min(shape, default=0) < 0:
        raise ValueError(f"its shape is {shape}")
    return shape, bool(header["fortran_order"]), np.dtype(header["descr"])


def _data_offset(path: Path, member: zipfile.ZipInfo) -> int:
    """Where a stored member's bytes begin; the local header's lengths differ from the directory's."""
    with path.open("rb") as file:
        file.seek(member.header_offset + 26)
        name, extra = struct.unpack("<HH", file.read(4))
    return member.header_offset + 30 + name + extra


def write_images(path: Path, blocks: Iterable[np.ndarray], shape: tuple[int, int, int, int]) -> None:
    """Write images as ADM's evaluator reads them: `arr_0`, uint8, N x H x W x 3. Streamed, and whole or not there.

    Statistics are left out on purpose: the original evaluator would believe them instead of computing them.

    Args:
        path: the .npz file.
        blocks: (n, H, W, 1 or 3) uint8, N images in all.
        shape: (N, H, W, 3).

    Raises:
        ValueError: the images are not of that shape, type or number.
    """
    if not isinstance(shape, Sequence) or len(shape) != 4:
        raise ValueError(f"shape={shown(shape)} is not (N, H, W, 3).")
    if not isinstance(blocks, Iterable):
        raise ValueError(f"blocks={shown(blocks)} is not a series of arrays of images.")
    shape = tuple(checks.whole(side, f"shape[{place}]") for place, side in enumerate(shape))  # type: ignore[assignment]
    path.parent.mkdir(parents=True, exist_ok=True)
    header = {"descr": "|u1", "fortran_order": False, "shape": shape}
    count = 0
    with (
        written_whole(path) as partial,
        zipfile.ZipFile(partial, "w", zipfile.ZIP_STORED) as archive,
        archive.open(f"{IMAGES_KEY}.npy", "w", force_zip64=True) as file,
    ):
        np.lib.format.write_array_header_1_0(file, header)
        for block in blocks:
            if not isinstance(block, np.ndarray) or block.dtype != np.uint8 or block.ndim != 4:
                raise ValueError(f"blocks hold {shown(block)}, which is no uint8 array of shape (n, H, W, 1 or 3).")
            rgb = np.repeat(block, 3, axis=3) if block.shape[3] == 1 else block
            if rgb.shape[1:] != tuple(shape[1:]):
                raise ValueError(f"a block has images of shape {rgb.shape[1:]}, not {tuple(shape[1:])}.")
            file.write(np.ascontiguousarray(rgb).tobytes())
            count += len(rgb)
        if count != shape[0]:
            raise ValueError(f"{count} images were given, {shape[0]} announced.")
