"""SCAD and MCP against the integrals, grids and convexity that define them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fallline import InputError
from fallline.parts.folded_concave import MCP, SCAD

LAM, WEIGHT = 0.7, 1.3
PENALTIES = {"SCAD": SCAD(LAM, 3.5, WEIGHT), "MCP": MCP(LAM, 2.5, WEIGHT)}
GRID = np.linspace(-4, 4, 1601)


def scad_slope(t):
    """Fan and Li's p′ for t ≥ 0, which defines the penalty."""
    return WEIGHT * np.where(t <= LAM, LAM, np.maximum(3.5 * LAM - t, 0) / 2.5)


def mcp_slope(t):
    return WEIGHT * np.maximum(LAM - t / 2.5, 0)


SLOPES = {"SCAD": scad_slope, "MCP": mcp_slope}


@pytest.fixture(params=PENALTIES)
def name(request):
    return request.param


def test_the_penalty_is_the_integral_of_its_slope(x64, name):
    t = np.linspace(0, 4, 400_001)
    middle = (t[1:] + t[:-1]) / 2
    integral = np.concatenate([[0], np.cumsum(SLOPES[name](middle)) * t[1]])[:: 400_000 // 800]
    expected = np.concatenate([integral[:0:-1], integral])
    penalty = PENALTIES[name]
    np.testing.assert_allclose(penalty.penalty(jnp.asarray(GRID)), expected, atol=1e-9)
    assert float(penalty.value(jnp.asarray(GRID))) == pytest.approx(expected.sum(), rel=1e-9)


def test_the_gradient_is_the_slope_and_what_autodiff_gives(x64, name):
    penalty, x = PENALTIES[name], jnp.asarray(GRID[np.abs(GRID) > 1e-9])
    expected = np.sign(x) * SLOPES[name](np.abs(np.asarray(x)))
    np.testing.assert_allclose(penalty.gradient(x), expected, atol=1e-12)
    np.testing.assert_allclose(jax.grad(penalty.value)(x), expected, atol=1e-12)
    assert float(penalty.gradient(jnp.zeros(()))) == 0


def test_the_weak_convexity_is_the_least_that_makes_it_convex(x64, name):
    penalty, mu = PENALTIES[name], float(PENALTIES[name].weak_convexity)
    values = np.asarray(penalty.penalty(jnp.asarray(GRID)))

    def least(mu):
        return np.diff(values + mu / 2 * GRID**2, 2).min()

    assert least(mu) > -1e-12 and least(0.99 * mu) < -1e-8


@pytest.mark.parametrize("part", [0.1, 0.5, 0.95])
def test_the_proximal_map_is_the_minimizer_on_a_grid(x64, name, part):
    penalty = PENALTIES[name]
    step = part / float(penalty.weak_convexity)
    v = np.linspace(-4, 4, 81)
    fine = np.linspace(-4.5, 4.5, 90_001)
    values = np.asarray(penalty.penalty(jnp.asarray(fine)))
    expected = [fine[np.argmin(values + (fine - a) ** 2 / (2 * step))] for a in v]
    np.testing.assert_allclose(penalty(jnp.asarray(v), step), expected, atol=2e-4 + 1e-5 / (1 - part))


def test_a_step_without_a_single_answer_is_refused_and_gives_nan_where_it_is_traced(x64, name):
    penalty = PENALTIES[name]
    limit = 1 / float(penalty.weak_convexity)
    with pytest.raises(InputError, match="^step: got .*; expected below .* not strongly convex"):
        penalty(jnp.ones(2), 1.001 * limit)
    with pytest.raises(InputError, match="^step"):
        penalty(jnp.ones(2), 0.0)
    traced = jax.jit(lambda step: penalty(jnp.ones(2), step))
    assert np.all(np.isnan(traced(1.001 * limit))) and np.all(np.isnan(traced(-1.0)))
    assert np.all(np.isfinite(traced(0.999 * limit)))


def test_points_are_trees_of_any_width_and_nan_stays(name):
    penalty = PENALTIES[name]
    v = {"a": jnp.asarray([5.0, 0.1, jnp.nan], jnp.bfloat16), "b": jnp.float32(-0.2)}
    out = penalty(v, 0.5)
    assert out["a"].dtype == jnp.bfloat16 and out["b"].dtype == jnp.float32
    # 0.5 · 1.3 · 0.7 = 0.455 shrinks the small ones to 0; 5 is beyond γλ.
    assert float(out["a"][0]) == 5 and float(out["a"][1]) == 0 and np.isnan(float(out["a"][2])) and out["b"] == 0
    assert np.isnan(float(penalty.value(v))) and np.isnan(float(penalty.gradient(v)["a"][2]))
    assert penalty.value(v).dtype == jnp.float32 and penalty.gradient(v)["a"].dtype == jnp.bfloat16


@pytest.mark.parametrize(
    ("make", "argument"),
    [
        (lambda: SCAD(0.0), "lam"),
        (lambda: SCAD(0.1, 2.0), "gamma"),
        (lambda: SCAD(0.1, np.inf), "gamma"),
        (lambda: SCAD(0.1, 3.0, -1.0), "weight"),
        (lambda: MCP(-1.0), "lam"),
        (lambda: MCP(0.1, 1.0), "gamma"),
        (lambda: SCAD(0.1).value(jnp.zeros(2, jnp.complex64)), "x"),
        (lambda: MCP(0.1)(jnp.zeros(2, jnp.complex64), 0.1), "x"),
    ],
)
def test_bad_input_is_refused(make, argument):
    with pytest.raises(InputError, match=f"^{argument}: got"):
        make()
