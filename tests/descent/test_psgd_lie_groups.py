"""PSGD: the loop in plain NumPy, special cases, Newton and Fisher types on every group, what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fallline as fl
from fallline.descent.psgd_lie_groups import psgd_lie_groups, scale_by_psgd
from fallline.parts.lie_groups import Dense, Diagonal, Kronecker, LowRank, SparseLU, scan, scaw

RNG = np.random.default_rng(0)
PARAMS = {"w": RNG.normal(size=(3, 2)), "b": RNG.normal(size=2)}
GROUPS = {
    "dense": {"group": Dense(), "whole": True},
    "diagonal": {"group": Diagonal()},
    "diagonal, sign": {"group": Diagonal(sign=True), "step": 0.01},
    "low rank": {"group": LowRank(2), "whole": True},
    "sparse": {"group": SparseLU(3), "whole": True},
    "kronecker": {},
    "scan": {"group": scan()},
    "scaw": {"group": scaw()},
    "normalize": {"group": Kronecker("normalize", "normalize")},
}
EACH = pytest.mark.parametrize("name", GROUPS)


def trees(count, seed=1):
    rng = np.random.default_rng(seed)
    return [{"w": rng.normal(size=(3, 2)), "b": rng.normal(size=2)} for _ in range(count)]


def test_newton_s_loop_with_a_dense_group(x64):
    """Three steps with "max": a = Qh, b = Q^{-T}v, Q ← Q − μ/N triu(aaᵀ − bbᵀ)Q, then QᵀQ g, the new Q."""
    update = scale_by_psgd(group=Dense(), step=0.2, scale=0.5, normalizer="max", whole=True)
    params = jnp.zeros(4)
    state, q = update.init(params), 0.5 * np.eye(4)
    for _ in range(3):
        g, v, h = RNG.normal(size=(3, 4))
        made, state = update.update(jnp.asarray(g), state, vector=jnp.asarray(v), hvp=jnp.asarray(h))
        a, b = q @ h, np.linalg.solve(q.T, v)
        e = np.triu(np.outer(a, a) - np.outer(b, b))
        q = q - 0.2 / np.max(np.abs(e)) * e @ q
        np.testing.assert_allclose(made, q.T @ q @ g, rtol=1e-10)


def test_second_divides_by_the_size_of_both_parts(x64):
    update = scale_by_psgd(group=Diagonal(), step=0.3)
    state, q = update.init(jnp.zeros(3)), np.ones(3)
    for size in (1.0, 10.0, 0.1):
        g, v, h = RNG.normal(size=(3, 3)) * np.array([1, 1, size])[:, None]
        made, state = update.update(jnp.asarray(g), state, vector=jnp.asarray(v), hvp=jnp.asarray(h))
        a, b = (q * h) ** 2, (v / q) ** 2
        q = q - 0.3 / np.max(a + b) * (a - b) * q
        np.testing.assert_allclose(made, q**2 * g, rtol=1e-10)


def test_matrices_and_vectors_get_their_own_groups(x64):
    """By default a matrix is preconditioned on both sides, a vector entry by entry, as each alone."""
    gradient, vector, hvp = trees(3)
    update = scale_by_psgd(step=0.3)
    made, _ = update.update(gradient, update.init(PARAMS), vector=vector, hvp=hvp)
    for name, group in (("w", Kronecker()), ("b", Diagonal())):
        alone = scale_by_psgd(group=group, step=0.3)
        expected, _ = alone.update(
            gradient[name], alone.init(jnp.zeros_like(gradient[name])), vector=vector[name], hvp=hvp[name]
        )
        np.testing.assert_allclose(made[name], expected, rtol=1e-12)


def test_a_function_chooses_groups_and_more_axes_are_a_matrix(x64):
    chosen = scale_by_psgd(group=lambda a: Diagonal() if a.ndim == 1 else scaw())
    state = chosen.init({"k": jnp.zeros((2, 3, 4)), "b": jnp.zeros(5), "s": jnp.zeros(())})
    shapes = [[factor.shape for factor in fit] for fit in state.fits]
    assert shapes == [[(5,)], [(6, 6), (4,)], [(1,)]]


def test_fisher_adds_damping_times_a_new_vector_in_each_step(x64):
    """h = g + δv: with zero gradients h/δ = v, and P g is that of Newton with v and δv."""
    fisher = scale_by_psgd("fisher", Diagonal(), step=0.3, damping=0.5, seed=3)
    zero, start = jnp.zeros(40), fisher.init(jnp.zeros(40))
    state = jax.jit(lambda s: jax.lax.fori_loop(0, 2000, lambda _, s: fisher.update(zero, s)[1], s))(start)
    np.testing.assert_allclose(jnp.square(state.fits[0][0]), 1 / 0.5, rtol=1e-6)  # P = (δ²)^{-1/2}


def test_fisher_whitens(x64):
    """E ggᵀ = diag(s²) gives P → 1/√(s² + δ²)."""
    s = np.array([0.1, 1.0, 5.0])
    fisher = scale_by_psgd("fisher", Diagonal(), step=0.1, damping=0.01)

    def step(t, carry):
        state, total = carry
        made, state = fisher.update(s * jax.random.normal(jax.random.key(t), (3,)), state)
        return state, total + jnp.where(t >= 2000, jnp.log(state.fits[0][0]), 0)

    _, total = jax.jit(lambda c: jax.lax.fori_loop(0, 6000, step, c))((fisher.init(jnp.zeros(3)), jnp.zeros(3)))
    np.testing.assert_allclose(np.exp(2 * total / 4000), 1 / np.sqrt(s**2 + 1e-4), rtol=0.15)


def test_the_scale_on_the_fly(x64):
    """q₀ = (‖v‖²/‖h‖²)^{1/4} of the first pair only."""
    update = scale_by_psgd(group=Diagonal(), scale=None, step=1e-9)
    g, v, h = RNG.normal(size=(3, 5))
    state = update.init(jnp.zeros(5))
    made, state = update.update(jnp.asarray(g), state, vector=jnp.asarray(v), hvp=jnp.asarray(7 * h))
    np.testing.assert_allclose(made, np.sqrt(v @ v / (49 * h @ h)) * g, rtol=1e-6)
    again, _ = update.update(jnp.asarray(g), state, vector=jnp.asarray(v), hvp=jnp.asarray(h))
    np.testing.assert_allclose(again, made, rtol=1e-6)


def test_clipping_is_of_all_leaves_together(x64):
    gradient, vector, hvp = trees(3)
    plain, clipped = scale_by_psgd(), scale_by_psgd(clip=0.1)
    a, _ = plain.update(gradient, plain.init(PARAMS), vector=vector, hvp=hvp)
    b, _ = clipped.update(gradient, clipped.init(PARAMS), vector=vector, hvp=hvp)
    norm = np.sqrt(sum(np.sum(np.square(x)) for x in a.values()))
    assert norm > 0.1
    for name in a:
        np.testing.assert_allclose(b[name], a[name] * 0.1 / norm, rtol=1e-12)


def test_with_a_probability_the_fit_moves_in_that_share_of_the_steps(x64):
    update = scale_by_psgd(group=Diagonal(), probability=0.3, seed=1)
    state, moved = update.init(jnp.zeros(2)), 0
    step = jax.jit(update.update)
    for i in range(200):
        v, h = jax.random.normal(jax.random.key(i), (2, 2))
        before = np.asarray(state.fits[0][0])
        _, state = step(jnp.ones(2), state, vector=v, hvp=h)
        moved += np.any(before != np.asarray(state.fits[0][0]))
    assert 30 <= moved <= 90  # 60 ± 4.6 standard deviations


def test_rosenbrock_in_300_steps(x64):
    """From (−1, 1), Q = 0.1 I, learning rate 1/2; the card's figure."""

    def rosenbrock(x):
        return 100 * (x[1] - x[0] ** 2) ** 2 + (1 - x[0]) ** 2

    solver = fl.optimizer(
        psgd_lie_groups, learning_rate=0.5, group=Dense(), step=0.2, scale=0.1, normalizer="max", whole=True
    )
    found = fl.minimize(rosenbrock, np.array([-1.0, 1.0]), solver, steps=300, stop=None, key=0)
    assert float(found.value) < 1e-12 and int(found.calls.hvp) == 300


