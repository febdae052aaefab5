"""Losses: the papers' formulas in NumPy, and finite differences."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fallline.core.errors import InputError
from fallline.recovery import (
    Absolute,
    Amplitude,
    Dense,
    Intensity,
    Recovery,
    ReweightedAmplitude,
    Squared,
    TruncatedAmplitude,
    TruncatedPoisson,
    coded_diffraction,
)

M, N = 40, 6


def _numbers(rng, shape, is_complex):
    parts = rng.standard_normal((2, *shape))
    return parts[0] + 1j * parts[1] if is_complex else parts[0]


def _case(is_complex, seed=0):
    """Rows of unequal norm, intensities that no signal fits, a point."""
    rng = np.random.default_rng(seed)
    a = _numbers(rng, (M, N), is_complex) * rng.uniform(0.5, 2, (M, 1))
    return a, rng.uniform(0.1, 9, M), _numbers(rng, (N,), is_complex)


def _truncation(a, y, z):
    """Chen and Candès (2015), Algorithm 1, one measurement at a time."""
    u, kept = a @ z, []
    typical = np.mean(np.abs(y - np.abs(u) ** 2))
    for i in range(len(y)):
        size = np.sqrt(a.shape[1]) * abs(u[i]) / (np.linalg.norm(a[i]) * np.linalg.norm(z))
        kept.append(0.3 <= size <= 5 and abs(y[i] - abs(u[i]) ** 2) <= 5 * typical * size)
    return np.array(kept)


def _formula(loss, a, y, z):
    """The gradient of each loss, summed over the measurements."""
    u, psi = a @ z, np.sqrt(y)
    amplitude = u - psi * u / np.abs(u)
    dual = {
        Intensity: lambda: (np.abs(u) ** 2 - y) * u,
        TruncatedPoisson: lambda: -2 * _truncation(a, y, z) * (y - np.abs(u) ** 2) / np.conj(u),
        Amplitude: lambda: amplitude,
        TruncatedAmplitude: lambda: (np.abs(u) >= psi / 1.7) * amplitude,
        ReweightedAmplitude: lambda: (np.abs(u) / psi) / (np.abs(u) / psi + 10) * amplitude,
    }[loss]()
    return a.conj().T @ dual


@pytest.mark.parametrize("is_complex", [False, True], ids=["real", "complex"])
@pytest.mark.parametrize("loss", [Intensity, TruncatedPoisson, Amplitude, TruncatedAmplitude, ReweightedAmplitude])
def test_gradients_are_the_papers_formulas(x64, loss, is_complex):
    a, y, z = _case(is_complex)
    problem = Recovery(Dense(a), y, loss=loss())
    unit = np.mean(y) if loss is Intensity else 1
    expected = _formula(loss, a, y, z) / (np.sum(np.abs(a) ** 2) / N) / unit
    gradient = problem.value_and_gradient(jnp.asarray(z))[1]
    np.testing.assert_allclose(gradient, expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("is_complex", [False, True], ids=["real", "complex"])
def test_the_mask_of_truncated_wirtinger_flow_is_the_papers(x64, is_complex):
    both = set()
    for seed in range(5):
        a, y, z = _case(is_complex, seed)
        u = jnp.asarray(a @ z)
        relative = Recovery(Dense(a), y)._relative(jnp.asarray(z), u, jnp.sqrt(N) / jnp.linalg.norm(a, axis=1))
        kept = np.asarray(TruncatedPoisson()._kept(u, jnp.asarray(y), relative))
        np.testing.assert_array_equal(kept, _truncation(a, y, z))
        both |= set(kept.tolist())
    assert both == {True, False}


@pytest.mark.parametrize("is_complex", [False, True], ids=["real", "complex"])
@pytest.mark.parametrize("loss", [Intensity, Amplitude])
def test_gradients_of_smooth_losses_are_finite_differences(x64, loss, is_complex):
    a, y, z = _case(is_complex, 1)
    problem = Recovery(Dense(a), y, loss=loss())
    gradient = np.asarray(problem.value_and_gradient(jnp.asarray(z))[1])
    directions = [1, 1j] if is_complex else [1]
    for i in range(N):
        for turn in directions:
            step = np.zeros(N, z.dtype)
            step[i] = 1e-5 * turn
            slope = float(problem.value(jnp.asarray(z + step)) - problem.value(jnp.asarray(z - step))) / 2e-5
            assert slope == pytest.approx(np.real(np.conj(turn) * gradient[i]), rel=1e-6, abs=1e-8)


@pytest.mark.parametrize("loss", [TruncatedPoisson, TruncatedAmplitude])
def test_gradients_of_truncated_losses_are_finite_differences_while_the_mask_stays(x64, loss):
    a, y, z = _case(True, 2)
    problem = Recovery(Dense(a), y, loss=loss())
    gradient = np.asarray(problem.value_and_gradient(jnp.asarray(z))[1])
    direction = _numbers(np.random.default_rng(3), (N,), True)
    ahead, behind = (float(problem.value(jnp.asarray(z + s * 1e-7 * direction))) for s in (1, -1))
    assert (ahead - behind) / 2e-7 == pytest.approx(np.real(np.vdot(gradient, direction)), rel=1e-6)


def test_reverse_differentiation_gives_the_conjugate_and_the_library_turns_it(x64):
    """JAX's gradient of |z|² at 1 + 2i is 2 − 4i; the direction of ascent is 2 + 4i."""
    assert complex(jax.grad(lambda z: jnp.abs(z) ** 2)(jnp.asarray(1 + 2j))) == pytest.approx(2 - 4j)
    a, y, z = _case(True)
    problem = Recovery(Dense(a), y, loss=Intensity())
    expected = np.conj(jax.grad(problem.value)(jnp.asarray(z)))
    np.testing.assert_allclose(problem.value_and_gradient(jnp.asarray(z))[1], expected, rtol=1e-11)


