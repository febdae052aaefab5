"""Lie groups of preconditioners: dense references, finite differences of the criterion, equivariance, limits of P."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fallline as fl
from fallline.core import memory
from fallline.parts.lie_groups import Dense, Diagonal, Kronecker, LowRank, SparseLU, scan, scaw

N, SHAPE = 8, (4, 2)
RNG = np.random.default_rng(0)
V, HV = RNG.normal(size=(2, N))
KEY = jax.random.key(0)

GROUPS = {
    "dense": (Dense(), (N,)),
    "diagonal": (Diagonal(), (N,)),
    "low rank": (LowRank(2), (N,)),
    "sparse": (SparseLU(3), (N,)),
    "kronecker": (Kronecker(), SHAPE),
    "kronecker, diagonal": (Kronecker("diagonal", "diagonal"), SHAPE),
    "kronecker, both normalize": (Kronecker("normalize", "normalize"), SHAPE),
    "scan": (scan(), SHAPE),
    "scaw": (scaw(), SHAPE),
}
EACH = pytest.mark.parametrize("name", GROUPS)


def somewhere(name, steps=5):
    """A fit inside the group, after some steps on pairs that have nothing to do with each other."""
    group, shape = GROUPS[name]
    fit = group.init(shape, 0.7, jnp.float64, jax.random.key(1))
    for i in range(steps):
        v, h = jax.random.normal(jax.random.key(10 + i), (2, *shape))
        fit = group.update(fit, v, h, 0.3, "second", jax.random.key(i))
    return group, shape, fit


def matrix(group, shape, fit):
    """Q on arrays as vectors, row after row."""
    columns = jax.vmap(lambda e: group.times(fit, e.reshape(shape)).ravel())(jnp.eye(N))
    return np.asarray(columns).T


def criterion(q):
    return np.sum((q @ HV) ** 2) + np.sum(np.linalg.solve(q.T, V) ** 2)


@EACH
def test_p_is_q_transposed_q_and_q_starts_as_a_multiple_of_one(x64, name):
    group, shape, fit = somewhere(name)
    q = matrix(group, shape, fit)
    g = RNG.normal(size=shape)
    np.testing.assert_allclose(group.precondition(fit, jnp.asarray(g)).ravel(), q.T @ q @ g.ravel(), rtol=1e-10)
    if name != "low rank":  # whose U and V begin at random
        start = matrix(group, shape, group.init(shape, 0.7, jnp.float64, KEY))
        np.testing.assert_allclose(start, 0.7 * np.eye(N), atol=1e-12)
    np.testing.assert_allclose(matrix(group, shape, group.rescaled(fit, 3.0)), 3 * q, rtol=1e-12)


@EACH
def test_small_steps_lower_the_criterion(x64, name):
    """To first order by a positive multiple of the squared projected gradient, whatever is moved."""
    group, shape, fit = somewhere(name)
    before = criterion(matrix(group, shape, fit))
    falls = []
    for step in (1e-4, 5e-5):
        after = group.update(fit, jnp.asarray(V.reshape(shape)), jnp.asarray(HV.reshape(shape)), step, "first", KEY)
        falls.append(before - criterion(matrix(group, shape, after)))
    assert falls[1] > 0
    np.testing.assert_allclose(falls[0] / falls[1], 2, rtol=2e-2)


def relative(group, shape, fit, step=1e-6):
    """(Q' − Q) Q⁻¹ / step, the direction of a step from the left, and Q⁻¹ (Q' − Q) / step from the right."""
    q = matrix(group, shape, fit)
    after = group.update(fit, jnp.asarray(V.reshape(shape)), jnp.asarray(HV.reshape(shape)), step, "first", KEY)
    change = (matrix(group, shape, after) - q) / step
    return change @ np.linalg.inv(q)


def slope(q):
    """The derivative of the criterion of (I + E)Q along E, by finite differences."""
    found, eps = np.zeros((N, N)), 1e-6
    for i in range(N):
        for j in range(N):
            e = np.zeros((N, N))
            e[i, j] = eps
            found[i, j] = (criterion(q + e @ q) - criterion(q - e @ q)) / (2 * eps)
    return found


@pytest.mark.parametrize(("name", "algebra"), [("dense", np.triu), ("diagonal", lambda a: np.diag(np.diag(a)))])
def test_the_step_is_along_the_projected_gradient_of_the_criterion(x64, name, algebra):
    group, shape, fit = somewhere(name)
    expected = algebra(slope(matrix(group, shape, fit)))
    found = relative(group, shape, fit)
    np.testing.assert_allclose(found / np.linalg.norm(found), -expected / np.linalg.norm(expected), atol=1e-4)


@pytest.mark.parametrize("name", ["kronecker", "scan", "scaw", "kronecker, both normalize"])
def test_each_side_s_step_is_along_its_gradient(x64, name):
    """The criterion of (E ⊗ I) and (I ⊗ E) on the left and right sides, projected on the side's algebra."""
    group, shape, fit = somewhere(name)
    q = matrix(group, shape, fit)
    full = slope(q).reshape(*shape, *shape)
    v, h = jnp.asarray(V.reshape(shape)), jnp.asarray(HV.reshape(shape))
    after = group.update(fit, v, h, 1e-6, "first", KEY)
    gradients = np.einsum("iajb->ij", full * np.eye(shape[1])[None, :, None, :]), np.einsum(
        "iaib->ab", full
    )  # fmt: skip
    for side, gradient, a, b in zip((group.left, group.right), gradients, fit, after, strict=True):
        dense_a, dense_b = as_matrix(side, a), as_matrix(side, b)
        # Balancing multiplies a side by a number.
        change = dense_b @ np.linalg.inv(dense_a)
        expected = project(side, gradient)
        n = len(change)
        change = change - np.eye(n) * np.trace(change) / n
        expected = expected - np.eye(n) * np.trace(expected) / n
        np.testing.assert_allclose(change / np.linalg.norm(change), -expected / np.linalg.norm(expected), atol=1e-3)


