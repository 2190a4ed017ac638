import numpy as np
import pytest
from statsmodels.stats.multitest import multipletests

from evalkit.stats.multiple import holm


@pytest.mark.parametrize("seed", range(5))
def test_holm_is_statsmodels(seed):
    p = np.random.default_rng(seed).uniform(0, 0.2, size=7)
    assert holm(p.tolist()) == pytest.approx(multipletests(p, method="holm")[1])


def test_holm_of_nothing_is_nothing():
    assert holm([]) == []
