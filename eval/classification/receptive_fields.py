"""What `receptive_field` does after it has read its options: open networks, add up gradients, measure, draw.

Source: "Understanding the Effective Receptive Field in Deep Convolutional Neural Networks", arXiv 1701.04128; the
smallest centred squares that hold a share of all contributions are those of arXiv 2203.06717. Strided convolutions with
padding see up to half a stride above and to the left of the middle of their position, which all such squares feel.

Shapes: B images, C channels, H x W pixels, h x w positions of a map.
"""

import argparse
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoImageProcessor, AutoModelForImageClassification

from d_emo import create_classifier, list_classifiers
from d_emo.classification.backbones import known_name
from d_emo.classification.transformers_models import make_image_processor
from d_emo.common.files import written_whole
from d_emo.common.messages import first_line
from d_emo.common.output import Progress
from d_emo.common.packaged import model_place
from d_emo.common.processes import default_device
from d_emo.common.saved_folders import LOADING_ERRORS, refuse_nobodys
from d_emo.eval.classification.accuracy import PreparedImages
from d_emo.images.decode import UnreadableImageError
from d_emo.images.folders import folder_source

SHARES = (0.2, 0.3, 0.5, 0.99)
OUTLINED = {0.5: "solid", 0.99: "dotted"}  # shares whose squares the picture shows
BATCH = 4
COLUMNS = 4
TIMM, TRAINED = "timm:", "trained"
BRANCH_SHUT = 0.1  # factors below it, alike in all channels, are an initialisation's
DECADES = 4  # contributions below 10^-4 of the largest are drawn as nothing
# (B, C, H, W) -> maps (B, C', h, w), the last one last.
Maps = Callable[[torch.Tensor], list[torch.Tensor]]


@dataclass(frozen=True)
class Network:
    """A network that is ready to be looked at.

    Attributes:
        name: as it was given.
        weights: "trained" or "fresh", and what was changed.
        maps: what it makes of images.
        mean, std: of the images that it is for, a number a colour; None for ImageNet's.
    """

    name: str
    weights: str
    maps: Maps
    mean: list[float] | None = None
    std: list[float] | None = None


