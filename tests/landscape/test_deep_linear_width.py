"""Deep linear networks against NumPy: the gradient's formula, a loop of descent, least squares, depth 1 exactly."""

import dataclasses

import equinox as eqx
import jax
import numpy as np
import optax
import pytest

import fallline as fl
from fallline.landscape import deep_linear_width as module
from fallline.landscape.deep_linear_width import (
    DeepLinear,
    WidthSweep,
    certified_rate,
    deep_linear_width,
    eigenvalues,
    end_to_end,
    infinite_width_factor,
    initial_weights,
    required_width,
    step_size,
)

RNG = np.random.default_rng(0)
D_IN, D_OUT, N = 3, 2, 5
X = RNG.standard_normal((D_IN, N))
Y = RNG.standard_normal((D_OUT, D_IN)) @ X
NOISY = Y + RNG.standard_normal((D_OUT, N))
FLAT = np.stack([X[0], X[1], X[0] - 2 * X[1]])  # of rank 2


def weights(width, depth, seed=0, dtype=np.float64):
    """What `initial_weights` draws, as NumPy arrays."""
    return [np.asarray(w, dtype) for w in initial_weights(seed, D_IN, width, depth, D_OUT, dtype)]


def product(matrices, size):
    """W_l ⋯ W_1 of matrices in the order W_1, W_2, …"""
    total = np.eye(size)
    for matrix in matrices:
        total = matrix @ total
    return total


def scale(x):
    """a = 1 / √(m^{L−1} d_out)."""
    return 1 / np.sqrt(np.prod([float(len(w)) for w in x]))


def loss(x, X, Y):
    return 0.5 * np.sum((scale(x) * product(x, len(X)) @ X - Y) ** 2)


def gradient(x, X, Y):
    """a (W_L ⋯ W_{l+1})ᵀ (U X − Y) (W_{l−1} ⋯ W_1 X)ᵀ for each l."""
    residual = scale(x) * product(x, len(X)) @ X - Y
    return [
        scale(x) * product(x[i + 1 :], len(x[i])).T @ residual @ (product(x[:i], len(X)) @ X).T for i in range(len(x))
    ]


def descent(x, X, Y, eta, steps):
    """The losses before the first step and after each, and the last weights."""
    losses = [loss(x, X, Y)]
    for _ in range(steps):
        x = [w - eta * g for w, g in zip(x, gradient(x, X, Y), strict=True)]
        losses.append(loss(x, X, Y))
    return np.array(losses), x


# ---- the problem ----------------------------------------------------------------------------------


@pytest.mark.parametrize("depth", [1, 2, 4])
def test_value_and_gradient_are_those_of_the_formula(depth, dtype):
    x = weights(4, depth, dtype=dtype)
    problem = DeepLinear(X.astype(dtype), NOISY.astype(dtype))
    value, found = problem.value_and_gradient(x)
    wide = [w.astype(np.float64) for w in x]
    rtol = 200 * np.finfo(dtype).eps
    np.testing.assert_allclose(value, loss(wide, X, NOISY), rtol=rtol)
    for ours, theirs in zip(found, gradient(wide, X, NOISY), strict=True):
        assert ours.dtype == dtype
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=rtol * np.abs(theirs).max())
    np.testing.assert_allclose(end_to_end(x), scale(wide) * product(wide, D_IN), rtol=0, atol=rtol)


def test_gradient_is_the_derivative(x64):
    x, problem, h = weights(4, 4), DeepLinear(X, NOISY), 1e-6
    direction = [RNG.standard_normal(w.shape) for w in x]
    ahead, behind = (loss([w + sign * h * v for w, v in zip(x, direction, strict=True)], X, NOISY) for sign in (1, -1))
    slope = sum(np.sum(g * v) for g, v in zip(problem.gradient(x), direction, strict=True))
    assert slope == pytest.approx((ahead - behind) / (2 * h), rel=1e-7)


@pytest.mark.parametrize("inputs", [X, FLAT], ids=["full rank", "rank 2"])
def test_the_lower_bound_is_that_of_least_squares(inputs, dtype):
    map_, *_ = np.linalg.lstsq(inputs.T, NOISY.T)
    expected = 0.5 * np.sum((map_.T @ inputs - NOISY) ** 2)
    found = DeepLinear(inputs.astype(dtype), NOISY.astype(dtype)).lower_bound
    np.testing.assert_allclose(found, expected, rtol=100 * np.finfo(dtype).eps)


