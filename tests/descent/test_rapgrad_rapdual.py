"""RapGrad and RapDual against their loops written again in NumPy, and against solutions in closed form."""

import math
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fallline as fl
from fallline import InputError
from fallline.core import trees
from fallline.descent.rapdual import Blocks, MultiBlock
from fallline.descent.rapgrad import RaGrad, default_inner_steps, numbers, theory_inner_steps
from fallline.descent.rapgrad_rapdual import rapgrad_rapdual
from fallline.parts.folded_concave import SCAD
from fallline.parts.prox import L1, Ball, Box

M, D, MU, L = 7, 4, 0.3, 4.0
_DRAW = np.random.default_rng(0)
ROWS = _DRAW.normal(size=(M, D))
ROWS /= np.linalg.norm(ROWS, axis=1, keepdims=True)
TARGETS = _DRAW.normal(size=M)


def losses(x, batch):
    """μ-weakly convex: a quartic double well in the direction of each row."""
    rows, targets = batch
    return 0.5 * (rows @ x - targets) ** 2 + 0.3 * jnp.cos(rows @ x)


def component(i, x):
    return ROWS[i] * (ROWS[i] @ x - TARGETS[i] - 0.3 * np.sin(ROWS[i] @ x))


def finite_sum(dtype=np.float64, batch_size=1):
    return fl.FiniteSum(losses, (ROWS.astype(dtype), TARGETS.astype(dtype)), batch_size=batch_size)


# --- RapGrad against the loop ---------------------------------------------------------------------


def drawn(seed, step, count, m):
    """The components that the outer step draws in a run of `minimize` with this seed, 128 at a time."""
    inner, _ = jax.random.split(jax.random.fold_in(jax.random.key(seed), step))
    return np.concatenate(
        [jax.random.randint(jax.random.fold_in(inner, t), (128,), 0, m, jnp.int32) for t in range(0, count, 128)]
    )


def rapgrad(x, outer, s, seed, project=lambda v: v, warm=False):
    """The card's algorithm: its centers."""
    c = 2 + L / MU
    alpha = 1 - 2 / (M * (math.sqrt(1 + 16 * c / M) + 1))
    tau, eta = 1 / (M * (1 - alpha)) - 1, alpha * MU / (1 - alpha)
    center, centers, xu, y = x, [], None, None
    for step in range(1, outer + 1):

        def psi(i, u, center=center):
            return component(i, u) + 2 * MU * (u - center)

        if xu is None or not warm:
            xu = np.tile(center, (M, 1))
        y = np.stack([psi(i, xu[i]) for i in range(M)])  # with a warm start nothing is asked for these
        before, now = center, center
        for i in drawn(seed, step, s, M)[:s]:
            ahead = now + alpha * (now - before)
            xu[i] = (tau * xu[i] + ahead) / (1 + tau)
            new = psi(i, xu[i])
            ytil = y.copy()
            ytil[i] = y[i] + M * (new - y[i])
            before, now = now, project((MU * center + eta * now - ytil.mean(0)) / (MU + eta))
            y[i] = new
        center = now
        centers.append(center)
    return centers


@pytest.mark.parametrize("options", ["free", "ball", "warm"])
def test_rapgrad_makes_the_centers_of_the_loop(x64, options):
    ball = 0.6 if options == "ball" else None
    project = (lambda v: v * min(1, 0.6 / np.linalg.norm(v))) if ball else (lambda v: v)
    problem, warm = finite_sum(), options == "warm"
    solver = rapgrad_rapdual(
        problem, mu=MU, smoothness=L, inner_steps=150, prox=Ball(ball) if ball else None, warm_start=warm
    )
    x0 = np.full(D, 0.25)
    run = fl.minimize(problem, x0, solver, steps=3, stop=None, key=5, every=1, record=("value", "gradient_norm"))
    expected = rapgrad(x0, 3, 150, 5, project, warm)
    np.testing.assert_allclose(run.x, expected[-1], rtol=1e-9, atol=1e-11)
    # The one that the paper returns is one of them.
    assert min(np.abs(run.state.sampled - center).max() for center in expected) < 1e-10

    asked = M + 3 * 150 if warm else 4 * M + 3 * 150
    assert int(run.state.component_calls) == asked
    looked = 4 if warm else 0  # the loop asks for what it records where the state does not know
    assert run.calls.as_dict() == {"minibatch": asked, **({"gradient": looked + 1} if warm else {})}

    gradients = np.mean([[component(i, x) for i in range(M)] for x in expected], axis=1)
    values = [np.mean(0.5 * (ROWS @ x - TARGETS) ** 2 + 0.3 * np.cos(ROWS @ x)) for x in expected]
    mapped = [
        L * np.linalg.norm(x - project(x - g / L)) if ball else np.linalg.norm(g)
        for x, g in zip(expected, gradients, strict=True)
    ]
    np.testing.assert_allclose(run.history["value"][1:], values, rtol=1e-9)
    np.testing.assert_allclose(run.history["gradient_norm"][1:], mapped, rtol=1e-5, atol=1e-9)