@dataclass(frozen=True)
class Field:
    """An effective receptive field.

    Attributes:
        network: whose.
        grid: height and width of the map whose middle was asked.
        contributions: (H, W), of each pixel; means over the images.
    """

    network: Network
    grid: tuple[int, int]
    contributions: torch.Tensor

    @property
    def center(self) -> tuple[float, float]:
        """Row and column of the middle of the position that was asked, in pixels; 0 is the middle of the first."""
        row, column = ((side // 2 + 0.5) / side for side in self.grid)
        height, width = self.contributions.shape
        return row * height - 0.5, column * width - 0.5

    def side(self, share: float) -> int:
        """Side in pixels of the smallest square around the center that holds a share of all contributions."""
        return smallest_square(self.contributions, self.center, share)

    def area(self, share: float) -> float:
        """Share of the image that this square covers, in [0, 1]."""
        covered = [
            min(middle + self.side(share) / 2, length - 0.5) - max(middle - self.side(share) / 2, -0.5)
            for middle, length in zip(self.center, self.contributions.shape, strict=True)
        ]
        return math.prod(covered) / self.contributions.numel()


def run(options: argparse.Namespace) -> None:
    """Look with every network at every image, print the table, draw the picture."""
    indices, source = [*range(options.num_images)], None
    if options.images is not None:
        try:
            source = folder_source(Path(options.images), unconditional=True)
        except ValueError as error:
            raise ValueError(f"--images {options.images}: {error}") from error
        count = min(options.num_images, source.size)
        indices = [index * source.size // count for index in range(count)]
    networks = []
    for name in options.models:
        torch.manual_seed(options.seed)
        networks.append(open_network(name, options.image_size))
    fields = []
    with Progress(len(indices) * len(networks), "image") as progress:
        for network in networks:
            if source is None:
                images = noise(len(indices), options.image_size, options.seed)
            else:
                images = prepared(network, source, indices, options.image_size)
            fields.append(look(network, images, options.stride, progress))
    shown = "noise" if source is None else options.images
    print(f"{len(indices)} images ({shown}) of {options.image_size} x {options.image_size}")
    if any(network.weights != TRAINED for network in networks):
        print("fresh weights: the field of an untrained network, which training widens or narrows")
    print()
    print(table(fields))
    if options.output:
        draw(fields, options.output)
        print(f"\npicture in {options.output}")


def open_network(name: str, image_size: int) -> Network:
    """A network by the name that a user gives.

    Raises:
        ValueError: there is none of that name, or none with maps.
    """
    if name.startswith(TIMM):
        model: Any = _timm_network(name, image_size)
        return Network(name, open_branches(model), _timm_maps(_ready(model)))
    if known := known_name("--models: backbone", name, list_classifiers()):
        model = create_classifier(known, image_size)
        return Network(known, open_branches(model), _emov2_maps(_ready(model)))
    place = model_place(name)
    try:
        refuse_nobodys(place)
        model = AutoModelForImageClassification.from_pretrained(place)
        processor = AutoImageProcessor.from_pretrained(place)
    except LOADING_ERRORS as error:
        raise ValueError(
            f"--models {name} is neither of d_emo.list_classifiers() nor {TIMM}NAME, and does not load as an image "
            f"classifier ({first_line(error)})."
        ) from error
    if (channels := getattr(model.config, "num_channels", 3)) != 3:
        raise ValueError(
            f"--models {name} takes images of {channels} channels; networks of colour images are compared."
        )
    _ready(model)
    if hasattr(model, "emov2"):
        maps = _emov2_maps(model.emov2)
    elif hasattr(model, "timm_model"):
        maps = _timm_maps(model.timm_model)
    else:
        maps = _hidden_maps(model)
    about = getattr(processor, "data_config", {})  # timm's
    mean, std = getattr(processor, "image_mean", about.get("mean")), getattr(processor, "image_std", about.get("std"))
    return Network(name, TRAINED, maps, mean and [*mean], std and [*std])


@torch.no_grad()
def open_branches(model: nn.Module) -> str:
    """Let residual branches of fresh weights contribute: vectors of one factor near 0 become ones.

    Those are layer scales (EMOv2's begin at 1e-6) and the last norms of blocks (timm's ResNets begin at 0),
    without which an untrained network's field would be that of its strided layers.

    Returns:
        What to say of the weights.
    """
    opened = 0
    for name, parameter in model.named_parameters():
        vector = parameter.numel() == max(parameter.shape, default=0) > 1
        factor = vector and not name.endswith(("bias", "token", "embed")) and parameter.unique().numel() == 1
        if factor and float(parameter.abs().max()) < BRANCH_SHUT:
            parameter.fill_(1)
            opened += 1
    return f"fresh ({opened} scales set to 1)" if opened else "fresh"


def _ready(model: nn.Module) -> nn.Module:
    return model.float().eval().requires_grad_(False).to(default_device())


def _emov2_maps(network: Any) -> Maps:
    return lambda pixels: network.forward_stages(pixels)


def _timm_network(name: str, image_size: int) -> nn.Module:
    try:
        import timm

        import d_emo.timm_models  # noqa: F401  makes timm know EMOv2
    except ImportError as error:
        raise ValueError(f"--models {name} needs the package timm: pip install 'd-emo[timm]'.") from error
    architecture = name.removeprefix(TIMM)
    try:
        try:
            return timm.create_model(architecture, img_size=image_size)
        except TypeError:  # a convolutional network, which takes any size
            return timm.create_model(architecture)
    except LOADING_ERRORS as error:
        raise ValueError(f"--models {name}: timm does not make it ({first_line(error)}).") from error


def _timm_maps(model: Any) -> Maps:
    if not hasattr(model, "forward_intermediates"):
        name = type(model).__name__
        raise ValueError(f"--models: timm's {name} gives no intermediate maps; choose a network with them.")
    return lambda pixels: model.forward_intermediates(pixels, output_fmt="NCHW", intermediates_only=True)


def _hidden_maps(model: Any) -> Maps:
    """Maps among the hidden states of any classifier of transformers."""

    def maps(pixels: torch.Tensor) -> list[torch.Tensor]:
        states = model(pixels, output_hidden_states=True).hidden_states or ()
        return [state for state in states if state.dim() == 4]

    return maps


def noise(count: int, side: int, seed: int) -> Any:
    """Images of normally distributed numbers, (3, side, side) each."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(3, side, side, generator=generator) for _ in range(count)]


def prepared(network: Network, source: Any, indices: list[int], image_size: int) -> Any:
    """The images as the network's own images were normalised, cut to one size."""
    processor = make_image_processor(image_size)
    if network.mean and network.std:
        processor.image_mean, processor.image_std = network.mean, network.std
    images = PreparedImages(source, processor)
    return [functools.partial(images, index) for index in indices]


def look(network: Network, images: Any, stride: int | None, progress: Progress) -> Field:
    """A network's field, as the mean over images.

    Args:
        network: whose.
        images: tensors (3, H, W), or functions that give one first.
        stride: of the map that is asked, the last one of it; None for the last map.
        progress: is told of each image.

    Raises:
        ValueError: there is no such map, the network does not take such images, or no pixel contributes.
        UnreadableImageError: an image cannot be decoded.
    """
    total, grid = torch.zeros(1), (0, 0)
    for start in range(0, len(images), BATCH):
        batch = [_pixels(image) for image in images[start : start + BATCH]]
        pixels = torch.stack(batch).to(default_device())  # (B, 3, H, W)
        added, grid = contributions(network, pixels, stride)
        total = total + added / len(images)
        progress.update(len(batch))
    if not torch.isfinite(total).all() or not total.sum() > 0:
        raise ValueError(f"--models {network.name}: no pixel contributes to the middle of its map, or without limit.")
    return Field(network, grid, total)


def _pixels(image: Any) -> torch.Tensor:
    if isinstance(image, torch.Tensor):
        return image
    try:
        return image()[0]
    except UnreadableImageError as error:
        raise UnreadableImageError(f"{error}. Repair or remove it.") from error


def contributions(network: Network, pixels: torch.Tensor, stride: int | None) -> tuple[torch.Tensor, tuple[int, int]]:
    """What each pixel contributes to the middle of a map: |d sum_c map[c, h // 2, w // 2] / d pixel|.

    Args:
        network, stride: see `look`.
        pixels: (B, 3, H, W).

    Returns:
        (H, W), float64, summed over images and colours, and the map's height and width.
    """
    pixels = pixels.requires_grad_()
    try:
        with torch.enable_grad():
            maps = network.maps(pixels)
    except (AssertionError, RuntimeError, ValueError) as error:  # timm asserts, PyTorch raises
        size = f"{pixels.shape[2]} x {pixels.shape[3]}"
        raise ValueError(f"--models {network.name} does not take images of {size} ({first_line(error)}).") from error
    strides = [round(pixels.shape[2] / map_.shape[2]) for map_ in maps]
    if not maps or (stride is not None and stride not in strides):
        has = ", ".join(map(str, dict.fromkeys(strides))) or "none"
        wanted = "maps" if stride is None else f"map of --stride {stride}"
        raise ValueError(f"--models {network.name} has no {wanted}; its maps have the strides: {has}.")
    chosen = [map_ for map_, its in zip(maps, strides, strict=True) if stride in (None, its)][-1]  # (B, C, h, w)
    height, width = chosen.shape[2:]
    (gradient,) = torch.autograd.grad(chosen[:, :, height // 2, width // 2].sum(), pixels)
    return gradient.abs().sum((0, 1)).cpu().double(), (height, width)


def smallest_square(field: torch.Tensor, center: tuple[float, float], share: float) -> int:
    """Side of the smallest square of whole pixels around a point that holds a share of a field.

    Args:
        field: (H, W), not negative.
        center: row and column in pixels, 0 the middle of the first; whole numbers give odd sides, halves even ones.
        share: above 0, up to 1.
    """
    rows, columns = (torch.arange(n, dtype=torch.float64) - c for n, c in zip(field.shape, center, strict=True))
    # The side of the first square around the center that holds a pixel.
    sides = (2 * torch.maximum(rows.abs()[:, None], columns.abs()) + 1).round().long()
    held = torch.bincount(sides.flatten(), field.double().flatten()).cumsum(0)
    return int(torch.searchsorted(held, share * held[-1] * (1 - 1e-12)))


def table(fields: list[Field]) -> str:
    """Sides of the squares in pixels and their shares of the image, a line a network."""
    heads = ["network", "weights", "map", *(f"{share:.0%} within" for share in SHARES)]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for field in fields:
        squares = [f"{field.side(share)} px ({field.area(share):.1%})" for share in SHARES]
        grid = f"{field.grid[0]} x {field.grid[1]}"
        lines.append(f"| {' | '.join([field.network.name, field.network.weights, grid, *squares])} |")
    return "\n".join(lines)


def draw(fields: list[Field], path: Path) -> None:
    """The contributions side by side, of the largest, on a scale of powers of ten; 50 and 99% outlined."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    columns = min(len(fields), COLUMNS)
    rows = math.ceil(len(fields) / columns)
    figure = Figure(figsize=(3.2 * columns + 1, 3.6 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False).flatten()
    image: Any = None
    for axes, field in zip(grid, fields, strict=False):
        scaled = (field.contributions / field.contributions.max()).clamp(min=10**-DECADES).log10()
        image = axes.imshow(scaled.numpy(), cmap="magma", vmin=-DECADES, vmax=0)
        for share, line in OUTLINED.items():
            side, (row, column) = field.side(share), field.center
            corner = (column - side / 2, row - side / 2)
            axes.add_patch(Rectangle(corner, side, side, fill=False, color="white", linestyle=line))
        axes.set_title(f"{Path(field.network.name).name}\n{field.network.weights}", fontsize=9)
        axes.set(xticks=[], yticks=[])
        axes.set_xlabel("  ".join(f"{share:.0%}: {field.side(share)} px" for share in SHARES), fontsize=7)
    for axes in grid[len(fields) :]:
        axes.axis("off")
    bar = figure.colorbar(image, ax=[*grid], shrink=0.8, ticks=range(-DECADES, 1))
    bar.ax.set_yticklabels([f"$10^{{{power}}}$" for power in range(-DECADES, 1)])
    bar.set_label("contribution, of the largest")
    with written_whole(path) as partial:
        figure.savefig(partial, format="png", dpi=120)
