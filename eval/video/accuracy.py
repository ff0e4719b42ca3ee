"""What a video classifier answers on a set of videos: probabilities averaged over several clips and crops of each.

Source: the published test of V-EMOv2 (one clip of the middle frames, three crops along the longer side), and its
validation on the way (one clip, the middle crop), which is what its processor does.
"""

from collections.abc import Callable
from typing import Any, Literal

import torch

from d_emo.eval.classification.accuracy import Predictions
from d_emo.images.prepared import prepared
from d_emo.video.folders import ClipSource
from d_emo.video.reading import spread

# What is shown of a clip: as it is, backwards, or its first frame in place of all.
Order = Literal["forward", "reversed", "repeated"]
# Called with the indices of some videos and their log-probabilities (N, K).
Keep = Callable[[list[int], torch.Tensor], None]


def in_order(frames: torch.Tensor, order: Order) -> torch.Tensor:
    """Frames (T, ...) in another order."""
    if order == "reversed":
        return frames.flip(0)
    return frames[:1].expand_as(frames) if order == "repeated" else frames


def crops_of(clip: torch.Tensor, side: int, crops: int) -> torch.Tensor:
    """Square crops along the longer side, evenly from one end to the other; one is the middle.

    Args:
        clip: (T, C, H, W), whose shorter side is `side` at least.
        side: of the crops.
        crops: how many.

    Returns:
        (crops, T, C, side, side).
    """
    height, width = clip.shape[-2:]
    found = []
    for number in range(crops):
        share = number / (crops - 1) if crops > 1 else 0.5
        along_height = height > width
        top = round((height - side) * (share if along_height else 0.5))
        left = round((width - side) * (0.5 if along_height else share))
        found.append(clip[..., top : top + side, left : left + side])
    return torch.stack(found)


class PreparedClips:
    """Views of videos as a video processor prepares them: index -> (clips * crops, T, 3, side, side), class id, index.

    Raises:
        ValueError: several crops are wanted, and the processor does not say how large one is.
    """

    def __init__(self, source: ClipSource, processor: Any, clips: int, crops: int, order: Order):
        self.source, self.processor = source, processor
        self.clips, self.crops, self.order = clips, crops, order
        if crops > 1 and not getattr(processor, "crop_size", None):
            raise ValueError(f"--crops {crops}: the model's video processor has no crop_size to cut; use --crops 1.")

    def __call__(self, index: int) -> tuple[torch.Tensor, int, int]:
        return self.views(index), int(self.source.labels[index]), index

    def views(self, index: int) -> torch.Tensor:
        """(clips * crops, T, 3, side, side), normalised."""
        frames = self.frames(index)  # (clips * T, 3, H, W), uint8
        whole = self.crops > 1
        videos = list(frames.chunk(self.clips))
        more = {"do_center_crop": False} if whole else {}
        values = self.processor(videos, do_sample_frames=False, return_tensors="pt", **more)["pixel_values"]
        if not whole:
            return values
        side = int(self.processor.crop_size["height"])
        return torch.cat([crops_of(clip, side, self.crops) for clip in values])

    def frames(self, index: int) -> torch.Tensor:
        """The frames of a video's clips, one after the other, (clips * T, 3, H, W), uint8.

        Raises:
            UnreadableImageError: it is damaged, no video, or shorter than a clip.
        """
        count = self.processor.num_frames
        frames = self.source.read(index).frames(
            count, lambda length: [number for clip in spread(length, count, self.clips) for number in clip]
        )
        return torch.cat([in_order(clip, self.order) for clip in frames.chunk(self.clips)])


def _stacked(samples: list[tuple[torch.Tensor, int, int]]) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    """Views (N, V, T, 3, side, side), class ids (N,), and indices."""
    views, labels, indices = zip(*samples, strict=True)
    return torch.stack(views), torch.tensor(labels), list(indices)


@torch.inference_mode()
def predict_clips(
    model: Any,
    processor: Any,
    source: ClipSource,
    *,
    clips: int = 1,
    crops: int = 1,
    order: Order = "forward",
    batch_size: int,
    num_workers: int,
    device: torch.device,
    rank: int = 0,
    world_size: int = 1,
    mixed_precision: bool = False,
    progress: bool = False,
    skip_bad: bool = False,
    keep: Keep | None = None,
) -> Predictions:
    """Show a video classifier every video of a source, or a process's share of them.

    Args:
        model: of transformers, in eval mode; takes (B, T, 3, H, W) and answers with `logits` (B, K).
        processor: prepares clips, and says how many frames they have.
        source: videos by index, with the model's class ids.
        clips: of each video; one has the middles of equal parts, more are spread over it.
        crops: of each clip, along its longer side; one is the middle.
        order: of the frames.
        batch_size: clips and crops at once.
        num_workers: loader processes, which decode.
        device: where the model is.
        rank, world_size: this process takes every `world_size`-th video from `rank` on.
        mixed_precision: autocast to bfloat16.
        progress: show how far it is.
        skip_bad: leave out, aloud, what is unreadable or too short.
        keep: is given every answer.

    Returns:
        Predictions by the probabilities averaged over clips and crops.

    Raises:
        UnreadableImageError: a video is unreadable or too short; every video counts.
    """
    views = clips * crops
    parts = []
    with prepared(
        source,
        PreparedClips(source, processor, clips, crops, order),
        _stacked,
        about="classifying",
        unit="video",
        batch_size=max(1, batch_size // views),
        num_workers=num_workers,
        rank=rank,
        world_size=world_size,
        progress=progress,
        skip_bad=skip_bad,
        remedy="Repair or remove it, or leave it out: --on-bad-image skip.",
    ) as batches:
        for batch, labels, indices in batches:
            # Several at once, as asked, though one video may have more views than that.
            parted = batch.flatten(0, 1).split(batch_size)
            with torch.autocast(device.type, torch.bfloat16, enabled=mixed_precision):
                logits = torch.cat([model(part.to(device)).logits.float().cpu() for part in parted])  # (B V, K)
            logs = mean_log_probabilities(logits.unflatten(0, (len(labels), views)))  # (B, K)
            parts.append(Predictions.of(logs, labels))
            if keep is not None:
                keep(indices, logs)
    return Predictions.joined(parts)


def mean_log_probabilities(logits: torch.Tensor) -> torch.Tensor:
    """Logs of the probabilities averaged over the views of a video, (B, V, K) -> (B, K)."""
    return logits.log_softmax(-1).logsumexp(1) - torch.tensor(float(logits.shape[1])).log()