def test_the_numbers_are_those_of_the_paper():
    # The prototype's instance: m = 100, L/μ = 1010 and 10010 (and its inner steps).
    assert default_inner_steps(100, 1e-3, 1.01) == 1676 and default_inner_steps(100, 1e-4, 1.001) == 4404
    assert theory_inner_steps(100, 1e-3, 1.01) == 15983
    one_minus_alpha, tau, eta = numbers(100, 1e-3, 1.01)
    alpha = 1 - 2 / (100 * (math.sqrt(1 + 16 * 1012 / 100) + 1))
    assert 1 - one_minus_alpha == pytest.approx(alpha, rel=1e-12)
    assert tau == pytest.approx(1 / (100 * (1 - alpha)) - 1, rel=1e-10)
    assert eta == pytest.approx(alpha * 1e-3 / (1 - alpha), rel=1e-10)


def test_a_long_inner_loop_ends_at_the_proximal_point(x64):
    """Of a quadratic that is (AᵀA/m + 3μ I)⁻¹ (Aᵀb/m + 3μ x̄)."""
    problem = fl.FiniteSum(lambda x, batch: 0.5 * (batch[0] @ x - batch[1]) ** 2, (ROWS, TARGETS), batch_size=1)
    center = np.arange(4.0)
    solver = rapgrad_rapdual(problem, mu=MU, smoothness=1.0, inner_steps=4000)
    run = fl.minimize(problem, center, solver, steps=1, stop=None, key=0)
    exact = np.linalg.solve(ROWS.T @ ROWS / M + 3 * MU * np.eye(D), ROWS.T @ TARGETS / M + 3 * MU * center)
    np.testing.assert_allclose(run.x, exact, atol=1e-12)


def test_an_added_convex_function_is_in_the_value(x64):
    problem, h = finite_sum(), L1(0.2)
    run = fl.minimize(problem, np.full(D, 0.1), rapgrad_rapdual(problem, mu=MU, smoothness=L, prox=h), steps=60, key=0)
    assert run.status.converged
    x = np.asarray(run.x)
    gradient = np.mean([component(i, x) for i in range(M)], axis=0)
    assert np.all(np.where(x == 0, np.abs(gradient) <= 0.2, np.abs(gradient + 0.2 * np.sign(x)) < 1e-5))
    assert (x == 0).any() and (x != 0).any()
    assert float(run.value) == pytest.approx(float(problem.value(run.x)) + 0.2 * np.abs(x).sum(), rel=1e-12)


@pytest.mark.parametrize(("batch_size", "oracle", "size"), [(None, "gradient", 7), (3, "minibatch", 3)])
def test_the_account_is_in_samples_of_the_problem(batch_size, oracle, size):
    problem = finite_sum(batch_size=batch_size)
    inner = rapgrad_rapdual(problem, mu=MU, smoothness=L).inner
    asked = [0, 7, 85, 163, 241]  # sums of accounts are accounts of sums, whatever is rounded on the way
    calls = [inner.calls(problem, a, b) for a, b in zip(asked, asked[1:], strict=False)]
    assert sum(c.as_dict()[oracle] for c in calls) == math.ceil(241 / size)
    assert all(set(c.as_dict()) == {oracle} for c in calls)


def test_the_sample_is_uniform_over_the_centers(x64):
    problem = finite_sum()
    solver = rapgrad_rapdual(problem, mu=MU, smoothness=L, inner_steps=10)

    def which(key):
        state = solver.init(problem, jnp.zeros(D), key=key)

        def step(state, t):
            state = solver.step(problem, state, key=jax.random.fold_in(key, t))
            return state, state.x

        state, centers = jax.lax.scan(step, trees.cast_like(state, state), jnp.arange(4))
        distances = jnp.max(jnp.abs(centers - state.sampled), axis=1)
        return jnp.argmin(distances), jnp.min(distances)

    found, distances = jax.jit(jax.vmap(which))(jax.random.split(jax.random.key(0), 400))
    assert float(jnp.max(distances)) == 0
    counts = np.bincount(np.asarray(found), minlength=4)
    assert np.sum((counts - 100.0) ** 2 / 100) < 16.3  # χ² with 3 degrees of freedom, 1 in 1000