def test_any_solver_reaches_the_global_minimum(x64):
    problem = DeepLinear(FLAT, NOISY)
    solution = fl.minimize(problem, weights(3, 2), fl.optimizer(optax.adam, learning_rate=0.03), steps=3000)
    assert solution.status.converged
    assert solution.value == pytest.approx(float(problem.lower_bound), rel=1e-12)
    assert fl.certify(problem, solution.x).verdict is fl.Verdict.GLOBAL_MINIMUM


@pytest.mark.parametrize("depth", [16, 34])
def test_nothing_overflows_in_float32(depth, x32):
    """At depth 34 the plain product does; at 16 its square is within 2⁸ of the largest number."""
    x = [np.asarray(w) for w in initial_weights(0, D_IN, 256, depth, D_OUT)]
    value, found = DeepLinear(X.astype(np.float32), Y.astype(np.float32)).value_and_gradient(x)
    total = np.eye(D_IN)
    for w in x:
        total = w.astype(np.float64) @ total / np.sqrt(len(w))
    np.testing.assert_allclose(value, 0.5 * np.sum((total @ X - Y) ** 2), rtol=1e-4)
    assert all(np.isfinite(g).all() and np.abs(g).max() > 0 for g in found)
    with np.errstate(over="ignore", invalid="ignore"):
        plain = np.linalg.multi_dot(x[::-1])
    assert np.isfinite(plain).all() == (depth == 16)


# ---- the start ------------------------------------------------------------------------------------


def test_the_start_is_standard_normal_and_has_the_layers_of_the_network(x64):
    x = initial_weights(7, D_IN, 200, 3, D_OUT)
    assert [w.shape for w in x] == [(200, D_IN), (200, 200), (D_OUT, 200)]
    assert [w.shape for w in initial_weights(7, D_IN, 200, 1, D_OUT)] == [(D_OUT, D_IN)]
    entries = np.concatenate([np.ravel(w) for w in x])
    error = 5 / np.sqrt(len(entries))  # five standard errors of a mean of unit variance
    assert abs(entries.mean()) < error
    assert abs(entries.var() - 1) < np.sqrt(2) * error
    assert abs((entries**4).mean() - 3) < np.sqrt(96) * error
    again = initial_weights(jax.random.key(7), D_IN, 200, 3, D_OUT)
    assert all(np.array_equal(a, b) for a, b in zip(x, again, strict=True))


def test_the_first_loss_has_one_mean_at_every_width(x64):
    """E ℓ(0) = ½ (‖X‖² + ‖Y‖²): an entry of U has variance 1/d_out. Within five standard errors, each of 5% at most."""
    problem, exact = DeepLinear(X, Y), 0.5 * (np.sum(X**2) + np.sum(Y**2))
    for width in (4, 32):
        first = jax.jit(jax.vmap(lambda key, m=width: problem.value(initial_weights(key, D_IN, m, 3, D_OUT))))
        losses = np.asarray(first(jax.random.split(jax.random.key(0), 600)))
        error = losses.std() / np.sqrt(len(losses))
        assert error < 0.05 * exact
        assert abs(losses.mean() - exact) < 5 * error


# ---- what the theorem says ------------------------------------------------------------------------

DIAGONAL = np.pad(np.diag([1.0, 3.0, 2.0]), ((0, 0), (0, 2)))


def test_step_size_rate_and_limit_by_hand():
    np.testing.assert_allclose(eigenvalues(DIAGONAL), [9, 4, 1], rtol=1e-14)
    eta = step_size(DIAGONAL, 5, 2)
    assert eta == pytest.approx(2 / (3 * 5 * 9))
    assert certified_rate(DIAGONAL, 5, 2, eta) == pytest.approx(1 - 1 / (12 * 9))
    assert certified_rate(DIAGONAL, 5, 2, eta / 2) == pytest.approx(1 - 1 / (24 * 9))
    assert infinite_width_factor(DIAGONAL, 5, 2, eta) == pytest.approx((1 - 1 / 27) ** 2)
    # ηLλ/d_out = 1.9 at the largest eigenvalue, which is then the slowest.
    assert infinite_width_factor(DIAGONAL, 5, 2, 2 * 1.9 / 45) == pytest.approx(0.81)


