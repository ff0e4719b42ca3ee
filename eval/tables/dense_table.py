"""Every system of the paper's tables VIII to XIII: parameters and multiply-adds beside the published ones.

    python eval/tables/dense_table.py
    python eval/tables/dense_table.py --only "SegFormer *" "V-EMOv2-5M*"
    python eval/tables/dense_table.py --coco-annotations instances_val2017.json

Counted on the meta device, as the paper counts (`d_emo.models.flops.count_macs_as_published`): one image, or one clip
of 4 frames, up to the head's own output; no resize to the image, no loss, no choice of boxes. Auxiliary heads are left
out of the multiply-adds and of the published parameters. A row agrees when the counter's printing and the paper's
cutting (`as_published`) give the published figures; rows that the paper does not have say so, and are not compared. The
command ends with an error if a row disagrees. The multiply-adds of RetinaNet and Mask R-CNN are published as means over
the first 100 images of COCO's validation set: with its file of annotations a second table has these means, and compares
them. Source: arXiv 2412.06674, tables VIII to XIII.
"""

import fnmatch
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import ROUND_DOWN, Decimal
from pathlib import Path
from typing import Any

import torch
from torch import nn

import d_emo
from d_emo.common.command_line import CommandParser
from d_emo.common.commands import CommandError, command
from d_emo.eval.tables.coco_sizes import COUNTED, read_sizes
from d_emo.models.flops import PublishedMacs, count_macs_as_published, count_parameters

SIZES = ("1M", "2M", "5M", "20M")
PROPOSALS, MASKED = 1000, 100  # that Mask R-CNN's box and mask heads see where the paper counts
AVERAGED = "The paper's multiply-adds are means over 100 images of COCO of other sizes: see --coco-annotations."


@dataclass(frozen=True)
class Row:
    """One counted system.

    Attributes:
        system: what it is, for people.
        size: of the backbone; empty for networks that are no backbone under a head.
        image: height and width, or frames, height and width.
        build: makes the model.
        parameters: millions as published; None where the paper has no such row.
        macs: billions as published; None where it has none at this size.
        with_auxiliary: whether the published parameters hold the auxiliary head.
        remark: why it is not compared, or what else is to be known.
    """

    system: str
    size: str
    image: tuple[int, ...]
    build: Callable[[], nn.Module]
    parameters: float | None
    macs: float | None
    with_auxiliary: bool = False
    remark: str = ""

    @property
    def name(self) -> str:
        """What --only matches."""
        return f"{self.label} {self.input}"

    @property
    def label(self) -> str:
        """System and size, for people."""
        return f"{self.system} {self.size}".strip()

    @property
    def input(self) -> str:
        """The image's size, for people."""
        return "x".join(map(str, self.image))


@dataclass(frozen=True)
class Counted:
    """A row as this package builds it.

    Attributes:
        parameters: all of them.
        without_auxiliary: those without the auxiliary head.
        macs: multiply-adds by kind.
    """

    parameters: int
    without_auxiliary: int
    macs: PublishedMacs


class _Heads(nn.Module):
    """A detector of torchvision from normalised images of one size to the outputs of its heads."""

    def __init__(self, detector: Any):
        super().__init__()
        self.detector = detector

    def forward(self, images: torch.Tensor) -> list[Any]:
        """(B, 3, H, W) -> outputs of every head; a two-stage detector's see as many proposals as the paper's count."""
        features = list(self.detector.backbone(images).values())
        if not hasattr(self.detector, "roi_heads"):
            return [self.detector.head(features)]
        # What the heads see is cut from the pyramid, which counts nothing.
        heads, width = self.detector.roi_heads, features[0].shape[1]
        boxes, masks = heads.box_roi_pool.output_size, heads.mask_roi_pool.output_size
        return [
            self.detector.rpn.head(features),
            heads.box_predictor(heads.box_head(images.new_zeros(PROPOSALS, width, *boxes))),
            heads.mask_predictor(heads.mask_head(images.new_zeros(MASKED, width, *masks))),
        ]


def _segmenters(system: str, head: str, *published: tuple[float, float]) -> list[Row]:
    """Table XI."""

    def build(size: str) -> Callable[[], nn.Module]:
        return lambda: d_emo.create_segmenter(f"EMOv2-{size}", head=head, num_classes=150)

    return [
        Row(system, size, (512, 512), build(size), *figures) for size, figures in zip(SIZES, published, strict=True)
    ]


