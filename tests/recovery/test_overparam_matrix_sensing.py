"""Over-parameterized sensing: the paper's iterates in NumPy, what the change of factors keeps, and its rates."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fallline as fl
from fallline.recovery.operators import Dense
from fallline.recovery.overparam_matrix_sensing import orthogonalized, overparam_matrix_sensing
from fallline.recovery.problem import Recovery
from fallline.recovery.starts import random
from fallline.recovery.structures import PSD, Factors, TwoFactors

pytestmark = pytest.mark.usefixtures("x64")

N, RANK, K = 8, 2, 4
RNG = np.random.default_rng(0)
BASIS = np.linalg.qr(RNG.standard_normal((N, RANK)))[0]
MATRIX = 3 * BASIS @ BASIS.T
ROWS = RNG.standard_normal((600, N * N)) / np.sqrt(600)
with jax.enable_x64(True):
    EVERY, SENSED = Dense(jnp.eye(N * N), (N, N)), Dense(jnp.asarray(ROWS), (N, N))


def problem(op=None, k=K, balance=0.0):
    op = EVERY if op is None else op
    return Recovery(op, op.mv(jnp.asarray(MATRIX)), TwoFactors(k, balance))


def start(alpha=0.5, k=K):
    draw = np.random.default_rng(1)
    left, right = (alpha * np.sqrt(3 / N) * draw.standard_normal((N, k)) for _ in range(2))
    return Factors(jnp.asarray(left), jnp.asarray(right / 3))


def test_the_iterates_are_the_papers():
    """Plain steps, the change with D = diag(β/σ') at the first residual below the threshold, plain steps again."""
    op_gain = (ROWS**2).sum() / (N * N)
    y = ROWS @ MATRIX.ravel()
    sigma = np.linalg.norm((y @ ROWS).reshape(N, N) / op_gain, 2)
    eta, beta = 0.2 / sigma, 0.7 * np.sqrt(sigma)
    f, g = map(np.array, start())
    switched = None
    for step in range(60):
        residual = ROWS @ (f @ g.T).ravel() - y
        if switched is None and np.linalg.norm(residual) <= 0.1 * np.linalg.norm(y):
            _, sizes, bt = np.linalg.svd(f, full_matrices=False)
            f, g, switched = f @ bt.T * (beta / sizes), g @ bt.T * (sizes / beta), step
        e = (residual @ ROWS).reshape(N, N) / op_gain
        f, g = f - eta * e @ g, g - eta * e.T @ f
    assert switched is not None and 5 < switched < 55
    end = fl.minimize(problem(SENSED), start(), overparam_matrix_sensing(0.2, beta=0.7), steps=60, stop=None)
    assert end.state.switched_at == switched
    np.testing.assert_allclose(end.x.left @ end.x.right.T, f @ g.T, atol=1e-6)  # σ₁ is an iterative estimate
    np.testing.assert_allclose(end.x.left @ end.x.left.T, f @ f.T, atol=1e-6)


@pytest.mark.parametrize("rank", [4, 2])
def test_the_change_keeps_the_product_and_makes_the_left_factor_orthogonal(rank):
    """Where the left factor lacks full rank, too: there D of the paper is infinite."""
    left = RNG.standard_normal((N, rank)) @ RNG.standard_normal((rank, K))
    x = Factors(jnp.asarray(left), jnp.asarray(RNG.standard_normal((N, K))))
    changed = orthogonalized(x, 0.7)
    np.testing.assert_allclose(changed.left @ changed.right.T, x.left @ x.right.T, atol=1e-13)
    np.testing.assert_allclose(changed.left.T @ changed.left, 0.49 * np.eye(K), atol=1e-13)


def test_the_change_is_the_papers_where_the_left_factor_has_full_rank():
    x = start()
    _, sizes, bt = np.linalg.svd(x.left, full_matrices=False)
    changed = orthogonalized(x, 0.7)
    np.testing.assert_allclose(changed.left, x.left @ bt.T * (0.7 / sizes), rtol=1e-9)
    np.testing.assert_allclose(changed.right, x.right @ bt.T * (sizes / 0.7), rtol=1e-9)


def test_a_start_of_lower_rank_stays_finite():
    """Two equal columns: no step tells them apart, so that the change meets σ' = 0."""
    x = start()
    x = Factors(x.left.at[:, 3].set(x.left[:, 2]), x.right.at[:, 3].set(x.right[:, 2]))
    end = fl.minimize(problem(), x, overparam_matrix_sensing(0.2), steps=400, stop=None)
    assert int(end.state.switched_at) > 0
    assert np.linalg.norm(end.x.left @ end.x.right.T - MATRIX) < 1e-8


def test_the_state_is_of_its_point():
    solver = overparam_matrix_sensing(0.2)
    switched = int(fl.minimize(problem(), start(), solver, steps=60, stop=None).state.switched_at)
    for steps in (0, switched - 1, switched, switched + 1):
        end = fl.minimize(problem(), start(), solver, steps=steps, stop=None)
        value, gradient = problem().value_and_gradient(end.x)
        np.testing.assert_allclose(end.value, value, rtol=1e-9)
        np.testing.assert_allclose(end.gradient_norm, optax.tree.norm(gradient), rtol=1e-9)
        residual = np.linalg.norm(end.x.left @ end.x.right.T - MATRIX) / np.linalg.norm(MATRIX)
        np.testing.assert_allclose(end.state.residual, residual, rtol=1e-9)
        assert int(end.state.switched_at) == (switched if steps >= switched else -1)
        assert end.calls.as_dict() == {"gradient": steps + 1 + (steps >= switched)}


def test_until_the_change_it_is_gradient_descent_with_one_conservation_law():
    """FᵀF − GᵀG moves by η² times the square of the gradients in a step, and no more."""
    plain = fl.optimizer(optax.sgd, learning_rate=0.01)
    ours = overparam_matrix_sensing(0.01, threshold=1e-9)
    a, b = (fl.minimize(problem(), start(), solver, steps=100, stop=None) for solver in (plain, ours))
    np.testing.assert_allclose(a.x.left, b.x.left, rtol=1e-9)
    np.testing.assert_allclose(a.history["value"], b.history["value"], rtol=1e-9)

    def imbalance(x):
        return np.asarray(x.left.T @ x.left - x.right.T @ x.right)

    moved = np.abs(imbalance(b.x) - imbalance(start())).max()
    assert moved < 2e-2 * np.abs(imbalance(start())).max()
    finer = fl.minimize(problem(), start(), overparam_matrix_sensing(0.005, threshold=1e-9), steps=200, stop=None)
    np.testing.assert_allclose(np.abs(imbalance(finer.x) - imbalance(start())).max(), moved / 2, rtol=0.1)


@pytest.mark.parametrize("beta", [0.4, 0.8])
def test_the_rate_at_the_end_is_that_of_the_left_factors_smallest_singular_value(beta):
    """With A = Id the error obeys E ← E − η(F Fᵀ E + E G Gᵀ); its slowest part has rows that G does not reach."""
    end = fl.minimize(problem(), start(), overparam_matrix_sensing(0.2, beta=beta), steps=500, stop=None)
    values = end.history["value"]
    at = np.flatnonzero(values > 1e-18)[-1]
    slowest = np.linalg.svd(end.x.left, compute_uv=False)[-1] ** 2 / 3  # over σ₁
    assert 0.4 * beta**2 < slowest < 1.5 * beta**2
    predicted = -2 * 20 * np.log(1 - 0.2 * slowest)
    np.testing.assert_allclose(np.log(values[at - 20] / values[at]), predicted, rtol=0.02)


def test_a_penalty_of_the_structure_is_left_out():
    ends = [
        fl.minimize(problem(balance=balance), start(), overparam_matrix_sensing(0.2), steps=40, stop=None)
        for balance in (0.0, 0.5)
    ]
    np.testing.assert_array_equal(ends[0].x.left, ends[1].x.left)


def test_a_start_that_fits_is_changed_at_once():
    x = Factors(jnp.asarray(3 * BASIS), jnp.asarray(BASIS))
    end = fl.minimize(problem(k=2), x, overparam_matrix_sensing(0.2, beta=0.5), steps=0, stop=None)
    assert end.state.switched_at == 0
    np.testing.assert_allclose(end.x.left.T @ end.x.left, 0.25 * 3 * np.eye(2), atol=1e-8)


def test_the_documented_start_is_imbalanced():
    x = random(0.2, ratio=1 / 3)(problem(k=8), jax.random.key(0))
    np.testing.assert_allclose([np.std(x.left), np.std(x.right)], [0.2, 0.2 / 3], rtol=0.3)
    np.testing.assert_allclose(np.std(x.left) / np.std(x.right), 3, rtol=0.4)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"step_size": 0.0}, "step_size: got 0.0"),
        ({"beta": 0.0}, "beta: got 0.0"),
        ({"beta": -1.0}, "beta: got -1.0"),
        ({"threshold": 1.0}, "threshold: got 1.0"),
        ({"threshold": 0.0}, "threshold: got 0.0"),
    ],
)
def test_refused(options, said):
    with pytest.raises(fl.InputError, match=said):
        overparam_matrix_sensing(**options)


def test_other_structures_are_refused():
    with pytest.raises(fl.InputError, match="problem: got PSD and Squared"):
        fl.minimize(Recovery(EVERY, EVERY.mv(jnp.asarray(MATRIX)), PSD(K)), start().left, overparam_matrix_sensing())
