"""Products, probes, Hutchinson and Lanczos quadrature against dense algebra, enumeration and closed forms."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate
import scipy.linalg
from jax.flatten_util import ravel_pytree

import fallline as fl
import fallline.core.memory
from fallline.parts.curvature import (
    Quadrature,
    gradient_and_hvp,
    hessian,
    hutchinson,
    lanczos_quadrature,
    per_example_hvp,
    per_example_squared_norms,
    probe,
)

LAWS = ["rademacher", "normal", "sphere"]


def symmetric(eigenvalues, seed=0):
    n = len(eigenvalues)
    q = np.linalg.qr(np.random.default_rng(seed).normal(size=(n, n)))[0]
    return (q * eigenvalues) @ q.T


# ---- products ------------------------------------------------------------------------------------

ROWS = 5


def example_losses(x, batch):
    """Of one hidden layer; the last leaf is a scalar."""
    hidden = jnp.tanh(batch["features"] @ x["w"] + x["b"])
    return (jnp.sum(hidden**3, axis=1) * x["s"] - batch["target"]) ** 2


def mean_loss(x, batch, scale):
    return scale * jnp.mean(example_losses(x, batch))


def network():
    rng = np.random.default_rng(3)
    x = {"w": rng.normal(size=(3, 2)), "b": rng.normal(size=2), "s": np.float64(0.7)}
    vector = jax.tree.map(lambda a: rng.normal(size=np.shape(a)), x)
    batch = {"features": rng.normal(size=(ROWS, 3)), "target": rng.normal(size=ROWS)}
    return jax.tree.map(jnp.asarray, (x, vector, batch))


def dense_hessian(fn, x):
    flat, back = ravel_pytree(x)
    return jax.hessian(lambda a: fn(back(a)))(flat)


def flat(tree):
    return np.concatenate([np.ravel(a) for a in jax.tree.leaves(tree)])


@pytest.mark.usefixtures("x64")
def test_gradient_and_hvp_and_hessian_are_the_dense_ones():
    x, vector, batch = network()

    @jax.jit
    def both(x, vector, batch):
        dense = dense_hessian(lambda x: mean_loss(x, batch, 3.0), x)
        linear = hessian(mean_loss, x, batch, 3.0)
        plain = jax.value_and_grad(mean_loss)(x, batch, 3.0)
        return gradient_and_hvp(mean_loss, x, vector, batch, 3.0), linear(vector), linear(x), plain, dense

    (value, gradient, product), once, twice, plain, dense = both(x, vector, batch)
    assert jax.tree.structure(product) == jax.tree.structure(gradient) == jax.tree.structure(x)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-12), (value, gradient), plain)
    for v, got in ((vector, product), (vector, once), (x, twice)):
        np.testing.assert_allclose(flat(got), dense @ flat(v), rtol=1e-11, atol=1e-13)


def test_a_quadratic_has_its_own_matrix(dtype):
    rng = np.random.default_rng(0)
    a = symmetric(np.linspace(-2, 5, 6)).astype(dtype)
    x, v, c = rng.normal(size=(3, 6)).astype(dtype)

    def quadratic(x, c):
        return 0.5 * x @ a @ x + c @ x

    got = jax.jit(lambda x, v, c: (*gradient_and_hvp(quadratic, x, v, c), hessian(quadratic, x, c)(v)))(x, v, c)
    tolerance = 100 * float(np.finfo(dtype).eps)
    for found, expected in zip(got, (0.5 * x @ a @ x + c @ x, a @ x + c, a @ v, a @ v), strict=True):
        assert found.dtype == dtype
        np.testing.assert_allclose(found, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.usefixtures("x64")
def test_per_example_products_are_those_of_a_loop():
    x, vector, batch = network()
    stacked = jax.jit(functools.partial(per_example_hvp, example_losses))(x, batch, vector)
    assert jax.tree.map(jnp.shape, stacked) == jax.tree.map(lambda a: (ROWS, *a.shape), x)
    dense = jax.jit(lambda x, row: dense_hessian(lambda x: example_losses(x, row)[0], x))
    for i in range(ROWS):
        row, got = jax.tree.map(lambda a, i=i: np.asarray(a)[i : i + 1], (batch, stacked))
        np.testing.assert_allclose(flat(got), dense(x, row) @ flat(vector), rtol=1e-10, atol=1e-12)


def test_per_example_squared_norms(dtype):
    rng = np.random.default_rng(0)
    stacked = {"a": rng.normal(size=(4, 3, 2)).astype(dtype), "b": rng.normal(size=4).astype(dtype)}
    got = per_example_squared_norms(jax.tree.map(jnp.asarray, stacked))
    assert got.shape == (4,) and got.dtype == dtype
    expected = (stacked["a"] ** 2).sum((1, 2)) + stacked["b"] ** 2
    np.testing.assert_allclose(got, expected, rtol=8 * np.finfo(dtype).eps)


@pytest.mark.usefixtures("x32")
def test_squared_norms_of_narrow_and_complex_numbers_are_summed_wide():
    # In bfloat16 the sum of ones ends at 256, and 1.0078125² = 1.01568… is not representable.
    stacked = jnp.full((2, 1000), 1.0078125, jnp.bfloat16)
    got = per_example_squared_norms([stacked, jnp.ones((2, 1), jnp.bfloat16)])
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, 1000 * 1.0078125**2 + 1, rtol=1e-6)
    np.testing.assert_allclose(per_example_squared_norms(jnp.array([[3 + 4j, 1j], [0, 2]])), [26, 4], rtol=1e-6)
    assert np.isnan(per_example_squared_norms(jnp.array([[1.0], [jnp.nan]]))).tolist() == [False, True]


# ---- probes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.usefixtures("x64")
def test_probes_have_unit_second_moment(law):
    like, draws = {"a": jnp.zeros((2, 2)), "b": jnp.zeros(()), "c": jnp.zeros(1)}, 4000
    n = 6
    drawn = jax.jit(jax.vmap(lambda key: ravel_pytree(probe(key, like, law))[0]))(
        jax.random.split(jax.random.key(1), draws)
    )
    # Variances of vᵢ² and of vᵢvⱼ, i ≠ j; uniform on the sphere: E vᵢ⁴ = 3n/(n+2), E vᵢ²vⱼ² = n/(n+2).
    square, cross = {"rademacher": (0, 1), "normal": (2, 1), "sphere": (3 * n / (n + 2) - 1, n / (n + 2))}[law]
    variance = np.where(np.eye(n, dtype=bool), square, cross)
    deviation = np.abs(drawn.T @ drawn / draws - np.eye(n))
    assert np.all(deviation <= 4 * np.sqrt(variance / draws) + 1e-12)
    assert np.all(np.abs(np.mean(drawn, axis=0)) <= 4 / np.sqrt(draws))
    norms = np.linalg.norm(drawn, axis=1)
    if law == "normal":
        assert np.std(norms**2) == pytest.approx(np.sqrt(2 * n), rel=0.15)
    else:
        np.testing.assert_allclose(norms, np.sqrt(n), rtol=1e-14)
    if law == "rademacher":
        assert set(np.unique(drawn)) == {-1.0, 1.0}


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.usefixtures("x64")
def test_probes_keep_shapes_and_dtypes(law):
    like = {"a": jnp.zeros((50, 2), jnp.bfloat16), "b": (jnp.zeros(3, jnp.float32), jnp.zeros((), jnp.float64))}
    draw = jax.jit(lambda key: probe(key, like, law))
    v, again, other = (draw(jax.random.key(seed)) for seed in (0, 0, 1))
    assert jax.tree.map(lambda a: (a.shape, a.dtype), v) == jax.tree.map(lambda a: (a.shape, a.dtype), like)
    assert np.array_equal(flat(v), flat(again)) and not np.array_equal(v["a"], other["a"])
    # Leaves are independent, and so are rows.
    assert not np.array_equal(v["a"][:3, 0], v["b"][0]) and not np.array_equal(v["a"][:, 0], v["a"][:, 1])
    if law != "normal":
        assert np.sum(flat(v).astype(float) ** 2) == pytest.approx(104, rel=2.0**-8)  # the rounding of bfloat16


# ---- Hutchinson ----------------------------------------------------------------------------------

KNOWN = symmetric(np.array([-2.0, 0.5, 1, 3, 7, 7.5]), seed=5)


@functools.partial(jax.jit, static_argnames=("probes", "law"))
def moments(matrix, key, probes, law="rademacher"):
    like = {"a": jnp.zeros((2, 2), matrix.dtype), "b": jnp.zeros(2, matrix.dtype)}
    back = ravel_pytree(like)[1]
    return hutchinson(lambda v: back(matrix @ ravel_pytree(v)[0]), like, key, probes, law)


@pytest.mark.usefixtures("x64")
def test_hutchinson_and_its_error_against_all_signs():
    probes, a = 4000, KNOWN
    signs = np.array(list(itertools.product([-1.0, 1.0], repeat=6)))
    forms, squares = np.einsum("si,ij,sj->s", signs, a, signs), np.sum((signs @ a) ** 2, axis=1)
    got = moments(jnp.asarray(a), jax.random.key(0), probes)
    closed = 2 * (np.sum(a**2) - np.sum(np.diag(a) ** 2))
    assert np.var(forms) == pytest.approx(closed, rel=1e-12)
    for estimate, truth, samples in ((got.trace, np.trace(a), forms), (got.squared_frobenius, np.sum(a**2), squares)):
        assert np.mean(samples) == pytest.approx(truth, rel=1e-12)
        centered = samples - truth
        variance, fourth = np.mean(centered**2), np.mean(centered**4)
        assert abs(estimate.value - truth) <= 4 * np.sqrt(variance / probes)
        # The sample variance's own standard deviation is √((m₄ − σ⁴)/probes), to first order.
        assert abs(estimate.error**2 * probes - variance) <= 4 * np.sqrt((fourth - variance**2) / probes)


@pytest.mark.parametrize("law", ["normal", "sphere"])
@pytest.mark.usefixtures("x64")
def test_variances_of_the_other_laws(law):
    probes, n = 20_000, 6
    got = moments(jnp.asarray(KNOWN), jax.random.key(2), probes, law)
    frobenius, trace = np.sum(KNOWN**2), np.trace(KNOWN)
    variance = 2 * frobenius if law == "normal" else 2 * n / (n + 2) * (frobenius - trace**2 / n)
    assert abs(got.trace.value - trace) <= 4 * np.sqrt(variance / probes)
    assert got.trace.error**2 * probes == pytest.approx(variance, rel=0.1)
    assert abs(got.squared_frobenius.value - frobenius) <= 4 * got.squared_frobenius.error


@pytest.mark.usefixtures("x64")
def test_laws_that_know_some_traces_exactly():
    diagonal = moments(jnp.diag(jnp.arange(6.0)), jax.random.key(0), 3)
    assert diagonal.trace == (15, 0) and diagonal.squared_frobenius == (55, 0)
    identity = moments(jnp.eye(6), jax.random.key(0), 3, "sphere")
    assert identity.trace.value == pytest.approx(6, rel=1e-14) and identity.trace.error < 1e-14


def test_one_probe_has_no_error(dtype):
    got = moments(jnp.asarray(KNOWN, dtype), jax.random.key(0), 1)
    assert got.trace.value.dtype == got.trace.error.dtype == dtype
    assert np.isfinite(got.trace.value) and np.isnan(got.trace.error)
    assert np.isfinite(got.squared_frobenius.value) and np.isnan(got.squared_frobenius.error)


# ---- Lanczos quadrature --------------------------------------------------------------------------

N = 14
EIGENVALUES = np.array([-3.0, -1, -0.5, 0, 0.1, 0.2, 0.3, 1, 1.5, 2, 3, 4, 5, 6])
MATRIX = symmetric(EIGENVALUES, seed=1)
LIKE = {"a": np.zeros((2, 3)), "b": np.zeros(N - 7), "c": np.zeros(())}


@functools.partial(jax.jit, static_argnames=("steps", "probes", "law"))
def quadrature(matrix, key, steps, probes=1, law="rademacher"):
    like = jax.tree.map(lambda a: jnp.asarray(a, matrix.dtype), LIKE) if len(matrix) == N else matrix[0]
    back = ravel_pytree(like)[1]
    found = lanczos_quadrature(lambda v: back(matrix @ ravel_pytree(v)[0]), like, key, steps, probes, law)
    flat = [a.ravel() for a in jax.tree.leaves(like)]
    starts = jax.vmap(lambda key: ravel_pytree(probe(key, flat, law))[0])(jax.random.split(key, probes))
    # The dimension is a Python number, which jit would make an array of.
    return found[:3], starts / jnp.linalg.norm(starts, axis=1, keepdims=True)


def run(matrix, steps, probes=1, law="rademacher", seed=0):
    """The quadrature of a matrix, and the unit vectors that it starts from."""
    found, starts = quadrature(jnp.asarray(matrix), jax.random.key(seed), steps, probes, law)
    return Quadrature(*map(np.asarray, found), len(matrix)), np.asarray(starts)


def measure(matrix, start, fn):
    """vᵀ fn(A) v by dense eigenvectors."""
    values, vectors = np.linalg.eigh(matrix)
    return (vectors.T @ start) ** 2 @ fn(values)


@pytest.mark.usefixtures("x64")
def test_polynomials_of_degree_2k_less_1_are_exact_for_each_probe():
    k, probes = 4, 3
    found, starts = run(MATRIX, k, probes, "normal")
    assert found.nodes.shape == found.weights.shape == found.residuals.shape == (probes, k)
    assert np.all(np.diff(found.nodes) > 0) and np.all(found.weights > 0)
    for nodes, weights, start in zip(found.nodes, found.weights, starts, strict=True):
        for degree in range(2 * k):
            expected = measure(MATRIX, start, lambda t, degree=degree: t**degree)
            assert weights @ nodes**degree == pytest.approx(expected, rel=1e-11, abs=1e-12)
        # One degree more is below by ∏ βⱼ², which the quadrature cannot know.
        assert weights @ nodes ** (2 * k) < measure(MATRIX, start, lambda t: t ** (2 * k)) * (1 - 1e-4)


@pytest.mark.usefixtures("x64")
def test_ritz_values_and_residuals_are_those_of_the_projected_matrix():
    k = 4
    found, (start, *_) = run(MATRIX, k, 3, "normal")
    powers = [start]
    for _ in range(k - 1):
        powers.append(MATRIX @ powers[-1])
    basis = scipy.linalg.qr(np.array(powers).T, mode="economic")[0]
    values, vectors = np.linalg.eigh(basis.T @ MATRIX @ basis)
    ritz = basis @ vectors
    np.testing.assert_allclose(found.nodes[0], values, rtol=1e-9)
    np.testing.assert_allclose(found.weights[0], (start @ ritz) ** 2, rtol=1e-8)
    residuals = np.linalg.norm(MATRIX @ ritz - ritz * values, axis=0)
    np.testing.assert_allclose(found.residuals[0], residuals, rtol=1e-8)
    # Some eigenvalue is as near as the residual.
    assert np.all(np.min(np.abs(EIGENVALUES - found.nodes[..., None]), axis=2) <= found.residuals)


@pytest.mark.usefixtures("x64")
def test_the_ends_of_the_spectrum():
    found, _ = run(MATRIX, 8, 3)
    for (value, residual), truth, sign, gap in ((found.largest, 6, 1, 0.5), (found.smallest, -3, -1, 1)):
        assert sign * value <= sign * truth + 1e-12
        # Quadratic in the residual, over the gap to the rest of the spectrum.
        assert abs(value - truth) <= residual**2 / gap + 1e-12
    ends = found.nodes
    assert found.largest[0] == ends.max() and found.smallest[0] == ends.min()
    # With different probes the ends differ, so that the best was chosen, with its own residual.
    best, worst = np.argmax(ends[:, -1]), np.argmin(ends[:, 0])
    assert len(set(ends[:, -1])) == 3
    assert found.largest[1] == found.residuals[best, -1] and found.smallest[1] == found.residuals[worst, 0]


@pytest.mark.usefixtures("x64")
def test_all_steps_give_the_whole_spectrum():
    found, (start,) = run(MATRIX, N)
    np.testing.assert_allclose(found.nodes[0], EIGENVALUES, atol=1e-11)
    vectors = np.linalg.eigh(MATRIX)[1]
    np.testing.assert_allclose(found.weights[0], (vectors.T @ start) ** 2, atol=1e-11)
    assert np.all(found.residuals < 1e-10)


@pytest.mark.parametrize(
    "eigenvalues",
    [[0.0] * N, [3.0] * N, [-4.0, 7] + [0.0] * (N - 2), [2.0] * 5 + [5.0] * (N - 5)],
    ids=["zero", "identity", "rank 2", "two eigenvalues"],
)
def test_an_exhausted_krylov_space_is_exact(eigenvalues, dtype):
    matrix = symmetric(np.array(eigenvalues))
    found, starts = run(matrix.astype(dtype), 8, 3)
    eps, size = float(np.finfo(dtype).eps), np.max(np.abs(eigenvalues))
    nodes, weights = np.asarray(found.nodes, float), np.asarray(found.weights, float)
    assert found.nodes.dtype == found.weights.dtype == found.residuals.dtype == dtype
    np.testing.assert_allclose(weights.sum(1), 1, atol=20 * eps)
    assert nodes.min() >= min(eigenvalues) - 20 * eps * size and nodes.max() <= max(eigenvalues) + 20 * eps * size
    assert np.all(found.residuals <= 50 * eps * size)
    for row, each, start in zip(nodes, weights, starts, strict=True):
        # Any function, not only polynomials: the measure itself.
        for value in set(eigenvalues):
            near = lambda t, value=value: np.abs(t - value) <= 1e-3  # noqa: E731
            assert each @ near(row) == pytest.approx(measure(matrix, start, near), abs=50 * eps)


OUTLIERS = 1e6 * np.array([0.1, 0.2, 0.35, 0.6, 1])


@pytest.mark.usefixtures("x32")
def test_no_ghosts_in_single_precision():
    # Five isolated eigenvalues over a bulk in [1, 10]: condition 1e6, and k far beyond the five's convergence.
    n, k = 300, 60
    diagonal = np.concatenate([np.linspace(1, 10, n - 5), OUTLIERS]).astype(np.float32)
    like = jnp.zeros(n, jnp.float32)
    quadrature = jax.jit(lambda d, key: lanczos_quadrature(lambda v: d * v, like, key, k, 2)[:3])
    found = quadrature(diagonal, jax.random.key(0))
    for nodes, weights, residuals in zip(*map(np.asarray, found), strict=True):
        above = nodes > 1e3
        np.testing.assert_allclose(nodes[above], OUTLIERS, rtol=1e-6)  # each once
        # Rademacher: every eigenvector has weight 1/n.
        np.testing.assert_allclose(weights[above], 1 / n, rtol=1e-3)
        assert np.all(weights >= 0) and np.sum(weights, dtype=float) == pytest.approx(1, abs=1e-5)
        # Backward stable: rounding is relative to the norm, 1e6.
        assert nodes.min() > 0 and nodes[~above].max() < 11
        assert np.all(residuals[above] < 1)
    # Without reorthogonalization the largest appears again, so that this test can fail.
    assert np.sum(plain_lanczos(diagonal, k) > 1e3) > 5


def plain_lanczos(diagonal, k):
    """The three-term recurrence alone, in NumPy and single precision."""
    q = np.ones_like(diagonal) / np.sqrt(np.float32(len(diagonal)))
    before, beta, alphas, betas = np.zeros_like(q), np.float32(0), [], []
    for _ in range(k):
        w = diagonal * q - beta * before
        alphas.append(q @ w)
        w = w - alphas[-1] * q
        beta = np.linalg.norm(w)
        betas.append(beta)
        before, q = q, w / beta
    return scipy.linalg.eigvalsh_tridiagonal(np.array(alphas, float), np.array(betas[:-1], float))


@pytest.mark.usefixtures("x64")
def test_integrals_of_functions():
    found, starts = run(MATRIX, 8, 40, "sphere")
    exponential = found.integral(jnp.exp)
    truth = np.sum(np.exp(EIGENVALUES))
    assert abs(exponential.value - truth) <= 4 * exponential.error
    each = np.array([N * measure(MATRIX, start, np.exp) for start in starts])
    assert exponential.value == pytest.approx(np.mean(each), rel=1e-5)
    assert exponential.error == pytest.approx(np.std(each, ddof=1) / np.sqrt(40), rel=1e-4)
    assert found.integral(jnp.ones_like).value == pytest.approx(N, rel=1e-13)
    alone = Quadrature(*(a[:1] for a in found[:3]), N)
    assert np.isfinite(alone.integral(jnp.exp).value) and np.isnan(alone.integral(jnp.exp).error)


@pytest.mark.usefixtures("x64")
def test_the_density_is_a_mean_of_gaussians():
    found, _ = run(MATRIX, 8, 3)
    grid, width = np.linspace(-10, 13, 2001), 0.5
    density, error = found.density(jnp.asarray(grid), width)
    assert density.shape == error.shape == grid.shape
    assert scipy.integrate.trapezoid(density, grid) == pytest.approx(1, abs=1e-10)
    # Its mean is the mean Rayleigh quotient, its variance that of the measure and width² more.
    nodes, weights = np.asarray(found.nodes), np.asarray(found.weights) / 3
    mean, square = np.sum(weights * nodes), np.sum(weights * nodes**2)
    assert scipy.integrate.trapezoid(density * grid, grid) == pytest.approx(mean, abs=1e-9)
    assert scipy.integrate.trapezoid(density * grid**2, grid) == pytest.approx(square + width**2, abs=1e-8)
    each = np.array([Quadrature(*(a[i : i + 1] for a in found[:3]), N).density(grid, width)[0] for i in range(3)])
    np.testing.assert_allclose(density, each.mean(0), rtol=1e-12)
    np.testing.assert_allclose(error, each.std(0, ddof=1) / np.sqrt(3), rtol=1e-9, atol=1e-15)
    for bad in (0.0, -1.0, np.nan):
        with pytest.raises(fl.InputError, match="width"):
            found.density(jnp.asarray(grid), bad)


@pytest.mark.usefixtures("x64")
def test_under_vmap_as_alone():
    # The first goes on for all steps, the other's Krylov space is exhausted at once: each has its own conditions.
    matrices = np.stack([MATRIX, 3 * np.eye(N)])
    keys = jax.random.split(jax.random.key(3), 2)
    together = jax.jit(jax.vmap(lambda a, key: quadrature(a, key, 8, 3)[0]))(matrices, keys)
    for i in range(2):
        for got, expected in zip(together, quadrature(jnp.asarray(matrices[i]), keys[i], 8, 3)[0], strict=True):
            np.testing.assert_allclose(got[i], expected, atol=1e-12)


@pytest.mark.usefixtures("x32")
def test_narrow_parameters_are_held_wide():
    like = {"a": jnp.zeros((4, 2), jnp.bfloat16), "b": jnp.zeros(4, jnp.bfloat16)}
    scales = {"a": jnp.arange(1.0, 9).reshape(4, 2), "b": jnp.arange(9.0, 13)}

    def product(v):
        assert jax.tree.map(lambda a: a.dtype, v) == jax.tree.map(lambda a: a.dtype, like)
        return jax.tree.map(lambda a, s: (a * s).astype(a.dtype), v, scales)

    found = jax.jit(lambda key: lanczos_quadrature(product, like, key, 12)[:3])(jax.random.key(0))
    assert all(a.dtype == jnp.float32 for a in found)
    np.testing.assert_allclose(found[0][0], np.arange(1, 13), atol=0.15)  # eps·‖A‖ of bfloat16 is 0.09


@pytest.mark.usefixtures("x64")
def test_nan_stays():
    product = MATRIX.copy()
    product[2, 2] = np.nan
    found, _ = run(product, 8, 3)
    assert np.all(np.isnan(found.nodes)) and np.isnan(found.largest[0]) and np.isnan(found.integral(jnp.exp).value)


# ---- bad input -----------------------------------------------------------------------------------


def unreachable(v):
    raise AssertionError("the product was asked")


@pytest.mark.parametrize(
    "argument, bad",
    [
        ("steps", {"steps": 0}),
        ("steps", {"steps": 2.5}),
        ("steps", {"steps": N + 1}),
        ("probes", {"steps": 3, "probes": 0}),
        ("probes", {"steps": 3, "probes": "three"}),
        ("law", {"steps": 3, "law": "gaussian"}),
    ],
)
def test_bad_input_of_the_quadrature(argument, bad):
    with pytest.raises(fl.InputError) as raised:
        lanczos_quadrature(unreachable, jnp.zeros(N), jax.random.key(0), **bad)
    assert raised.value.argument == argument


def test_a_basis_larger_than_memory_is_refused(monkeypatch):
    monkeypatch.setattr(fallline.core.memory, "memory_size", lambda: 4.0 * 5 * N - 1)
    with pytest.raises(fl.InputError, match="steps: got 5, which takes 280 bytes"):
        lanczos_quadrature(unreachable, jnp.zeros(N, jnp.float32), jax.random.key(0), 5)
    # 4.0 is a whole number.
    four = lanczos_quadrature(lambda v: v, jnp.zeros(N, jnp.float32), jax.random.key(0), 4.0)
    assert four.dimension == N and four.nodes.shape == (1, 4)


@pytest.mark.parametrize("argument, bad", [("probes", {"probes": 0}), ("law", {"probes": 1, "law": "rademacker"})])
def test_bad_input_of_hutchinson_and_probe(argument, bad):
    with pytest.raises(fl.InputError) as raised:
        hutchinson(unreachable, jnp.zeros(3), jax.random.key(0), **bad)
    assert raised.value.argument == argument
    with pytest.raises(fl.InputError, match="did you mean 'sphere'"):
        probe(jax.random.key(0), jnp.zeros(3), "spheres")