def _detectors(
    system: str, kind: str, image: tuple[int, int], *published: tuple[float, float | None], **more: Any
) -> list[Row]:
    """Tables VIII to X."""

    def build(size: str) -> Callable[[], nn.Module]:
        def make() -> nn.Module:
            options = {"image_size": image[0]} if kind == "ssdlite" else {}
            return _Heads(getattr(d_emo.detection, kind)(f"EMOv2-{size}", num_classes=80, **options))

        return make

    rows = zip(SIZES, published, strict=True)
    return [Row(system, size, image, build(size), *figures, **more) for size, figures in rows]


def _unets() -> list[Row]:
    """Table XII."""

    def plain() -> nn.Module:
        return d_emo.create_segmenter("UNet-S5-D16", num_classes=2)

    def windowed(window: int) -> Callable[[], nn.Module]:
        return lambda: d_emo.create_segmenter("U-EMOv2-5M", num_classes=2, window_size=window)

    crop = "The paper's multiply-adds are those at 512, though its caption says 256, the crop."
    auxiliary = "The paper's 29.0M hold the auxiliary head."
    wider = "The paper's multiply-adds are those of windows of 8."
    small, large = (256, 256), (512, 512)
    return [
        Row("UNet-S5-D16", "", small, plain, 29.0, None, with_auxiliary=True, remark=f"{auxiliary} {crop}"),
        Row("UNet-S5-D16", "", large, plain, 29.0, 204, with_auxiliary=True, remark=auxiliary),
        Row("U-EMOv2-5M window 8", "", small, windowed(8), 21.3, None, remark=crop),
        Row("U-EMOv2-5M window 8", "", large, windowed(8), 21.3, 228),
        Row("U-EMOv2-5M window 10", "", small, windowed(10), 21.3, None, remark=wider),
        Row("U-EMOv2-5M window 10", "", large, windowed(10), 21.3, None, remark=wider),
    ]


def _video() -> nn.Module:
    """Table XIII."""
    return d_emo.create_video_classifier("V-EMOv2-5M", num_classes=400)


ROWS: tuple[Row, ...] = (
    *_segmenters("DeepLabv3", "deeplabv3", (5.6, 3.3), (6.6, 5.0), (9.9, 9.1), (26.0, 31.6)),
    *_segmenters("Semantic FPN", "semantic_fpn", (5.3, 23.4), (6.2, 25.1), (8.9, 29.1), (23.9, 51.5)),
    *_segmenters("SegFormer", "segformer", (1.4, 5.0), (2.6, 10.3), (5.3, 14.4), (20.4, 36.8)),
    *_segmenters("PSPNet", "pspnet", (4.2, 2.9), (5.2, 4.6), (8.1, 8.6), (23.6, 30.9)),
    *_detectors("SSDLite", "ssdlite", (320, 320), (2.4, 0.7), (3.3, 1.2), (6.0, 2.4), (21.2, 9.1)),
    *_detectors("SSDLite", "ssdlite", (512, 512), (2.4, 2.3), (3.3, 4.0), (6.0, 8.0), (21.2, 30.3)),
    *_detectors(
        "RetinaNet", "retinanet", (800, 1280), (10.5, 142), (11.5, 146), (14.4, 158), (29.8, 220), remark=AVERAGED
    ),
    *_detectors(
        "Mask R-CNN", "mask_rcnn", (800, 1280), (21.2, 165), (22.1, 170), (24.8, 181), (39.8, 244), remark=AVERAGED
    ),
    *_unets(),
    Row("V-EMOv2-5M", "", (4, 160, 160), _video, 5.9, 1.3),
)


def count(row: Row) -> Counted:
    """Build a row's system on the meta device and count."""
    channels = (3, *row.image) if len(row.image) == 2 else (row.image[0], 3, *row.image[1:])
    model = _built(row)
    parameters = count_parameters(model)
    auxiliary = getattr(model, "auxiliary_head", None)
    return Counted(
        parameters=parameters,
        without_auxiliary=parameters - (count_parameters(auxiliary) if auxiliary is not None else 0),
        macs=count_macs_as_published(model, torch.zeros(1, *channels, device="meta")),
    )


def mean_macs(row: Row, sizes: Sequence[tuple[int, int]]) -> int:
    """Mean multiply-adds of a row's system over images of these heights and widths, cut to a whole number as mmdet's.

    Each size is counted once.
    """
    model = _built(row)
    totals = {
        size: count_macs_as_published(model, torch.zeros(1, 3, *size, device="meta")).total
        for size in dict.fromkeys(sizes)
    }
    return sum(totals[size] for size in sizes) // len(sizes)


def _built(row: Row) -> nn.Module:
    with torch.device("meta"):
        return row.build()


def as_printed(number: int) -> str:
    """A count as the paper's counter prints it: three decimals of T from 100 G on, of G from 100 M on, else of M."""
    scale, letter = (1e12, "T") if number > 1e11 else (1e9, "G") if number > 1e8 else (1e6, "M")
    return f"{number / scale:.3f}".rstrip("0").rstrip(".") + letter