def test_points_are_trees_and_single_precision_stays(x32):
    def split_losses(x, batch):
        return losses(jnp.concatenate([x["a"], x["b"][None]]), batch)

    problem = fl.FiniteSum(split_losses, (ROWS.astype(np.float32), TARGETS.astype(np.float32)), batch_size=1)
    solver = rapgrad_rapdual(problem, mu=MU, smoothness=L, inner_steps=150)
    run = fl.minimize(problem, {"a": np.zeros(3, np.float32), "b": np.float32(0)}, solver, steps=2, stop=None, key=1)
    assert run.x["a"].dtype == np.float32 and run.state.memory["a"].shape == (M, 3)
    np.testing.assert_allclose(trees.flatten(run.x), rapgrad(np.zeros(D), 2, 150, 1)[-1], rtol=1e-4, atol=1e-5)


# --- RapDual --------------------------------------------------------------------------------------

K, N, P = 3, 5, 2
MATRICES = _DRAW.normal(size=(K, N, P)) / 2
B = _DRAW.normal(size=N)
BLOCK = SCAD(0.2, 4.0, 0.3)  # 0.1-weakly convex


def last(r):
    return 0.5 * jnp.sum(r**2)


def coupled(dtype=np.float64, block=BLOCK, **options):
    return MultiBlock(block, last, MATRICES.astype(dtype), B.astype(dtype), **options)


def scad_prox(v, step):
    sigma, lam, gamma = 0.3 * step, 0.2, 4.0
    bent = ((gamma - 1) * v - np.sign(v) * sigma * gamma * lam) / (gamma - 1 - sigma)
    soft = np.sign(v) * np.maximum(np.abs(v) - sigma * lam, 0)
    return np.where(np.abs(v) <= lam * (1 + sigma), soft, np.where(np.abs(v) <= gamma * lam, bent, v))


def rapdual(x, xm, outer, s, seed, mu, merged):
    """The card's algorithm: its last center."""
    k = 1 if merged else K
    norm = np.linalg.norm(np.hstack(MATRICES), 2) if merged else max(np.linalg.norm(a, 2) for a in MATRICES)
    root = math.sqrt(1 + 8 * (2 * mu + 1) * norm**2 / mu)
    alpha, tau = 1 - 2 / (k * (root + 1)), mu * (root - 1) / 2
    eta = alpha / (1 - alpha)
    for step in range(1, outer + 1):
        center, center_m, x = x, xm, x.copy()
        inner, _ = jax.random.split(jax.random.fold_in(jax.random.key(seed), step))
        keys = jax.vmap(lambda t, key: jax.random.fold_in(key, t), (0, None))(jnp.arange(s), inner)
        drawn = jax.vmap(lambda key: jax.random.randint(key, (), 0, k, jnp.int32))(keys)
        y = before = -xm
        for i in np.asarray(drawn):
            ahead = y + alpha * (y - before)
            r = sum(MATRICES[j] @ x[j] for j in range(K))
            new = x.copy()
            for j in range(K) if merged else [i]:
                # argmin f_j(u) + μ‖u − x̄_j‖² + ⟨A_jᵀỹ, u⟩ + (τ/2)‖u − x_j‖²
                w = 2 * mu + tau
                new[j] = scad_prox((2 * mu * center[j] + tau * x[j] - MATRICES[j].T @ ahead) / w, 1 / w)
                r = r + k * MATRICES[j] @ (new[j] - x[j])
            x = new
            xm = (eta * xm + B - r) / (1 + eta)
            before, y = y, -(xm + 2 * mu * (xm - center_m))
    return x, xm


