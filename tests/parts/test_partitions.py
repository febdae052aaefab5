"""Distances between partitions against scikit-learn, the metric's axioms and values by hand."""

import math

import numpy as np
import pytest
from sklearn.metrics import adjusted_rand_score, mutual_info_score

import fallline as fl
from fallline.parts.partitions import adjusted_rand_index, variation_of_information

RNG = np.random.default_rng(0)
DRAWN = [
    (RNG.integers(0, a, n), RNG.integers(0, b, n)) for n, a, b in [(7, 2, 3), (60, 4, 4), (500, 10, 3), (40, 1, 5)]
]
NEAR = [(labels, np.where(RNG.random(80) < 0.2, 0, labels)) for labels in RNG.integers(0, 4, (3, 80))]


def entropy(labels):
    return mutual_info_score(labels, labels)


@pytest.mark.parametrize(("a", "b"), [*DRAWN, *NEAR])
def test_against_scikit_learn(a, b):
    assert adjusted_rand_index(a, b) == pytest.approx(adjusted_rand_score(a, b), abs=1e-12)
    expected = entropy(a) + entropy(b) - 2 * mutual_info_score(a, b)
    assert variation_of_information(a, b) == pytest.approx(expected, abs=1e-12)


def test_values_by_hand():
    # One of two halves cut in two: H(B | A) = 1/2 log 2, H(A | B) = 0.
    assert variation_of_information([0, 0, 0, 0], [0, 0, 1, 1]) == pytest.approx(math.log(2))
    assert variation_of_information([0, 0, 0, 0, 1, 1, 1, 1], [0, 0, 2, 2, 1, 1, 1, 1]) == pytest.approx(
        math.log(2) / 2
    )
    # Together in both: 2 pairs; in the first 6, in the second 3, of 15: (2 − 18/15) / (9/2 − 18/15).
    assert adjusted_rand_index([0, 0, 0, 1, 1, 1], [0, 0, 1, 1, 2, 2]) == pytest.approx(0.8 / 3.3)


@pytest.mark.parametrize("distance", [variation_of_information, lambda a, b: 1 - adjusted_rand_index(a, b)])
def test_names_of_the_parts_do_not_matter(distance):
    a, b = DRAWN[1]
    names = np.array(["w", "x", "y", "z"])
    assert distance(a, names[a]) == 0
    assert distance(names[a], 7 - b) == pytest.approx(distance(a, b), rel=1e-14)
    assert distance(a, b) == pytest.approx(distance(b, a), rel=1e-14)


def test_variation_of_information_is_a_metric():
    for _ in range(50):
        a, b, c = RNG.integers(0, 4, (3, 30))
        assert variation_of_information(a, c) <= variation_of_information(a, b) + variation_of_information(b, c) + 1e-12
        assert 0 < variation_of_information(a, b) <= math.log(30)
    # The bound is attained between the trivial partitions.
    assert variation_of_information(np.zeros(30), np.arange(30)) == pytest.approx(math.log(30))


@pytest.mark.parametrize(
    ("a", "b", "index"), [([5], [7], 1), ([0] * 9, [1] * 9, 1), (range(9), range(9), 1), ([0] * 9, range(9), 0)]
)
def test_rand_index_of_trivial_partitions(a, b, index):
    assert adjusted_rand_index(list(a), list(b)) == index == adjusted_rand_score(list(a), list(b))


def test_rand_index_is_0_on_average_for_independent_partitions():
    a = np.repeat([0, 1, 2], 20)
    values = [adjusted_rand_index(a, RNG.permutation(a)) for _ in range(2000)]
    assert abs(np.mean(values)) < 4 * np.std(values) / math.sqrt(2000)


@pytest.mark.parametrize("function", [variation_of_information, adjusted_rand_index])
@pytest.mark.parametrize(("a", "b"), [([0, 1], [0, 1, 2]), ([], []), ([[0, 1]], [[0, 1]]), (0, 0)])
def test_labels_of_another_kind_are_refused(function, a, b):
    with pytest.raises(fl.InputError, match=r"^labels: got .*; expected two vectors of one length of at least 1"):
        function(a, b)
