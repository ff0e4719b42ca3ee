"""The 39 counted systems of the paper's tables VIII to XIII: exact integers, and the published figures."""

import csv

import pytest
from helpers.paths import GOLDEN

from d_emo.eval.tables import dense_table
from d_emo.eval.tables.dense_table import AVERAGED, ROWS, Counted, agrees, as_printed, as_published, chosen_rows, count
from d_emo.models.flops import PublishedMacs

# The table's names of systems in the file of counts.
SYSTEMS = {"Semantic FPN": "FPN", "Mask R-CNN": "MaskRCNN"}


def read_counts(path):
    """The file's lines by system, size and input."""
    with path.open(newline="") as file:
        return {(line["system"], line["size"], line["input"]): line for line in csv.DictReader(file)}


EXPECTED = read_counts(GOLDEN / "dense_counts.csv")


def expected(row):
    system = SYSTEMS.get(row.system, row.system)
    return EXPECTED[
        f"{system}512" if system == "SSDLite" and row.image[0] == 512 else system, row.size or "5M", row.input
    ]


# Of each system one size soon.
@pytest.mark.parametrize(
    "row",
    [pytest.param(row, marks=[pytest.mark.slow] * (row.size in ("1M", "2M", "20M"))) for row in ROWS],
    ids=lambda row: row.name,
)
def test_parameters_and_multiply_adds_are_exact_and_become_the_published_figures(row):
    line, counted = expected(row), count(row)
    products, norms, resampling = (int(line[kind]) for kind in ("products", "norms", "resampling"))
    assert counted == Counted(
        int(line["parameters_all"]),
        int(line["parameters_without_auxiliary"]),
        PublishedMacs(products, norms, resampling),
    )
    assert counted.macs.total == int(line["total"])
    assert not line["parameters_in_log"] or counted.without_auxiliary == int(line["parameters_in_log"])
    assert agrees(row, counted)
    parameters = counted.parameters if row.with_auxiliary else counted.without_auxiliary
    assert as_published(parameters) == float(line["published_M"])
    if row.macs is not None and row.remark != AVERAGED:
        assert as_published(counted.macs.total) == float(line["published_G"])


def test_the_rows_are_those_of_the_file_with_its_published_figures():
    assert len(ROWS) == len(EXPECTED) == 39
    assert len({row.name for row in ROWS}) == 39
    for row in ROWS:
        line = expected(row)
        assert row.parameters == float(line["published_M"])
        assert row.macs in (None, float(line["published_G"]))
    # Rows whose multiply-adds the paper gives for another input or window, or as averages.
    assert [row.name for row in ROWS if row.macs is None] == [
        "UNet-S5-D16 256x256", "U-EMOv2-5M window 8 256x256", "U-EMOv2-5M window 10 256x256",
        "U-EMOv2-5M window 10 512x512",
    ]  # fmt: skip
    assert {row.system for row in ROWS if row.remark == AVERAGED} == {"RetinaNet", "Mask R-CNN"}


def test_the_file_is_the_projects(shared):
    assert (GOLDEN / "dense_counts.csv").read_bytes() == (shared / "golden" / "dense_expected.csv").read_bytes()


@pytest.mark.parametrize(
    ("number", "printed", "published"),
    [
        (9_965_718, "9.966M", 9.9),
        (6_658_454, "6.658M", 6.6),
        (20_399_798, "20.4M", 20.4),
        (5_983_568, "5.984M", 5.9),
        (734_343_152, "0.734G", 0.7),
        (1_362_993_600, "1.363G", 1.3),
        (51_551_289_344, "51.551G", 51.5),
        (8_002_717_120, "8.003G", 8.0),
        (99_999_999_999, "100G", 100.0),
        (158_400_000_000, "0.158T", 158),
        (227_978_773_536, "0.228T", 228),
        (300_000_000_000, "0.3T", 300),
    ],
)
def test_counts_are_printed_and_cut_as_the_paper_does(number, printed, published):
    assert as_printed(number) == printed and as_published(number) == published


def test_the_table_is_printed_for_the_rows_that_a_pattern_names(capsys):
    dense_table.main(["--only", "SegFormer 1M*", "U-EMOv2-5M window 8 256x256"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4
    assert lines[2] == (
        "| SegFormer 1M | 512x512 | 1,499,234 | 1,499,234 | 1.4 | 4,941,435,136 | 38,684,672 | 47,185,920 "
        "| 5,027,305,728 | 5.0 | yes |  |"
    )
    assert lines[3].startswith("| U-EMOv2-5M window 8 | 256x256 | 21,397,156 | 21,323,170 | 21.3 |")


def test_a_row_that_disagrees_ends_the_command_with_an_error(capsys, monkeypatch):
    (row,) = chosen_rows(["SegFormer 1M*"])
    wrong = Counted(1_600_000, 1_600_000, PublishedMacs(5_000_000_000, 0, 0))
    monkeypatch.setattr(dense_table, "count", lambda _: wrong)
    assert not agrees(row, wrong)
    with pytest.raises(SystemExit) as stop:
        dense_table.main(["--only", row.name])
    assert stop.value.code == "dense_table: 1 of 1 rows disagree with the paper: SegFormer 1M 512x512"
    assert "| no |" in capsys.readouterr().out


def test_a_pattern_of_no_row_is_refused(capsys):
    with pytest.raises(SystemExit) as stop:
        dense_table.main(["--only", "SegFormer 3M*"])
    assert str(stop.value.code).startswith(
        "dense_table: --only SegFormer 3M*: no row matches; names are such as DeepLabv3 1M"
    )
