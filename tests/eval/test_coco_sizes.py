"""Multiply-adds of RetinaNet and Mask R-CNN as means over COCO's images: the sizes, the mean, the second table."""

import dataclasses
import json
import math
from fractions import Fraction

import pytest

from d_emo.eval.tables import dense_table
from d_emo.eval.tables.coco_sizes import padded, read_sizes, resized
from d_emo.eval.tables.dense_table import chosen_rows, count, mean_macs


def annotations(path, sizes):
    """A file with images of these widths and heights, as COCO's have them; ids are in no order."""
    images = [
        {"id": 7919 * number % 1009, "file_name": f"{number}.jpg", "width": width, "height": height}
        for number, (width, height) in enumerate(sizes)
    ]
    path.write_text(json.dumps({"info": {}, "images": images, "annotations": [], "categories": []}))
    return path


@pytest.mark.parametrize(
    ("size", "new", "seen"),
    [
        ((640, 480), (1067, 800), (1088, 800)),
        ((480, 640), (800, 1067), (800, 1088)),
        ((640, 427), (1199, 800), (1216, 800)),
        ((640, 360), (1333, 750), (1344, 768)),
        ((333, 500), (800, 1201), (800, 1216)),
        ((612, 612), (800, 800), (800, 800)),
        ((640, 200), (1333, 417), (1344, 448)),
        ((2666, 1600), (1333, 800), (1344, 800)),
    ],
)
def test_an_image_is_resized_and_padded_as_mmdet_does(size, new, seen):
    assert resized(*size) == new
    assert tuple(map(padded, new)) == seen


def test_sizes_are_those_of_exact_arithmetic():
    for width in range(120, 641, 13):
        for height in range(120, 641, 11):
            scale = min(Fraction(1333, max(width, height)), Fraction(800, min(width, height)))
            exact = [math.floor(side * scale + Fraction(1, 2)) for side in (width, height)]
            assert [padded(side) for side in resized(width, height)] == [32 * math.ceil(side / 32) for side in exact]


def test_the_first_hundred_images_count_in_the_files_order(tmp_path):
    sizes = [(640, 480), (480, 640)] * 30 + [(640, 427)] * 40 + [(100, 100)] * 30
    seen = read_sizes(annotations(tmp_path / "instances.json", sizes))  # (height, width)
    assert seen == [(800, 1088), (1088, 800)] * 30 + [(800, 1216)] * 40
    assert read_sizes(annotations(tmp_path / "few.json", sizes[-2:])) == [(800, 800)] * 2


def test_the_mean_is_that_of_every_image_counted_alone():
    (row,) = chosen_rows(["SSDLite 1M 320*"])  # the rule is the same for every row; this one is quick
    sizes = [(64, 96), (96, 64), (128, 64), (64, 96)]
    alone = [count(dataclasses.replace(row, image=size)).macs.total for size in sizes]
    assert len(set(alone)) > 1
    assert mean_macs(row, sizes) == math.floor(Fraction(sum(alone), 4))


def test_means_are_compared_through_the_counters_rounding(tmp_path, capsys, monkeypatch):
    means = {"RetinaNet 1M": 142_499_999_999, "RetinaNet 2M": 146_500_000_001}
    monkeypatch.setattr(dense_table, "mean_macs", lambda row, sizes: means[row.label])
    path = annotations(tmp_path / "instances.json", [(640, 480)] * 101)
    with pytest.raises(SystemExit) as stop:
        dense_table.main(["--only", "RetinaNet [12]M*", "--coco-annotations", str(path)])
    assert stop.value.code == "dense_table: 1 of 4 rows disagree with the paper: RetinaNet 2M on COCO's images"
    assert capsys.readouterr().out.splitlines()[-2:] == [
        "| RetinaNet 1M | 100 | 142,499,999,999 | 142 | 142 | yes |",
        "| RetinaNet 2M | 100 | 146,500,000,001 | 147 | 146 | no |",
    ]


def test_fewer_images_are_counted_and_not_compared(tmp_path, capsys):
    path = annotations(tmp_path / "instances.json", [(640, 400)] * 2)  # becomes 1280 x 800
    dense_table.main(["--only", "SegFormer 1M*", "RetinaNet 1M*", "--coco-annotations", str(path)])
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == "| RetinaNet 1M | 2 | 157,687,848,160 | 158 | 142 | not compared |"


@pytest.mark.slow
def test_the_means_over_the_projects_27_images_are_near_the_published(shared):
    path = shared / "data" / "dense" / "coco" / "val" / "panoptic.json"
    if not path.is_file():
        pytest.skip("needs COCO's sizes in ../shared")
    sizes = read_sizes(path)
    assert len(sizes) == 27
    # Within 2% of the mean over 79 other images, whose standard error is 0.8%.
    for pattern, mean in {"RetinaNet 5M*": 156.5e9, "Mask R-CNN 5M*": 180.3e9}.items():
        assert mean_macs(chosen_rows([pattern])[0], sizes) == pytest.approx(mean, rel=0.02)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("[]", "is damaged (a list instead of a table)"),
        ("{", "is damaged"),
        ("{}", "has no list of images"),
        ('{"images": []}', "has no list of images"),
        ('{"images": {"1": {}}}', "has no list of images"),
        ('{"images": [{"width": 640, "height": 480}, 3]}', "image 2 is no table"),
        ('{"images": [{"width": 640}]}', "image 1: height=None is not a whole number"),
        ('{"images": [{"width": "640", "height": 480}]}', "image 1: width='640' is not a whole number"),
        ('{"images": [{"width": 640, "height": 0}]}', "image 1: height=0 is not"),
        ('{"images": [{"width": 640.5, "height": 1}]}', "image 1: width=640.5 is not"),
        ('{"images": [{"width": 1000000, "height": 2}]}', "image 1: nothing is left of 1000000 x 2 in 1333 x 800"),
        (f'{{"images": [{{"width": 1{"0" * 400}, "height": 2}}]}}', "image 1: width="),
    ],
)
def test_a_file_that_is_none_of_cocos_is_refused_in_one_line(tmp_path, content, said):
    path = tmp_path / "instances.json"
    path.write_text(content)
    with pytest.raises(SystemExit) as stop:
        dense_table.main(["--coco-annotations", str(path)])
    line = stop.value.code
    assert line.startswith(f"dense_table: {path}") and said in line and "instances_val2017.json" in line
    assert "\n" not in line and len(line) < 700


def test_annotations_without_a_row_of_their_own_are_refused(tmp_path):
    path = annotations(tmp_path / "instances.json", [(640, 480)])
    with pytest.raises(SystemExit) as stop:
        dense_table.main(["--only", "SegFormer *", "--coco-annotations", str(path)])
    assert stop.value.code.startswith("dense_table: --coco-annotations is for RetinaNet and Mask R-CNN")