@pytest.mark.parametrize("merged", [False, True])
def test_rapdual_makes_the_points_of_the_loop(x64, merged):
    problem, mu, s = coupled(), 0.12, 40
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # few inner steps: the paths are compared, not their ends
        solver = rapgrad_rapdual(problem, mu=mu, smoothness=1.0, inner_steps=s, merged=merged)
        x0 = Blocks(np.full((K, P), 0.5), np.arange(5.0) / 5)
        run = fl.minimize(problem, x0, solver, steps=2, stop=None, key=3)
    x, xm = rapdual(np.full((K, P), 0.5), np.arange(5.0) / 5, 2, s, 3, mu, merged)
    np.testing.assert_allclose(run.x.blocks, x, rtol=1e-8, atol=1e-10)
    np.testing.assert_allclose(run.x.last, xm, rtol=1e-8, atol=1e-10)
    assert run.calls.as_dict() == {"gradient": 1 + 2 * (s + 1)}  # of f_m
    assert int(run.state.component_calls) == 2 * s * (K if merged else 1)
    value = float(BLOCK.value(run.x.blocks)) + 0.5 * np.sum(xm**2)
    assert float(run.value) == pytest.approx(value, rel=1e-10) == float(problem.value(run.x))
    step = 1 / (2 * mu + 1)
    slopes = np.stack([a.T @ -xm for a in MATRICES])
    moved = (x - np.asarray(BLOCK(jnp.asarray(x - step * slopes), step))) / step
    missing = sum(a @ u for a, u in zip(MATRICES, x, strict=True)) + xm - B
    assert float(problem.infeasibility(run.x)) == pytest.approx(np.linalg.norm(missing), rel=1e-7, abs=1e-12)
    expected = math.sqrt(np.sum(moved**2) + np.sum(missing**2))
    assert float(run.gradient_norm) == pytest.approx(expected, rel=1e-6)


def test_rapdual_meets_the_constraint_at_a_stationary_point(x64):
    problem = coupled()
    run = fl.minimize(problem, problem.start(), rapgrad_rapdual(problem, mu=0.1, smoothness=1.0), steps=80, key=0)
    assert run.status.converged and float(problem.infeasibility(run.x)) < 1e-6
    # With x_m eliminated: 0 ∈ p′(x) − Aᵀ(b − Ax).
    A, x = np.hstack(MATRICES), np.asarray(run.x.blocks).ravel()
    slope = A.T @ (A @ x - B)
    inside = np.abs(slope) <= 0.3 * 0.2 + 1e-5
    assert np.all(np.where(x == 0, inside, np.abs(slope + np.asarray(BLOCK.gradient(x))) < 1e-5)) and (x != 0).any()


def test_an_invertible_matrix_of_the_last_block_is_divided_out(x64):
    matrix = np.eye(N) + 0.3 * _DRAW.normal(size=(N, N))
    problem = coupled(A_last=matrix)
    x = Blocks(jnp.asarray(_DRAW.normal(size=(K, P))), jnp.asarray(_DRAW.normal(size=N)))
    missing = np.hstack(MATRICES) @ np.ravel(x.blocks) + matrix @ x.last - B
    np.testing.assert_allclose(problem.coupling(x.blocks) + x.last - problem.b, np.linalg.solve(matrix, missing))


def test_the_start_is_feasible_and_the_norms_are_those_of_the_matrices(x64):
    problem, blocks = coupled(), np.ones((K, P))
    assert float(problem.infeasibility(problem.start())) == 0
    np.testing.assert_allclose(problem.start(blocks).last, B - MATRICES.sum(0) @ np.ones(P))
    assert problem.block_norm == max(np.linalg.norm(a, 2) for a in MATRICES)
    assert problem.norm == pytest.approx(np.linalg.norm(np.hstack(MATRICES), 2))


# --- limits and bad input -------------------------------------------------------------------------


def test_few_inner_steps_are_warned_of_and_fewer_than_components_refused(x64):
    problem, blocks = finite_sum(), coupled()

    def check(steps):
        rapgrad_rapdual(problem, mu=MU, smoothness=L, inner_steps=steps).check(problem, np.zeros(D))

    def check_blocks(steps):
        rapgrad_rapdual(blocks, mu=0.1, smoothness=1.0, inner_steps=steps).check(blocks, blocks.start())

    limit = math.ceil(M + math.sqrt(M * (2 + L / MU)))
    for steps in (M, 2 * limit):
        with pytest.warns(UserWarning, match=f"inner_steps: {steps} may be slow or diverge; take .* = {4 * limit}"):
            check(steps)
    check(2 * limit + 1)  # a warning would be an error
    with pytest.raises(InputError, match="inner_steps: got 6; expected at least the 7 components"):
        check(6)
    with pytest.raises(InputError, match="inner_steps: got 2; expected at least the 3 blocks"):
        check_blocks(2)
    with pytest.warns(UserWarning, match="inner_steps: 3 may stall or diverge"):
        check_blocks(3)


