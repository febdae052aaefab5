"""Mirror maps against ψ written in NumPy: derivatives by differences, steps by their optimality."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize

from fallline import InputError
from fallline.parts.mirror import Entropy, Euclidean, PNorm, UniformlyConvex
from fallline.parts.prox import L1, Ball, Box, GroupL2, Simplex, Zero


def of_norm(p):
    q = p / (p - 1)
    return lambda x: 2 ** (q - 2) * np.linalg.norm(x) ** q / q


MAPS = {
    "euclidean": (Euclidean(), lambda x: (x**2).sum() / 2),
    "entropy": (Entropy(), lambda x: (x * np.log(x) - x).sum()),
    "p = 1.3": (PNorm(1.3), lambda x: np.linalg.norm(x, 1.3) ** 2 / 0.6),
    "p = 2": (PNorm(2.0), lambda x: (x**2).sum() / 2),
    "moment 1.5": (UniformlyConvex(1.5), of_norm(1.5)),
    "moment 2": (UniformlyConvex(2.0), of_norm(2.0)),
}


def point(name, seed):
    x = np.random.default_rng(seed).normal(size=5)
    return np.exp(x) / np.exp(x).sum() if name == "entropy" else x


def slope(fn, x):
    eye = 1e-6 * np.eye(x.size)
    return np.array([(fn(x + e) - fn(x - e)) / 2e-6 for e in eye])


@pytest.mark.parametrize("name", MAPS)
def test_value_gradient_inverse_and_divergence(name, x64):
    psi, value = MAPS[name]
    x, y = (jnp.asarray(point(name, seed)) for seed in (0, 1))
    np.testing.assert_allclose(psi.value(x), value(np.asarray(x)), rtol=1e-12)
    np.testing.assert_allclose(psi.gradient(x), slope(value, np.asarray(x)), rtol=1e-6, atol=1e-8)
    np.testing.assert_allclose(psi.inverse(psi.gradient(x)), x, rtol=1e-12)
    w = 1.5 * x  # off the simplex too
    by_hand = value(np.asarray(w)) - value(np.asarray(y)) - slope(value, np.asarray(y)) @ np.asarray(w - y)
    np.testing.assert_allclose(psi.divergence(w, y), by_hand, rtol=1e-6)
    # Two leaves are one vector.
    tree = [x[:2], x[2:].reshape(3, 1)]
    np.testing.assert_allclose(psi.value(tree), psi.value(x), rtol=1e-12)
    np.testing.assert_allclose(psi.gradient(tree)[1][:, 0], psi.gradient(x)[2:], rtol=1e-12)
    np.testing.assert_allclose(psi.inverse(psi.gradient(tree))[0], x[:2], rtol=1e-12)


def test_how_convex_they_are(x64):
    """The inequalities that the theorems ask of ψ, and places where they are tight."""
    norms = {
        "euclidean": lambda d: np.linalg.norm(d) ** 2 / 2,
        "entropy": lambda d: np.abs(d).sum() ** 2 / 2,
        "p = 1.3": lambda d: np.linalg.norm(d, 1.3) ** 2 / 2,
        "moment 1.5": lambda d: np.linalg.norm(d) ** 3 / 3,
    }
    for name, bound in norms.items():
        psi = MAPS[name][0]
        x, y = (np.array([point(name, s) for s in range(start, start + 300)]) for start in (0, 1000))
        ratios = jax.vmap(psi.divergence)(x, y) / np.array([bound(d) for d in x - y])
        assert np.min(ratios) >= 1 - 1e-9, name
    x = jnp.array([0.7, -0.2])
    # ⟨∇ψ(x) − ∇ψ(y), x − y⟩ ≥ ‖x − y‖^q, with equality at y = −x.
    psi = UniformlyConvex(1.5)
    np.testing.assert_allclose(2 * psi.gradient(x) @ (2 * x), np.linalg.norm(2 * x) ** 3, rtol=1e-12)
    moved = jnp.array([0.5 + 1e-4, 0.5 - 1e-4]), jnp.array([0.5, 0.5])
    np.testing.assert_allclose(Entropy().divergence(*moved), (2e-4) ** 2 / 2, rtol=1e-6)


STEPS = {
    "euclidean, box": (Euclidean(), Box(-0.3, 0.4)),
    "euclidean, group": (Euclidean(), GroupL2(0.4, "leaf")),
    "p-norm": (PNorm(1.3), Zero()),
    "p-norm, l1": (PNorm(1.3), L1(0.4)),
    "moment": (UniformlyConvex(1.5), Zero()),
    "moment, l1": (UniformlyConvex(1.5), L1(0.4)),
    "moment, group": (UniformlyConvex(1.5), GroupL2(0.4, "leaf")),
    "moment, ball": (UniformlyConvex(1.5), Ball(0.6)),
    "entropy": (Entropy(), Zero()),
    "entropy, simplex": (Entropy(), Simplex()),
}


@pytest.mark.parametrize("name", STEPS)
def test_the_composite_step_is_the_argmin(name, x64):
    psi, h = STEPS[name]
    kind = name.split(",", maxsplit=1)[0]
    value = {**MAPS, "p-norm": MAPS["p = 1.3"], "moment": MAPS["moment 1.5"]}[kind][1]
    draw = np.random.default_rng(3)
    for eta in (0.2, 1.5):
        x, g = point(kind, 4), draw.normal(size=5)
        dual = psi.step(psi.gradient(jnp.asarray(x)), jnp.asarray(g), eta, h)
        new = np.asarray(psi.inverse(dual))

        def objective(u, x=x, g=g, eta=eta):
            extra = {
                L1: lambda: 0.4 * np.abs(u).sum(),
                GroupL2: lambda: 0.4 * np.linalg.norm(u),
            }.get(type(h), lambda: 0.0)()
            return extra + g @ u + (value(u) - value(x) - slope(value, x) @ (u - x)) / eta

        def allowed(u):
            if isinstance(h, Box):
                return np.clip(u, -0.3, 0.4)
            if isinstance(h, Ball):
                return u * min(1, 0.6 / np.linalg.norm(u))
            if kind == "entropy":
                return np.maximum(u, 1e-12) / np.maximum(u, 1e-12).sum()
            return u

        np.testing.assert_allclose(allowed(new), new, atol=1e-12)
        best = objective(new)
        for scale in (1.0, 0.1, 0.01):
            for _ in range(50):
                assert objective(allowed(new + scale * draw.normal(size=5))) >= best - 1e-9
        searched = scipy.optimize.minimize(lambda u: objective(allowed(u)), new, method="Nelder-Mead").fun
        assert searched >= best - 1e-7


def test_exponentiated_gradient_by_hand(x64):
    x, g = np.array([0.2, 0.3, 0.5]), np.array([1.0, -2.0, 0.5])
    weights = x * np.exp(-0.7 * g)
    psi = Entropy()
    dual = psi.step(psi.gradient(jnp.asarray(x)), jnp.asarray(g), 0.7, Zero())
    np.testing.assert_allclose(psi.inverse(dual), weights / weights.sum(), rtol=1e-12)


def test_entropy_comes_back_from_where_exp_underflows():
    psi = Entropy()
    dual = psi.gradient(jnp.array([0.5, 0.5], jnp.float32))
    away, back = jnp.array([400.0, 0.0]), jnp.array([-400.0, 0.0])
    dual = psi.step(dual, away, 1.0, Zero())
    assert float(psi.inverse(dual)[0]) == 0.0
    np.testing.assert_allclose(psi.inverse(psi.step(dual, back, 1.0, Zero())), [0.5, 0.5], rtol=1e-4)
    assert np.isnan(np.asarray(psi.inverse(psi.step(dual, jnp.array([jnp.nan, 0.0]), 1.0, Zero())))).all()


def test_large_exponents_neither_underflow_nor_overflow():
    psi = PNorm(1.05)  # q = 21
    for size in (1e-8, 1e8):
        x = jnp.array([1.0, 0.5, 0.0], jnp.float32) * size
        np.testing.assert_allclose(psi.inverse(psi.gradient(x)), x, rtol=1e-4)
    for psi in (PNorm(1.05), UniformlyConvex(1.2)):
        np.testing.assert_array_equal(psi.inverse(psi.gradient(jnp.zeros(3))), jnp.zeros(3))


@pytest.mark.parametrize("psi", [value[0] for value in MAPS.values()], ids=list(MAPS))
def test_widths_nan_and_points_without_leaves(psi):
    x = jnp.array([0.25, 0.75], jnp.bfloat16)
    dual = psi.gradient(x)
    assert dual.dtype == jnp.float32
    assert psi.step(dual, x, 0.1, Zero()).dtype == jnp.float32
    assert np.isnan(np.asarray(psi.inverse(psi.step(dual, x.at[0].set(jnp.nan), 0.1, Zero())))[0])
    assert psi.inverse(psi.step(psi.gradient(None), None, 0.1, Zero())) is None
    psi.check_start(None)


@pytest.mark.parametrize(
    ("run", "words"),
    [
        (lambda: PNorm(1.0), "p: got 1.0"),
        (lambda: PNorm(2.5), "p: got 2.5"),
        (lambda: UniformlyConvex(1.0), "p: got 1.0"),
        (lambda: UniformlyConvex(float("nan")), "p: got nan"),
        (lambda: Entropy().check(L1(0.1)), "prox: got L1; expected Zero, Simplex"),
        (lambda: PNorm(1.5).check(Ball(1.0)), "prox: got Ball; expected Zero, L1"),
        (lambda: UniformlyConvex(1.5).check(Box(0.0, 1.0)), "prox: got Box"),
        (lambda: UniformlyConvex(1.5).check(Ball(1.0, np.ones(2))), "prox: got a Ball with a center"),
        (lambda: Euclidean().check(L1), "prox: got the class L1"),  # type: ignore[arg-type]
        (lambda: Euclidean().check(abs), "prox: got builtin"),  # type: ignore[arg-type]
        (lambda: Entropy().check_start(jnp.array([0.0, 1.0])), "params: got entries down to 0.0"),
        (lambda: Entropy().check_start(jnp.array([-0.5, 1.5])), "params: got entries down to -0.5"),
        (lambda: Entropy().check_start(jnp.array([jnp.nan, 1.0])), "params: got entries down to nan"),
        (lambda: Entropy().check_start([jnp.array([0.5]), jnp.array([0.6])]), "params: got entries that sum to 1.1"),
        (lambda: Entropy().check_start(jnp.array([1j])), "params: got complex entries"),
        (lambda: Euclidean().check_start(jnp.array([1])), r"params: got int32\[1\]"),
    ],
)
def test_bad_input(run, words):
    with pytest.raises(InputError, match=words):
        run()


def test_numbers_may_be_traced():
    @jax.jit
    def moved(p, x):
        return PNorm(p).gradient(x), UniformlyConvex(p).gradient(x)

    x = jnp.array([0.3, -0.6])
    for ours, exact in zip(moved(1.5, x), (PNorm(1.5).gradient(x), UniformlyConvex(1.5).gradient(x)), strict=True):
        np.testing.assert_allclose(ours, exact, rtol=1e-5)
