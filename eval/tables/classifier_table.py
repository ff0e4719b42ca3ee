"""Every row of the paper's architecture and ablation tables: parameters and multiply-adds beside the published ones.

    python eval/tables/classifier_table.py

Multiply-adds are those of one 224 x 224 image, as the paper counts them (`d_emo.models.flops.count_macs_as_published`).
The paper cuts parameters to one decimal and gives most multiply-adds to a million. A row agrees when cutting or
rounding ours gives the published figure; the others say why they do not. Source: arXiv 2412.06674, tables III, IV and
those of its ablations; systems on these backbones are in `dense_table.py`.
"""

import sys
from dataclasses import dataclass, field
from typing import Any

import torch

from d_emo import create_classifier
from d_emo.classification import other_networks
from d_emo.common.command_line import CommandParser
from d_emo.common.commands import command
from d_emo.models.flops import count_macs_as_published, count_parameters

IMAGE_SIZE = 224


@dataclass(frozen=True)
class Row:
    """One published row.

    Attributes:
        change: what the row is, for people.
        parameters: millions, as published.
        macs: millions, as published; those in billions with one decimal are multiples of 100.
        name: the size that is changed, or a function of `d_emo.classification.other_networks`.
        overrides: the change, or that function's arguments.
        remark: why it does not agree, or what was inferred.
    """

    change: str
    parameters: float
    macs: float
    name: str = "EMOv2-5M"
    overrides: dict[str, Any] = field(default_factory=dict)
    remark: str = ""


_WIDTHS = "The row's widths are not published; at those of EMOv2-5M it has another size."
ROWS = (
    Row("EMOv2-1M", 1.4, 285, "EMOv2-1M"),
    Row("EMOv2-2M", 2.3, 487, "EMOv2-2M"),
    Row("EMOv2-5M", 5.1, 1035),
    Row("EMOv2-20M", 20.1, 4000, "EMOv2-20M"),
    Row("EMOv2-50M", 49.8, 8800, "EMOv2-50M"),
    Row("EMOv1-1M", 1.3, 261, "EMOv1-1M"),
    Row("EMOv1-2M", 2.3, 439, "EMOv1-2M"),
    Row("EMOv1-5M", 5.1, 903, "EMOv1-5M"),
    Row("EMOv1-20M", 20.5, 3800, "EMOv1-20M", remark="Its exact definition was not published; heads as in EMOv2-20M."),
    Row("no attention", 4.3, 802, overrides={"attention_type": "none"}),
    Row("neighborhood windows", 5.1, 967, overrides={"attention_type": "neighborhood"}),
    Row("remote windows", 5.1, 967, overrides={"attention_type": "remote"}),
    Row("attention in stage 4", 4.7, 832, overrides={"attending_stages": (4,)}),
    Row("attention in stages 3, 4", 5.1, 1035, overrides={"attending_stages": (3, 4)}),
    Row("attention in stages 2, 3, 4", 5.1, 1096, overrides={"attending_stages": (2, 3, 4)}),
    Row("attention in all stages", 5.2, 1213, overrides={"attending_stages": (1, 2, 3, 4)}),
    Row("kernel 1", 4.8, 969, overrides={"kernel_sizes": (1, 1, 1, 1)}),
    Row("kernel 3", 4.9, 991, overrides={"kernel_sizes": (3, 3, 3, 3)}),
    Row("kernel 7", 5.3, 1102, overrides={"kernel_sizes": (7, 7, 7, 7)}),
    Row(
        "kernel 9", 5.5, 1184, overrides={"kernel_sizes": (9, 9, 9, 7)},
        remark="Inferred: 7 in the last stage, whose grid is 7 x 7; with 9 there it has 5.7M and 1190M.",
    ),
    Row("kernel 5, dilation 2", 5.1, 1035, overrides={"dilation": 2}),
    Row("kernel 5, dilation 3", 5.1, 1035, overrides={"dilation": 3}),
    Row(
        "deformable v2", 6.7, 1625, overrides={"local": "deformable"},
        remark="How offsets are made is not published (here: by 1x1 convolutions); the operator is not counted.",
    ),
    Row("depths 2, 2, 10, 3", 5.3, 1038, overrides={"depths": (2, 2, 10, 3)}),
    Row("depths 2, 2, 12, 2", 5.0, 1127, overrides={"depths": (2, 2, 12, 2)}),
    Row("depths 4, 4, 8, 3", 5.1, 1132, overrides={"depths": (4, 4, 8, 3)}, remark=_WIDTHS),
    Row("depths 2, 2, 12, 3", 5.1, 1136, overrides={"depths": (2, 2, 12, 3)}, remark=_WIDTHS),
    Row(
        "depths 2, 2, 8, 2, widths 48, 72, 224, 288", 5.1, 1117,
        overrides={"depths": (2, 2, 8, 2), "widths": (48, 72, 224, 288)},
        remark="The widths as published give another size with EMOv2-5M's expansions.",
    ),
    Row(
        "EMOv1-5M, attention and convolution in parallel", 5.1, 964, "EMOv1-5M", {"arrangement": "parallel"},
        remark="The wiring is inferred; the values are projected once and both branches see them.",
    ),
    Row("DeiT-Tiny", 5.7, 1300, "deit_tiny"),
    Row("DeiT-Tiny with iRMB", 4.9, 1100, "deit_tiny", {"block": "irmb"}),
    Row(
        "DeiT-Tiny with i2RMB", 5.0, 1300, "deit_tiny", {"block": "i2rmb"},
        remark="How the block was put in is not published; inferred, as in the rows around this one.",
    ),
    Row("PVT-Tiny", 13.2, 1900, "pvt_tiny"),
    Row("PVT-Tiny with iRMB", 11.7, 1800, "pvt_tiny", {"block": "irmb"}),
    Row("PVT-Tiny with i2RMB", 11.9, 1900, "pvt_tiny", {"block": "i2rmb"}),
)  # fmt: skip


