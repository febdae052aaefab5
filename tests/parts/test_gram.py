"""The window against dense algebra, at every update, and against the recursion that the paper publishes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fallline.parts import gram

M, D, LAM = 6, 21, 1e-2


def fisher(rows, lam):
    """λ I + (1/m) Gᵀ G in float64."""
    rows = np.asarray(rows, np.float64)
    return lam * np.eye(rows.shape[1]) + rows.T @ rows / len(rows)


def published(rows, lam, x):
    """The paper's dynamic algorithm: D by LU without pivots, B by its recursion, then F⁻¹ x; in the dtype of `rows`."""
    m, dtype = len(rows), rows.dtype
    lu = (dtype.type(m) * np.eye(m, dtype=dtype) + rows @ rows.T / dtype.type(lam)).astype(dtype)
    for k in range(m):
        lu[k + 1 :, k] /= lu[k, k]
        lu[k + 1 :, k + 1 :] -= np.outer(lu[k + 1 :, k], lu[k, k + 1 :])
    D = np.triu(lu - dtype.type(m) * np.eye(m, dtype=dtype))
    q = dtype.type(m) + np.diag(D)
    B = np.eye(m, dtype=dtype) / dtype.type(lam)
    for i in range(1, m):
        B[i, :i] = -(D[:i, i] / q[:i]) @ B[:i, :i]
    c = rows @ x / dtype.type(lam)
    for i in range(1, m):
        c[i:] -= D[i - 1, i:] * (c[i - 1] / q[i - 1])
    return x / dtype.type(lam) - ((c / q) @ B) @ rows, D, B


def relative(a, b):
    return np.linalg.norm(np.asarray(a, np.float64) - b) / np.linalg.norm(b)


def test_the_published_recursion_is_what_its_symbols_say():
    """D_ij = g_iᵀ F_{i−1}⁻¹ g_j for j ≥ i, and v_i = Σ B_ik g_k = F_{i−1}⁻¹ g_i, where F_i holds i gradients."""
    rows = np.random.default_rng(0).normal(size=(M, D))
    _, d, b = published(rows, LAM, rows[0])
    for i in range(M):
        before = np.linalg.inv(LAM * np.eye(D) + rows[:i].T @ rows[:i] / M)
        np.testing.assert_allclose(d[i, i:], rows[i] @ before @ rows[i:].T, rtol=1e-11)
        np.testing.assert_allclose(b[i, : i + 1] @ rows[: i + 1], before @ rows[i], rtol=1e-9, atol=1e-11)


def test_every_update_is_exact_also_with_zero_rows_and_around_the_ring(x64):
    draw = np.random.default_rng(1)
    vectors, x, c = draw.normal(size=(2 * M + 3, D)), draw.normal(size=D), draw.normal(size=M)
    update = jax.jit(
        lambda window, g: (
            new := gram.write(window, g),
            gram.inverse_of_newest(new, LAM),
            gram.inverse_of_vector(new, LAM, x),
            gram.inverse_of_combination(new, LAM, c),
        )
    )
    window, rows = gram.start_window(M, D, jnp.float64), np.zeros((M, D))
    for t, g in enumerate(vectors):
        rows[t % M] = g
        window, newest, product, combination = update(window, g)
        dense = fisher(rows, LAM)
        assert relative(newest, np.linalg.solve(dense, g)) < 1e-12
        assert relative(product, np.linalg.solve(dense, x)) < 1e-12
        assert relative(combination, np.linalg.solve(dense, rows.T @ c)) < 1e-12
        assert relative(product, published(rows, LAM, x)[0]) < 1e-11
        np.testing.assert_array_equal(window.rows, rows)
        np.testing.assert_allclose(window.gram, rows @ rows.T, rtol=1e-13, atol=1e-13)
        assert int(window.slot) == (t + 1) % M


def test_in_float32_the_newest_vector_keeps_its_accuracy_where_other_forms_lose_it(x32):
    """|g|² ≈ 200, λ = 1e-5: (x − …)/λ and the published recursion lose 10 % and more, m Gᵀ M⁻¹ e at most 1e-5."""
    m, d, lam = 16, 200, 1e-5
    rows = np.random.default_rng(2).normal(size=(m, d)).astype(np.float32)
    window = gram.start_window(m, d, jnp.float32)
    for g in rows:
        window = gram.write(window, g)
    exact = m * np.linalg.solve(m * lam * np.eye(m) + (r := rows.astype(np.float64)) @ r.T, np.eye(m)[-1]) @ r
    assert relative(exact, np.linalg.solve(fisher(rows, lam), r[-1])) < 1e-7
    assert relative(gram.inverse_of_newest(window, lam), exact) < 1e-5
    assert relative(gram.inverse_of_vector(window, lam, jnp.asarray(rows[-1])), exact) > 0.1
    assert relative(published(rows, lam, rows[-1])[0], exact) > 0.1


def test_the_factor_is_that_of_cholesky_where_there_is_one(x64):
    rows = np.random.default_rng(3).normal(size=(5, 9))
    k = rows @ rows.T
    np.testing.assert_allclose(gram.damped_cholesky(k, 0.3), np.linalg.cholesky(k + 0.3 * np.eye(5)), rtol=1e-13)


def test_parallel_rows_that_rounding_cannot_tell_apart_are_damped_more(x32):
    """All rows equal, λ far below ε |g|²: no Cholesky factor exists, and u = m g/(m λ + m |g|²) comes out roughly."""
    m, g = 16, np.random.default_rng(4).normal(size=300).astype(np.float32)
    window = gram.start_window(m, g.size, jnp.float32)
    for _ in range(m):
        window = gram.write(window, g)
    assert np.isnan(np.linalg.norm(jnp.linalg.cholesky(window.gram + 1e-12 * jnp.eye(m))))
    lower = np.asarray(gram.damped_cholesky(window.gram, 1e-12), np.float64)
    added = np.diag(lower @ lower.T - np.asarray(window.gram, np.float64))
    assert np.all(added > 0) and np.all(added < 1e-3 * float(jnp.trace(window.gram)))
    assert relative(gram.inverse_of_newest(window, 1e-12 / m), g / (g @ g)) < 0.1


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_stays_so(x32, value):
    window = gram.write(gram.start_window(3, 5, jnp.float32), jnp.ones(5))
    window = gram.write(window, jnp.ones(5).at[2].set(value))
    assert not np.isfinite(gram.inverse_of_newest(window, 0.1)).any()
    assert np.isnan(gram.damped_cholesky(window.gram, 0.1)[-1, -1])


def test_a_donated_window_is_never_copied(x32):
    def update(window, g):
        window = gram.write(window, g)
        return window, gram.inverse_of_newest(window, 0.1)

    window = jax.eval_shape(lambda: gram.start_window(8, 1000, jnp.float32))
    text = jax.jit(update, donate_argnums=0).lower(window, jax.ShapeDtypeStruct((1000,), jnp.float32)).compile()
    lines = text.as_text().splitlines()
    assert not [line for line in lines if "f32[8,1000]" in line and " copy(" in line]
    # The rows that come in are the rows that go out.
    assert "input_output_alias" in lines[0] and "{0}: (0, {}, " in lines[0]