def test_eigenvalues_are_those_that_are_not_zero(dtype):
    found = eigenvalues(FLAT.astype(dtype))
    assert len(found) == 2
    np.testing.assert_allclose(found, np.linalg.eigvalsh(FLAT.T @ FLAT)[:-3:-1], rtol=100 * np.finfo(dtype).eps)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"depth": 3, "rank": 10, "kappa": 3, "d_out": 4, "phi_norm": 2, "delta": 0.1, "C": 0.5}, 8100),
        ({"depth": 2, "rank": 1, "kappa": 1, "d_out": 1, "phi_norm": 0, "delta": np.exp(-5)}, 10),
        ({"depth": 2, "rank": 3, "kappa": 2, "d_out": 1, "phi_norm": 0, "delta": 3 * np.exp(-5)}, 240),
        ({"depth": 55, "rank": 1, "kappa": 1, "d_out": 1, "phi_norm": 0, "delta": 0.5}, 55 * np.log(55)),
    ],
)
def test_required_width_by_hand(arguments, expected):
    assert required_width(**arguments) == pytest.approx(expected)


def test_a_step_above_the_rule_warns():
    eta = step_size(DIAGONAL, 5, 2)
    with pytest.warns(UserWarning, match=r"step_size: .* is 1\.5 times the theorem's"):
        assert certified_rate(DIAGONAL, 5, 2, 1.5 * eta) == pytest.approx(1 - 1 / 72)
    with pytest.warns(UserWarning, match=r"is 1\.1 times the theorem's"):
        deep_linear_width(X.astype("f4"), Y.astype("f4"), depths=[1], widths=[1], seeds=[0], steps=1, step_scale=1.1)


# ---- the sweep ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("inputs", "targets"), [(X, Y), (FLAT, NOISY)], ids=["realizable", "rank 2 with noise"])
def test_the_losses_are_those_of_a_loop_by_hand(inputs, targets, x64):
    found = deep_linear_width(inputs, targets, depths=[1, 3], widths=[2, 40], seeds=[0, 3], steps=40)
    map_, *_ = np.linalg.lstsq(inputs.T, targets.T)
    optimum = 0.5 * np.sum((map_.T @ inputs - targets) ** 2)
    largest, *_, smallest = np.linalg.svd(inputs, compute_uv=False)[: np.linalg.matrix_rank(inputs)] ** 2
    assert found.optimum == pytest.approx(optimum, abs=1e-12)
    assert found.rate == pytest.approx(1 - smallest / largest / 12)
    assert found.limit == pytest.approx((1 - smallest / largest / 3) ** 2)
    for i, depth in enumerate((1, 3)):
        for j, width in enumerate((2, 40)):
            for k, seed in enumerate((0, 3)):
                start = weights(width, depth, seed)
                losses, end = descent(start, inputs, targets, D_OUT / (3 * depth * largest), 40)
                np.testing.assert_allclose(found.gaps[i, j, k], losses - optimum, rtol=1e-10, atol=1e-12)
                drifts = [
                    np.linalg.norm(after - before, 2) / np.linalg.norm(before, 2)
                    for after, before in zip(end, start, strict=True)
                ]
                assert found.drift[i, j, k] == pytest.approx(max(drifts), rel=1e-9)
                above = losses - optimum > (1 - smallest / largest / 12) ** np.arange(41) * (losses[0] - optimum)
                np.testing.assert_array_equal(found.violations[i, j, k, 1:], above[1:])
    assert found.violations[0].sum() == 0


def test_at_depth_one_every_direction_has_its_own_factor(x64):
    """E(t) = E(0) (I − η X Xᵀ / d_out)ᵗ exactly, with X Xᵀ diagonal; in the end the slowest is alone."""
    phi = RNG.standard_normal((D_OUT, D_IN))
    found = deep_linear_width(DIAGONAL, phi @ DIAGONAL, depths=[1], widths=[1], seeds=[0], steps=300)
    values, t = np.array([1.0, 9.0, 4.0]), np.arange(301)
    error = weights(1, 1)[0] / np.sqrt(D_OUT) - phi
    gaps = 0.5 * np.sum(values * error**2 * (1 - values / 27) ** (2 * t[:, None, None]), axis=(1, 2))
    np.testing.assert_allclose(found.gaps[0, 0, 0], gaps, rtol=1e-9)
    assert found.gaps[0, 0, 0, -1] / found.gaps[0, 0, 0, -2] == pytest.approx(found.limit, rel=1e-8)


