import numpy as np
import pytest

from evalkit.errors import InputError
from evalkit.stats.clusters import design_effect


def test_documents_apart_have_no_effect():
    assert design_effect([1.0, 0.0, -1.0, 0.0], range(4)) == 1.0


def test_copies_of_one_answer_count_once():
    """Every cluster of 5 answers alike: the effect is 5, up to the two corrections for degrees of freedom."""
    differences = np.random.default_rng(0).choice([-1.0, 0.0, 1.0], size=200, p=[0.1, 0.8, 0.1])
    effect = design_effect(np.repeat(differences, 5).tolist(), np.repeat(np.arange(200), 5).tolist())
    assert effect == pytest.approx(5 * (200 / 199) / (1000 / 999))


def test_clusters_that_mean_nothing_have_an_effect_near_one():
    rng = np.random.default_rng(1)
    differences = rng.choice([-1.0, 0.0, 1.0], size=4000, p=[0.1, 0.8, 0.1])
    assert 1.0 <= design_effect(differences.tolist(), (np.arange(4000) // 4).tolist()) < 1.15


def test_an_effect_is_never_below_one():
    """Answers that alternate within clusters would claim more documents than there are."""
    assert design_effect([1.0, -1.0] * 50, [i // 2 for i in range(100)]) == 1.0


@pytest.mark.parametrize(("differences", "clusters"), [([1.0, 0.0], [0, 0]), ([1.0], [0, 1])])
def test_one_cluster_or_another_number_of_documents_is_refused(differences, clusters):
    with pytest.raises(InputError, match="want"):
        design_effect(differences, clusters)