def as_matrix(side, q):
    q = np.asarray(q)
    if side == "dense":
        return q
    return np.diag(q) if side == "diagonal" else np.diag(q[0]) + np.outer(q[1], np.eye(q.shape[1])[-1])


def project(side, gradient):
    if side == "dense":
        return np.triu(gradient)
    diagonal = np.diag(np.diag(gradient))
    if side == "diagonal":
        return diagonal
    last = np.zeros_like(gradient)
    last[:-1, -1] = gradient[:-1, -1]
    return diagonal + last


@pytest.mark.parametrize("side", [0, 1, 2])
def test_the_factors_of_sparse_lu_and_low_rank_move_along_their_own_gradients(x64, side):
    """L from the left, U and d from the right: each in its pattern, by automatic differentiation of the criterion."""
    name = "low rank" if side == 2 else "sparse"
    group, shape, fit = somewhere(name)

    def value(factors):
        q = jax.vmap(lambda e: group.times(tuple(factors), e))(jnp.eye(N)).T
        return jnp.sum((q @ HV) ** 2) + jnp.sum(jnp.linalg.solve(q.T, jnp.asarray(V)) ** 2)

    gradient = jax.grad(value)(list(fit))
    after = group.update(fit, jnp.asarray(V), jnp.asarray(HV), 1e-6, "first", KEY)
    change = [np.asarray(b - a) for a, b in zip(fit, after, strict=True)]
    if side == 2:
        d = np.asarray(fit[2])
        expected, found = np.asarray(gradient[2]) * d, change[2] / d
    elif side == 0:  # ∂c/∂E = (∂c/∂l₃) l₃ for l₃ ← (1 + e) l₃, but that the rows of L₂ move along
        l1, l2, l3 = (np.asarray(a) for a in fit[:3])
        expected = np.asarray(gradient[2]) * l3 + np.sum(np.asarray(gradient[1]) * l2, axis=1)
        found = change[2] / l3
    else:
        u2, u3 = (np.asarray(a) for a in fit[4:])
        expected = np.asarray(gradient[5]) * u3 + np.sum(np.asarray(gradient[4]) * u2, axis=0)
        found = change[5] / u3
    np.testing.assert_allclose(found / np.linalg.norm(found), -expected / np.linalg.norm(expected), atol=1e-4)


