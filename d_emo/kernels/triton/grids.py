"""Launches of any number of programs: one axis, in which those of an image follow one another and share the cache."""

from typing import Any

LARGEST_GRID = 2**31 - 1  # of the first axis; the others end at 65,535
# Sizes that kernels are not compiled anew for, so that what was checked before its first use is what then runs.
SIZES = ("first_image", "height", "width", "batch", "groups", "parts", "strips", "pieces", "pixels")


def launch(kernel: Any, programs: int, images: int, *arguments: Any, **options: Any) -> None:
    """Launch `programs` for each of `images`; the kernel is told the number of its launch's first image."""
    step = max(1, LARGEST_GRID // programs)
    for first in range(0, images, step):
        kernel[(programs * min(step, images - first),)](*arguments, first_image=first, **options)
