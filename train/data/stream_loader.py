"""Batches of a stream, read and decoded ahead by threads while the model computes.

Which image stands at a position comes from the stream (`ImageStream`); noise, time, flip and label dropout stay
functions of (seed, position). Every batch says where the stream is after it, which is all that a resumed run needs.
"""

import queue
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator

from d_emo.common import checks
from d_emo.common.files import read_json, write_json
from d_emo.images.decode import UnreadableImageError, decode
from d_emo.images.source import EncodedImage, ImageSource, ImageStream
from d_emo.train.data import stream
from d_emo.train.data.batches import Batch, Preparation, Sample, StreamPlace, collate

PLACE_FILE = "stream-{}.json"
# Batches that wait, decoded, for the model.
READY_BATCHES = 4


@dataclass(frozen=True)
class _Pending:
    """A batch whose images are being decoded."""

    samples: list["Future[Sample]"]
    place: StreamPlace


class StreamLoader:
    """Iterates over the batches of one process.

    Args:
        source: has a stream.
        prepare: what becomes of an image.
        seed: of the order.
        sampler: the positions of each batch, the process and how many there are.
        place: where to go on.
        num_threads: decoders.

    Raises:
        ValueError: while iterating: the stream cannot be opened, its labels do not fit, or this process gets no images.
        UnreadableImageError: while iterating: a whole batch of images cannot be read.
    """

    def __init__(
        self,
        source: ImageSource,
        prepare: Preparation,
        seed: int,
        sampler: stream.StreamSampler,
        place: StreamPlace,
        num_threads: int,
    ):
        assert source.stream is not None
        self.images: ImageStream = source.stream
        self.prepare = prepare
        self.seed = seed
        self.sampler = sampler
        self.place = place
        self.num_threads = num_threads

    def __iter__(self) -> Iterator[Batch]:
        ready: queue.Queue[_Pending | BaseException | None] = queue.Queue(READY_BATCHES)
        stop = threading.Event()
        reader = threading.Thread(target=self._fill, args=(ready, stop), daemon=True, name="stream reader")
        reader.start()
        try:
            while (pending := ready.get()) is not None:
                if isinstance(pending, BaseException):
                    raise pending
                yield _finish(pending)
        finally:
            stop.set()

    def _fill(self, ready: "queue.Queue[_Pending | BaseException | None]", stop: threading.Event) -> None:
        """Read ahead until everything is read or nobody wants more. Runs in a thread of its own."""

        def put(item: _Pending | BaseException | None) -> bool:
            while not stop.is_set():
                try:
                    ready.put(item, timeout=0.2)
                    return True
                except queue.Full:
                    continue
            return False

        try:
            images = self._endless()
            with ThreadPoolExecutor(max(1, self.num_threads)) as pool:
                for positions in self.sampler.positions():
                    samples, place = [], self.place
                    for position in positions:
                        image, place = next(images)
                        samples.append(pool.submit(self._load, image, position))
                    if not put(_Pending(samples, place)):
                        return
            put(None)
        except BaseException as error:  # whatever it is, the trainer must hear of it
            put(error)

    def _endless(self) -> Iterator[tuple[EncodedImage, StreamPlace]]:
        """Epoch after epoch, each image with the place after it."""
        epoch, skipped = self.place.epoch, self.place.offset
        while True:
            offset = 0
            for image in self.images.epoch(self.seed, epoch, self.sampler.rank, self.sampler.world_size):
                offset += 1
                if offset > skipped:
                    yield image, StreamPlace(epoch, offset)
            if not offset:
                raise ValueError(
                    f"process {self.sampler.rank} of {self.sampler.world_size} gets no image of this stream of "
                    f"{self.images.num_shards} files; use fewer processes or more files."
                )
            epoch, skipped = epoch + 1, 0

    def _load(self, image: EncodedImage, position: int) -> Sample:
        try:
            picture = decode(image.file, image.name)
        except UnreadableImageError as error:
            return torch.empty(0), image.label, position, [str(error)]
        return self.prepare(picture, position), image.label, position, []


def _finish(pending: _Pending) -> Batch:
    """Wait for the images; one that cannot be read is replaced by the next readable one of its batch."""
    samples = [future.result() for future in pending.samples]
    readable = [index for index, sample in enumerate(samples) if not sample[3]]
    if not readable:
        raise UnreadableImageError(
            f"none of {len(samples)} images in a row can be read; the first: {samples[0][3][0]}. Check the files of "
            "--dataset."
        )
    for index, (_, _, position, messages) in enumerate(samples):
        if messages:
            other = next((candidate for candidate in readable if candidate > index), readable[0])
            samples[index] = (samples[other][0], samples[other][1], position, messages)
    return collate(samples, pending.place)


def save_place(folder: Path, accelerator: Accelerator, place: StreamPlace) -> None:
    """Remember where this process is, in a checkpoint's folder of training state."""
    content = {"epoch": place.epoch, "offset": place.offset, "processes": accelerator.num_processes}
    write_json(folder / PLACE_FILE.format(accelerator.process_index), content)


def _read_place(path: Path) -> StreamPlace:
    stored = read_json(path, "continue from another checkpoint")
    return StreamPlace(*(checks.whole(stored.get(name), f"{path}: {name}", least=0) for name in ("epoch", "offset")))


def load_place(folder: Path, accelerator: Accelerator) -> tuple[StreamPlace, str]:
    """Where this process goes on, and a line to tell the user.

    A stream is dealt out by the number of processes. With another number nobody's place means anything; then everyone
    begins the epoch after the latest one.
    """
    stored = [_read_place(path) for path in sorted(folder.glob(PLACE_FILE.format("*")))]
    if len(stored) != accelerator.num_processes:
        epoch = 1 + max((place.epoch for place in stored), default=-1)
        return StreamPlace(epoch), (
            f"the stream was read by {len(stored)} processes, now by {accelerator.num_processes}: starting its epoch "
            f"{epoch} afresh."
        )
    place = _read_place(folder / PLACE_FILE.format(accelerator.process_index))
    return place, f"the stream goes on in epoch {place.epoch} after {place.offset:,} images, which are read again."