@pytest.mark.parametrize("normalizer", ["max", "first", "second"])
def test_the_fit_does_not_depend_on_the_coordinates(x64, normalizer):
    """With B lower triangular, (Q B^{-T}, B⁻¹v, Bᵀh) goes to Q' B^{-T}."""
    group, shape, fit = somewhere("dense")
    b = np.tril(RNG.normal(size=(N, N))) + 3 * np.eye(N)
    inverse = np.linalg.inv(b)
    moved = (fit[0] @ inverse.T,)
    plain = group.update(fit, jnp.asarray(V), jnp.asarray(HV), 0.3, normalizer, KEY)
    other = group.update(moved, jnp.asarray(inverse @ V), jnp.asarray(b.T @ HV), 0.3, normalizer, KEY)
    np.testing.assert_allclose(other[0], plain[0] @ inverse.T, rtol=1e-9, atol=1e-12)


def test_the_fit_of_matrices_does_not_depend_on_their_coordinates(x64):
    """B_l and B_r lower triangular: P in the new coordinates is that of the old ones."""
    group, shape, fit = somewhere("kronecker")
    bl, br = (np.tril(RNG.normal(size=(k, k))) + 3 * np.eye(k) for k in shape)
    il, ir = np.linalg.inv(bl), np.linalg.inv(br)
    moved = (fit[0] @ il.T, fit[1] @ ir.T)
    v, h = V.reshape(shape), HV.reshape(shape)
    plain = group.update(fit, jnp.asarray(v), jnp.asarray(h), 0.3, "second", KEY)
    other = group.update(moved, jnp.asarray(il @ v @ ir.T), jnp.asarray(bl.T @ h @ br), 0.3, "second", KEY)
    g = RNG.normal(size=shape)
    expected = il @ np.asarray(group.precondition(plain, jnp.asarray(g))) @ ir.T
    np.testing.assert_allclose(group.precondition(other, jnp.asarray(bl.T @ g @ br)), expected, rtol=1e-9)


def fitted(group, h, steps, step, shape=None, normalizer="second"):
    """P after pairs (v, Hv)."""
    n = len(h)
    shape = (n,) if shape is None else shape

    def one(t, fit):
        key = jax.random.fold_in(KEY, t)
        v = jax.random.normal(key, shape)
        return group.update(fit, v, (h @ v.ravel()).reshape(shape), step, normalizer, key)

    fit = jax.jit(lambda fit: jax.lax.fori_loop(0, steps, one, fit))(group.init(shape, 1.0, jnp.float64, KEY))
    return np.asarray(jax.vmap(lambda e: group.precondition(fit, e.reshape(shape)).ravel())(jnp.eye(n)))


def turned(n, values, seed):
    q = np.linalg.qr(np.random.default_rng(seed).normal(size=(n, n)))[0]
    return (q * values) @ q.T


def off(found, expected):
    return np.linalg.norm(found - expected) / np.linalg.norm(expected)


@pytest.mark.parametrize(
    ("group", "h", "shape", "step"),
    [
        (Dense(), turned(6, np.linspace(1, 5, 6), 1), None, 0.5),
        (Diagonal(), np.diag(np.logspace(-1, 1, 6)), None, 0.5),
        (SparseLU(2), np.diag(np.linspace(1, 5, 6)), None, 0.1),
        (LowRank(2), np.eye(6) + turned(6, np.array([4.0, 2, 0, 0, 0, 0]), 2), None, 0.5),
        (Kronecker(), np.kron(turned(3, np.array([1.0, 2, 3]), 3), turned(2, np.array([1.0, 3]), 4)), (3, 2), 0.5),
        (scaw(), np.kron(turned(3, np.array([1.0, 2, 3]), 3), np.diag([1.0, 3])), (3, 2), 0.5),
        (Kronecker("diagonal", "diagonal"), np.kron(np.diag([1.0, 2, 3]), np.diag([1.0, 3])), (3, 2), 0.5),
    ],
)
def test_p_tends_to_the_inverse_where_the_group_has_it(x64, group, h, shape, step):
    assert off(fitted(group, h, 4000, step, shape), np.linalg.inv(h)) < 2e-2


def test_scan_finds_the_inverse_of_what_normalizes(x64):
    """H⁻¹ = QᵀQ with Q of the group itself."""
    q = np.diag([1.0, 2.0, 0.5]) + np.outer([0.7, -0.4, 0], [0, 0, 1])
    inverse = np.kron(q.T @ q, np.diag([1.0, 3.0]))
    assert off(fitted(scan(), np.linalg.inv(inverse), 4000, 0.5, (3, 2)), inverse) < 1e-3


