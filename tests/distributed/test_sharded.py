"""The problem of many workers: the mean over all rows, in closed form and as a finite sum; how rows are dealt out."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fallline import FiniteSum, minimize, optimizer
from fallline.core.errors import InputError
from fallline.distributed import Gradient, Mean, Round, Sharded, Step, mesh_of, shard
from fallline.parts.codecs import Plain

WORKERS, EACH, D = 3, 4, 5
DRAWN = np.random.default_rng(11)
A = DRAWN.normal(size=(WORKERS, EACH, D))
B = DRAWN.normal(size=(WORKERS, EACH))
X = DRAWN.normal(size=D)
V = DRAWN.normal(size=D)


def cubes(x, batch):
    rows, sides = batch
    return (rows @ x - sides) ** 3 / 6


def closed(x, v):
    """Value, gradient and Hessian times v of the mean of (a·x − b)³/6."""
    a, b = A.reshape(-1, D), B.reshape(-1)
    r = a @ x - b
    return np.mean(r**3) / 6, a.T @ r**2 / 2 / len(b), a.T @ (r * (a @ v)) / len(b)


def problem(**options):
    return Sharded(cubes, (A, B), **options)


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("laid_out", [False, True])
def test_oracles_in_closed_form(exact, laid_out, x64):
    """Simulated, and on a mesh of one device."""
    sharded = problem(exact=exact, mesh=mesh_of() if laid_out else None)
    rest = FiniteSum(cubes, (A.reshape(-1, D), B.reshape(-1)))

    @jax.jit
    def ask(x, v):
        ours = sharded.value(x), sharded.gradient(x), sharded.hvp(x, v)
        return ours, (rest.value(x), rest.gradient(x), rest.hvp(x, v)), sharded.hessian(x)(v)

    ours, of_the_sum, product = ask(X, V)
    for one, other, expected in zip(ours, of_the_sum, closed(X, V), strict=True):
        np.testing.assert_allclose(one, expected, rtol=1e-12)
        np.testing.assert_allclose(one, other, rtol=1e-12)
    np.testing.assert_allclose(product, ours[2], rtol=1e-12)


def test_what_one_worker_is_asked(x64):
    value, gradient = problem().ask(jnp.asarray(X), (jnp.asarray(A[1]), jnp.asarray(B[1])), None)
    r = A[1] @ X - B[1]
    np.testing.assert_allclose(value, np.mean(r**3) / 6, rtol=1e-12)
    np.testing.assert_allclose(gradient, A[1].T @ r**2 / 2 / EACH, rtol=1e-12)


@pytest.mark.parametrize("exact", [False, True])
def test_a_minibatch_is_drawn_by_each_worker_for_itself(exact, x64):
    """The rows that `fold_in(key, worker)` draws, with NumPy's gradient of them."""
    sharded, key = problem(batch_size=2, exact=exact), jax.random.key(4)
    assert sharded.random and not problem().random
    expected = []
    for worker in range(WORKERS):
        rows = np.asarray(jax.random.randint(jax.random.fold_in(key, worker), (2,), 0, EACH))
        r = A[worker][rows] @ X - B[worker][rows]
        expected.append((np.mean(r**3) / 6, A[worker][rows].T @ r**2 / 4))
    value, gradient = jax.jit(lambda x, key: sharded.minibatch(x, key))(X, key)
    np.testing.assert_allclose(value, np.mean([e[0] for e in expected]), rtol=1e-12)
    np.testing.assert_allclose(gradient, np.mean([e[1] for e in expected], axis=0), rtol=1e-12)


def test_minibatches_are_unbiased(x64):
    """The mean of 4,000 gradients, within five of its standard errors."""
    sharded = problem(batch_size=1)
    keys = jax.random.split(jax.random.key(0), 4000)
    drawn = np.asarray(jax.jit(jax.vmap(lambda key: sharded.minibatch(jnp.asarray(X), key)[1]))(keys))
    assert np.all(np.abs(drawn.mean(0) - closed(X, V)[1]) < 5 * drawn.std(0) / np.sqrt(4000))


def test_a_pytree_of_mixed_leaves(x64):
    """The gradient of every leaf, against that of all of them as one vector."""

    def loss(x, batch):
        return cubes(jnp.concatenate([x["a"].reshape(-1), x["b"][None]]), batch)

    sharded = Sharded(loss, (A, B))
    x = {"a": jnp.asarray(X[:4].reshape(2, 2)), "b": jnp.asarray(X[4])}
    gradient = sharded.gradient(x)
    np.testing.assert_allclose(gradient["a"].reshape(-1), closed(X, V)[1][:4], rtol=1e-12)
    np.testing.assert_allclose(gradient["b"], closed(X, V)[1][4], rtol=1e-12)


