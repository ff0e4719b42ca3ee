"""Thousands of mutated files through the readers of archives, tensors, JSON and YAML.

python tests/helpers/reader_fuzz.py 10000 0        # files, seed
"""

import collections
import hashlib
import io
import json
import resource
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from safetensors.numpy import save

from helpers import pickles
from helpers.mutation import mutated
from helpers.public_calls import patience

# Bytes of memory that the readers may have beside what their imports take.
MEMORY = 4 << 30
SECONDS = 20


class Fuzzed(NamedTuple):
    """A kind of file: whole ones to begin with, and who reads it."""

    suffix: str
    originals: list[bytes]
    read: Callable[[Path], object]


def _archives(marker: Path, folder: Path) -> list[bytes]:
    content = []
    for write in (np.savez, np.savez_compressed):
        target = io.BytesIO()
        write(target, np.arange(60, dtype=np.uint8).reshape(1, 4, 5, 3), mu=np.ones(4), sigma=np.eye(4))
        content.append(target.getvalue())
    pickles.as_archive("arr_0", "mu", "sigma")(folder / "objects.npz", marker)
    return [*content, (folder / "objects.npz").read_bytes()]


def _read_archive(path: Path) -> None:
    from d_emo.eval.fid.archives import archive_keys, read_array
    from d_emo.eval.fid.image_sets import open_set

    for key in archive_keys(path):
        read_array(path, key)
    images = open_set(str(path))
    images.read(0, len(images))


def _read_tensors(path: Path) -> None:
    from d_emo.common.tensor_files import read_state

    read_state(path, ("ema", "model"), "ema")


def _read_manifest(path: Path) -> None:
    from d_emo.images.latent_manifest import read_cache_manifest

    read_cache_manifest(path.parent)


def _read_checkpoint(path: Path) -> None:
    from d_emo.train.engine.checkpoints import verify_checkpoint

    verify_checkpoint(path.parent)


def _read_names(path: Path) -> None:
    from d_emo.images.labels import read_class_names

    read_class_names(str(path))


def _read_options(path: Path) -> None:
    from d_emo.train.diffusion.config import parse_config

    parse_config(["--config", str(path)])


def _tensors(marker: Path, folder: Path) -> list[bytes]:
    pickles.by_torch(folder / "pickle.pt", marker)
    values = {"a.weight": np.eye(4, dtype=np.float32), "b": np.zeros((2, 3), np.float16), "c": np.arange(3)}
    return [save(values), save(values, {"format": "pt"}), (folder / "pickle.pt").read_bytes()]


def kinds(marker: Path, folder: Path) -> list[Fuzzed]:
    """Every kind of file; `marker` is what a pickle or a YAML tag in them would make."""
    from d_emo.images.decode import DECODE_VERSION

    manifest = {
        **{"source": "s", "fingerprint": "f", "count": 6, "id2label": {"0": "a"}, "resolution": 16, "flips": 2},
        **{"vae": "v", "vae_digest": "0" * 64, "shape": [4, 8, 8], "dtype": "float32", "shard_size": 4},
        **{"scaling_factor": 0.7, "shift_factor": 0.3, "decode_version": DECODE_VERSION},
    }
    for name in ("whole", "mutated"):
        (folder / name / "training_state").mkdir(parents=True)
        (folder / name / "training_state" / "a").write_bytes(b"abc")
    sums = {"training_state/a": {"bytes": 3, "sha256": hashlib.sha256(b"abc").hexdigest()}}
    checkpoint = {"step": 10, "processes": 1, "files": sums}
    yaml = (f"learning_rate: 1e-4\nlog_every: 10\nseed: !!python/object/apply:builtins.open ['{marker}', 'w']\n"
            "anchor: &a [1, 2]\nmore: *a\nmodel: |\n  text\n")  # fmt: skip
    names = [b"cat\ndog\n", b'{"0": "cat", "1": "dog"}', b'["cat", "dog"]']
    return [
        Fuzzed("x.npz", _archives(marker, folder), _read_archive),
        Fuzzed("x.safetensors", _tensors(marker, folder), _read_tensors),
        Fuzzed("manifest.json", [json.dumps(manifest, indent=1).encode()], _read_manifest),
        Fuzzed("manifest.json", [json.dumps(checkpoint).encode()], _read_checkpoint),
        Fuzzed("names.json", names[1:], _read_names),
        Fuzzed("names.txt", names[:1], _read_names),
        Fuzzed("x.yaml", [yaml.encode(), b"learning_rate: 1e-4\nlog_every: 10\nseed: 3\n"], _read_options),
    ]  # fmt: skip


def fuzz(count: int, seed: int) -> dict[str, collections.Counter]:
    """Mutate and read `count` files; outcomes by kind.

    Raises:
        AssertionError: a reader raised what it does not document, did not answer, or ran what it read.
    """
    random, outcomes = np.random.RandomState(seed), collections.defaultdict(collections.Counter)
    with tempfile.TemporaryDirectory() as name:
        folder, marker = Path(name), Path(name) / "it-ran"
        all_kinds = kinds(marker, folder)
        for kind in all_kinds:  # imports, before memory is limited
            try_one(kind, kind.originals[0], folder / "whole")
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, resource.RLIM_INFINITY))
        for number in range(count):
            kind = all_kinds[number % len(all_kinds)]
            original = kind.originals[random.randint(len(kind.originals))]
            content = mutated(original, random, most=1)
            said = try_one(kind, content, folder / "mutated")
            outcomes[kind.read.__name__.removeprefix("_read_")][said] += 1
            assert not marker.exists(), f"file {number} of seed {seed} ran: {content[:200]!r}"
    for name, counted in outcomes.items():
        assert counted["read"], f"no mutated file of {name} was read: they are ruined too thoroughly to tell anything"
    return outcomes


def try_one(kind: Fuzzed, content: bytes, folder: Path) -> str:
    """Read one file: "read" or "refused"."""
    folder.mkdir(exist_ok=True)
    path = folder / kind.suffix
    path.write_bytes(content)
    try:
        with patience(SECONDS):
            kind.read(path)
    except ValueError:
        return "refused"
    except BaseException as error:
        raise AssertionError(f"{kind.read.__name__}: {type(error).__name__}: {error} of {content[:300]!r}") from error
    finally:
        path.unlink()
    return "read"


if __name__ == "__main__":
    for name, counted in fuzz(int(sys.argv[1]), int(sys.argv[2])).items():
        print(f"{name:12} {counted.total():6} files: {counted['refused']:6} refused, {counted['read']:6} read")