def run_at(x0, problem=None, **options):
    problem = finite_sum() if problem is None else problem
    return fl.minimize(problem, x0, rapgrad_rapdual(problem, **{"mu": 0.1, "smoothness": 1.0, **options}), key=0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: rapgrad_rapdual(finite_sum(), mu=0.0, smoothness=1.0),
            "mu: got 0.0; expected a finite number above 0",
        ),
        (lambda: rapgrad_rapdual(finite_sum(), mu=math.nan, smoothness=1.0), "mu: got nan"),
        (
            lambda: rapgrad_rapdual(finite_sum(), mu=1.0, smoothness=0.5),
            "smoothness: got 0.5; expected at least mu = 1",
        ),
        (lambda: rapgrad_rapdual(finite_sum(), mu=1.0, smoothness=math.inf), "smoothness: got inf"),
        (lambda: rapgrad_rapdual(finite_sum(), mu=1.0, smoothness=2.0, inner_steps=1.5), "inner_steps: got 1.5"),
        (lambda: rapgrad_rapdual(finite_sum(), mu=1.0, smoothness=2.0, inner_steps=0), "inner_steps: got 0"),
        (
            lambda: rapgrad_rapdual(finite_sum(), mu=1.0, smoothness=2.0, merged=True),
            "merged: got True; expected False",
        ),
        (lambda: rapgrad_rapdual(finite_sum(), mu=1.0, smoothness=2.0, prox=jnp.sign), "prox: got .*expected a Prox"),
        (lambda: rapgrad_rapdual(coupled(), mu=1.0, smoothness=2.0, warm_start=True), "prox and warm_start: got one"),
        (
            lambda: rapgrad_rapdual(fl.Objective(last), mu=1.0, smoothness=2.0),
            "problem: got last; expected a FiniteSum",
        ),
        (lambda: theory_inner_steps(10, 1.0, 0.5), "smoothness: got 0.5"),
        (lambda: MultiBlock(last, last, MATRICES, B), "block: got function; expected a Prox"),
        (lambda: MultiBlock(BLOCK, 3, MATRICES, B), "last: got int"),
        (lambda: MultiBlock(BLOCK, last, MATRICES[0], B), r"A and b: got shapes \(5, 2\) and \(5,\)"),
        (lambda: MultiBlock(BLOCK, last, MATRICES, B[1:]), "A and b: got shapes"),
        (lambda: MultiBlock(BLOCK, last, np.full((K, N, P), np.inf), B), "A: got .*not finite"),
        (lambda: MultiBlock(BLOCK, last, MATRICES, np.full(N, np.nan)), "b: got .*not finite"),
        (lambda: coupled(A_last=np.ones((N, N))), "A_last: got a singular matrix; expected an invertible one"),
        (lambda: coupled(A_last=np.ones((N, 2))), r"A_last: got shape \(5, 2\); expected an invertible matrix"),
        (lambda: coupled(A_last=np.full((N, N), np.nan)), "A_last: got .*not finite"),
        (lambda: run_at(np.full(D, 2.0), prox=Box(-1.0, 1.0)), "x0: got a point outside of the set"),
        (lambda: run_at(np.zeros(D), coupled()), "x0: got float64.4.; expected Blocks of shapes"),
        (lambda: run_at(Blocks(np.zeros((K, P)), np.zeros(2)), coupled()), "x0: got .*expected Blocks of shapes"),
        (
            lambda: run_at(coupled().start(), coupled(), mu=0.05),
            "mu: got 0.05; expected at least 0.1, the weak convexity",
        ),
    ],
)
def test_bad_input_is_refused_with_the_reason(x64, make, message):
    with pytest.raises(InputError, match=f"^{message}"):
        make()


def test_numbers_may_be_traced(x64):
    problem = finite_sum()

    def end(mu):
        solver = rapgrad_rapdual(problem, mu=mu, smoothness=L)
        return fl.minimize(problem, jnp.zeros(D), solver, steps=1, stop=None, key=jax.random.key(2), every=1).x

    steps = int(default_inner_steps(M, MU, L))
    np.testing.assert_allclose(jax.jit(end)(MU), rapgrad(np.zeros(D), 1, steps, 2)[-1], rtol=1e-9)


def test_a_warm_start_in_a_set_has_no_test_of_its_own():
    options = {"mu": MU, "smoothness": L, "warm_start": True}
    assert rapgrad_rapdual(finite_sum(), prox=Ball(1.0), **options).stopping() is None
    assert rapgrad_rapdual(finite_sum(), **options).stopping() is not None
    assert isinstance(rapgrad_rapdual(finite_sum(), **options).inner, RaGrad)