def test_complex_points(x64):
    """f = mean |a·z − b|²: the steepest ascent is 2 mean conj(a) (a·z − b)."""
    a, b = A + 1j * A[::-1], B - 0.5j * B
    z = X + 1j * V
    sharded = Sharded(lambda z, batch: jnp.abs(batch[0] @ z - batch[1]) ** 2, (a, b))
    flat, sides = a.reshape(-1, D), b.reshape(-1)
    r = flat @ z - sides
    np.testing.assert_allclose(sharded.value(jnp.asarray(z)), np.mean(np.abs(r) ** 2), rtol=1e-12)
    np.testing.assert_allclose(sharded.gradient(jnp.asarray(z)), 2 * flat.conj().T @ r / len(sides), rtol=1e-12)


class Line(eqx.Module):
    """A model with an activation and an integer buffer, which are no parameters."""

    weight: jax.Array
    order: jax.Array
    act: object = eqx.field(static=True)

    def __call__(self, rows):
        return self.act(rows[:, self.order] @ self.weight)


@pytest.mark.parametrize("laid_out", [False, True])
def test_a_model_is_a_point(laid_out, x64):
    """Gradient descent in NumPy on its weights; what is no parameter stays."""

    def loss(model, batch):
        return (model(batch[0]) - batch[1]) ** 2 / 2

    order = np.array([4, 3, 2, 1, 0])
    model = Line(jnp.asarray(X), jnp.asarray(order), jnp.tanh)
    sharded = Sharded(loss, (A, B), mesh=mesh_of() if laid_out else None)
    server = Step(optax.sgd, learning_rate=0.1)
    solution = minimize(sharded, model, Round(Gradient(), Plain(), Mean(), None, server), steps=3)
    rows, sides, w = A.reshape(-1, D)[:, order], B.reshape(-1), X.copy()
    for _ in range(3):
        h = np.tanh(rows @ w)
        w = w - 0.1 * rows.T @ ((h - sides) * (1 - h**2)) / len(sides)
    assert isinstance(solution.x, Line) and solution.x.act is jnp.tanh
    np.testing.assert_allclose(solution.x.weight, w, rtol=1e-12)
    np.testing.assert_array_equal(solution.x.order, order)


def test_any_solver_takes_it(x64):
    """A method for one machine: least squares to the end, which NumPy knows."""
    sharded = Sharded(lambda x, batch: (batch[0] @ x - batch[1]) ** 2 / 2, (A, B), lower_bound=0.0)
    solution = minimize(sharded, X, optimizer(optax.lbfgs), steps=100)
    assert solution.status.name == "converged"
    np.testing.assert_allclose(solution.x, np.linalg.lstsq(A.reshape(-1, D), B.reshape(-1), rcond=None)[0], atol=1e-6)
    assert sharded.lower_bound == 0 and sharded.size == EACH and sharded.workers.count == WORKERS


# --- how rows are dealt out ----------------------------------------------------------------------------------------


def test_rows_are_dealt_in_turn():
    """Row j to worker j mod 3; the eleventh is left over after equal shares."""
    data = {"x": np.arange(22).reshape(11, 2), "y": jnp.arange(11)}
    dealt = shard(data, 3)
    np.testing.assert_array_equal(dealt["y"], [[0, 3, 6], [1, 4, 7], [2, 5, 8]])
    np.testing.assert_array_equal(dealt["x"], data["x"][np.asarray(dealt["y"])])
    np.testing.assert_array_equal(shard(np.arange(4), 4), [[0], [1], [2], [3]])


def test_rows_are_dealt_by_a_label():
    """Sorted, ties in order, then in stretches: each worker has few labels."""
    labels = np.array([2, 0, 1, 0, 2, 1, 0, 1])
    dealt = shard((np.arange(8), labels), 4, by=labels)
    np.testing.assert_array_equal(dealt[1], [[0, 0], [0, 1], [1, 1], [2, 2]])
    np.testing.assert_array_equal(dealt[0], [[1, 3], [6, 2], [5, 7], [0, 4]])


def test_dtypes_stay():
    for dtype in (np.float16, jnp.bfloat16, np.float64, np.int8, bool):
        assert shard(np.ones(4, dtype), 2).dtype == dtype


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: shard(np.ones(3), 4), "workers: got 4; expected at most the number of examples, 3"),
        (lambda: shard(np.ones(3), 0), "workers: got 0; expected a whole number of at least 1"),
        (lambda: shard((), 2), "data: got a pytree without leaves"),
        (lambda: shard((np.ones(4), np.ones(6)), 2), r"data: got float64\[4\], float64\[6\]; .* one leading axis"),
        (lambda: shard((np.ones(4), 1.0), 2), r"data: got float64\[4\], float; expected"),
        (lambda: shard(np.ones(4), 2, by=np.ones(3)), r"by: got shape \(3,\); expected one number for each of 4 "),
    ],
)
def test_rows_that_cannot_be_dealt(make, words):
    with pytest.raises(InputError, match=words):
        make()


