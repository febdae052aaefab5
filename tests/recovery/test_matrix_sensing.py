"""Matrix sensing: its methods against their formulas in NumPy, and what the driver refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fallline as fl
from fallline.recovery.alternating_least_squares import alternating_least_squares
from fallline.recovery.matrix_sensing import METHODS, matrix_sensing, small_random
from fallline.recovery.operators import Dense
from fallline.recovery.problem import Recovery
from fallline.recovery.scaled_gradient import scale_by_factor_grams, scaled_gradient
from fallline.recovery.singular_value_projection import singular_value_projection
from fallline.recovery.starts import spectral
from fallline.recovery.structures import PSD, Factors, TwoFactors

pytestmark = pytest.mark.usefixtures("x64")

N1, N2, R, M = 9, 7, 2, 160
RNG = np.random.default_rng(0)
ROWS = RNG.standard_normal((M, N1 * N2)) / np.sqrt(M)
SQUARE = RNG.standard_normal((M, N1 * N1)) / np.sqrt(M)
LEFT, RIGHT = RNG.standard_normal((N1, R)), RNG.standard_normal((N2, R))
MATRIX, PSD_MATRIX = LEFT @ RIGHT.T, LEFT @ LEFT.T
Y, PSD_Y = ROWS @ MATRIX.ravel(), SQUARE @ PSD_MATRIX.ravel()
with jax.enable_x64(True):
    OP, SQUARE_OP = Dense(jnp.asarray(ROWS), (N1, N2)), Dense(jnp.asarray(SQUARE), (N1, N1))
    START = Factors(jnp.asarray(0.5 * LEFT + 0.1), jnp.asarray(RIGHT - 0.3))
    VECTORS_ONLY, COMPLEX = Dense(OP.matrix), Dense(OP.matrix + 0j, (N1, N2))


def gain(rows):
    """The mean eigenvalue of A*A."""
    return (rows**2).sum() / rows.shape[1]


def back(rows, residual, shape):
    """A* of the residual, with A*A the identity on average."""
    return (residual @ rows).reshape(shape) / gain(rows)


def largest(rows, y, shape):
    """σ₁ of A*(y)."""
    return np.linalg.norm(back(rows, y, shape), 2)


def relative_error(matrix, truth):
    return np.linalg.norm(matrix - truth) / np.linalg.norm(truth)


def product(x):
    return np.asarray(x.left @ x.right.T)


# ---- gradient descent -----------------------------------------------------------------------------


def test_gradient_descent_is_the_papers_with_both_factors_at_once():
    """λ = 1/2, with the step c/σ₁."""
    left, right = np.array(START.left), np.array(START.right)
    eta = 0.3 / largest(ROWS, Y, (N1, N2))
    for _ in range(7):
        e = back(ROWS, ROWS @ (left @ right.T).ravel() - Y, (N1, N2))
        b = left.T @ left - right.T @ right
        left, right = (
            left - eta * (e @ right + 0.25 * left @ b),
            right - eta * (e.T @ left - 0.25 * right @ b),
        )
    end = matrix_sensing(OP, jnp.asarray(Y), R, init=START, step_size=0.3, balance=0.5, steps=7, stop=None)
    np.testing.assert_allclose(end.x.left, left, rtol=1e-9)
    np.testing.assert_allclose(end.x.right, right, rtol=1e-9)


def test_gradient_descent_on_one_factor_symmetrizes_the_back_projection():
    x = np.array(START.left)
    eta = 0.3 / largest(SQUARE, PSD_Y, (N1, N1))
    for _ in range(7):
        e = back(SQUARE, SQUARE @ (x @ x.T).ravel() - PSD_Y, (N1, N1))
        x = x - eta * (e + e.T) / 2 @ x
    end = matrix_sensing(SQUARE_OP, jnp.asarray(PSD_Y), R, psd=True, init=START.left, step_size=0.3, steps=7, stop=None)
    np.testing.assert_allclose(end.x, x, rtol=1e-9)


@pytest.mark.parametrize("psd", [False, True])
def test_the_gradient_is_that_of_finite_differences(psd):
    structure = PSD(R) if psd else TwoFactors(R, balance=0.7)
    problem = Recovery(SQUARE_OP if psd else OP, jnp.asarray(PSD_Y if psd else Y), structure)
    x = START.left if psd else START
    v = jax.tree.map(lambda a: jnp.asarray(np.random.default_rng(1).standard_normal(a.shape)), x)
    h = 1e-5
    ahead, behind = (problem.value(jax.tree.map(lambda a, d, s=s: a + s * h * d, x, v)) for s in (1, -1))
    slope = sum(float(jnp.vdot(g, d)) for g, d in zip(*map(jax.tree.leaves, (problem.gradient(x), v)), strict=True))
    np.testing.assert_allclose(slope, float(ahead - behind) / (2 * h), rtol=1e-7)


def test_the_value_is_half_the_squared_residual_and_the_penalty_over_sigma_one():
    left, right = np.array(START.left), np.array(START.right)
    residual = ROWS @ (left @ right.T).ravel() - Y
    apart = left.T @ left - right.T @ right
    loss = 0.5 * residual @ residual / gain(ROWS) + 0.7 / 8 * (apart**2).sum()
    problem = Recovery(OP, jnp.asarray(Y), TwoFactors(R, balance=0.7))
    np.testing.assert_allclose(problem.value(START), loss / largest(ROWS, Y, (N1, N2)), rtol=1e-6)


def test_spectral_start():
    u, s, vt = np.linalg.svd(back(ROWS, Y, (N1, N2)))
    x = spectral(Recovery(OP, jnp.asarray(Y), TwoFactors(R)), jax.random.key(0))
    np.testing.assert_allclose(product(x), u[:, :R] * s[:R] @ vt[:R], atol=1e-6)
    np.testing.assert_allclose(x.left.T @ x.left, np.diag(s[:R]), atol=1e-6)
    np.testing.assert_allclose(x.right.T @ x.right, np.diag(s[:R]), atol=1e-6)


def test_spectral_start_of_one_factor_has_no_negative_eigenvalue():
    e = back(SQUARE, PSD_Y, (N1, N1))
    values, vectors = np.linalg.eigh((e + e.T) / 2)
    rank = 6
    kept = np.maximum(values[::-1][:rank], 0)
    x = spectral(Recovery(SQUARE_OP, jnp.asarray(PSD_Y), PSD(rank)), jax.random.key(0))
    vectors = vectors[:, ::-1][:, :rank]
    assert values[::-1][rank - 1] < 0
    np.testing.assert_allclose(x @ x.T, vectors * kept @ vectors.T, atol=1e-6)


# ---- the other methods ----------------------------------------------------------------------------


def test_scaled_gradient_is_the_formula():
    left, right = np.array(START.left), np.array(START.right)
    for _ in range(5):
        e = back(ROWS, ROWS @ (left @ right.T).ravel() - Y, (N1, N2))
        left, right = (
            left - 0.5 * e @ right @ np.linalg.inv(right.T @ right),
            right - 0.5 * e.T @ left @ np.linalg.inv(left.T @ left),
        )
    end = matrix_sensing(OP, jnp.asarray(Y), R, method="scaled", init=START, steps=5, stop=None)
    np.testing.assert_allclose(end.x.left, left, rtol=1e-8)
    np.testing.assert_allclose(end.x.right, right, rtol=1e-8)


def test_scaled_gradient_of_one_factor_is_the_formula():
    x = np.array(START.left)
    for _ in range(5):
        e = back(SQUARE, SQUARE @ (x @ x.T).ravel() - PSD_Y, (N1, N1))
        x = x - 0.4 * (e + e.T) / 2 @ x @ np.linalg.inv(x.T @ x)
    end = matrix_sensing(
        SQUARE_OP, jnp.asarray(PSD_Y), R, psd=True, method="scaled", init=START.left, step_size=0.4, steps=5, stop=None
    )
    np.testing.assert_allclose(end.x, x, rtol=1e-8)


def test_scaled_products_do_not_see_how_the_factors_share_them():
    turn = jnp.asarray([[3.0, 1.0], [0.5, 2.0]])
    other = Factors(START.left @ turn, START.right @ jnp.linalg.inv(turn).T)
    ends = [
        matrix_sensing(OP, jnp.asarray(Y), R, method="scaled", init=x, steps=5, stop=None).x for x in (START, other)
    ]
    np.testing.assert_allclose(product(ends[0]), product(ends[1]), rtol=1e-8)


def test_scaling_is_a_transformation_of_any_gradient():
    gradient = Factors(jnp.ones((N1, R)), jnp.ones((N2, R)))
    update = scale_by_factor_grams()
    scaled, _ = update.update(gradient, update.init(START), START)
    np.testing.assert_allclose(scaled.left @ (START.right.T @ START.right), gradient.left, rtol=1e-10)
    np.testing.assert_allclose(scaled.right @ (START.left.T @ START.left), gradient.right, rtol=1e-10)
    alone, _ = update.update(gradient.left, update.init(START.left), START.left)
    np.testing.assert_allclose(alone @ (START.left.T @ START.left), gradient.left, rtol=1e-10)

    def loss(x):
        return jnp.sum((x.left @ x.right.T - MATRIX) ** 2) / 2

    descent = fl.optimizer(optax.chain(scale_by_factor_grams(), optax.scale_by_learning_rate(0.5)))
    end = fl.minimize(loss, START, descent, steps=60, stop=None)
    assert relative_error(product(end.x), MATRIX) < 1e-12


def test_scaled_gradient_does_not_see_the_condition_number():
    """Between matrices of condition 1 and 100 the decay per step is the same; that of gradient descent is not."""
    u, v = np.linalg.qr(LEFT)[0], np.linalg.qr(RIGHT)[0]
    decay = {"scaled": [], "gradient": []}
    for kappa in (1.0, 100.0):
        y = jnp.asarray(ROWS @ (u * np.array([1, 1 / kappa]) @ v.T).ravel())
        for method, found in decay.items():
            values = matrix_sensing(OP, y, R, method=method, steps=30, stop=None).history["value"]
            found.append(np.log(values[15] / values[30]))
    assert abs(decay["scaled"][1] / decay["scaled"][0] - 1) < 0.15
    assert decay["gradient"][1] < 0.2 * decay["gradient"][0]


def test_projection_is_the_truncated_svd_of_a_gradient_step():
    matrix = product(START)
    for _ in range(4):
        moved = matrix - 0.6 * back(ROWS, ROWS @ matrix.ravel() - Y, (N1, N2))
        u, s, vt = np.linalg.svd(moved)
        matrix = u[:, :R] * s[:R] @ vt[:R]
    end = matrix_sensing(OP, jnp.asarray(Y), R, method="projection", init=START, step_size=0.6, steps=4, stop=None)
    np.testing.assert_allclose(product(end.x), matrix, atol=1e-9)
    np.testing.assert_allclose(end.x.left.T @ end.x.left, end.x.right.T @ end.x.right, atol=1e-9)


def test_projection_says_value_and_gradient_of_its_point():
    problem = Recovery(OP, jnp.asarray(Y), TwoFactors(R, balance=0.7))
    for steps in (0, 3):
        end = fl.minimize(problem, START, singular_value_projection(), steps=steps, stop=None)
        value, gradient = problem.value_and_gradient(end.x)
        np.testing.assert_allclose(end.value, value, rtol=1e-10)
        np.testing.assert_allclose(end.gradient_norm, optax.tree.norm(gradient), rtol=1e-10)


def test_projection_without_isometry_diverges_and_says_so():
    few = 40
    op, y = Dense(jnp.asarray(ROWS[:few]), (N1, N2)), jnp.asarray(Y[:few])
    with pytest.warns(UserWarning, match=r"40 measurements are 1\.4 times the 28 degrees of freedom"):
        end = matrix_sensing(op, y, R, method="projection", steps=500, step_size=3.0)
    assert end.status.ending is fl.Ending.DIVERGED
    assert np.isfinite(end.value) and int(end.steps) < 100


def test_alternating_ends_each_step_with_the_best_left_factor():
    """Solved to 1e-12, a step is two least-squares problems, for which NumPy has a solver."""
    columns = ROWS.reshape(M, N1, N2)
    left = np.array(START.left)
    right = np.linalg.lstsq(np.einsum("mij,ir->mjr", columns, left).reshape(M, -1), Y, rcond=None)[0].reshape(N2, R)
    left = np.linalg.lstsq(np.einsum("mij,jr->mir", columns, right).reshape(M, -1), Y, rcond=None)[0].reshape(N1, R)
    problem = Recovery(OP, jnp.asarray(Y), TwoFactors(R))
    end = fl.minimize(problem, START, alternating_least_squares(1e-12, products=200), steps=1, stop=None)
    np.testing.assert_allclose(product(end.x), left @ right.T, atol=1e-9)
    np.testing.assert_allclose(end.x.left.T @ end.x.left, end.x.right.T @ end.x.right, atol=1e-9)


class CountedDense(Dense):
    """Counts its products."""

    def mv(self, x):
        jax.debug.callback(lambda: COUNTS.append("A"))
        return super().mv(x)

    def adjoint(self, v):
        jax.debug.callback(lambda: COUNTS.append("A*"))
        return super().adjoint(v)


COUNTS = []


@pytest.mark.parametrize("solver", [scaled_gradient(), singular_value_projection(), alternating_least_squares()])
def test_each_counted_gradient_is_one_product_with_a_and_one_with_its_adjoint(solver):
    problem = Recovery(CountedDense(jnp.asarray(ROWS), (N1, N2)), jnp.asarray(Y), TwoFactors(R, balance=0.0))
    jax.effects_barrier()
    COUNTS.clear()
    end = fl.minimize(problem, START, solver, steps=6, stop=None)
    jax.effects_barrier()
    assert end.calls.as_dict() == {"gradient": COUNTS.count("A")}
    assert COUNTS.count("A*") == COUNTS.count("A")


@pytest.mark.parametrize("init", ["spectral", "random"])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_recovers_from_both_starts(method, init):
    end = matrix_sensing(OP, jnp.asarray(Y), R, method=method, init=init, steps=3000)
    assert end.status.converged
    assert relative_error(product(end.x), MATRIX) < 1e-6


@pytest.mark.parametrize("init", ["spectral", "random"])
@pytest.mark.parametrize("method", ["gradient", "scaled", "lbfgs"])
def test_every_method_for_one_factor_recovers_from_both_starts(method, init):
    end = matrix_sensing(SQUARE_OP, jnp.asarray(PSD_Y), R, psd=True, method=method, init=init, steps=3000)
    assert end.status.converged
    assert relative_error(end.x @ end.x.T, PSD_MATRIX) < 1e-6


def test_small_random_start_is_in_units_of_the_data():
    problem = Recovery(OP, jnp.asarray(1e6 * Y), TwoFactors(R))
    x = small_random(problem, jax.random.key(0))
    spread = np.std(np.concatenate([np.ravel(x.left), np.ravel(x.right)]))
    np.testing.assert_allclose(spread / np.sqrt(largest(ROWS, 1e6 * Y, (N1, N2))), 0.01, rtol=0.3)


def test_single_precision():
    with jax.enable_x64(False):
        op = Dense(jnp.asarray(ROWS, jnp.float32), (N1, N2))
        for method in ("gradient", "projection"):
            end = matrix_sensing(op, jnp.asarray(Y, jnp.float32), R, method=method, steps=600)
            assert end.x.left.dtype == jnp.float32
            assert relative_error(product(end.x), MATRIX) < 1e-5, method


# ---- certificates ---------------------------------------------------------------------------------


def certified(y, x):
    return fl.certify(Recovery(SQUARE_OP, jnp.asarray(y), PSD(R)), x)


def minimizer(y):
    return matrix_sensing(SQUARE_OP, jnp.asarray(y), R, psd=True, method="lbfgs", stop=fl.gradient_norm(1e-10)).x


def test_certificate_of_a_solution_deflates_the_rotations():
    certificate = certified(PSD_Y, minimizer(PSD_Y))
    assert certificate.verdict is fl.Verdict.GLOBAL_MINIMUM
    assert certificate.symmetry_dimension == 1
    assert certificate.lower > 0  # off the rotations every direction curves upwards


def test_certificate_with_noise_is_a_minimum_modulo_rotations():
    """The value stays above its bound, so that curvature decides."""
    y = PSD_Y + 0.3 * np.random.default_rng(2).standard_normal(M)
    certificate = certified(y, minimizer(y))
    assert certificate.verdict is fl.Verdict.MINIMUM_MODULO_SYMMETRY
    assert certificate.symmetry_dimension == 1


def test_certificate_calls_a_saddle_a_saddle():
    """At X = 0 the curvature is that of −A*(y), over unit and gain."""
    e = back(SQUARE, PSD_Y, (N1, N1))
    certificate = certified(PSD_Y, jnp.zeros((N1, R)))
    assert certificate.verdict is fl.Verdict.STRICT_SADDLE
    lowest = -np.linalg.eigvalsh(e + e.T)[-1] / (2 * np.linalg.norm(e, 2))
    np.testing.assert_allclose(certificate.rayleigh, lowest, rtol=1e-6)
    problem = Recovery(SQUARE_OP, jnp.asarray(PSD_Y), PSD(R))
    assert problem.value(fl.escape(certificate)) < problem.value(jnp.zeros((N1, R)))


# ---- bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"rank": 0}, "rank: got 0"),
        ({"rank": 8}, "rank: got 8; expected at most the smaller dimension, 7"),
        ({"step_size": 0.0}, "step_size: got 0.0"),
        ({"step_size": -1.0}, "step_size: got -1.0"),
        ({"method": "lbfgs", "step_size": 1.0}, "step_size: got 1.0; expected None: lbfgs has no step size"),
        ({"method": "newton"}, "method: got 'newton'"),
        ({"method": "projection", "psd": True}, "method: got 'projection'; expected one of gradient, scaled, lbfgs"),
        ({"psd": True, "balance": 0.5}, "balance: got 0.5"),
        ({"balance": -1.0}, "balance: got -1.0"),
        ({"psd": True}, r"op: got an operator on matrices of shape \(9, 7\); expected square ones"),
        ({"y": np.zeros(M - 1)}, r"y: got float64\[159\]"),
        ({"y": np.where(np.arange(M) == 3, np.nan, Y)}, r"y: got nan at \[3\]"),
        ({"y": Y + 0j}, r"y: got complex128\[160\]"),
        ({"op": VECTORS_ONLY}, r"op: got an operator on signals of shape \(63,\)"),
        ({"op": COMPLEX}, "op: got a complex operator"),
    ],
)
def test_refused(options, said):
    arguments = {"op": OP, "y": jnp.asarray(Y), "rank": R, **options}
    with pytest.raises(fl.InputError, match=said):
        matrix_sensing(**arguments)


@pytest.mark.parametrize(
    ("build", "said"),
    [
        (lambda: scaled_gradient(0.0), "step_size"),
        (lambda: singular_value_projection(-1.0), "step_size"),
        (lambda: singular_value_projection(sweeps=0), "sweeps"),
        (lambda: alternating_least_squares(0.0), "tolerance"),
        (lambda: alternating_least_squares(1.0), "tolerance"),
        (lambda: alternating_least_squares(products=0), "products"),
        (lambda: scale_by_factor_grams().init({"w": jnp.ones((2, 2))}), "params"),
        (lambda: scale_by_factor_grams().update(START, optax.EmptyState()), "params"),
    ],
)
def test_refused_by_the_methods(build, said):
    with pytest.raises(fl.InputError, match=said):
        build()


@pytest.mark.parametrize("solver", [scaled_gradient(), singular_value_projection(), alternating_least_squares()])
def test_a_problem_without_factors_is_refused(solver):
    with pytest.raises(fl.InputError, match="problem: got Vector"):
        fl.minimize(Recovery(Dense(jnp.asarray(ROWS)), jnp.asarray(Y)), jnp.ones(N1 * N2), solver)


def test_symmetric_measurements_are_warned_of():
    rows = SQUARE.reshape(M, N1, N1)
    rows = ((rows + rows.transpose(0, 2, 1)) / 2).reshape(M, -1)
    matrix = LEFT @ RNG.standard_normal((R, N1))
    op, y = Dense(jnp.asarray(rows), (N1, N1)), jnp.asarray(rows @ matrix.ravel())
    with pytest.warns(UserWarning, match="all its measurement matrices are symmetric"):
        end = matrix_sensing(op, y, R, steps=50)
    assert relative_error(product(end.x), matrix) > 0.1
    y = jnp.asarray(rows @ PSD_MATRIX.ravel())
    end = matrix_sensing(op, y, R, psd=True)  # here they are welcome
    assert relative_error(end.x @ end.x.T, PSD_MATRIX) < 1e-6
