"""Numbers that docs/kernels.md tells of what has no code yet."""

import re

import numpy as np
import pytest
import torch
from helpers.paths import ROOT


def test_the_polynomial_for_gelu_is_as_close_as_it_says():
    page = " ".join((ROOT / "docs" / "kernels.md").read_text(encoding="utf-8").split())
    told = re.search(
        r"P has the coefficients ((?:-?[\d.]+,? )+)from the eleventh power down: GELU is within (\S+)", page
    )
    coefficients = [float(number) for number in re.findall(r"-?[\d.]+\d", told[1])]
    x = np.linspace(-9, 9, 1_000_001)
    ours = x * np.clip(0.5 + x * np.polyval(coefficients, np.minimum(x**2 / 12.5 - 1, 1)), 0, 1)
    assert len(coefficients) == 12
    exact = x * torch.special.ndtr(torch.from_numpy(x)).numpy()
    assert np.abs(ours - exact).max() == pytest.approx(float(told[2]), rel=0.02)
