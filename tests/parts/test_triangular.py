"""Products with triangular matrices against NumPy's plain ones, in one panel and in several, the last one shorter."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fallline.parts import lie_groups
from fallline.parts.triangular import (
    _panels,
    times_upper,
    times_upper_transposed,
    upper_gram,
    upper_product,
    upper_times,
    upper_transposed_times,
)

N = pytest.mark.parametrize("n", [1, 7, 255, 256, 400])


def drawn(*shape):
    return np.random.default_rng(sum(shape)).standard_normal(shape)


def test_panels_cover_every_row_once():
    for n in (1, 255, 256, 300, 384, 385, 1000):
        rows = [r for i, j in _panels(n) for r in range(i, j)]
        assert rows == list(range(n)) and len(_panels(n)) <= 3
    assert len(_panels(255)) == 1 and len(_panels(256)) == 2 and len(_panels(400)) == 3


@N
def test_products_are_the_plain_ones(x64, n):
    g, q, x = np.triu(drawn(n, n)), np.triu(drawn(n, n + 1)[:, :n]), drawn(n, 3)
    expected = {
        "upper_times": q @ x,
        "upper_transposed_times": q.T @ x,
        "times_upper": x.T @ q,
        "times_upper_transposed": x.T @ q.T,
        "upper_product": g @ q,
        "upper_gram": np.triu(x @ x.T),
    }

    @jax.jit
    def all_of_them(g, q, x):
        return {
            "upper_times": upper_times(q, x),
            "upper_transposed_times": upper_transposed_times(q, x),
            "times_upper": times_upper(x.T, q),
            "times_upper_transposed": times_upper_transposed(x.T, q),
            "upper_product": upper_product(g, q),
            "upper_gram": upper_gram(x),
        }

    for name, got in all_of_them(g, q, x).items():
        np.testing.assert_allclose(got, expected[name], atol=1e-12, err_msg=name)


@N
def test_the_bound_of_a_symmetric_matrix_needs_its_upper_triangle_only(x64, n):
    a = drawn(n, 3)
    got = lie_groups._symmetric_spectral(jnp.asarray(np.triu(a @ a.T)))
    assert got == pytest.approx(float(lie_groups._spectral(jnp.asarray(a @ a.T))), rel=1e-12)
    norm = np.linalg.norm(a @ a.T, 2)
    assert norm / 2 <= got <= norm * (1 + 1e-12)