def as_published(number: int) -> float:
    """A count as the paper gives it, in M or G: what was printed is cut to one decimal, and T becomes a whole G."""
    printed = as_printed(number)
    value = Decimal(printed[:-1])
    return float(1000 * value if printed[-1] == "T" else value.quantize(Decimal("0.1"), ROUND_DOWN))


def agrees(row: Row, counted: Counted) -> bool:
    """Whether what was counted becomes the published figures that are compared."""
    parameters = counted.parameters if row.with_auxiliary else counted.without_auxiliary
    compared = [(row.parameters, parameters)]
    if row.remark != AVERAGED:
        compared.append((row.macs, counted.macs.total))
    return all(figure is None or as_published(number) == figure for figure, number in compared)


HEADER = (
    "| system | input | parameters | without auxiliary | paper, M | products | norms | resampling | multiply-adds "
    "| paper, G | agrees | remark |\n" + "|---" * 12 + "|"
)


def table_row(row: Row, counted: Counted) -> str:
    """One line of the Markdown table."""
    macs = counted.macs
    numbers = (macs.products, macs.norms, macs.resampling, macs.total)
    cells = [
        row.label,
        row.input,
        f"{counted.parameters:,}",
        f"{counted.without_auxiliary:,}",
        f"{row.parameters}",
        *(f"{number:,}" for number in numbers),
        in_g(row.macs),
        "yes" if agrees(row, counted) else "no",
        row.remark,
    ]
    return f"| {' | '.join(cells)} |"


MEANS_HEADER = "\n| system | images | mean multiply-adds | as published | paper, G | agrees |\n" + "|---" * 6 + "|"


def means_row(row: Row, images: int, mean: int) -> str:
    """One line of the table of means over COCO's images; fewer images than the paper's are not compared."""
    agreement = "not compared" if images < COUNTED else "yes" if as_published(mean) == row.macs else "no"
    return f"| {row.label} | {images} | {mean:,} | {in_g(as_published(mean))} | {in_g(row.macs)} | {agreement} |"


def in_g(macs: float | None) -> str:
    """Multiply-adds in G with as many decimals as the paper has."""
    return "-" if macs is None else f"{macs:.{1 if macs < 100 else 0}f}"


def chosen_rows(patterns: Sequence[str]) -> list[Row]:
    """The rows whose names match a pattern, in the table's order.

    Raises:
        ValueError: a pattern matches none.
    """
    for pattern in patterns:
        if not any(fnmatch.fnmatchcase(row.name, pattern) for row in ROWS):
            raise ValueError(f"--only {pattern}: no row matches; names are such as {ROWS[0].name} (patterns: *).")
    return [row for row in ROWS if any(fnmatch.fnmatchcase(row.name, pattern) for pattern in patterns)]


def _sizes(path: Path) -> list[tuple[int, int]]:
    if not path.is_file():
        raise ValueError(f"--coco-annotations {path}: there is no such file.")
    return read_sizes(path)


@command("dense_table", extra="eval")
def main(arguments: list[str]) -> None:
    """Print the table."""
    parser = CommandParser("dense_table", __doc__)
    parser.add_argument(
        "--only", nargs="+", default=["*"], help="Shell patterns of rows, such as 'SegFormer 5M 512x512'."
    )
    parser.add_argument(
        "--coco-annotations",
        metavar="FILE",
        help="COCO's instances_val2017.json: count RetinaNet and Mask R-CNN over its first 100 images, too (a minute).",
    )
    options = parser.parse_args(arguments)
    rows = chosen_rows(options.only)
    averaged = [row for row in rows if row.remark == AVERAGED]
    sizes = [] if options.coco_annotations is None else _sizes(Path(options.coco_annotations))
    if sizes and not averaged:
        raise ValueError(
            "--coco-annotations is for RetinaNet and Mask R-CNN, which --only leaves out; leave out one of both."
        )
    print(HEADER)
    wrong = []
    for row in rows:
        counted = count(row)
        print(table_row(row, counted), flush=True)
        if not agrees(row, counted):
            wrong.append(row.name)
    if sizes:
        print(MEANS_HEADER)
        for row in averaged:
            mean = mean_macs(row, sizes)
            print(means_row(row, len(sizes), mean), flush=True)
            if len(sizes) == COUNTED and as_published(mean) != row.macs:
                wrong.append(f"{row.label} on COCO's images")
    if wrong:
        count_of_all = len(rows) + (len(averaged) if sizes else 0)
        raise CommandError(f"{len(wrong)} of {count_of_all} rows disagree with the paper: {', '.join(wrong)}")


if __name__ == "__main__":
    main(sys.argv[1:])
