"""Learning rates against batch size: the formulas by hand, random matrices, and dense Hessians of single examples."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fallline.core.errors import InputError
from fallline.descent.batch_size_learning_rates import (
    batch_size_learning_rates,
    effective_batch_size,
    noise_variance,
    scale_damping,
    scale_learning_rate,
    spike,
)


def by_hand(batch, eigenvalue, level, examples):
    """λ′, overlap and edge of one batch size, in float64; `level` is Pσ²."""
    effective = np.inf if batch == examples else batch / (1 - batch / examples)
    edge = 2 * np.sqrt(level / effective)
    if eigenvalue > np.sqrt(level / effective):
        return eigenvalue + level / (effective * eigenvalue), 1 - level / (effective * eigenvalue**2), edge
    return edge, 0.0, edge


def test_the_numbers_are_those_of_the_rule(dtype):
    batches = np.array([1, 2, 5, 40, 99, 100])
    rates = batch_size_learning_rates(batches, largest=1.5, variance=0.2, parameters=60, examples=100)
    expected = np.array([by_hand(b, 1.5, 12.0, 100) for b in batches])
    rtol = 20 * np.finfo(dtype).eps
    np.testing.assert_allclose(rates.largest, expected[:, 0], rtol=rtol)
    np.testing.assert_allclose(rates.overlap, expected[:, 1], rtol=rtol, atol=rtol)
    np.testing.assert_allclose(rates.edge, expected[:, 2], rtol=rtol)
    np.testing.assert_allclose(rates.learning_rate, 2 / expected[:, 0], rtol=rtol)
    assert list(rates.outside) == [False, False, False, True, True, True]
    # 12/1.5² = 5.33 effective examples
    np.testing.assert_allclose(rates.threshold, (16 / 3) / (1 + 16 / 300), rtol=rtol)
    assert rates.largest.dtype == dtype


def test_the_full_batch_has_the_full_hessian(x64):
    rates = batch_size_learning_rates(50, largest=3.0, variance=7.0, parameters=9, examples=50)
    assert (float(rates.largest), float(rates.overlap), float(rates.edge)) == (3.0, 1.0, 0.0)
    assert float(rates.effective) == np.inf and float(rates.learning_rate) == 2 / 3


def test_the_branches_meet_at_the_threshold(x64):
    rates = batch_size_learning_rates(10.0, largest=2.0, variance=0.4, parameters=100, examples=None)
    assert float(rates.threshold) == 10.0 and not bool(rates.outside)
    np.testing.assert_allclose(rates.largest, 4.0, rtol=1e-12)
    above = spike(2.0, 4.0 * (1 - 1e-9))
    np.testing.assert_allclose(above.value, 4.0, rtol=1e-8)
    assert bool(above.outside) and float(above.overlap) < 2e-9


def test_along_replaces_the_isotropic_level_but_not_the_edge(x64):
    options = {"largest": 1.5, "variance": 0.2, "parameters": 60, "examples": 100}
    rates = batch_size_learning_rates(20, **options, along=4.0)
    value, overlap, _ = by_hand(20, 1.5, 4.0, 100)
    np.testing.assert_allclose([rates.largest, rates.overlap], [value, overlap], rtol=1e-12)
    np.testing.assert_allclose(rates.edge, by_hand(20, 1.5, 12.0, 100)[2], rtol=1e-12)
    np.testing.assert_allclose(rates.threshold, (4 / 2.25) / (1 + 4 / 225), rtol=1e-12)


@pytest.mark.parametrize("eigenvalue", [0.5, 1.5, 4.0])
def test_a_random_matrix_does_what_the_rule_says(eigenvalue, x64):
    p, noise = 400, 1.0
    draw = np.random.default_rng(0)
    values, overlaps = [], []
    for _ in range(4):
        g = draw.normal(size=(p, p)) * np.sqrt(noise / p)
        e = (g + g.T) / np.sqrt(2)
        e[0, 0] += eigenvalue
        theta, vectors = np.linalg.eigh(e)
        values.append(theta[-1])
        overlaps.append(vectors[0, -1] ** 2)
    found = spike(eigenvalue, noise)
    assert abs(np.mean(values) / float(found.value) - 1) < 0.03
    assert abs(np.mean(overlaps) - float(found.overlap)) < 0.06


def test_numbers_may_be_traced_and_nan_stays_nan(x64):
    fn = jax.jit(lambda a, b: batch_size_learning_rates(b, largest=a, variance=0.2, parameters=60, examples=100))
    found = fn(1.5, jnp.array([2.0, 40.0]))
    plain = batch_size_learning_rates([2.0, 40.0], largest=1.5, variance=0.2, parameters=60, examples=100)
    np.testing.assert_allclose(found.largest, plain.largest, rtol=1e-14)
    broken = fn(jnp.nan, jnp.array([2.0, 40.0]))
    assert np.isnan(broken.largest).all() and np.isnan(broken.overlap).all() and np.isnan(broken.learning_rate).all()


# ---- measuring the noise ------------------------------------------------------------------------


def losses(x, batch):
    return 0.5 * jnp.einsum("j,ijk,k->i", jnp.concatenate([x["a"], x["b"]]), batch, jnp.concatenate([x["a"], x["b"]]))


def hessians(n=70, p=6, diagonal=False):
    draw = np.random.default_rng(3)
    each = draw.normal(size=(n, p, p))
    each = each + each.transpose(0, 2, 1) + np.diag(np.arange(1.0, p + 1) * 2)
    return each * np.eye(p) if diagonal else each


START = {"a": np.ones(2), "b": np.ones(4)}


def test_the_variance_of_diagonal_hessians_is_exact_for_every_probe(x32):
    dtype = np.float32
    each = hessians(diagonal=True).astype(dtype)
    x = {k: jnp.asarray(v, dtype) for k, v in START.items()}
    found = noise_variance(losses, x, jnp.asarray(each), probes=3)
    exact = np.mean(np.sum((each - each.mean(0)) ** 2, axis=(1, 2))) / 6**2
    np.testing.assert_allclose(found.variance.value, exact, rtol=100 * np.finfo(dtype).eps)
    assert float(found.variance.error) <= 100 * np.finfo(dtype).eps * exact
    assert (found.parameters, found.examples) == (6, 70)


def test_variance_along_and_eigenpair_are_those_of_the_dense_hessians(x64):
    each = hessians()
    mean = each.mean(0)
    found = noise_variance(losses, START, jnp.asarray(each), probes=300, key=1)
    exact = np.mean(np.sum((each - mean) ** 2, axis=(1, 2))) / 6**2
    assert 0 < float(found.variance.error) < 0.05 * exact
    assert abs(float(found.variance.value) - exact) < 4 * float(found.variance.error)
    values, vectors = np.linalg.eigh(mean)
    u = vectors[:, -1]
    np.testing.assert_allclose(found.largest, values[-1], rtol=1e-10)
    ours = np.concatenate([found.vector["a"], found.vector["b"]])
    np.testing.assert_allclose(abs(ours @ u), 1, rtol=1e-10)
    along = np.mean([np.sum(((np.eye(6) - np.outer(u, u)) @ (a - mean) @ u) ** 2) for a in each])
    np.testing.assert_allclose(found.along, along, rtol=1e-8)
    # second order: the mean of λ₁ over batches of many examples
    rates = found.rates(35)
    np.testing.assert_allclose(rates.largest, values[-1] + along / (70 * values[-1]), rtol=1e-8)
    isotropic = found.rates(35, anisotropic=False)
    np.testing.assert_allclose(isotropic.largest, values[-1] + float(found.variance.value) * 6 / (70 * values[-1]))


# ---- scaling ------------------------------------------------------------------------------------


def test_rates_scale_by_the_batch_size_or_its_root():
    assert scale_learning_rate(0.1, 8, 32, "sgd") == pytest.approx(0.4)
    assert scale_learning_rate(0.1, 8, 32, "adaptive") == pytest.approx(0.2)
    assert scale_learning_rate(0.1, 32, 8, "adaptive") == pytest.approx(0.05)


def test_a_cap_stops_the_growth_on_both_sides():
    np.testing.assert_allclose(scale_learning_rate(0.1, 8, 32, "sgd", cap=16), 0.2, rtol=1e-6)
    np.testing.assert_allclose(scale_learning_rate(0.1, 64, 8, "sgd", cap=16), 0.05, rtol=1e-6)
    np.testing.assert_allclose(scale_learning_rate(0.1, 8, 12, "sgd", cap=16), 0.15, rtol=1e-6)


def test_damping_goes_with_the_rate_and_against_the_batch_size():
    assert scale_damping(1e-3, 8, 32) == pytest.approx(2.5e-4)
    assert scale_damping(1e-3, 8, 32, 0.1, 0.4) == pytest.approx(1e-3)


# ---- bad input ----------------------------------------------------------------------------------

GOOD = {"batch_sizes": 4, "largest": 1.0, "variance": 0.1, "parameters": 5, "examples": 10}


@pytest.mark.parametrize(
    "bad",
    [
        {"batch_sizes": 0},
        {"batch_sizes": [4, 11]},
        {"batch_sizes": np.nan},
        {"batch_sizes": "many"},
        {"variance": -0.1},
        {"variance": np.inf},
        {"largest": 0.0},
        {"largest": -1.0},
        {"parameters": 0},
        {"examples": 0},
        {"along": -1.0},
    ],
    ids=str,
)
def test_numbers_out_of_range_are_refused(bad):
    with pytest.raises(InputError, match=f"^{next(iter(bad))}: got"):
        batch_size_learning_rates(**{**GOOD, **bad})


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda: spike(-1.0, 0.1), "eigenvalue"),
        (lambda: spike([1.0, 0.0], 0.1), "eigenvalue"),
        (lambda: spike(1.0, -0.1), "noise"),
        (lambda: effective_batch_size(11, 10), "batch_sizes"),
        (lambda: scale_learning_rate(0.1, 8, 32, "adam"), "kind"),
        (lambda: scale_learning_rate(-0.1, 8, 32, "sgd"), "learning_rate"),
        (lambda: scale_learning_rate(0.1, 0, 32, "sgd"), "batch_size"),
        (lambda: scale_learning_rate(0.1, 8, 0.5, "sgd"), "new_batch_size"),
        (lambda: scale_learning_rate(0.1, 8, 32, "sgd", cap=0.5), "cap"),
        (lambda: scale_damping(-1.0, 8, 32), "damping"),
        (lambda: scale_damping(1.0, 8, 0), "new_batch_size"),
        (lambda: scale_damping(1.0, 8, 32, 0.0, 1.0), "learning_rate"),
        (lambda: noise_variance(losses, START, np.zeros((0, 6, 6))), "data"),
        (lambda: noise_variance(losses, START, 3.0), "data"),
        (lambda: noise_variance(losses, {"a": np.ones(6, int)}, np.zeros((2, 6, 6))), "x"),
        (lambda: noise_variance(losses, {"a": np.ones(6, complex)}, np.zeros((2, 6, 6))), "x"),
        (lambda: noise_variance(losses, START, np.zeros((2, 6, 6)), probes=0), "probes"),
        (lambda: noise_variance(losses, START, np.zeros((2, 6, 6)), steps=0), "steps"),
    ],
)
def test_what_cannot_be_used_is_refused(call, name):
    with pytest.raises(InputError, match=f"^{name}: got"):
        call()