@pytest.mark.parametrize("loss", [Intensity, Amplitude, TruncatedAmplitude, ReweightedAmplitude, TruncatedPoisson])
def test_gradients_over_masks_one_by_one_are_those_of_the_whole_matrix(x64, loss):
    op = coded_diffraction(jax.random.key(0), (3, 4), 5, octanary=True)
    rng = np.random.default_rng(4)
    z, y = _numbers(rng, (3, 4), True), rng.uniform(0.1, 40, (5, 3, 4))
    columns = [np.ravel(op.mv(jnp.asarray(e.reshape(3, 4)))) for e in np.eye(12)]
    matrix = Recovery(Dense(np.stack(columns, axis=1)), y.ravel(), loss=loss())
    value, gradient = Recovery(op, y, loss=loss()).value_and_gradient(jnp.asarray(z))
    expected, slope = matrix.value_and_gradient(jnp.asarray(z.ravel()))
    assert float(value) == pytest.approx(float(expected), rel=1e-12)
    np.testing.assert_allclose(np.ravel(gradient), slope, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("loss", [Intensity, TruncatedPoisson, Amplitude, TruncatedAmplitude, ReweightedAmplitude])
@pytest.mark.parametrize("is_complex", [False, True], ids=["real", "complex"])
def test_no_nan_where_a_measurement_is_zero(x64, loss, is_complex):
    """u = 0 in the first measurement, y = 0 in the second, both in the third: no NaN in value, gradient or Hessian."""
    dtype = complex if is_complex else float
    a, y = np.array([[1, 0], [0, 1], [2, 0], [1, 1], [1, -1]], dtype), np.array([1.0, 0.0, 0.0, 2.0, 1.0])
    problem = Recovery(Dense(a), y, loss=loss())
    z = jnp.asarray(np.array([0, 1.3], dtype))
    found = [*problem.value_and_gradient(z), problem.hvp(z, jnp.ones(2, dtype)), jax.grad(problem.value)(z)]
    for numbers in found:
        assert np.all(np.isfinite(numbers))


def test_linear_losses(x64):
    rng = np.random.default_rng(5)
    u, y = rng.standard_normal(4), rng.standard_normal(4)
    assert float(Squared().value(u, y, None)) == pytest.approx(np.sum((u - y) ** 2) / 2)
    np.testing.assert_allclose(Squared().dual(u, y, None), u - y)
    assert float(Absolute().value(u, y, None)) == pytest.approx(np.sum(np.abs(u - y)))
    np.testing.assert_array_equal(Absolute().dual(jnp.asarray([2.0, 1.0, 0.0]), jnp.ones(3), None), [1, 0, -1])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TruncatedPoisson(lower=0.0), "lower: got 0.0"),
        (lambda: TruncatedPoisson(upper=-1.0), "upper: got -1.0"),
        (lambda: TruncatedPoisson(misfit=0.0), "misfit: got 0.0"),
        (lambda: TruncatedPoisson(lower=6.0), "lower: got 6.0; expected at most upper = 5"),
        (lambda: TruncatedAmplitude(0.0), "gamma: got 0.0"),
        (lambda: ReweightedAmplitude(-1.0), "beta: got -1.0"),
    ],
)
def test_thresholds_that_make_no_sense_are_refused(make, message):
    with pytest.raises(InputError, match=message):
        make()


@pytest.mark.parametrize(
    ("y", "message"),
    [
        (np.array([1.0, -2.0, 3.0]), r"y: got -2 at \[1\]; expected intensities"),
        (np.array([1.0, 2.0, np.nan]), r"y: got nan at \[2\]"),
        (np.zeros(3), "y: got all zeros"),
        (np.ones(4), r"y: got float64\[4\]; expected the shape"),
        (np.ones(3, complex), r"y: got complex128\[3\]; expected a real"),
        (np.ones(3, int), r"y: got int64\[3\]; expected a real"),
    ],
)
def test_data_that_are_no_intensities_are_refused(x64, y, message):
    with pytest.raises(InputError, match=message):
        Recovery(Dense(np.eye(3)), y, loss=Intensity())


def test_the_place_of_bad_data_is_named_in_all_its_indices(x64):
    op = coded_diffraction(jax.random.key(0), (2, 3), 4)
    y = np.ones((4, 2, 3))
    y[2, 1, 0] = -1
    with pytest.raises(InputError, match=r"y: got -1 at \[2, 1, 0\]"):
        Recovery(op, y, loss=Amplitude())
