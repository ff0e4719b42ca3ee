"""What disks, kills and people do to files."""

from collections.abc import Callable
from pathlib import Path


def flip_bit(path: Path, bit: int) -> None:
    """Turn one bit of a file over."""
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


def flip_in_the_middle(path: Path) -> None:
    flip_bit(path, 4 * path.stat().st_size)


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def delete(path: Path) -> None:
    path.unlink()


def replace_by_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def replace_by_broken_link(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.with_name("nowhere"))


def overwrite(path: Path) -> None:
    path.write_bytes(b"something else altogether")


def nest_deeply(path: Path) -> None:
    path.write_bytes(b"[" * 100_000)


DAMAGES: dict[str, Callable[[Path], None]] = {
    "flipped bit": flip_in_the_middle,
    "cut short": cut_short,
    "empty": empty,
    "deleted": delete,
    "folder": replace_by_folder,
    "broken link": replace_by_broken_link,
    "overwritten": overwrite,
    "nested deeply": nest_deeply,
}
