"""Starts against dense eigenvectors, with weights computed in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fallline.core.errors import InputError
from fallline.recovery import STARTS, Dense, Intensity, Recovery, Vector, coded_diffraction, random, spectral, start

M, N = 80, 8


def _case(is_complex, seed=0):
    rng = np.random.default_rng(seed)
    parts = rng.standard_normal((2, M, N))
    a = (parts[0] + 1j * parts[1] if is_complex else parts[0]) * rng.uniform(0.7, 1.4, (M, 1))
    x = rng.standard_normal(N) + (1j * rng.standard_normal(N) if is_complex else 0)
    return a, x, np.abs(a @ x) ** 2


def _weights(name, a, y):
    """The weights of the card, one measurement at a time."""
    m, n = a.shape
    norms, psi = np.linalg.norm(a, axis=1), np.sqrt(y)
    if name == "spectral":
        return y
    if name == "truncated":
        return np.array([y[i] if y[i] * n / norms[i] ** 2 <= 9 * np.mean(y) else 0 for i in range(m)])
    if name == "orthogonality_promoting":
        chosen = np.argsort(psi / norms)[-int(np.ceil(m / 6)) :]
        return np.array([1 / norms[i] ** 2 if i in chosen else 0 for i in range(m)])
    if name == "maximal_correlation":
        chosen = np.argsort(psi)[-(3 * m // 13) :]
        return np.array([psi[i] ** 0.5 if i in chosen else 0 for i in range(m)])
    scaled = y / np.mean(y)
    return (scaled - 1) / (scaled + np.sqrt(m / n) - 1)


@pytest.mark.parametrize("is_complex", [False, True], ids=["real", "complex"])
@pytest.mark.parametrize("name", list(STARTS))
def test_a_start_is_the_leading_eigenvector_with_the_norm_of_the_signal(x64, name, is_complex):
    a, _, y = _case(is_complex)
    w = _weights(name, a, y)
    values, vectors = np.linalg.eigh((a.conj().T * w) @ a)
    if name == "optimal":
        assert w.min() < 0
    problem = Recovery(Dense(a), y, loss=Intensity())
    x0 = np.asarray(start(name)(problem, jax.random.key(0)))
    size = np.sqrt(np.mean(y)) * np.sqrt(M * N / np.sum(np.abs(a) ** 2))
    assert np.iscomplexobj(x0) == is_complex
    assert np.linalg.norm(x0) == pytest.approx(size, rel=1e-10)
    assert abs(np.vdot(vectors[:, -1], x0)) == pytest.approx(size, rel=1e-10), values


def test_negative_weights_do_not_lead_to_the_other_end_of_the_spectrum(x64):
    """The most negative eigenvalue is the largest in size here: power iteration would find it."""
    rng = np.random.default_rng(1)
    a = rng.standard_normal((M, N))
    y = (a @ rng.standard_normal(N)) ** 2
    y[0], a[1:4], y[1:4] = 30 * y.max(), 3 * a[1:4], 1e-3
    w = _weights("optimal", a, y)
    values, vectors = np.linalg.eigh((a.T * w) @ a)
    assert -values[0] > 1.5 * values[-1]
    x0 = np.asarray(start("optimal")(Recovery(Dense(a), y, loss=Intensity()), jax.random.key(0)))
    assert abs(vectors[:, -1] @ x0) == pytest.approx(np.linalg.norm(x0), rel=1e-9)


def test_a_real_signal_behind_a_complex_operator_gets_the_real_part_of_the_covariance(x64):
    a, _, y = _case(True)
    x0 = start("truncated", real=True)(Recovery(Dense(a), y, loss=Intensity()), jax.random.key(0))
    leading = np.linalg.eigh(np.real((a.conj().T * _weights("truncated", a, y)) @ a))[1][:, -1]
    assert not np.iscomplexobj(x0)
    assert abs(leading @ np.asarray(x0)) == pytest.approx(np.linalg.norm(x0), rel=1e-10)


def test_rows_of_zeros_change_no_start(x64):
    a, _, y = _case(False)
    padded, zeros = np.vstack([a, np.zeros((30, N))]), np.append(y, np.zeros(30))
    for name in ("orthogonality_promoting", "optimal"):
        x0, same = (
            start(name)(Recovery(Dense(rows), data, loss=Intensity()), jax.random.key(0))
            for rows, data in ((a, y), (padded, zeros))
        )
        np.testing.assert_allclose(same * jnp.sign(jnp.vdot(same, x0)), x0, rtol=1e-9, atol=1e-11)


def test_masks_of_unequal_size_are_divided_out(x64):
    """The start is D^{−1/2} v with v the leading eigenvector of D^{−1/2} A*(w A) D^{−1/2}, D the diagonal of A*A."""
    op = coded_diffraction(jax.random.key(0), (3, 3), 8, octanary=True)
    rng = np.random.default_rng(2)
    x = rng.standard_normal((3, 3)) + 1j * rng.standard_normal((3, 3))
    y = np.abs(np.asarray(op.mv(jnp.asarray(x)))) ** 2
    a = np.stack([np.ravel(op.mv(jnp.asarray(e.reshape(3, 3)))) for e in np.eye(9)], axis=1)
    d = np.sqrt(np.sum(np.abs(a) ** 2, axis=0))
    v = np.linalg.eigh((a / d).conj().T * y.ravel() @ (a / d))[1][:, -1] / d
    x0 = np.ravel(start("spectral")(Recovery(op, y, loss=Intensity()), jax.random.key(1)))
    assert abs(np.vdot(v, x0)) == pytest.approx(np.linalg.norm(v) * np.linalg.norm(x0), rel=1e-9)
    assert np.linalg.norm(a @ x0) ** 2 == pytest.approx(np.sum(y), rel=1e-9)


def test_octanary_masks_do_not_lock_the_start_on_a_pixel(x64):
    """On 64 × 64 pixels the eigenvector that is not whitened puts much of its mass on one of them."""
    op = coded_diffraction(jax.random.key(0), (64, 64), 8, octanary=True)
    x = jax.random.uniform(jax.random.key(1), (64, 64), minval=0.5)
    problem = Recovery(op, jnp.abs(op.mv(x)) ** 2, loss=Intensity())
    x0 = np.abs(np.asarray(start("truncated", steps=30)(problem, jax.random.key(2))))
    assert x0.max() < 6 * np.sqrt(np.mean(x0**2))


def test_the_random_start_has_the_norm_of_the_signal_on_average(x64):
    a, _, y = _case(False)
    problem = Recovery(Dense(a), y, loss=Intensity())
    keys = jax.random.split(jax.random.key(0), 2000)
    squares = jax.vmap(lambda key: jnp.sum(random()(problem, key) ** 2))(keys)
    size = np.mean(y) * M * N / np.sum(a**2)
    assert np.mean(squares) == pytest.approx(size, rel=4 * np.sqrt(2 / N / 2000))


def test_the_spectral_start_by_function_is_that_by_name(x64):
    a, _, y = _case(False)
    problem = Recovery(Dense(a), y, loss=Intensity())
    np.testing.assert_array_equal(spectral(problem, jax.random.key(0)), start("spectral")(problem, jax.random.key(0)))


def test_bad_input(x64):
    with pytest.raises(InputError, match="init: got 'spectrl'.*did you mean 'spectral'"):
        start("spectrl")
    with pytest.raises(InputError, match="alpha: got 0"):
        start("truncated", alpha=0.0)
    with pytest.raises(InputError, match="scale: got -1"):
        random(-1.0)
    problem = Recovery(Dense(np.eye(3)), np.ones(3), Vector())
    with pytest.raises(InputError, match="init: got a spectral start of linear measurements"):
        spectral(problem, jax.random.key(0))
