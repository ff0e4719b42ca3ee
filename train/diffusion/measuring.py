"""Measuring mean and deviation a channel of a finished folder of latents: `encode_latents.py --statistics true`."""

import os
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import gather_object

from d_emo.common.files import remove
from d_emo.common.output import Progress, say
from d_emo.common.processes import agreed
from d_emo.images.latent_cache import blocks
from d_emo.images.latent_manifest import CacheManifest, LatentCacheError, reason_of, shard_folder
from d_emo.images.latent_statistics import (
    STATISTICS,
    LatentStatistics,
    Moments,
    describe_scale,
    merged,
    moments_of,
    statistics_from,
    statistics_of,
    write_statistics,
)

# Of fewer images mean and deviation are not what those of more would be.
FEW_IMAGES = 1000


def discard_statistics(folder: Path, manifest: CacheManifest, accelerator: Accelerator) -> bool:
    """Delete statistics that are damaged or of other latents; whether there were some. Every process calls this."""

    def discard() -> bool:
        try:
            statistics_of(folder, manifest)
        except LatentCacheError as error:
            remove(folder / STATISTICS)
            say(f"measured again: {reason_of(str(error))}")
            return True
        return False

    return agreed(accelerator, discard)


def measure(folder: Path, manifest: CacheManifest, accelerator: Accelerator) -> None:
    """Measure a complete folder that has no statistics, each process its share of the files.

    Raises:
        ValueError: a channel is constant.
    """
    if agreed(accelerator, lambda: os.path.lexists(folder / STATISTICS)):
        return
    files = shard_folder(folder, manifest).ranges
    mine: dict[int, Moments] = {}
    with Progress(len(files), "file", "measuring", shown=accelerator.is_main_process) as progress:
        for shard in files[accelerator.process_index :: accelerator.num_processes]:
            mine[shard.start] = moments_of(blocks(folder, manifest, shard))
            progress.update(accelerator.num_processes)  # the others are about as far
    everyones = {first: moments for share in gather_object([mine]) for first, moments in share.items()}

    def write() -> None:
        found = statistics_from(merged(everyones[first] for first in sorted(everyones)), manifest)
        write_statistics(folder, found)
        say(describe(found))

    agreed(accelerator, write)


def describe(statistics: LatentStatistics) -> str:
    """What was measured, for people."""
    few = f"; {FEW_IMAGES:,} images or more would tell them better" if statistics.images < FEW_IMAGES else ""
    views = " and their mirror images" if statistics.views == 2 else ""
    return f"measured on {statistics.images:,} images{views}: {describe_scale(statistics.latent_space)}{few}"
