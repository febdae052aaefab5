"""Phase diagrams of trials whose rates are known."""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conformance.checks import compilations

from fallline import InputError
from fallline.recovery import Dense, PhaseDiagram, phase_diagram

module = importlib.import_module("fallline.recovery.phase_diagram")  # the function has its name


def test_a_trial_without_chance_succeeds_where_it_must():
    found = phase_diagram(lambda a, b, key: a * b >= 6, [1, 2, 3, 4], [1.5, 2, 3], seeds=3, labels=("a", "b"))
    expected = np.outer([1, 2, 3, 4], [1.5, 2, 3]) >= 6
    np.testing.assert_array_equal(found.rates, expected)
    np.testing.assert_array_equal(found.threshold(), [4, 3, 2])
    assert found.seeds == 3 and found.labels == ("a", "b")
    assert found.first.tolist() == [1, 2, 3, 4] and found.second.tolist() == [1.5, 2, 3]


def test_the_rates_of_coins_are_their_probabilities():
    a, b, seeds = np.linspace(0, 1, 6), np.array([0.5, 1.0]), 2000
    found = phase_diagram(lambda a, b, key: jax.random.uniform(key) < a * b, a, b, seeds=seeds, key=3)
    p = np.outer(a, b)
    assert np.all(np.abs(found.rates - p) <= 5 * np.sqrt(p * (1 - p) / seeds))
    assert np.all(found.rates[0] == 0) and found.rates[-1, 1] == 1
    # One draw for all cells: the empirical distribution of it never falls.
    assert np.all(np.diff(found.rates, axis=0) >= 0)


def test_each_cell_is_the_loop_over_its_keys():
    def trial(a, b, key):
        return jnp.sum(jax.random.normal(key, (3,))) > a - b

    found = phase_diagram(trial, [0.0, 1.0], [0.5, 2.0, 2.5], seeds=7, key=jax.random.key(5))
    keys = jax.random.split(jax.random.key(5), 7)
    for i, a in enumerate(found.first):
        for j, b in enumerate(found.second):
            assert found.rates[i, j] == np.mean([bool(trial(a, b, key)) for key in keys])


def test_keys_decide():
    def rates(key):
        return phase_diagram(lambda a, b, key: jax.random.uniform(key) < a, [0.3, 0.6], [0.0], seeds=50, key=key).rates

    np.testing.assert_array_equal(rates(1), rates(jax.random.key(1)))
    assert np.any(rates(1) != rates(2))


def test_a_grid_compiles_one_program_for_its_trials():
    traced = []

    def trial(a, b, key):
        """Least squares from the first `a` rows, alone: exact from 4 on."""
        traced.append(1)
        matrix = jnp.where(jnp.arange(8)[:, None] < a, jax.random.normal(key, (8, 4)), 0)
        assert Dense(matrix).out_shape == (8,)
        x = jnp.arange(1.0, 5)
        found = jnp.linalg.pinv(matrix) @ (matrix @ x)
        return jnp.linalg.norm(found - x) < 1e-3 + b

    phase_diagram(trial, [1.0], [0.0], seeds=2)  # what surrounds the trial is compiled now
    traced.clear()
    with compilations() as found:
        diagram = phase_diagram(trial, np.arange(1.0, 9), [0.0], seeds=2)
    assert len(traced) == 1 and len(found) == 1
    np.testing.assert_array_equal(diagram.rates[:, 0], np.arange(1, 9) >= 4)


def test_a_threshold_is_where_the_rate_stays_reached():
    rates = np.array([[0.6, 0.0, 0.5, 1.0], [0.2, 0.0, 0.5, 1.0], [0.7, 0.4, 0.4, 1.0], [0.9, 0.9, 0.3, 1.0]])
    found = PhaseDiagram(np.array([1.0, 2, 4, 8]), np.arange(4.0), rates, 10, ("a", "b"))
    np.testing.assert_array_equal(found.threshold(), [4, 8, np.nan, 1])
    np.testing.assert_array_equal(found.threshold(0.3), [4, 4, 1, 1])
    np.testing.assert_array_equal(found.threshold(1.0), [np.nan, np.nan, np.nan, 1])


def test_a_bar_counts_the_rows(monkeypatch):
    said = []

    class Recorded:
        def __init__(self, *about):
            said.append(about)

        def update(self, step, words):
            said.append((step, words))

        def close(self):
            said.append("closed")

    monkeypatch.setattr(module, "Bar", Recorded)
    labels = ("m / n", "b")
    phase_diagram(lambda a, b, key: a > b, [1.0, 2.5], [0.0], seeds=1, labels=labels, progress=False)
    assert said == [("phase diagram", 2, False), (1, "m / n 1"), (2, "m / n 2.5"), "closed"]


@pytest.mark.parametrize("axis", [[], [1.0, 1.0], [2.0, 1.0], [0.0, np.nan], 3.0, [[1.0]]], ids=repr)
@pytest.mark.parametrize("name", ["first", "second"])
def test_axes_are_checked(name, axis):
    axes = {"first": [1.0], "second": [1.0], name: axis}
    with pytest.raises(InputError, match=f"{name}.*ascending"):
        phase_diagram(lambda a, b, key: a > b, **axes)


def test_trials_and_counts_are_checked():
    for trial in (lambda a, b, key: a, lambda a, b, key: jnp.array([True, False]), lambda a, b, key: jnp.int32(1)):
        with pytest.raises(InputError, match="trial.*one True or False"):
            phase_diagram(trial, [1.0], [1.0])
    for seeds in (0, 1.5):
        with pytest.raises(InputError, match="seeds"):
            phase_diagram(lambda a, b, key: a > b, [1.0], [1.0], seeds=seeds)
    with pytest.raises(InputError, match="key"):
        phase_diagram(lambda a, b, key: a > b, [1.0], [1.0], key="a")
