"""Problems: oracles against finite differences and closed forms, and what `bind` refuses."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fallline as fl
from fallline.core import trees
from fallline.core.problem import Problem, bind, check_needs

DRAW = np.random.default_rng(0)
SGD = fl.optimizer(optax.sgd, learning_rate=0.1)


def bound(problem, x, **kwargs):
    point, rebuild = trees.split(x)
    return bind(problem, point, rebuild, **kwargs)


def central(fn, x, v, h):
    """(f(x + hv) − f(x − hv)) / 2h, leaf by leaf."""
    ahead, behind = (fn(jax.tree.map(lambda a, b, t=t: a + t * b, x, v)) for t in (h, -h))
    return jax.tree.map(lambda a, b: (a - b) / (2 * h), ahead, behind)


def inner(u, v):
    """Re⟨u, v⟩ over all leaves."""
    pairs = zip(jax.tree.leaves(u), jax.tree.leaves(v), strict=True)
    return sum(float(np.sum((np.conj(a) * np.asarray(b)).real)) for a, b in pairs)


# --- oracles --------------------------------------------------------------------------------------


def fit(x, rows, targets):
    return jnp.mean((jnp.tanh(rows @ x["w"] + x["b"]) - targets) ** 2) + 0.1 * jnp.sum(x["w"] ** 4)


FIT = {"w": DRAW.normal(size=(3, 2)), "b": DRAW.normal(size=2)}
DATA = (DRAW.normal(size=(7, 3)), DRAW.uniform(-1, 1, size=(7, 2)))


def directions(x, count=3):
    draw = np.random.default_rng(1)
    return [jax.tree.map(lambda a: draw.normal(size=a.shape), x) for _ in range(count)]


def products(problem):
    """Gradient and the two ways to a Hessian product, compiled."""
    return (
        jax.jit(lambda x: problem.gradient(x)),
        jax.jit(lambda x, v: problem.hvp(x, v)),
        jax.jit(lambda x, v: problem.hessian(x)(v)),
    )


def test_gradient_and_hessian_product_match_finite_differences(x64):
    problem = bound(fit, FIT, args=DATA)
    value, gradient = jax.jit(lambda x: problem.value_and_gradient(x))(FIT)
    gradient_at, hvp, hessian = products(problem)
    assert float(value) == pytest.approx(float(fit(FIT, *DATA)), rel=1e-15)
    for v in directions(FIT):
        # Errors of the central difference: h² in truth, rounding / h.
        slope = central(jax.jit(lambda x: problem.value(x)), FIT, v, 1e-5)
        assert inner(gradient, v) == pytest.approx(float(slope), rel=1e-8)
        expected = central(gradient_at, FIT, v, 1e-5)
        for product in (hvp(FIT, v), hessian(FIT, v)):
            jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-9), product, expected)


def test_hessian_products_match_the_dense_hessian(x64):
    problem = bound(fit, FIT, args=DATA)
    dense = np.asarray(jax.jit(jax.hessian(lambda v: fit(trees.unflatten(v, FIT), *DATA)))(trees.flatten(FIT)))
    _, hvp, _ = products(problem)
    for v in directions(FIT):
        product = hvp(FIT, v)
        np.testing.assert_allclose(trees.flatten(product), dense @ np.asarray(trees.flatten(v)), rtol=1e-12, atol=1e-13)


def test_closed_forms_that_a_subclass_overrides_are_used(x64):
    class Quadratic(Problem):
        matrix: jax.Array

        def value(self, x):
            return x @ self.matrix @ x / 2

        def hvp(self, x, v):
            return 2 * self.matrix @ v  # not the derivative of the gradient

    problem = bound(Quadratic(jnp.diag(jnp.arange(1.0, 4))), np.ones(3))
    v = np.array([1.0, -1.0, 2.0])
    np.testing.assert_array_equal(problem.hessian(np.ones(3))(v), 2 * np.array([1, 2, 3]) * v)
    np.testing.assert_array_equal(problem.gradient(np.ones(3)), [1, 2, 3])


# --- complex variables ----------------------------------------------------------------------------

Z = DRAW.normal(size=4) + 1j * DRAW.normal(size=4)
M = DRAW.normal(size=(5, 4)) + 1j * DRAW.normal(size=(5, 4))


def intensities(z, rows):
    w = rows @ z
    return jnp.sum((w.real**2 + w.imag**2 - 1) ** 2)


def test_complex_gradient_is_the_steepest_ascent(x64):
    # d/dt f(z + t v) = Re⟨∇f, v⟩ for real t; closed form: 4 Mᴴ((|Mz|² − 1) Mz).
    problem = bound(intensities, Z, args=(M,))
    gradient = np.asarray(problem.gradient(Z))
    w = M @ Z
    np.testing.assert_allclose(gradient, 4 * M.conj().T @ ((np.abs(w) ** 2 - 1) * w), rtol=1e-12)
    draw = np.random.default_rng(1)
    for _ in range(3):
        v = draw.normal(size=4) + 1j * draw.normal(size=4)
        assert inner(gradient, v) == pytest.approx(float(central(problem.value, Z, v, 1e-6)), rel=1e-7)
    # Of all unit directions the gradient's own ascends fastest.
    unit = gradient / np.linalg.norm(gradient)
    assert float(central(problem.value, Z, unit, 1e-6)) == pytest.approx(np.linalg.norm(gradient), rel=1e-7)


def test_complex_gradient_and_hessian_agree_with_the_real_view(x64):
    problem = bound(intensities, Z, args=(M,))

    def real(v):
        return intensities(v[:4] + 1j * v[4:], M)

    flat = np.concatenate([Z.real, Z.imag])
    gradient = np.asarray(problem.gradient(Z))
    np.testing.assert_allclose(np.concatenate([gradient.real, gradient.imag]), jax.grad(real)(flat), rtol=1e-12)
    v = DRAW.normal(size=4) + 1j * DRAW.normal(size=4)
    expected = np.asarray(jax.jit(jax.hessian(real))(flat)) @ np.concatenate([v.real, v.imag])
    for product in (oracle(Z, v) for oracle in products(problem)[1:]):
        np.testing.assert_allclose(np.concatenate([product.real, product.imag]), expected, rtol=1e-11)


def test_a_step_against_the_complex_gradient_descends(x64):
    # f = ‖z − a‖²: with the gradient 2(z − a) a step of ½ ends at a.
    a = np.array([1 + 2j, -3j, 0.5])
    solver = fl.optimizer(optax.sgd, learning_rate=0.5)
    solution = fl.minimize(lambda z: jnp.sum((z - a).real ** 2 + (z - a).imag ** 2), 0 * a, solver, steps=1, stop=None)
    np.testing.assert_allclose(solution.x, a, rtol=1e-15)


# --- objectives -----------------------------------------------------------------------------------


def test_aux_and_declarations_come_through(x64):
    def fn(x, shift):
        return jnp.sum((x - shift) ** 2), {"residual": x - shift}

    x = np.array([1.0, 2.0])
    declared = fl.Objective(fn, (0.5,), has_aux=True, lower_bound=-1.5, symmetry=lambda x: x[None])
    problem = bound(declared, x)
    assert float(problem.value(x)) == 2.5
    np.testing.assert_array_equal(problem.aux(x)["residual"], [0.5, 1.5])
    np.testing.assert_array_equal(declared.aux(x)["residual"], [0.5, 1.5])
    assert float(problem.lower_bound) == float(declared.lower_bound) == -1.5
    np.testing.assert_array_equal(declared.symmetry(x), [[1.0, 2.0]])
    plain = bound(fl.Objective(lambda x: x @ x), x)
    assert plain.lower_bound is None and plain.symmetry(x) is None and plain.aux(x) is None


def test_a_lower_bound_can_be_declared_in_either_precision(dtype):
    x = np.ones(2, dtype)
    rows = DATA_ROWS.astype(dtype)
    for declared in (fl.Objective(lambda x: x @ x, lower_bound=0.1), fl.FiniteSum(losses, rows, lower_bound=0.1)):
        problem = bound(declared, x)
        assert problem.lower_bound.dtype == dtype and float(problem.lower_bound) == dtype.type(0.1)


def test_non_array_arguments_are_carried_through(x64):
    def fn(x, power, mode):
        return jnp.sum(x**power) if mode == "sum" else jnp.max(x)

    assert float(bound(fn, np.ones(3), args=(2, "sum")).value(np.full(3, 3.0))) == 27


# --- finite sums ----------------------------------------------------------------------------------

DATA_ROWS = DRAW.normal(size=(6, 2))


def losses(x, rows):
    return (jnp.sin(rows @ x) - 0.3) ** 2


def gradients(x, rows):
    """The gradient of each loss, by hand."""
    t = rows @ x
    return (2 * (np.sin(t) - 0.3) * np.cos(t))[:, None] * rows


@pytest.mark.parametrize(
    "wrap", [lambda p, x: p, lambda p, x: bound(p, x, needs=frozenset({"per_example"}))], ids=["user", "bound"]
)
def test_per_example_gradients_average_to_the_gradient(x64, wrap):
    x = np.array([0.4, -1.2])
    problem = wrap(fl.FiniteSum(losses, DATA_ROWS, 2), x)
    per_example = problem.per_example_gradients(x, DATA_ROWS)
    np.testing.assert_allclose(per_example, gradients(x, DATA_ROWS), rtol=1e-13)
    np.testing.assert_allclose(problem.gradient(x), gradients(x, DATA_ROWS).mean(0), rtol=1e-13)
    assert float(problem.value(x)) == pytest.approx(np.mean((np.sin(DATA_ROWS @ x) - 0.3) ** 2), rel=1e-14)
    assert problem.size == 6 and problem.random


def test_complex_per_example_gradients(x64):
    def loss(z, rows):
        w = rows @ z
        return (w.real**2 + w.imag**2 - 1) ** 2

    out = fl.FiniteSum(loss, M).per_example_gradients(Z, M)
    w = M @ Z
    np.testing.assert_allclose(out, (4 * (np.abs(w) ** 2 - 1) * w)[:, None] * M.conj(), rtol=1e-12)


def test_minibatches_are_rows_drawn_with_replacement_and_unbiased(x64):
    x = np.array([0.4, -1.2])
    for size in (1, 4):
        problem = bound(fl.FiniteSum(losses, DATA_ROWS, size), x)
        keys = jax.random.split(jax.random.key(size), 4000)
        batches = np.asarray(jax.vmap(problem.sample)(keys))
        drawn = np.argmin(np.abs(batches[:, :, None, :] - DATA_ROWS).sum(-1), axis=-1)
        np.testing.assert_array_equal(batches, DATA_ROWS[drawn])  # whole rows of the data
        # Each row as often as the others: within 5 standard deviations of the binomial count.
        counts, n = np.bincount(drawn.ravel(), minlength=6), drawn.size
        assert np.all(np.abs(counts - n / 6) < 5 * np.sqrt(n * (1 / 6) * (5 / 6)))
        values, estimates = jax.vmap(problem.minibatch, (None, 0))(x, keys)
        # Given the rows drawn, the estimate is their mean: exactly.
        np.testing.assert_allclose(estimates, gradients(x, DATA_ROWS)[drawn].mean(1), rtol=1e-12)
        np.testing.assert_allclose(values, ((np.sin(DATA_ROWS @ x) - 0.3) ** 2)[drawn].mean(1), rtol=1e-12)
        if size > 1:  # with replacement: 4 distinct rows of 6 have the chance 5·4·3/6³ = 0.28
            distinct = np.mean([len(set(rows)) == size for rows in drawn])
            assert abs(distinct - 60 / 216) < 5 * np.sqrt(0.28 * 0.72 / 4000)


def test_a_minibatch_of_each_single_row_averages_to_the_gradient(x64):
    x = np.array([0.4, -1.2])
    problem = bound(fl.FiniteSum(losses, DATA_ROWS, 1), x)
    minibatch, estimates = jax.jit(lambda x, key: problem.minibatch(x, key)), {}
    for seed in range(60):
        key = jax.random.key(seed)
        row = int(np.argmin(np.abs(np.asarray(problem.sample(key)) - DATA_ROWS).sum(-1)))
        estimates[row] = np.asarray(minibatch(x, key)[1])
    assert sorted(estimates) == list(range(6))
    np.testing.assert_allclose(np.mean([estimates[i] for i in range(6)], axis=0), problem.gradient(x), rtol=1e-13)


def test_rows_of_several_arrays_stay_together(x64):
    def loss(x, batch):
        return batch["target"] * (batch["row"] @ x)

    data = {"row": DATA_ROWS, "target": np.arange(6.0)}
    problem = bound(fl.FiniteSum(loss, data, 3), np.ones(2))
    for seed in range(5):
        batch = problem.sample(jax.random.key(seed))
        np.testing.assert_array_equal(batch["row"], DATA_ROWS[np.asarray(batch["target"]).astype(int)])


def test_a_finite_sum_without_a_batch_size_is_deterministic(x64):
    problem = fl.FiniteSum(losses, DATA_ROWS)
    assert not problem.random and not bound(problem, np.ones(2)).random
    assert problem.lower_bound is None and problem.symmetry(np.ones(2)) is None
    with pytest.raises(NotImplementedError, match="minibatch"):
        fl.Objective(lambda x: x @ x).minibatch(np.ones(2), jax.random.key(0))


def test_equal_finite_sums_share_their_programs(x64):
    first, second = (
        bound(fl.FiniteSum(lambda x, rows: (jnp.sin(rows @ x) - 0.3) ** 2, data, 2), np.ones(2))
        for data in (DATA_ROWS, DATA_ROWS[::-1] + 1)
    )
    assert first.programs == second.programs and hash(first.programs) == hash(second.programs)
    other = bound(fl.FiniteSum(lambda x, rows: (jnp.cos(rows @ x) - 0.3) ** 2, DATA_ROWS, 2), np.ones(2))
    assert other.programs != first.programs


def test_a_batch_size_may_be_a_numpy_integer(x64):
    assert fl.FiniteSum(losses, DATA_ROWS, np.int64(2)).batch_size == 2


# --- refusals -------------------------------------------------------------------------------------

ONES = np.ones(3, np.float32)
WITH_NAN = np.array([1, np.nan, 2], np.float32)
WIDE = np.ones(3)
ROWS = np.ones((4, 3), np.float32)


def square(x):
    return jnp.sum(x**2)


def rowwise(x, rows):
    return jnp.sum((x - rows) ** 2, axis=1)


def weighted(x, weights):
    return jnp.sum(x * weights)


def through_another_function(x):
    return weighted(x, through_a_third())


def through_a_third():
    return WIDE


class Own(Problem):
    data: object

    def value(self, x):
        return jnp.sum(x * self.data)


class Vector(Problem):
    def value(self, x):
        return x


REFUSED = {
    "vector": (lambda x: x**2, {}, "problem", r"float32\[3\]", "one real scalar; sum or average it"),
    "integer": (lambda x: jnp.sum(x > 0), {}, "problem", r"int32\[\]", "one real scalar"),
    "boolean": (lambda x: jnp.any(x > 0), {}, "problem", r"bool\[\]", "one real scalar"),
    "complex": (lambda x: 1j * jnp.sum(x), {}, "problem", r"complex64\[\]", "one real scalar"),
    "nothing": (lambda x: None, {}, "problem", "nothing", "one real scalar"),
    "fails": (lambda x: x @ jnp.ones(4), {}, "problem", "fails at x0 with TypeError", "x0's shapes"),
    "raises": (lambda x: {}["k"], {}, "problem", "KeyError: 'k'", "x0's shapes"),
    "no callable": (3, {}, "problem", "int", "a callable"),
    "too many args": (square, {"args": (1.0,)}, "problem", "takes 1 positional argument but 2", "x0's shapes"),
    "too few args": (weighted, {}, "problem", "missing 1 required positional argument", "x0's shapes"),
    "args no tuple": (weighted, {"args": ONES}, "args", "ndarray", "a tuple"),
    "args beside data": (fl.FiniteSum(rowwise, ROWS), {"args": (1,)}, "args", "1 arguments", "holds its own data"),
    "nan argument": (weighted, {"args": (WITH_NAN,)}, "args[0]", "with 1 NaN", "no NaN"),
    "nan captured": (lambda x: weighted(x, WITH_NAN), {}, "problem[0]", "with 1 NaN", "no NaN"),
    "nan in an inner jit": (jax.jit(lambda x: weighted(x, WITH_NAN)), {}, "problem[0]", "with 1 NaN", "no NaN"),
    "nan rows": (fl.FiniteSum(rowwise, {"a": ROWS * np.nan}), {}, "problem.data['a']", "with 12 NaN", "no NaN"),
    "nan in a loss": (fl.FiniteSum(lambda x, b: b @ WITH_NAN + x[0], ROWS), {}, "loss[0]", "with 1 NaN", "no NaN"),
    "nan in a problem": (Own(WITH_NAN), {}, "problem.data", "with 1 NaN", "no NaN"),
    "wide argument": (weighted, {"args": (WIDE,)}, "args[0]", r"float64\[3\]", "jax_enable_x64"),
    "wide captured": (lambda x: weighted(x, WIDE), {}, "problem['WIDE']", r"float64\[3\]", "jax_enable_x64"),
    "wide in a partial": (
        functools.partial(lambda d, x: weighted(x, d), WIDE),
        {},
        "problem['args[0]']",
        r"float64\[3\]",
        "jax_enable_x64",
    ),
    "wide in a keyword": (
        functools.partial(weighted, weights=WIDE),
        {},
        "problem['weights']",
        r"float64\[3\]",
        "jax_enable_x64",
    ),
    "wide two calls below": (through_another_function, {}, "problem['WIDE']", r"float64\[3\]", "jax_enable_x64"),
    "wide in a jit": (jax.jit(through_another_function), {}, "problem['WIDE']", r"float64\[3\]", "jax_enable_x64"),
    "wide rows": (fl.FiniteSum(rowwise, np.ones((4, 3))), {}, "problem.data", r"float64\[4,3\]", "jax_enable_x64"),
    "wide in a loss": (
        fl.FiniteSum(lambda x, b: rowwise(x, b * WIDE), ROWS),
        {},
        "loss['WIDE']",
        r"float64\[3\]",
        "jax_enable_x64",
    ),
    "wide in a problem": (Own(WIDE), {}, "problem.data", r"float64\[3\]", "jax_enable_x64"),
    "no aux": (square, {"has_aux": True}, "problem", r"float32\[\]", r"\(scalar, aux\), for has_aux=True"),
    "three for aux": (lambda x: (square(x), x, x), {"has_aux": True}, "problem", r"float32\[3\]", r"\(scalar, aux\)"),
    "unasked aux": (lambda x: (square(x), x), {}, "problem", r"float32\[\], float32\[3\]", "one real scalar"),
    "vector and aux": (lambda x: (x, x), {"has_aux": True}, "problem", r"float32\[3\]", "one real scalar"),
    "aux of a problem": (fl.FiniteSum(rowwise, ROWS), {"has_aux": True}, "has_aux", "True", "False"),
    "aux of an objective": (fl.Objective(square), {"has_aux": True}, "has_aux", "True", "False"),
    "problem of vectors": (Vector(), {}, "problem", r"Vector returning float32\[3\]", "one real scalar"),
    "problem without value": (Problem(), {}, "problem", "NotImplementedError", "x0's shapes"),
    "mean loss": (
        fl.FiniteSum(lambda x, b: jnp.mean(x * b), ROWS),
        {},
        "loss",
        r"float32\[\] from 4 rows",
        "one real loss for each row",
    ),
    "integer losses": (
        fl.FiniteSum(lambda x, b: jnp.sum(b > x, 1), ROWS),
        {},
        "loss",
        r"int32\[4\]",
        "one real loss for each row",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_used_is_refused(x32, case):
    problem, kwargs, argument, got, expected = REFUSED[case]
    pattern = rf"^{re.escape(argument)}: got .*{got}.*; expected .*{expected}"
    with pytest.raises(fl.InputError, match=pattern) as caught:
        fl.minimize(problem, ONES, SGD, steps=1, **kwargs)
    assert caught.value.argument == argument
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("make", "argument", "got", "expected"),
    [
        (lambda: fl.FiniteSum(rowwise, ROWS[:0]), "data", r"float32\[0,3\]", "at least one example"),
        (lambda: fl.FiniteSum(rowwise, {}), "data", "without leaves", "a leading axis"),
        (
            lambda: fl.FiniteSum(rowwise, (ROWS, ROWS[:3])),
            "data",
            r"float32\[4,3\], float32\[3,3\]",
            "one leading axis",
        ),
        (lambda: fl.FiniteSum(rowwise, (ROWS, 1.0)), "data", "float", "one leading axis"),
        (lambda: fl.FiniteSum(rowwise, ROWS.tolist()), "data", "float", "one leading axis"),
        (lambda: fl.FiniteSum(rowwise, ROWS, 5), "batch_size", "5", "at most the number of examples, 4"),
        (lambda: fl.FiniteSum(rowwise, ROWS, 0), "batch_size", "0", "at least 1"),
        (lambda: fl.FiniteSum(rowwise, ROWS, 1.5), "batch_size", "1.5", "a whole number"),
        (lambda: fl.FiniteSum(3, ROWS), "loss", "int", "a callable"),
        (lambda: fl.Objective("f"), "problem", "str", "a callable"),
        (lambda: fl.Objective(square, lower_bound=np.nan), "lower_bound", "nan", "a finite number"),
        (lambda: fl.Objective(square, lower_bound=-np.inf), "lower_bound", "-inf", "a finite number"),
        (lambda: fl.FiniteSum(rowwise, ROWS, lower_bound=[0.0]), "lower_bound", r"\[0.0\]", "a finite number"),
    ],
)
def test_what_cannot_be_built_is_refused(x32, make, argument, got, expected):
    with pytest.raises(fl.InputError, match=rf"^{argument}: got .*{got}.*; expected .*{expected}"):
        make()


def test_a_wide_global_that_only_shares_its_name_with_an_attribute_is_no_obstacle(x32):
    class Holder:
        WIDE = ONES

    holder = Holder()
    assert float(bound(lambda x: jnp.sum(x * holder.WIDE), ONES).value(ONES)) == 3


def test_wide_data_are_welcome_in_64_bit_mode(x64):
    problem = bound(through_another_function, np.ones(3))
    assert problem.value(np.ones(3)).dtype == np.float64


def test_a_problem_without_an_oracle_of_the_solver_is_refused(x32):
    class Searching:
        needs = frozenset({"gradient", "prox"})

    for problem, name in ((square, "Objective"), (fl.FiniteSum(rowwise, ROWS), "FiniteSum"), (Own(ONES), "Own")):
        with pytest.raises(
            fl.InputError, match=f"got {name} without the oracle 'prox'; .*Searching needs: gradient, prox"
        ):
            check_needs(Searching(), bound(problem, ONES))
    Searching.needs = frozenset({"minibatch"})
    check_needs(Searching(), bound(fl.FiniteSum(rowwise, ROWS), ONES))
    with pytest.raises(fl.InputError, match="without the oracle 'minibatch'"):
        check_needs(Searching(), bound(square, ONES))


def test_messages_call_a_problem_by_its_name(x32):
    assert fl.Objective(square).label == "square"
    assert fl.FiniteSum(rowwise, ROWS).label == "FiniteSum(rowwise)"
    assert Own(ONES).label == "Own"
    assert bound(square, ONES).label == "Objective"
    assert bound(fl.FiniteSum(rowwise, ROWS), ONES).label == "FiniteSum"
