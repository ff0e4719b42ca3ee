"""The vision model whose features a diffusion transformer is aligned with (`alignment.py`).

Any of transformers' with an image processor, EMOv2's classifiers among them, or one of timm's. It sees the whole clean
image, mirrored where the trained one is, at its own size.
"""

from typing import Any

import torch
import torch.nn.functional as F

from d_emo.common.digests import weights_digest
from d_emo.common.messages import first_line
from d_emo.common.packaged import model_place
from d_emo.common.saved_folders import LOADING_ERRORS, refuse_nobodys
from d_emo.models.flops import macs_of
from d_emo.train.engine.rehearsal import held_at_most, shapes_only
from d_emo.train.engine.roofline import Work, count_work

TIMM = "timm:"


class Teacher:
    """A frozen vision model; every process has its own.

    Args:
        name: a folder, a packaged model, a Hub id, or timm:NAME.
        grid: (h, w) tokens that are aligned. Of networks in stages the deepest is taken that is no coarser, or the
            finest one.

    Attributes:
        side: of the images that it sees.
        shape: (h', w', T) of its features.
        digest: of its weights.

    Raises:
        ValueError: it does not load, or gives no grid of features.
    """

    def __init__(self, name: str, grid: tuple[int, int]):
        self.name = name
        try:
            network, mean, std, self.side = _open(name)
            self.network: Any = network.eval().requires_grad_(False)
            self.mean, self.std = (
                torch.tensor(values, dtype=torch.float32).view(1, -1, 1, 1) for values in (mean, std)
            )
            self._stage: int | None = None
            with torch.no_grad():
                output = self._answer(torch.zeros(1, 3, self.side, self.side))
                self._stage = _stage_of(output, grid)
                rows, columns, channels = self._grid(output).shape[1:]
        except LOADING_ERRORS as error:
            raise ValueError(f"--align {name} does not load ({first_line(error)}).") from error
        self.shape = rows, columns, channels
        if rows * columns < 2:
            raise ValueError(
                f"--align {name}: it says one thing of a whole image of {self.side} pixels, and alignment is about "
                "where things are; choose a model with finer features."
            )
        self.digest = str(weights_digest(self.network))

    def describe(self) -> str:
        """For people."""
        rows, columns, channels = self.shape
        return f"{self.name}, {channels:,} features of {rows} x {columns} places, images of {self.side} x {self.side}"

    def to(self, device: torch.device) -> "Teacher":
        """Move it."""
        self.network.to(device)
        self.mean, self.std = self.mean.to(device), self.std.to(device)
        return self

    @torch.no_grad()
    def features(self, images: torch.Tensor) -> torch.Tensor:
        """Images (B, 1 or 3, H, W) in [-1, 1] -> (B, h', w', T)."""
        images = ((images.float() + 1) / 2).expand(-1, 3, -1, -1)
        if images.shape[-2:] != (self.side, self.side):
            size = (self.side, self.side)
            images = F.interpolate(images, size, mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)
        return self._grid(self._answer((images - self.mean) / self.std))

    def macs(self, device: torch.device) -> int:
        """Multiply-adds of an image."""
        with shapes_only(device, self.network):
            return macs_of(lambda: self._answer(torch.empty(1, 3, self.side, self.side)))

    def work(self, images: int) -> Work:
        """What its operators do with so many images; within a rehearsal of its network."""
        return count_work(lambda: self._answer(torch.empty(images, 3, self.side, self.side)))

    def held(self, images: int, device: torch.device) -> int:
        """The most bytes that so many images take at once beside its weights."""
        with shapes_only(device, self.network), torch.no_grad():
            return held_at_most(lambda: self._answer(torch.empty(images, 3, self.side, self.side)))

    def _answer(self, images: torch.Tensor) -> Any:
        if self.name.startswith(TIMM):
            return self.network.forward_features(images)
        return self.network(pixel_values=images, output_hidden_states=True)

    def _grid(self, output: Any) -> torch.Tensor:
        """The features (B, h', w', T) in an answer."""
        if self._stage is not None:
            return output.hidden_states[self._stage].permute(0, 2, 3, 1)
        features = output if isinstance(output, torch.Tensor) else output.last_hidden_state
        if features.dim() == 4:
            last = getattr(self.network, "output_fmt", "NCHW") == "NHWC"  # timm's Swin, for one
            return features if last else features.permute(0, 2, 3, 1)
        patch = _patch_of(self.network)
        rows = self.side // patch
        prefix = features.shape[1] - rows * rows  # class and register tokens come first
        if prefix < 0:
            raise ValueError(f"{features.shape[1]} tokens are no grid of patches of {patch} pixels")
        return features[:, prefix:].unflatten(1, (rows, rows))


def _stage_of(output: Any, grid: tuple[int, int]) -> int | None:
    """Which of the hidden states to take of a network in stages, coarser and coarser; None for any other."""
    states = getattr(output, "hidden_states", None) or ()
    if not states or any(state.dim() != 4 for state in states):
        return None
    fine = [index for index, state in enumerate(states) if state.shape[2] >= grid[0] and state.shape[3] >= grid[1]]
    return fine[-1] if fine else 0


def _patch_of(network: Any) -> int:
    if hasattr(network, "patch_embed"):  # timm's
        return int(network.patch_embed.patch_size[0])
    size = network.config.patch_size
    return int(size if isinstance(size, int) else size[0])


def _open(name: str) -> tuple[Any, Any, Any, int]:
    """The network, mean and deviation of its images in [0, 1], and their side."""
    if name.startswith(TIMM):
        import timm

        network: Any = timm.create_model(name.removeprefix(TIMM), pretrained=True, num_classes=0)
        data = timm.data.resolve_model_data_config(network)
        return network, data["mean"], data["std"], int(data["input_size"][-1])
    from transformers import AutoImageProcessor, AutoModel

    place = model_place(name)
    refuse_nobodys(place)
    network = AutoModel.from_pretrained(place)
    network = getattr(network, "vision_model", network)  # of those that know texts, too
    processor: Any = AutoImageProcessor.from_pretrained(place)
    if processor.do_rescale and abs(processor.rescale_factor * 255 - 1) > 1e-6:
        raise ValueError(f"it rescales pixels by {processor.rescale_factor}, not 1/255; choose another model")
    mean, std = (processor.image_mean, processor.image_std) if processor.do_normalize else ((0.0,) * 3, (1.0,) * 3)
    return network, mean, std, _side_of(processor)


def _side_of(processor: Any) -> int:
    """The side of the square images that a processor makes."""
    size = processor.crop_size if getattr(processor, "do_center_crop", False) else processor.size
    values = {name: value for name, value in dict(size).items() if value}
    side = values.get("height") or values.get("shortest_edge")
    if not side:
        raise ValueError(f"its image processor makes no images of one size ({values})")
    return int(side)
