"""GPUs by their names."""

import pytest

from d_emo.common.gpus import GPUS, Fleet, find_gpu, parse_fleet, peak_flops


@pytest.mark.parametrize(
    ("text", "count", "name"),
    [
        ("64xH100", 64, "H100"),
        ("h200", 1, "H200"),
        (" 8 x a100 ", 8, "A100"),
        ("8*H100", 8, "H100"),
        ("2XA100-80GB", 2, "A100"),
        ("2xA100 40GB", 2, "A100-40GB"),
        ("4xRTX 4090", 4, "RTX4090"),
        ("rtx-4090", 1, "RTX4090"),
        ("1xNVIDIA GeForce RTX 4090", 1, "RTX4090"),
        ("NVIDIA H100 80GB HBM3", 1, "H100"),
        ("NVIDIA A100-SXM4-80GB", 1, "A100"),
    ],
)
def test_people_write_gpus_in_many_ways(text, count, name):
    assert parse_fleet(text) == Fleet(count, GPUS[name])


@pytest.mark.parametrize(
    "text",
    [
        "",
        "x",
        "64x",
        "0xH100",
        "-1xH100",
        "1.5xH100",
        "64xH1000",
        "3xB200",
        "80GB",
        "H100xH100",
        "64 64xH100",
        "2000000xH100",
        "9" * 5000 + "xH100",
    ],
)
def test_what_is_no_known_gpu_is_refused_with_those_that_are(text):
    with pytest.raises(
        ValueError, match=r"write a number up to 1,000,000, x and one of H100, H200, A100, A100-40GB, RTX4090: 64xH100"
    ):
        parse_fleet(text)


def test_many_gpus_fill_machines_and_talk_as_slowly_as_these_do():
    assert [Fleet(count, GPUS["H100"]).machines for count in (1, 8, 9, 64)] == [1, 1, 2, 8]
    # Links in a machine; between machines the ports of the one with the fewest together, each of 50 GB/s.
    rings = {count: Fleet(count, GPUS["H100"]).ring for count in (1, 8, 9, 12, 16, 64)}
    assert rings == {1: 450e9, 8: 450e9, 9: 50e9, 12: 200e9, 16: 400e9, 64: 400e9}
    assert Fleet(16, GPUS["RTX4090"]).ring == 12.5e9
    assert Fleet(8, GPUS["A100"]).describe() == "8 x A100"
    assert Fleet(64, GPUS["H100"]).describe() == "64 x H100 in 8 machines"


@pytest.mark.parametrize(
    ("card", "expected"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4e12),
        ("NVIDIA H200", 989.4e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A100 80GB PCIe", 312e12),
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA H100 NVL", None),
        ("NVIDIA H200 NVL", None),
        ("NVIDIA GeForce RTX 4090", 165.2e12),
        ("NVIDIA GeForce RTX 4090 D", None),
        ("NVIDIA GeForce RTX 4080", None),
    ],
)
def test_a_cards_peak(card, expected):
    assert peak_flops(card) == expected


@pytest.mark.parametrize("card", ["NVIDIA H100 PCIe", "NVIDIA A100 80GB PCIe", "NVIDIA H100 NVL", "NVIDIA L40S", ""])
def test_slower_forms_of_a_card_are_not_taken_for_it(card):
    assert find_gpu(card) is None


def test_forty_gigabytes_are_another_card():
    assert find_gpu("NVIDIA A100-SXM4-40GB") is GPUS["A100-40GB"]
