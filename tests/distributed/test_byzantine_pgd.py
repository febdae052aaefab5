"""ByzantinePGD against Algorithm 1 of Yin et al. (2019) and its subroutine Escape, written again in NumPy."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fallline as fl
from fallline import Ending
from fallline.distributed.aggregators import IterativeFiltering, Mean, Median, TrimmedMean
from fallline.distributed.attacks import NotANumber, SaddlePoint, SignFlip
from fallline.distributed.byzantine_pgd import ball_marginal, byzantine_pgd, theory_parameters
from fallline.distributed.channels import StaleReads
from fallline.distributed.sharded import Sharded
from fallline.distributed.workers import mesh_of
from fallline.parts.sampling import uniform_ball

DIAGONAL = np.array([-1.0, 1.0, 2.0])  # a strict saddle at 0 with one way out, minima at ±e₁
M, B = 7, 2
OFFSETS = 0.05 * np.random.default_rng(0).standard_normal((M, 3))
OFFSETS[:, 0] = [0.0, -0.1, 0.1, -0.05, 0.05, 0.02, -0.03]
PARAMETERS = {
    "step_size": 0.2,
    "gradient_threshold": 0.2,
    "radius": 0.6,
    "distance": 0.75,
    "patience": 20,
    "attempts": 3,
}


def tilted(x, offset):
    return jnp.sum(jnp.asarray(DIAGONAL, x.dtype) * x**2 / 2 + x**4 / 4) + offset @ x


def problem(dtype=np.float64, **options):
    """A quartic, and for each worker a gradient that is off by a constant of its own."""
    return Sharded(tilted, OFFSETS[:, None].astype(dtype), **options)


def attack(**options):
    return SaddlePoint(B, np.zeros(3), DIAGONAL < 0, **options)


def algorithm_1(w, gradagg, parameters, draw):
    """The paper's two boxes. Returns w, and the points at which aggregates were asked, in order.

    The perturbation is `draw(round)`, a function of the number of rounds so far.
    """
    eta, epsilon, distance = (parameters[name] for name in ("step_size", "gradient_threshold", "distance"))
    asked = []

    def escape(w):
        for _ in range(parameters["attempts"]):
            v = start = w + draw(len(asked))
            for _ in range(parameters["patience"] + 1):
                asked.append(v)
                g = gradagg(v)
                if np.linalg.norm(v - start) >= distance:
                    return True, v
                v = v - eta * g
        return False, w

    asked.append(w)
    while True:
        g = gradagg(w)
        if np.linalg.norm(g) > epsilon:
            w = w - eta * g
            asked.append(w)
            continue
        escaped, w = escape(w)
        if not escaped:
            return w, asked


def told(x, push):
    """The messages at x: honest ones, and from the last two what holds x at the saddle."""
    honest = DIAGONAL * x + x**3 + OFFSETS
    lie = honest[: M - B].mean(axis=0) + push(honest[: M - B]) * np.where(DIAGONAL < 0, np.where(x >= 0, 1, -1), 0)
    return np.concatenate([honest[: M - B], np.tile(lie, (B, 1))])


def loud(honest):
    return 1e3


def stealthy(honest):
    return 1.75 * honest.std(axis=0)


def trimmed(messages):
    return np.sort(messages, axis=0)[B:-B].mean(axis=0)


def perturbations(seed, radius, dtype=np.float64):
    """What the solver draws in its step t, in a run of `minimize` with this seed."""
    key, like = jax.random.key(seed), jnp.zeros(3, dtype)
    return lambda t: np.asarray(uniform_ball(jax.random.split(jax.random.fold_in(key, t))[1], like, dtype(radius)))


def run(x0, aggregator, parameters, seed, where=None, attack=None, **options):
    solver = byzantine_pgd(aggregator=aggregator, attack=attack, **parameters)
    return fl.minimize(problem(x0.dtype) if where is None else where, x0, solver, key=seed, **options)


# --- against the paper's loop ---------------------------------------------------------------------


CASES = {
    "median": (Median(), {"strength": 1e3}, loud, lambda g: np.median(g, axis=0)),
    "trimmed": (TrimmedMean(B), {"strength": 1e3}, loud, trimmed),
    "filtering": (IterativeFiltering(1.0), {"stealth": 1.75}, stealthy, lambda g: g.mean(axis=0)),  # nothing fires
}


@pytest.mark.parametrize("case", CASES)
def test_same_points_and_same_return_as_algorithm_1(x64, case):
    aggregator, options, push, gradagg = CASES[case]
    for seed, start, changes in [
        (0, [0.0, 0.0, 0.0], {}),
        (1, [0.05, 1.5, -1.0], {}),  # along the stable manifold first
        (2, [-0.3, 0.2, 0.1], {"radius": 0.05}),  # too small to clear the fake minimum
        (3, [0.0, 0.0, 0.0], {"patience": 3, "attempts": 2}),
        (4, [0.2, 0.1, 0.0], {"distance": 0.5, "gradient_threshold": 0.5, "attempts": 1}),
        (5, [1.0, 1.0, 1.0], {"patience": 1, "attempts": 1}),
    ]:
        parameters, x0 = {**PARAMETERS, **changes}, np.array(start)
        draw = perturbations(seed, parameters["radius"])
        expected, asked = algorithm_1(x0, lambda x: gradagg(told(x, push)), parameters, draw)

        solution = run(x0, aggregator, parameters, seed, attack=attack(**options))
        np.testing.assert_allclose(solution.x, expected, rtol=1e-10, atol=1e-13)
        assert solution.status.ending is Ending.CONVERGED and solution.status.met == "ByzantinePGD's own test"
        assert int(solution.steps) == len(asked) == int(solution.state.round.rounds)
        assert int(solution.state.calls.gradient) == len(asked)
        # Each step asks once, at the point where it begins.
        for steps in sorted({1, 2, len(asked) // 3, len(asked) // 2, len(asked) - 1} & set(range(1, len(asked)))):
            shorter = run(x0, aggregator, parameters, seed, attack=attack(**options), steps=steps)
            np.testing.assert_allclose(shorter.x, asked[steps], rtol=1e-10, atol=1e-13)
            g = gradagg(told(asked[steps - 1], push))
            np.testing.assert_allclose(shorter.state.round.x, g, rtol=1e-9, atol=1e-13)
            assert float(shorter.state.aggregate_norm) == pytest.approx(np.linalg.norm(g), rel=1e-9)


def test_single_precision_keeps_its_type(x32):
    x0 = np.zeros(3, np.float32)
    draw = perturbations(0, 0.6, np.float32)
    expected, asked = algorithm_1(x0, lambda x: np.median(told(x, loud), axis=0), PARAMETERS, draw)
    solution = run(x0, Median(), PARAMETERS, 0, attack=attack())
    assert solution.x.dtype == np.float32 and int(solution.steps) == len(asked)
    np.testing.assert_allclose(solution.x, expected, rtol=1e-5, atol=1e-5)


# --- saddles, real and fake -----------------------------------------------------------------------


def test_a_small_radius_stays_where_the_attack_holds_it_and_a_large_one_leaves(x64):
    """Two loud lies make the second largest of five honest offsets the median: shift 0.05, curvature 1."""
    half, x0 = 0.05, np.zeros(3)
    for w in (-1e-9, 0.0):
        assert np.median(told(np.array([w, 0, 0]), loud), axis=0)[0] == pytest.approx(math.copysign(half, w + 1e-10))
    for seed in range(3):
        held = run(x0, Median(), {**PARAMETERS, "radius": half / 4}, seed, attack=attack())
        assert held.status.ending is Ending.CONVERGED and np.array_equal(held.x, x0)
        left = run(x0, Median(), PARAMETERS, seed, attack=attack())
        assert abs(abs(left.x[0]) - 1) < 0.2
    assert 1 - (1 - ball_marginal(PARAMETERS["radius"], half, 3)) ** PARAMETERS["attempts"] > 0.99


def test_without_liars_it_is_perturbed_gradient_descent_with_a_test_of_movement(x64):
    where = Sharded(tilted, np.zeros((M, 1, 3)))
    parameters = {**PARAMETERS, "radius": 0.01, "patience": 60, "gradient_threshold": 1e-6, "distance": 0.3}
    solution = run(np.zeros(3), Mean(), parameters, 0, where, steps=2000)
    np.testing.assert_allclose(np.abs(solution.x), [1, 0, 0], atol=1e-6)
    assert float(solution.value) == pytest.approx(-0.25, abs=1e-12)
    # Where no perturbation moves, the point before them comes back, to the last bit.
    start = np.array([1.0, 0.0, 0.0])
    assert np.array_equal(run(start, Mean(), parameters, 0, where).x, start)


def test_a_step_limit_is_no_return(x64):
    solution = run(np.zeros(3), Median(), PARAMETERS, 0, attack=attack(), steps=5)
    assert solution.status.ending is Ending.STEP_LIMIT and not bool(solution.state.done)
    assert not np.any(solution.state.candidate) and np.any(solution.x)
    assert int(solution.state.attempt) == 1 and int(solution.state.age) == 4


# --- the same elsewhere ---------------------------------------------------------------------------


def of_parts(x, offset):
    return tilted(jnp.stack([x["way"], *x["rest"]]), offset)


def test_trees_blocks_and_meshes_change_nothing(x64):
    whole = run(np.zeros(3), Median(), PARAMETERS, 0, attack=attack())
    tree = {"rest": np.zeros(2), "way": np.zeros(())}  # its vector has the way out at the end
    turned = SaddlePoint(B, np.zeros(3), np.array([False, False, True]))
    draw = perturbations(0, PARAMETERS["radius"])
    order = [2, 0, 1]  # of a vector of the tree's, to the coordinates of the quartic
    expected, asked = algorithm_1(
        np.zeros(3), lambda x: np.median(told(x, loud), axis=0), PARAMETERS, lambda t: draw(t)[order]
    )
    solver = byzantine_pgd(aggregator=Median(), attack=turned, **PARAMETERS)
    parts = fl.minimize(Sharded(of_parts, OFFSETS[:, None]), tree, solver, key=0)
    np.testing.assert_allclose([parts.x["way"], *parts.x["rest"]], expected, rtol=1e-10)
    assert int(parts.steps) == len(asked)

    solver = byzantine_pgd(aggregator=Median(), attack=attack(), blocks=2, **PARAMETERS)
    np.testing.assert_array_equal(fl.minimize(problem(), np.zeros(3), solver, key=0).x, whole.x)

    solver = byzantine_pgd(aggregator=Median(), attack=attack(), **PARAMETERS)
    exact, real = (
        fl.minimize(problem(mesh=mesh, exact=True), np.zeros(3), solver, key=0)
        for mesh in (None, mesh_of(jax.devices()[:1]))
    )
    np.testing.assert_array_equal(exact.x, real.x)
    np.testing.assert_allclose(exact.x, whole.x, rtol=1e-10)
    assert int(exact.steps) == int(real.steps) == int(whole.steps)


def test_the_bytes_are_those_of_whole_vectors(x32):
    solution = run(np.zeros(3, np.float32), Median(), PARAMETERS, 0, attack=attack(), steps=5)
    assert float(solution.state.round.bytes_up) == 5 * M * 3 * 4


# --- lost messages --------------------------------------------------------------------------------


def test_nan_is_one_vote_for_robust_rules_and_the_end_with_the_mean(x64):
    x0, liars = np.zeros(3), NotANumber(B)
    solution = run(x0, Median(), PARAMETERS, 0, attack=liars)
    assert solution.status.ending is Ending.CONVERGED and np.isfinite(solution.x).all()

    lost = run(x0, Mean(), PARAMETERS, 0, attack=liars)
    assert lost.status.ending is Ending.DIVERGED
    assert "workers 5, 6 sent messages that are not finite" in str(lost.status)
    np.testing.assert_array_equal(lost.x, x0)

    driven = run(x0, Mean(), PARAMETERS, 0, attack=attack(strength=1e3))
    assert driven.status.ending is Ending.DIVERGED and int(driven.status.step) < 10


# --- the paper's parameters -----------------------------------------------------------------------


def test_theory_parameters_by_hand():
    # Δ = 1e-5, d = 1: Δ^{2/5} = 1e-2 and Δ^{3/5} = 1e-3; √ρ = 2.
    out = theory_parameters(
        smoothness=8.0, hessian_lipschitz=4.0, inexactness=1e-5, dimension=1, gap=3.0, failure_probability=0.1
    )
    assert out == {
        "step_size": 0.125,
        "gradient_threshold": pytest.approx(3e-5, rel=1e-14),
        "radius": pytest.approx(4e-3 / 2, rel=1e-14),
        "distance": pytest.approx(1e-2 / 2, rel=1e-14),
        "patience": 1,  # ⌈8 / (384 · 10 · 0.01)⌉
        # 48 · 8 · 0.1 (1e-6 + 1e-7) = 4.224e-5; 12 / 4.224e-5 = 284,090.9…, whose logarithm is 12.557
        "attempts": 26,
    }
    # d = 32: d^{1/5} = 2, d^{3/10} = 2√2.
    wide = theory_parameters(smoothness=1.0, hessian_lipschitz=1.0, inexactness=1e-5, dimension=32, gap=1.0)
    assert wide["radius"] == pytest.approx(8e-3 * math.sqrt(2), rel=1e-14)
    assert wide["distance"] == pytest.approx(2e-2, rel=1e-14)
    tiny = theory_parameters(smoothness=1.0, hessian_lipschitz=1.0, inexactness=1e-10, dimension=1, gap=1.0)
    assert tiny["patience"] == math.ceil(1 / (384 * 2 * 1e-4)) == 14
    assert byzantine_pgd(aggregator=Median(), **tiny).attempts == tiny["attempts"]
    # A gap too small to need an attempt still gets one.
    assert theory_parameters(smoothness=1, hessian_lipschitz=1, inexactness=1, dimension=1, gap=1)["attempts"] == 1


def test_the_marginal_of_a_ball_in_closed_form():
    for h in (0.0, 0.3, 0.7, 0.999):
        assert ball_marginal(1, h, 1) == pytest.approx(1 - h, rel=1e-12)
        area = 2 / math.pi * (h * math.sqrt(1 - h * h) + math.asin(h))
        assert ball_marginal(1, h, 2) == pytest.approx(1 - area, rel=1e-9)
        assert ball_marginal(2, 2 * h, 3) == pytest.approx(1 - (3 * h - h**3) / 2, rel=1e-9)
    assert ball_marginal(1, 1, 5) == 0.0 and ball_marginal(1, 2, 5) == 0.0


def test_the_marginal_of_a_ball_is_that_of_the_perturbations(x32):
    keys, like = jax.random.split(jax.random.key(0), 20_000), jnp.zeros(10)
    first = jax.jit(jax.vmap(lambda key: uniform_ball(key, like, 1.0)))(keys)[:, 0]
    p, share = ball_marginal(1.0, 0.2, 10), float(np.mean(np.abs(first) > 0.2))
    assert abs(share - p) < 4 * math.sqrt(p * (1 - p) / 20_000)  # four standard deviations


# --- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["step_size", "gradient_threshold", "radius", "distance"])
@pytest.mark.parametrize("value", [0.0, -1.0, math.inf, math.nan, "0.1", [0.1]])
def test_numbers_must_be_positive(name, value):
    with pytest.raises(fl.InputError, match=f"^{name}: got .*; expected a (finite )?number"):
        byzantine_pgd(aggregator=Median(), **{**PARAMETERS, name: value})


@pytest.mark.parametrize("name", ["patience", "attempts"])
@pytest.mark.parametrize("value", [0, -1, 1.5, True, math.nan, "3"])
def test_counts_must_be_counts(name, value):
    with pytest.raises(fl.InputError, match=f"^{name}: got"):
        byzantine_pgd(aggregator=Median(), **{**PARAMETERS, name: value})


def test_what_does_not_fit_is_refused(x64):
    with pytest.raises(fl.InputError, match="^aggregator: got"):
        byzantine_pgd(aggregator=np.median, **PARAMETERS)
    with pytest.raises(fl.InputError, match="^reads: got"):
        byzantine_pgd(aggregator=Median(), reads=StaleReads(2), **PARAMETERS)
    with pytest.raises(fl.InputError, match="^key: got None; expected .*ByzantinePGD is random"):
        fl.minimize(problem(), np.zeros(3), byzantine_pgd(aggregator=Median(), **PARAMETERS))
    with pytest.raises(fl.InputError, match="workers"):
        fl.minimize(lambda x: x @ x, np.zeros(3), byzantine_pgd(aggregator=Median(), **PARAMETERS), key=0)
    for aggregator, liars in ((TrimmedMean(1), 2), (TrimmedMean(3), 4), (Median(), 4), (IterativeFiltering(1.0), 4)):
        with pytest.raises(fl.InputError, match=f"^attack: got {liars} Byzantine workers of 7; expected .* tolerates"):
            run(np.zeros(3), aggregator, PARAMETERS, 0, attack=SignFlip(liars))
    with pytest.raises(fl.InputError, match="^cut: got 4; expected less than half of the 7 workers"):
        run(np.zeros(3), TrimmedMean(4), PARAMETERS, 0)


@pytest.mark.parametrize(
    ("changes", "argument"),
    [
        ({"smoothness": 0.0}, "smoothness"),
        ({"hessian_lipschitz": -1.0}, "hessian_lipschitz"),
        ({"inexactness": 0.0}, "inexactness"),
        ({"inexactness": 1.1}, "inexactness"),
        ({"gap": math.inf}, "gap"),
        ({"dimension": 0}, "dimension"),
        ({"failure_probability": 0.0}, "failure_probability"),
        ({"failure_probability": 1.1}, "failure_probability"),
    ],
)
def test_theory_parameters_refuse(changes, argument):
    good = {"smoothness": 1.0, "hessian_lipschitz": 1.0, "inexactness": 0.1, "dimension": 2, "gap": 1.0}
    with pytest.raises(fl.InputError, match=f"^{argument}: got"):
        theory_parameters(**{**good, **changes})


@pytest.mark.parametrize(
    ("arguments", "argument"), [((0, 1, 3), "radius"), ((1, -1, 3), "height"), ((1, 1, 0), "dimension")]
)
def test_ball_marginal_refuses(arguments, argument):
    with pytest.raises(fl.InputError, match=f"^{argument}: got"):
        ball_marginal(*arguments)