@EACH
@pytest.mark.parametrize("curvature", ["newton", "fisher"])
def test_both_types_on_every_group_lower_a_badly_scaled_loss(x64, name, curvature):
    """½ Σ c x² of condition 100, with steps of either type's own size."""
    curvatures = {"w": np.logspace(0, 2, 6).reshape(3, 2), "b": np.array([1.0, 30.0])}

    def loss(x):
        return 0.5 * sum(jnp.sum(curvatures[k] * x[k] ** 2) for k in x)

    rate, ends = (0.1, 1e-3) if curvature == "newton" else (0.02, 0.3)
    update = psgd_lie_groups(rate, curvature, **{"step": 0.1, "scale": None, "clip": 1.0, **GROUPS[name]})
    start = jax.tree.map(jnp.ones_like, PARAMS)

    def step(t, carry):
        x, state = carry
        v = jax.tree.map(lambda a: jax.random.normal(jax.random.key(t), a.shape), x)
        extra = {} if curvature == "fisher" else {"vector": v, "hvp": jax.tree.map(jnp.multiply, curvatures, v)}
        updates, state = update.update(jax.grad(loss)(x), state, x, **extra)
        return optax.apply_updates(x, updates), state

    x, _ = jax.jit(lambda c: jax.lax.fori_loop(0, 300, step, c))((start, update.init(start)))
    assert float(loss(x)) < ends * float(loss(start))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"step": 0.0}, "step: got 0.0"),
        ({"step": 1.0}, "step: got 1.0; expected a number of at least 0 and below 1"),
        ({"curvature": "gauss"}, "curvature: got 'gauss'"),
        ({"normalizer": "third"}, "normalizer: got 'third'"),
        ({"damping": -1.0}, "damping: got -1.0"),
        ({"scale": 0.0}, "scale: got 0.0"),
        ({"clip": 0.0}, "clip: got 0.0"),
        ({"probability": 0.0}, "probability: got 0.0"),
        ({"probability": 1.5}, "probability: got 1.5"),
        ({"group": 3}, "group: got int"),
        ({"whole": True}, "group: got None; expected a group of vectors"),
        ({"seed": 0.5}, "key: got float"),
    ],
)
def test_bad_input(options, said):
    with pytest.raises(fl.InputError, match=said):
        scale_by_psgd(**options)


@pytest.mark.parametrize(
    ("options", "params", "said"),
    [
        ({}, {"w": jnp.zeros(3, jnp.int32)}, r"params: got int32\[3\]"),
        ({"group": LowRank(4), "whole": True}, jnp.zeros(3), "rank: got 4; expected at most the 3"),
        ({"group": scan()}, jnp.zeros((1, 3)), "normalizing side of length 1"),
        ({"group": lambda a: Kronecker()}, jnp.zeros(3), "group: got Kronecker"),
    ],
)
def test_parameters_that_a_group_does_not_act_on(options, params, said):
    with pytest.raises(fl.InputError, match=said):
        scale_by_psgd(**options).init(params)


@pytest.mark.parametrize("missing", ["vector", "hvp"])
def test_newton_s_pair_is_asked_for(x32, missing):
    update = scale_by_psgd()
    pair = {"vector": jnp.ones(2), "hvp": jnp.ones(2)}
    del pair[missing]
    with pytest.raises(fl.InputError, match=f"^{missing}: got None"):
        update.update(jnp.ones(2), update.init(jnp.ones(2)), **pair)
