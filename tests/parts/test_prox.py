"""Proximal maps against their definition: an argmin, with the function written in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fallline import InputError
from fallline.parts.prox import L1, Ball, Box, GroupL2, Simplex, Zero

CENTER = np.array([0.5, -1.0, 0.25, 2.0, 0.0, 1.0])


def inside(flag):
    return 0.0 if flag else np.inf


FUNCTIONS = {
    "zero": (Zero(), lambda x: 0.0),
    "l1": (L1(0.7), lambda x: 0.7 * np.abs(x).sum()),
    "rows of a vector": (GroupL2(0.7), lambda x: 0.7 * np.abs(x).sum()),
    "leaf": (GroupL2(0.7, "leaf"), lambda x: 0.7 * np.sqrt((x**2).sum())),
    "box": (Box(-0.5, 0.75), lambda x: inside((x >= -0.5).all() and (x <= 0.75).all())),
    "half line": (Box(low=0.0), lambda x: inside((x >= 0).all())),
    "ball": (Ball(1.5), lambda x: inside((x**2).sum() <= 1.5**2 * (1 + 1e-12))),
    "moved ball": (Ball(0.5, CENTER), lambda x: inside(((x - CENTER) ** 2).sum() <= 0.25 * (1 + 1e-12))),
    "simplex": (Simplex(), lambda x: inside((x >= 0).all() and abs(x.sum() - 1) < 1e-12)),
}


def feasible_neighbours(name, u, draw):
    """Points around u that the function allows."""
    for scale in (1.0, 0.1, 1e-3):
        for _ in range(60):
            w = u + scale * draw.normal(size=u.size) * (draw.random(u.size) < 0.5)
            if name == "box":
                w = np.clip(w, -0.5, 0.75)
            elif name == "half line":
                w = np.maximum(w, 0)
            elif name == "ball":
                w = w * min(1, 1.5 / np.linalg.norm(w))
            elif name == "moved ball":
                w = CENTER + (w - CENTER) * min(1, 0.5 / np.linalg.norm(w - CENTER))
            elif name == "simplex":
                w = np.maximum(w, 0) / max(np.maximum(w, 0).sum(), 1e-9)
                if w.sum() == 0:
                    continue
            yield w


@pytest.mark.parametrize("name", FUNCTIONS)
def test_no_neighbour_is_better(name, x64):
    h, value = FUNCTIONS[name]
    draw = np.random.default_rng(0)
    for step in (0.3, 2.0):
        v = draw.normal(size=6)
        u = np.asarray(h(jnp.asarray(v), step))

        def objective(w, v=v, step=step):
            return value(w) + ((w - v) ** 2).sum() / (2 * step)

        best = objective(u)
        assert np.isfinite(best)
        # The objective grows by ‖w − u‖²/(2 step) at least around its minimizer.
        for w in feasible_neighbours(name, u, draw):
            assert objective(w) >= best + ((w - u) ** 2).sum() / (2 * step) - 1e-9
        np.testing.assert_allclose(h.value(jnp.asarray(u)), value(u), rtol=1e-12)


def test_what_is_inside_stays_and_what_is_outside_is_infinite(x64):
    v = jnp.array([0.2, 0.3, 0.5])
    for h in (Box(0.0, 1.0), Ball(1.0), Ball(1.0, np.zeros(3)), Simplex()):
        np.testing.assert_allclose(h(v, 1.0), v, rtol=0, atol=1e-15)
        assert float(h.value(v)) == 0.0
        assert float(h.value(v + 2)) == np.inf
        assert np.isnan(float(h.value(v.at[1].set(jnp.nan))))


def test_groups_of_a_matrix():
    v = jnp.array([[3.0, 4.0], [0.3, 0.4]])
    np.testing.assert_allclose(GroupL2(1.0)(v, 1.0), [[2.4, 3.2], [0.0, 0.0]], rtol=1e-6)
    np.testing.assert_allclose(GroupL2(1.0).value(v), 5.5, rtol=1e-6)
    whole = np.sqrt(25.25)
    np.testing.assert_allclose(GroupL2(1.0, "leaf")(v, 1.0), v * (1 - 1 / whole), rtol=1e-6)
    np.testing.assert_allclose(GroupL2(1.0, "leaf").value(v), whole, rtol=1e-6)
    tensor = jnp.ones((2, 3, 4))
    np.testing.assert_allclose(GroupL2(0.5).value(tensor), 0.5 * 2 * np.sqrt(12), rtol=1e-6)
    np.testing.assert_array_equal(GroupL2(1.0)(jnp.zeros((2, 2)), 0.0), jnp.zeros((2, 2)))


def test_leaves_are_one_vector_for_balls_and_the_simplex(x64):
    vector = np.array([3.0, -4.0, 12.0, 0.5])
    tree = {"a": jnp.asarray(vector[:2]), "b": jnp.asarray(vector[2:])}
    for h in (Ball(1.0), Simplex(), L1(0.3), Box(-1.0, 1.0)):
        moved = h(tree, 0.5)
        np.testing.assert_allclose(np.concatenate([moved["a"], moved["b"]]), h(jnp.asarray(vector), 0.5), rtol=1e-12)


def test_bounds_and_centers_with_the_structure_of_the_points():
    tree = {"a": jnp.array([3.0, -3.0]), "b": jnp.array(5.0)}
    clipped = Box({"a": np.array([-1.0, -2.0]), "b": 0.0}, {"a": 1.0, "b": 2.0})(tree, 1.0)
    np.testing.assert_array_equal(clipped["a"], [1.0, -2.0])
    assert float(clipped["b"]) == 2.0
    assert Ball(1.0, tree)(tree, 1.0)["b"] == 5.0
    for h in (Box({"a": 0.0}, 1.0), Ball(1.0, {"b": jnp.zeros(2)})):
        with pytest.raises(InputError, match=r"(low|center): got the structure"):
            h(tree, 1.0)


@pytest.mark.parametrize("h", [value[0] for value in FUNCTIONS.values()], ids=list(FUNCTIONS))
def test_nan_stays_and_dtypes_are_kept(h):
    v = jnp.array([0.5, jnp.nan, 0.1, 0.0, 0.0, 0.3])
    assert np.isnan(np.asarray(h(v, 1.0))[1])
    half = jnp.asarray([0.5, -0.25, 0.1, 0.0, 0.0, 0.3], jnp.bfloat16)
    moved = h(half, jnp.float32(0.1))
    assert moved.dtype == jnp.bfloat16
    np.testing.assert_allclose(
        moved.astype(jnp.float32), h(half.astype(jnp.float32), jnp.float32(0.1)), atol=2**-8, rtol=2**-8
    )
    empty = h(None, 1.0) if not isinstance(h, Ball) or h.center is None else None
    assert empty is None
    value = jax.jit(type(h).value)(h, half)
    assert value.dtype == jnp.float32


def test_moduli_of_complex_entries():
    np.testing.assert_allclose(L1(1.0)(jnp.array([3 + 4j, 0.3j]), 1.0), [2.4 + 3.2j, 0.0], rtol=1e-6)
    for h in (Box(0.0, 1.0), Simplex()):
        with pytest.raises(InputError, match="v: got complex entries"):
            h(jnp.array([1j]), 1.0)


def test_a_step_without_weight_is_no_step():
    v = jnp.array([0.0, 2.0, -1.0])
    for h in (L1(0.0), GroupL2(0.0)):
        np.testing.assert_array_equal(h(v, 1.0), v)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: L1(-1.0), "weight: got -1.0"),
        (lambda: L1(float("nan")), "weight: got nan"),
        (lambda: GroupL2(-1.0), "weight: got -1.0"),
        (lambda: GroupL2(1.0, "column"), "group: got 'column'"),  # type: ignore[arg-type]
        (lambda: Box(1.0, 0.0), "low: got 1.0"),
        (lambda: Box(np.array([0.0, 2.0]), 1.0), "low: got"),
        (lambda: Box(0.0, {"a": 1.0, "b": -1.0}), "low: got 0.0"),
        (lambda: Box(float("nan"), 1.0), "low: got"),
        (lambda: Box(0.0, np.array([1.0, np.nan])), "high: got"),
        (lambda: Ball(0.0), "radius: got 0.0"),
        (lambda: Ball(1.0, np.array([np.nan])), "center: got"),
    ],
)
def test_bad_input(make, words):
    with pytest.raises(InputError, match=words):
        make()