# --- bad input -----------------------------------------------------------------------------------------------------

ROWS = np.ones((4, 3, 2), np.float32)


def ones(x, batch):
    return batch @ x


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Sharded("loss", ROWS), "loss: got str; expected a callable"),
        (lambda: Sharded(ones, ()), "data: got a pytree without leaves; expected arrays"),
        (lambda: Sharded(ones, np.ones(4)), r"data: got float64\[4\]; expected arrays \(workers, examples, …\)"),
        (lambda: Sharded(ones, (ROWS, np.ones((4, 2)))), r"data: got float32\[4,3,2\], float64\[4,2\]; .*equal shards"),
        (lambda: Sharded(ones, (ROWS, np.ones((3, 3)))), "data: got .*; expected arrays .* that share both axes"),
        (lambda: Sharded(ones, [np.ones((3, 2)), np.ones((2, 2))]), "of equal shards"),
        (lambda: Sharded(ones, np.ones((4, 0))), r"data: got float64\[4,0\]"),
        (lambda: Sharded(ones, ROWS, 0), "batch_size: got 0; expected a whole number of at least 1"),
        (lambda: Sharded(ones, ROWS, 4), "batch_size: got 4; expected at most the examples of a worker, 3"),
        (lambda: Sharded(ones, ROWS, mesh="all"), "mesh: got str; expected a mesh with one axis named 'workers'"),
    ],
)
def test_bad_input(make, words):
    with pytest.raises(InputError, match=words):
        make()


def sgd_round():
    return Round(Gradient(), Plain(), Mean(), None, Step(optax.sgd, learning_rate=0.1))


@pytest.mark.parametrize(
    ("loss", "words"),
    [
        (lambda x, batch: jnp.sum(batch @ x), r"loss: got float32\[\] from 3 rows; expected one real loss a row"),
        (lambda x, batch: batch @ x > 0, r"loss: got bool\[3\] from 3 rows; expected one real loss a row: float\[3\]"),
        (lambda x, batch: batch @ x[:1], "problem: got Sharded.* which fails at x0 with TypeError"),
    ],
)
def test_a_loss_that_is_none(loss, words):
    with pytest.raises(InputError, match=words):
        minimize(Sharded(loss, ROWS), np.ones(2, np.float32), sgd_round(), steps=1)


def test_a_problem_without_workers(x32):
    with pytest.raises(InputError, match="problem: got FiniteSum.* without the oracle 'workers'"):
        minimize(FiniteSum(ones, ROWS[0]), np.ones(2, np.float32), sgd_round(), steps=1)


@pytest.mark.parametrize(
    ("x0", "words"),
    [
        (np.ones(2, np.int32), r"x0: got int32\[2\]; expected a floating or complex array"),
        ({"w": np.ones(2, np.float32), "n": 3}, r"x0\['n'\]: got int; expected a floating"),
        (np.array([1, np.nan], np.float32), "x0: got .* with 1 NaN"),
    ],
)
def test_points_that_cannot_be_optimized(x0, words):
    with pytest.raises(InputError, match=words):
        minimize(Sharded(ones, ROWS), x0, sgd_round(), steps=1)


def test_data_are_never_narrowed_silently(x32):
    """Where they are laid out on devices that is at once, else when a run begins."""
    wide = ROWS.astype(np.float64)
    with pytest.raises(InputError, match=r"data.*: got float64\[4,3,2\]; expected float32"):
        Sharded(ones, wide, mesh=mesh_of())
    with pytest.raises(InputError, match=r"got float64\[4,3,2\]; expected float32"):
        minimize(Sharded(ones, wide), np.ones(2, np.float32), sgd_round(), steps=1)
    bad = np.where(np.arange(24).reshape(4, 3, 2) == 7, np.nan, ROWS)
    for mesh in (None, mesh_of()):
        with pytest.raises(InputError, match="with 1 NaN"):
            minimize(Sharded(ones, bad.astype(np.float32), mesh=mesh), np.ones(2, np.float32), sgd_round(), steps=1)


def test_a_batch_size_is_a_whole_number():
    assert Sharded(ones, ROWS, 2.0).batch_size == 2 and isinstance(Sharded(ones, ROWS, 2.0).batch_size, int)
