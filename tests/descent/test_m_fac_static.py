"""The static inverse and the pruner against dense algebra in NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fallline as fl
from fallline.core import memory
from fallline.descent.m_fac_static import inverse_fisher, m_fac_prune, pruning_densities, surgeon

LAM = 1e-2


def dense_inverse(rows, lam, block=None):
    """F⁻¹ in float64, of its diagonal blocks alone."""
    rows = np.asarray(rows, np.float64)
    d = rows.shape[1]
    inverse = np.zeros((d, d))
    for at in range(0, d, block or d):
        part = slice(at, min(at + (block or d), d))
        g = rows[:, part]
        inverse[part, part] = np.linalg.inv(lam * np.eye(g.shape[1]) + g.T @ g / len(g))
    return inverse


# m below d, m above d; blocks that divide d or not, above m and below.
CASES = [(5, 23, None), (9, 6, None), (5, 24, 8), (5, 23, 9), (7, 23, 4), (5, 23, 1), (3, 10, 50)]


@pytest.mark.parametrize(("m", "d", "block"), CASES)
def test_products_elements_and_diagonal_are_those_of_the_dense_inverse(x64, m, d, block):
    draw = np.random.default_rng(0)
    rows, x = draw.normal(size=(m, d)), draw.normal(size=d)
    expected = dense_inverse(rows, LAM, block)

    @jax.jit
    def ask(rows, x):
        inverse = inverse_fisher(rows, LAM, block)
        elements = jax.vmap(lambda k: jax.vmap(lambda l: inverse.element(k, l))(jnp.arange(d)))(jnp.arange(d))
        return inverse.times(x), inverse.diagonal(), elements

    product, diagonal, elements = ask(rows, x)
    np.testing.assert_allclose(product, expected @ x, rtol=1e-11, atol=1e-11)
    np.testing.assert_allclose(diagonal, np.diag(expected), rtol=1e-11)
    np.testing.assert_allclose(elements, expected, rtol=1e-10, atol=1e-11)


def test_the_factors_are_the_vectors_of_the_paper(x64):
    """v_i = g_i/λ − Σ_{j<i} v_j ⟨v_j, g_i⟩/q_j and q_i = m + ⟨g_i, v_i⟩: v_i/√q_i is a row of V/√λ."""
    rows = np.random.default_rng(1).normal(size=(6, 15))
    v, q = np.zeros_like(rows), np.zeros(6)
    for i, g in enumerate(rows):
        v[i] = g / LAM - (v[:i] @ g / q[:i]) @ v[:i]
        q[i] = 6 + g @ v[i]
    factors = inverse_fisher(rows, LAM).factors[0]
    np.testing.assert_allclose(factors / np.sqrt(LAM), v / np.sqrt(q)[:, None], rtol=1e-11, atol=1e-12)


def test_in_float32_the_diagonal_never_falls_below_its_bound(x32):
    """A gradient of 30 along an axis and λ = 1e-6: (1 − Σ V²)/λ rounds to zero or below, [F⁻¹]_pp ≥ 1/F_pp does not."""
    rows = np.diag([30.0, 1.0, 2.0, 0.5]).astype(np.float32) @ np.eye(4, 12, dtype=np.float32)
    inverse = inverse_fisher(rows, 1e-6)
    naive = (1 - np.sum(np.asarray(inverse.factors[0]) ** 2, axis=0)) / 1e-6
    exact = 1 / (1e-6 + np.mean(rows.astype(np.float64) ** 2, axis=0))
    assert abs(naive[0] / exact[0] - 1) > 0.1
    np.testing.assert_allclose(inverse.diagonal()[0], exact[0], rtol=1e-5)
    np.testing.assert_allclose(inverse.element(0, 0), exact[0], rtol=1e-5)
    assert float(inverse.element(0, 1)) == 0.0


def test_one_weight_dropped_is_the_constrained_minimum_and_costs_its_saliency(x64):
    """With the loss (w − w₀)ᵀ F (w − w₀)/2: the others move to the minimum where that one is zero."""
    draw = np.random.default_rng(2)
    rows, start = draw.normal(size=(4, 9)), draw.normal(size=9)
    fisher = LAM * np.eye(9) + rows.T @ rows / 4
    w, left = surgeon(jnp.asarray(start), jnp.ones(9, bool), jnp.asarray(rows), 8, LAM, None)
    costs = []
    for p in range(9):
        rest = np.arange(9) != p
        best = np.zeros(9)
        best[rest] = np.linalg.solve(fisher[np.ix_(rest, rest)], fisher[rest] @ start)
        costs.append((0.5 * (best - start) @ fisher @ (best - start), best))
    p = int(np.argmin([cost for cost, _ in costs]))
    np.testing.assert_array_equal(left, np.arange(9) != p)
    np.testing.assert_allclose(w, costs[p][1], rtol=1e-11, atol=1e-12)
    saliency = start**2 / (2 * np.diag(np.linalg.inv(fisher)))
    np.testing.assert_allclose([cost for cost, _ in costs], saliency, rtol=1e-10)


def test_densities_fall_geometrically():
    np.testing.assert_allclose(pruning_densities(0.8, 0.1, 3), [0.4, 0.2, 0.1])
    np.testing.assert_allclose(pruning_densities(1.0, 0.04, 2), [0.2, 0.04])


ROWS, LABELS = np.random.default_rng(3).normal(size=(7, 4)), np.arange(7, dtype=np.int32) % 3


def gradients(params, j):
    """Per-example gradients of a linear layer, for rows that depend on j."""

    rows = jnp.asarray(ROWS, params["w"].dtype) * (1 + 0.1 * j)

    def loss(params, row, label):
        return -jax.nn.log_softmax(row @ params["w"] + params["b"])[label]

    return jax.vmap(jax.grad(loss), (None, 0, 0))(params, rows, LABELS)


def start():
    draw = np.random.default_rng(4)
    return {"w": jnp.asarray(draw.normal(size=(4, 3))), "b": jnp.asarray(draw.normal(size=3))}


def pruned_by_hand(params, left, kept, block):
    """The pruner on the 12 weights, with F of the weights that are left alone and inverted as it is."""
    w = np.where(left, np.ravel(params["w"]), 0)
    for j, keep in enumerate(kept):
        given = gradients({"w": jnp.asarray(w.reshape(4, 3)), "b": params["b"]}, jnp.int32(j))["w"].reshape(7, 12)
        at = np.flatnonzero(left)
        inverse = dense_inverse(np.asarray(given)[:, at], LAM, block)
        order = np.argsort(w[at] ** 2 / (2 * np.diag(inverse)))
        dropped = order[: len(at) - keep]
        target = np.zeros(len(at))
        target[dropped] = -w[at[dropped]] / np.diag(inverse)[dropped]
        w[at] += inverse @ target
        w[at[dropped]] = 0
        left = left.copy()
        left[at[dropped]] = False
    return w.reshape(4, 3), left.reshape(4, 3)


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({"sparsity": 0.5, "recomputations": 3}, [10, 8, 6]),
        ({"sparsity": 0.75, "recomputations": 2, "block": 5}, [6, 3]),
        ({"sparsity": 0.75, "recomputations": 2, "masked": True, "block": 8}, [5, 3]),
        ({"sparsity": 0.6, "recomputations": 1}, [5]),
    ],
)
def test_the_pruner_is_the_algorithm(x64, options, kept):
    options, params = dict(options), start()
    left = np.ones(12, bool)
    if options.pop("masked", False):
        left[[0, 2, 5, 11]] = False
        options["mask"] = {"w": left.reshape(4, 3), "b": np.ones(3, bool)}
    found = m_fac_prune(params, gradients, lam=LAM, **options)
    w, mask = pruned_by_hand(params, left, kept, options.get("block"))
    np.testing.assert_allclose(found.params["w"], w, rtol=1e-9, atol=1e-12)
    np.testing.assert_array_equal(found.mask["w"], mask)
    np.testing.assert_array_equal(found.params["b"], params["b"])  # biases are not pruned
    assert found.mask["b"].all() and found.sparsity == 1 - kept[-1] / 12
    assert jax.tree.structure(found.params) == jax.tree.structure(params)


def test_it_runs_inside_vmap_and_what_is_pruned_can_be_chosen(x64):
    prune = functools.partial(m_fac_prune, gradients=gradients, sparsity=0.5, recomputations=2, lam=LAM)
    both = jax.tree.map(lambda a: jnp.stack([a, 2 * a]), start())
    together = jax.vmap(lambda params: prune(params).params)(both)
    alone = prune(jax.tree.map(lambda a: a[1], both)).params
    np.testing.assert_allclose(together["w"][1], alone["w"], rtol=1e-9, atol=1e-12)
    biases = prune(start(), sparsity=0.4, prunable={"w": False, "b": True})
    assert int(np.sum(np.asarray(biases.params["b"]) == 0)) == 1  # ⌊0.4 · 3⌋
    np.testing.assert_array_equal(biases.params["w"], start()["w"])


def test_nan_is_handed_on(x32):
    params = jax.tree.map(lambda a: a.astype(jnp.float32), start())
    found = m_fac_prune(params, lambda x, j: jax.tree.map(lambda g: g * jnp.nan, gradients(x, j)), 0.5)
    np.testing.assert_array_equal(np.isnan(found.params["w"]), found.mask["w"])
    assert int(np.sum(found.mask["w"])) == 6


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"lam": 0.0}, "lam: got 0.0"),
        ({"block": 0}, "block: got 0"),
        ({"gradients": np.ones(3)}, "gradients: got"),
        ({"gradients": np.ones((0, 3))}, "gradients: got"),
        ({"gradients": np.ones((2, 3), np.int32)}, "gradients: got int32"),
    ],
)
def test_bad_input_of_the_inverse(options, words):
    with pytest.raises(fl.InputError, match=words):
        inverse_fisher(**{"gradients": np.ones((2, 3), np.float32), **options})


def test_bad_queries():
    inverse = inverse_fisher(np.ones((2, 3), np.float32), 0.1)
    for call, words in (
        (lambda: inverse.times(jnp.ones(4)), "x: got"),
        (lambda: inverse.element(3, 0), "k: got 3"),
        (lambda: inverse.element(0, -1), "l: got -1"),
    ):
        with pytest.raises(fl.InputError, match=words):
            call()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"sparsity": 1.0}, "sparsity: got 1.0"),
        ({"sparsity": -0.1}, "sparsity: got -0.1"),
        ({"sparsity": 0.2, "mask": {"w": np.arange(12).reshape(4, 3) < 6, "b": np.ones(3, bool)}}, "sparsity: got 0.2"),
        ({"recomputations": 0}, "recomputations: got 0"),
        ({"lam": -1.0}, "lam: got -1.0"),
        ({"block": 0}, "block: got 0"),
        ({"mask": {"w": np.ones((4, 3), bool)}}, "mask: got"),
        ({"mask": {"w": np.zeros((4, 3), bool), "b": np.ones(3, bool)}}, "mask: got no weight"),
        ({"prunable": {"w": False, "b": False}}, "prunable: got"),
        ({"params": {"w": np.ones((4, 3), np.int32), "b": np.ones(3, np.float32)}}, "params: got int32"),
        ({"gradients": lambda params, j: params}, "gradients: got"),
    ],
)
def test_bad_input_of_the_pruner(x32, options, words):
    params = jax.tree.map(lambda a: a.astype(jnp.float32), start())
    with pytest.raises(fl.InputError, match=words):
        m_fac_prune(**{"params": params, "gradients": gradients, "sparsity": 0.5, **options})


def test_more_gradients_than_memory_are_refused_before_they_are_made(x32, monkeypatch):
    params = jax.tree.map(lambda a: a.astype(jnp.float32), start())
    monkeypatch.setattr(memory, "memory_size", lambda: 1e3)
    with pytest.raises(fl.InputError, match=r"gradients: got \[7,12\], which takes 1.2 kB"):
        m_fac_prune(params, gradients, 0.5)
    with pytest.raises(fl.InputError, match=r"gradients: got \[9,30\]"):
        inverse_fisher(np.ones((9, 30), np.float32))