def test_an_indefinite_hessian_gives_the_inverse_of_its_modulus(x64):
    h, modulus = (turned(6, v, 5) for v in (np.array([-3.0, -1, 1, 2, 3, 4]), np.array([3.0, 1, 1, 2, 3, 4])))
    found = np.mean([fitted(Dense(), h, steps, 0.1) for steps in (3000, 3300, 3600, 4000)], axis=0)
    assert off(found, np.linalg.inv(modulus)) < 0.1


def test_the_diagonal_s_sign_steps(x64):
    q, v, h = np.array([0.5, 2.0, 1.0]), np.array([1.0, -1, 2]), np.array([3.0, 1, -2])
    fit = (jnp.asarray(q),)
    after = Diagonal(sign=True).update(fit, jnp.asarray(v), jnp.asarray(h), 0.1, "max", KEY)
    np.testing.assert_allclose(after[0], q - 0.1 * np.sign(np.abs(q * h) - np.abs(v / q)) * q)


def test_max_stays_at_a_distance_and_second_does_not(x64):
    h = turned(6, np.linspace(1, 5, 6), 1)
    ends = {name: off(fitted(Dense(), h, 4000, 0.1, normalizer=name), np.linalg.inv(h)) for name in ("max", "second")}
    assert ends["max"] > 1e-2 and ends["second"] < 1e-3


def test_the_sides_are_balanced(x64):
    group, _, fit = somewhere("kronecker")
    lopsided = (1e6 * fit[0], 1e-6 * fit[1])
    v, h = jnp.asarray(V.reshape(SHAPE)), jnp.asarray(HV.reshape(SHAPE))
    left, right = group.update(lopsided, v, h, 0.1, "first", KEY)
    np.testing.assert_allclose(np.max(np.diag(left)), np.max(np.diag(right)), rtol=1e-9)


@pytest.mark.parametrize("name", ["dense", "kronecker", "sparse", "diagonal"])
@pytest.mark.parametrize("normalizer", ["max", "first", "second"])
def test_diagonals_stay_positive_with_large_steps(x64, name, normalizer):
    """μ = 0.99 and pairs of any size."""
    group, shape = GROUPS[name]
    fit = group.init(shape, 1.0, jnp.float64, KEY)
    for i in range(10):
        v, h = jax.random.normal(jax.random.key(i), (2, *shape)) * 10.0 ** (i % 4 - 2)
        fit = group.update(fit, v, h, 0.99, normalizer, KEY)
        assert np.linalg.matrix_rank(matrix(group, shape, fit), tol=1e-300) == N
        for factor in fit[:1]:
            assert np.min(np.diag(factor) if factor.ndim == 2 else factor) > 0


@EACH
def test_nan_is_not_hidden(x64, name):
    group, shape, fit = somewhere(name, steps=1)
    after = group.update(fit, jnp.asarray(V.reshape(shape)), jnp.full(shape, jnp.nan), 0.1, "second", KEY)
    assert np.isnan(np.asarray(group.precondition(after, jnp.ones(shape)))).any()


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: LowRank(0), "rank: got 0"),
        (lambda: SparseLU(2.5), "rank: got 2.5"),
        (lambda: LowRank(9).check((8,), jnp.float32), "rank: got 9; expected at most the 8"),
        (lambda: Dense().check((2, 3), jnp.float32), "group: got Dense"),
        (lambda: Kronecker().check((3,), jnp.float32), "group: got Kronecker"),
        (lambda: Kronecker("lower"), "left: got 'lower'"),
        (lambda: Kronecker(right="x"), "right: got 'x'"),
        (lambda: scan().check((1, 3), jnp.float32), "group: got a normalizing side of length 1"),
    ],
)
def test_bad_input(make, said):
    with pytest.raises(fl.InputError, match=said):
        make()


def test_a_dense_group_larger_than_memory_is_refused_beforehand(monkeypatch):
    monkeypatch.setattr(memory, "memory_size", lambda: 1e6)
    with pytest.raises(fl.InputError, match="Dense.* on 1000 numbers, which takes 4 MB"):
        Dense().check((1000,), jnp.float32)
    with pytest.raises(fl.InputError, match="dense side of length 1000, which takes 4 MB"):
        Kronecker("diagonal", "dense").check((1_000_000, 1000), jnp.float32)
