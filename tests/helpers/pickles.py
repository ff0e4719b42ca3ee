"""A prepared pickle: loading it makes a file. And the ways in which files hold one."""

import io
import pickle
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import torch


class Prepared:
    """Loaded by pickle, it makes a file; without this module, which is how strangers' pickles come."""

    def __init__(self, marker: Path):
        self.marker = str(marker)

    def __reduce__(self):
        return open, (self.marker, "w")


def raw(path: Path, marker: Path) -> None:
    """A plain pickle."""
    path.write_bytes(pickle.dumps({"state": Prepared(marker)}))


def bare(path: Path, marker: Path) -> None:
    """A plain pickle of the object alone, of protocol 0, which other readers may take for text."""
    path.write_bytes(pickle.dumps(Prepared(marker), protocol=0))


def by_torch(path: Path, marker: Path) -> None:
    """As torch.save writes it."""
    torch.save({"weight": torch.zeros(2), "more": Prepared(marker)}, path)


def by_old_torch(path: Path, marker: Path) -> None:
    """As torch.save wrote it before its archives."""
    torch.save({"weight": torch.zeros(2), "more": Prepared(marker)}, path, _use_new_zipfile_serialization=False)


def scripted(path: Path, marker: Path) -> None:
    """An archive that is taken for TorchScript, with a pickle inside."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(Prepared(marker)))
        archive.writestr("archive/constants.pkl", pickle.dumps(Prepared(marker)))
        archive.writestr("archive/version", "3")


def as_array(path: Path, marker: Path) -> None:
    """An .npy file of Python objects."""
    content = np.empty(2, dtype=object)
    content[:] = [Prepared(marker)] * 2
    with path.open("wb") as file:
        np.save(file, content, allow_pickle=True)


def as_archive(*keys: str):
    """An .npz file whose arrays are of Python objects."""

    def write(path: Path, marker: Path) -> None:
        content = np.empty(2, dtype=object)
        content[:] = [Prepared(marker)] * 2
        with path.open("wb") as file:
            np.savez(file, **dict.fromkeys(keys, content))

    return write


def as_shard(path: Path, marker: Path) -> None:
    """A tar file of samples with pickled members, as WebDataset's own decoders would load them."""
    picture = io.BytesIO()
    import PIL.Image

    PIL.Image.new("RGB", (8, 8)).save(picture, "PNG")
    array = io.BytesIO()
    objects = np.empty(1, dtype=object)
    objects[0] = Prepared(marker)
    np.save(array, objects, allow_pickle=True)
    content = pickle.dumps(Prepared(marker))
    members = {"0.png": picture.getvalue(), "0.cls": b"1", "0.pkl": content, "0.pyd": content,
               "0.npy": array.getvalue(), "0.pth": content, "1.png": picture.getvalue(), "1.cls": content}  # fmt: skip
    with tarfile.open(path, "w") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


FORMS = {"pickle": raw, "pickle of protocol 0": bare, "torch.save": by_torch, "old torch.save": by_old_torch,
         "TorchScript": scripted}  # fmt: skip