@dataclass(frozen=True)
class Counted:
    """A row as this package builds it.

    Attributes:
        parameters: number of parameters.
        macs: multiply-adds as published ones are counted.
    """

    parameters: int
    macs: int


def count(row: Row) -> Counted:
    """Build a row's network on the meta device and count."""
    with torch.device("meta"):
        images = torch.zeros(1, 3, IMAGE_SIZE, IMAGE_SIZE)
        if hasattr(other_networks, row.name):
            model = getattr(other_networks, row.name)(**row.overrides)
        else:
            model = create_classifier(row.name, **row.overrides)
    return Counted(count_parameters(model), count_macs_as_published(model, images).total)


def agrees(row: Row, counted: Counted) -> bool:
    """Whether cutting or rounding what was counted gives both published figures."""
    unit = 1e8 if row.macs % 100 == 0 else 1e6
    return _shows(counted.parameters / 1e5, row.parameters * 10) and _shows(counted.macs / unit, row.macs * 1e6 / unit)


def _shows(value: float, published: float) -> bool:
    return round(published) in (int(value), round(value))


@command("classifier_table", extra="timm")
def main(arguments: list[str]) -> None:
    """Print the table."""
    CommandParser("classifier_table", __doc__).parse_args(arguments)
    print("| change of EMOv2-5M, or size | parameters | published | MMACs | published | agrees | remark |")
    print("|---" * 7 + "|")
    for row in ROWS:
        counted = count(row)
        print(
            f"| {row.change} | {counted.parameters / 1e6:.3f}M | {row.parameters}M | {counted.macs / 1e6:.1f} "
            f"| {row.macs} | {'yes' if agrees(row, counted) else 'no'} | {row.remark} |",
            flush=True,
        )


if __name__ == "__main__":
    main(sys.argv[1:])