@pytest.mark.parametrize("shape", [(40, 50), (50, 40), (4, 50), (1, 1)])
def test_spectral_norms_are_the_largest_singular_values(shape):
    matrix = RNG.standard_normal(shape)
    assert module._spectral_norm(matrix) == pytest.approx(np.linalg.svd(matrix, compute_uv=False)[0], rel=1e-12)
    assert module._spectral_norm(0 * matrix) == 0


def test_a_run_that_diverges_is_infinite_from_there(x64):
    with pytest.warns(UserWarning, match="times the theorem's"):
        found = deep_linear_width(X, Y, depths=[3], widths=[2], seeds=[0, 3], steps=40, step_scale=30)
    with np.errstate(over="ignore", invalid="ignore"):
        by_hand = [descent(weights(2, 3, seed), X, Y, 30 * step_size(X, 3, D_OUT), 40)[0] for seed in (0, 3)]
    for gaps, losses in zip(found.gaps[0, 0], by_hand, strict=True):
        finite = np.isfinite(losses)
        assert 0 < finite.sum() < 40
        np.testing.assert_array_equal(np.isinf(gaps), ~finite)
    assert np.isinf([found.ratio, found.factor, found.drift, found.steps_to(1e-300)]).all()
    assert found.violations[0, 0, :, -1].all() and found.success()[0, 0] == 0


def test_a_run_that_stands_still_keeps_its_last_loss(x32):
    """Once no bit changes the run ends; the rest of the row is where it stands."""
    found = deep_linear_width(X.astype("f4"), NOISY.astype("f4"), depths=[1], widths=[1], seeds=[0, 1], steps=20_000)
    assert found.gaps.dtype == np.float32
    assert np.isfinite(found.gaps).all()
    assert (found.ratio < 1e-10).all()
    assert (found.gaps[..., -1:] == found.gaps[..., 10_000:]).all()


def test_an_interrupt_ends_the_whole_grid(x64, monkeypatch):
    sweep = module.sweep

    def interrupted(*args, **kwargs):
        end = sweep(*args, **kwargs)
        return eqx.tree_at(lambda s: s.status.code, end, np.array([fl.Ending.INTERRUPTED]))

    monkeypatch.setattr(module, "sweep", interrupted)
    with pytest.raises(KeyboardInterrupt):
        deep_linear_width(X, Y, depths=[1], widths=[2], seeds=[0], steps=3)


def made_up(*rows):
    gaps = np.array(rows)[None, None]
    return WidthSweep((1,), (1,), tuple(range(len(rows))), 0.0, gaps, np.ones((1, 1, len(rows))), 0.6, 0.5)


def test_what_a_sweep_says_of_its_gaps():
    found = made_up([2.0, 1.0, 0.5, 0.25], [2.0, 1.4, 0.2, 0.44], [2.0, 1.9, 1.8, np.inf])
    np.testing.assert_allclose(found.ratio[0, 0], [0.125, 0.22, np.inf])
    np.testing.assert_array_equal(found.violations[0, 0], np.array([[0, 0, 0, 0], [0, 1, 0, 1], [0, 1, 1, 1]], bool))
    np.testing.assert_allclose(found.factor[0, 0], [0.5, 0.22 ** (1 / 3), np.inf])
    np.testing.assert_array_equal(found.steps_to(0.25)[0, 0], [2, 2, np.inf])
    np.testing.assert_allclose(found.success(0.2), [[1 / 3]])
    np.testing.assert_allclose(found.success(0.3), [[2 / 3]])


def test_rounding_is_no_violation_and_no_part_of_the_factor():
    found = made_up([1.0, 1e-10, 1e-20, 1e-30, 1e-30, 1e-30])
    np.testing.assert_allclose(found.factor, 1e-10)
    deep = dataclasses.replace(found, rate=1e-7)
    np.testing.assert_array_equal(deep.violations[0, 0, 0], [False] * 6)
    np.testing.assert_array_equal(dataclasses.replace(found, rate=1e-11).violations[0, 0, 0, :3], [False, True, True])


# ---- bad input ------------------------------------------------------------------------------------

GRID = {"depths": [2], "widths": [2], "steps": 1}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"depths": [2, 0]}, "depths: got 0; expected a whole number of at least 1"),
        ({"widths": [1.5]}, "widths: got 1.5"),
        ({"widths": []}, "widths: got none; expected at least one"),
        ({"seeds": []}, "seeds: got none"),
        ({"seeds": [-1]}, "seeds: got -1"),
        ({"steps": 0}, "steps: got 0"),
        ({"step_scale": 0.0}, "step_scale: got 0.0; expected a finite number above 0"),
        ({"step_scale": np.inf}, "step_scale: got inf"),
    ],
)
def test_a_grid_that_cannot_be_run_is_refused(changes, message, x64):
    with pytest.raises(fl.InputError) as raised:
        deep_linear_width(X, Y, **{**GRID, **changes})
    assert str(raised.value).startswith(message)


@pytest.mark.parametrize(
    ("inputs", "targets", "message"),
    [
        (np.zeros((3, 5)), Y, r"X: got float64\[3,5\] of rank 0; expected a matrix that is not zero"),
        (np.where(X > 1, np.nan, X), Y, r"X: got float64\[3,5\] with NaN or infinity"),
        (X, np.where(Y > 1, np.inf, Y), r"Y: got float64\[2,5\] with NaN or infinity"),
        (X, Y[:, :4], r"Y: got float64\[2,4\]; expected 5 columns"),
        (X, Y[0], r"Y: got float64\[5\]; expected a real floating array of two axes"),
        (np.ones((3, 5), int), Y, r"X: got int64\[3,5\]"),
        (X.tolist(), Y, r"X: got list"),
        (X[:0], Y, r"X: got float64\[0,5\]"),
    ],
)
def test_data_that_are_no_matrices_are_refused(inputs, targets, message, x64):
    with pytest.raises(fl.InputError, match=message):
        DeepLinear(inputs, targets)


def test_float64_data_need_64_bit_mode(x32):
    with pytest.raises(fl.InputError, match=r"X: got float64\[3,5\]; expected float32"):
        deep_linear_width(X, Y, **GRID)
    with pytest.raises(fl.InputError, match=r"Y: got float64\[2,5\]; expected float32"):
        DeepLinear(X.astype("f4"), Y)


def test_traced_data_are_refused(x64):
    with pytest.raises(fl.InputError, match="X: got a traced value"):
        jax.jit(lambda X: DeepLinear(X, Y).value(weights(2, 2)))(X)


@pytest.mark.parametrize("start", [[], [np.ones((2, 4))], [np.ones((4, 3)), np.ones((2, 5))], [np.ones(3)], np.ones(3)])
def test_weights_that_do_not_fit_are_refused(start, x64):
    with pytest.raises(fl.InputError, match=r"x0: got .*; expected a list of matrices .* the shape \(2, 3\)"):
        DeepLinear(X, Y).value(start)


@pytest.mark.parametrize("name", ["d_in", "width", "depth", "d_out"])
def test_sizes_below_one_are_refused(name):
    sizes = {"d_in": 3, "width": 3, "depth": 3, "d_out": 3, name: 0}
    with pytest.raises(fl.InputError, match=f"{name}: got 0"):
        initial_weights(0, **sizes)


@pytest.mark.parametrize("bad", [0.0, -1.0, np.nan, np.inf])
def test_step_sizes_that_are_not_positive_are_refused(bad):
    for function in (certified_rate, infinite_width_factor):
        with pytest.raises(fl.InputError, match="step_size: got"):
            function(DIAGONAL, 2, 2, bad)


@pytest.mark.parametrize("function", [step_size, lambda X, depth, d_out: certified_rate(X, depth, d_out, 1e-3)])
def test_depths_and_outputs_below_one_are_refused(function):
    with pytest.raises(fl.InputError, match="depth: got 0"):
        function(DIAGONAL, 0, 2)
    with pytest.raises(fl.InputError, match="d_out: got 0"):
        function(DIAGONAL, 2, 0)
    with pytest.raises(fl.InputError, match="of rank 0"):
        function(0 * DIAGONAL, 2, 2)


@pytest.mark.parametrize(
    ("name", "bad"),
    [("depth", 0), ("rank", 0), ("d_out", 0), ("kappa", 0.9), ("kappa", np.nan), ("phi_norm", -1.0)]
    + [("delta", 0.0), ("delta", 1.0), ("C", 0.0)],
)
def test_arguments_of_the_width_out_of_range_are_refused(name, bad):
    good = {"depth": 2, "rank": 2, "kappa": 2.0, "d_out": 2, "phi_norm": 1.0, "delta": 0.1}
    with pytest.raises(fl.InputError, match=f"{name}: got"):
        required_width(**{**good, name: bad})
