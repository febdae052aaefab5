"""Sharing of compiled code: equal programs over other data share, different programs never do.

Every case states its gradients in closed form: a wrong share would show as the other function's gradient.
"""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fallline as fl
from fallline.core import trees
from fallline.core.chunk import compiled_advance
from fallline.core.problem import bind
from fallline.core.program import Static, trace

pytestmark = pytest.mark.usefixtures("x64")

X = np.array([0.3, -0.7, 1.1])
A, B = np.array([1.0, 2.0, -3.0]), np.array([-0.5, 4.0, 0.25])
IDENTITY = fl.optimizer(optax.sgd, learning_rate=1.0)  # one step from x: x − ∇f(x)


def bound(fn, x=X, args=()):
    point, rebuild = trees.split(x)
    return bind(fn, point, rebuild, args=args)


def compiled(oracle):
    """An oracle compiled as the loop compiles it: arrays in, the rest of the problem static."""

    @functools.partial(jax.jit, static_argnames="static")
    def run(leaves, x, *, static):
        return oracle(static.join(leaves), x)

    def call(problem, x=X):
        leaves, static = Static.split(problem)
        return jax.tree.map(np.asarray, run(leaves, x, static=static))

    call.entries = run._cache_size
    return call


# --- the same program over other data -------------------------------------------------------------
# Each makes a function f(x) of an array c with the gradient given beside it.


def captured(c):
    return lambda x: jnp.sum(c * x**2)


def captured_by_inner_jit(c):
    @jax.jit
    def inner(x):
        return jnp.sum(c * x**2)

    return lambda x: inner(x) + 0.0


def captured_by_nested_jits(c):
    @jax.jit
    def outer(x):
        @jax.jit
        def inner(x):
            return jnp.sum(c * x**2)

        return inner(x) / 2

    return lambda x: outer(x) + outer(x)


def captured_by_a_jit_without_operands(c):
    @jax.jit
    def inner():
        return 2 * c

    return lambda x: jnp.sum(inner() * x**2) / 2


def captured_by_scan(c):
    return lambda x: jax.lax.scan(lambda s, row: (s + row[0] * row[1] ** 2, None), 0.0, (c, x))[0]


def captured_by_branches(c):
    return lambda x: jax.lax.cond(x[0] > 0, lambda: jnp.sum(c * x**2), lambda: jnp.sum(x))


def captured_beside_relu(c):
    # The rule of relu calls relu again.
    return lambda x: jnp.sum(c * x**2) + 0 * jnp.sum(jax.nn.relu(x))


def captured_beside_softplus(c):
    return lambda x: jnp.sum(c * x**2) + 0 * jnp.sum(jax.nn.softplus(x))


def captured_by_a_jvp_rule(c):
    @jax.custom_jvp
    def f(x, c):
        return jnp.sum(c * x**2)

    f.defjvp(lambda primals, tangents: (f(*primals), jnp.vdot(2 * primals[1] * primals[0], tangents[0])))
    return lambda x: f(x, c)


SHARING = [
    captured,
    captured_by_inner_jit,
    captured_by_nested_jits,
    captured_by_a_jit_without_operands,
    captured_by_scan,
    captured_by_branches,
    captured_beside_relu,
    captured_beside_softplus,
    captured_by_a_jvp_rule,
]


@pytest.mark.parametrize("make", SHARING, ids=lambda make: make.__name__)
@pytest.mark.parametrize("array", [np.asarray, jnp.asarray], ids=["numpy", "jax"])
def test_equal_lambdas_over_other_data_share_one_compilation(make, array):
    gradient = compiled(lambda problem, x: problem.gradient(x))
    first, second = bound(make(array(A))), bound(make(array(B)))
    assert first.program == second.program
    assert hash(first.program) == hash(second.program)
    np.testing.assert_allclose(gradient(first), 2 * A * X, rtol=1e-15)
    np.testing.assert_allclose(gradient(second), 2 * B * X, rtol=1e-15)
    np.testing.assert_allclose(gradient(first), 2 * A * X, rtol=1e-15)
    assert gradient.entries() == 1


def test_arguments_are_data():
    gradient = compiled(lambda problem, x: problem.gradient(x))
    for scale, c in ((2.0, A), (3.0, B)):
        problem = bound(lambda x, c: c["scale"] * jnp.sum(c["rows"] * x**2), args=({"scale": scale, "rows": c},))
        np.testing.assert_allclose(gradient(problem), 2 * scale * c * X, rtol=1e-15)
    assert gradient.entries() == 1


def test_constants_of_inner_jits_become_arguments_with_the_same_values():
    for make in (captured_by_nested_jits, captured_by_a_jit_without_operands):
        program, consts = trace(make(jnp.asarray(A)), X)
        assert [c.tolist() for c in consts] == [A.tolist()] * len(consts)
        assert consts
        closed = [
            eqn.params["jaxpr"].consts
            for jaxpr in _jaxprs(program.jaxpr)
            for eqn in jaxpr.eqns
            if eqn.primitive.name == "jit"
        ]
        assert closed and not any(closed)
        for evaluate in (program, jax.jit(lambda consts, x, program=program: program(consts, x))):
            np.testing.assert_allclose(evaluate(consts, X), np.sum(A * X**2), rtol=1e-15)
            other = [np.asarray(B)] * len(consts)
            np.testing.assert_allclose(evaluate(other, X), np.sum(B * X**2), rtol=1e-15)


def _jaxprs(jaxpr):
    yield jaxpr
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "jit":
            yield from _jaxprs(eqn.params["jaxpr"].jaxpr)


def test_an_inner_jit_with_a_sharding_of_its_own_keeps_its_constants():
    sharding = jax.sharding.NamedSharding(jax.make_mesh((1,), ("rows",)), jax.sharding.PartitionSpec("rows"))

    def make(c):
        inner = jax.jit(lambda x: jnp.sum(c * x**2), in_shardings=sharding)
        return lambda x: inner(x)

    gradient = compiled(lambda problem, x: problem.gradient(x))
    for c in (2.0, 5.0):  # a scalar cannot be sharded by rows
        np.testing.assert_allclose(gradient(bound(make(jnp.asarray(c)))), 2 * c * X, rtol=1e-15)


# --- different programs ---------------------------------------------------------------------------
# Each makes two functions that differ in one place, with their gradients at X.


def vjp_rule():
    def make(k):
        @jax.custom_vjp
        def sine(x):
            return jnp.sin(x)

        sine.defvjp(lambda x: (jnp.sin(x), x), lambda x, g: (k * g * jnp.cos(x),))
        return lambda x: jnp.sum(sine(x))

    return (make(1.0), np.cos(X)), (make(3.0), 3 * np.cos(X))


def vjp_rule_below():
    def make(k):
        @jax.custom_vjp
        def sine(x):
            return jnp.sin(x)

        sine.defvjp(lambda x: (jnp.sin(x), x), lambda x, g: (k * g * jnp.cos(x),))
        return lambda x: jax.lax.scan(lambda s, row: (s + jax.jit(sine)(row), None), 0.0, x)[0]

    return (make(1.0), np.cos(X)), (make(3.0), 3 * np.cos(X))


def jvp_rule():
    def make(k):
        @jax.custom_jvp
        def sine(x):
            return jnp.sin(x)

        sine.defjvp(lambda primals, tangents: (jnp.sin(primals[0]), k * jnp.cos(primals[0]) * tangents[0]))
        return lambda x: jnp.sum(sine(x))

    return (make(1.0), np.cos(X)), (make(3.0), 3 * np.cos(X))


def jvp_rule_constant():
    def make(c):
        @jax.custom_jvp
        def sine(x):
            return jnp.sin(x)

        sine.defjvp(lambda primals, tangents: (jnp.sin(primals[0]), c * tangents[0]))
        return lambda x: jnp.sum(sine(x))

    return (make(jnp.asarray(A)), A), (make(jnp.asarray(B)), B)


def jvp_rule_with_symbolic_zeros():
    # The two rules agree unless the second tangent is known to be zero.
    def make(k):
        @jax.custom_jvp
        def product(x, y):
            return x * y

        def rule(primals, tangents):
            (x, y), (tx, ty) = primals, tangents
            if isinstance(ty, jax.custom_derivatives.SymbolicZero):
                return x * y, k * y * tx
            return x * y, y * tx + x * ty

        product.defjvp(rule, symbolic_zeros=True)
        return lambda x: jnp.sum(product(x, A))

    return (make(1.0), A), (make(3.0), 3 * A)


def callback():
    def make(host):
        def f(x):
            y = jax.pure_callback(host, jax.ShapeDtypeStruct(x.shape, x.dtype), jax.lax.stop_gradient(x))
            return jnp.sum(x * y)

        return f

    return (make(np.sin), np.sin(X)), (make(np.exp), np.exp(X))


def literal():
    return (lambda x: jnp.sum(2.0 * x), 2 + 0 * X), (lambda x: jnp.sum(3.0 * x), 3 + 0 * X)


def literal_by_one_rounding():
    c, d = 0.1, float(np.nextafter(0.1, 1))
    return (lambda x: jnp.sum(c * x), c + 0 * X), (lambda x: jnp.sum(d * x), d + 0 * X)


def dtype():
    c = A + 1 / 3
    make = lambda precision: lambda x: jnp.sum(x.astype(precision) * c.astype(precision)).astype(float)  # noqa: E731
    narrow = np.asarray(jnp.asarray(c, jnp.bfloat16), np.float64)
    return (make(jnp.bfloat16), narrow), (make(np.float32), c.astype(np.float32).astype(np.float64))


def scan_body():
    def make(body):
        return lambda x: jax.lax.scan(lambda s, row: (s + body(row), None), 0.0, x)[0]

    return (make(jnp.sin), np.cos(X)), (make(jnp.cos), -np.sin(X))


def scan_direction():
    def make(reverse):
        # Σ s_i over running sums: x_i counts in as many of them as come after it.
        return lambda x: jnp.sum(jax.lax.scan(lambda s, row: (s + row, s + row), 0.0, x, reverse=reverse)[1])

    return (make(False), np.array([3.0, 2.0, 1.0])), (make(True), np.array([1.0, 2.0, 3.0]))


def scan_constant_inside_an_inner_jit():
    def make(c):
        inner = jax.jit(lambda t: jnp.sum(c * t))
        return lambda x: jax.lax.scan(lambda s, _: (s + inner(x), None), 0.0, None, length=2)[0]

    return (make(jnp.asarray(A)), 2 * A), (make(jnp.asarray(B)), 2 * B)


def cond_branch():
    def make(branch):
        return lambda x: jax.lax.cond(x[0] > 0, lambda: jnp.sum(branch(x)), lambda: 0.0)

    return (make(jnp.sin), np.cos(X)), (make(jnp.cos), -np.sin(X))


def cond_order():
    f = lambda x: jax.lax.cond(x[0] > 0, lambda: jnp.sum(x), lambda: 5 * jnp.sum(x))  # noqa: E731
    g = lambda x: jax.lax.cond(x[0] > 0, lambda: 5 * jnp.sum(x), lambda: jnp.sum(x))  # noqa: E731
    return (f, 1 + 0 * X), (g, 5 + 0 * X)


def while_body():
    def make(body):
        def f(x):
            y = jax.lax.while_loop(lambda c: c[0] < 2, lambda c: (c[0] + 1, body(c[1])), (0, jax.lax.stop_gradient(x)))
            return jnp.sum(x * y[1])

        return f

    return (make(jnp.sin), np.sin(np.sin(X))), (make(jnp.cos), np.cos(np.cos(X)))


def while_condition():
    def make(rounds):
        def f(x):
            y = jax.lax.while_loop(
                lambda c: c[0] < rounds, lambda c: (c[0] + 1, 2 * c[1]), (0, jax.lax.stop_gradient(x))
            )
            return jnp.sum(x * y[1])

        return f

    return (make(2), 4 * X), (make(3), 8 * X)


def exponent():
    return (lambda x: jnp.sum(x**2), 2 * X), (lambda x: jnp.sum(x**3), 3 * X**2)


def axis():
    make = lambda axis: lambda x: jnp.sum(jnp.sum(jnp.outer(x, A), axis=axis) * B)  # noqa: E731
    return (make(0), np.full(3, np.sum(A * B))), (make(1), B * np.sum(A))


def axis_of_running_sums():
    make = lambda reverse: lambda x: jnp.sum(jax.lax.cumsum(x, reverse=reverse))  # noqa: E731
    return (make(False), np.array([3.0, 2.0, 1.0])), (make(True), np.array([1.0, 2.0, 3.0]))


def wiring():
    def make(join):
        return lambda x: jnp.sum(join(jnp.sin(x), jnp.exp(x)))

    return (make(lambda a, b: a - b), np.cos(X) - np.exp(X)), (make(lambda a, b: b - a), np.exp(X) - np.cos(X))


DIFFERENT = [
    vjp_rule,
    vjp_rule_below,
    jvp_rule,
    jvp_rule_constant,
    jvp_rule_with_symbolic_zeros,
    callback,
    literal,
    literal_by_one_rounding,
    dtype,
    scan_body,
    scan_direction,
    scan_constant_inside_an_inner_jit,
    cond_branch,
    cond_order,
    while_body,
    while_condition,
    exponent,
    axis,
    axis_of_running_sums,
    wiring,
]


@pytest.mark.parametrize("make", DIFFERENT, ids=lambda make: make.__name__)
def test_programs_that_differ_in_one_place_do_not_share(make):
    gradient = compiled(lambda problem, x: problem.gradient(x))
    (f, df), (g, dg) = make()
    assert not np.array_equal(df, dg)
    first, second = bound(f), bound(g)
    assert first.program != second.program
    # float32 and bfloat16 are exact here; sums of two roundings are not.
    for problem, expected in ((first, df), (second, dg), (first, df)):
        np.testing.assert_allclose(gradient(problem), expected, rtol=3e-16)
    assert gradient.entries() == 2


def test_the_rule_of_a_rule_is_part_of_the_program():
    # The gradients agree, the Hessians do not.
    def make(k):
        @jax.custom_jvp
        def cosine(x):
            return jnp.cos(x)

        @jax.custom_jvp
        def sine(x):
            return jnp.sin(x)

        cosine.defjvp(lambda primals, tangents: (jnp.cos(primals[0]), -k * jnp.sin(primals[0]) * tangents[0]))
        sine.defjvp(lambda primals, tangents: (sine(*primals), cosine(*primals) * tangents[0]))
        return lambda x: jnp.sum(sine(x))

    product = compiled(lambda problem, x: problem.hvp(x, jnp.asarray(A)))
    first, second = bound(make(1.0)), bound(make(3.0))
    assert first.program != second.program
    np.testing.assert_allclose(product(first), -np.sin(X) * A, rtol=1e-15)
    np.testing.assert_allclose(product(second), -3 * np.sin(X) * A, rtol=1e-15)


def test_types_of_arguments_are_part_of_the_program():
    def f(x, c):
        return jnp.sum(x.astype(np.float32) * c).astype(np.float64)

    value = compiled(lambda problem, x: problem.value(x))
    narrow, seventh = X.astype(np.float32), 1 / 7
    sums = {
        "weak": np.sum(narrow * np.float32(seventh), dtype=np.float32),
        "float64": np.sum(narrow.astype(np.float64) * seventh),
        "float16": np.sum(narrow * np.float32(np.float16(seventh)), dtype=np.float32),
    }
    assert len(set(sums.values())) == 3
    problems = [bound(f, args=(c,)) for c in (seventh, np.float64(seventh), np.float16(seventh))]
    for problem, expected in zip(problems, sums.values(), strict=True):
        np.testing.assert_allclose(value(problem), expected, rtol=2e-7 if expected.dtype == np.float32 else 1e-15)
    assert len({problem.program for problem in problems}) == 3


# --- functions that a jaxpr does not describe -----------------------------------------------------


def scaled_sine(k):
    """A sine whose rule for the gradient is off by the factor k: nothing in a jaxpr shows it."""

    @jax.custom_vjp
    def sine(x):
        return jnp.sin(x)

    sine.defvjp(lambda x: (jnp.sin(x), x), lambda x, g: (k * g * jnp.cos(x),))
    return sine


def activated(x, activation):
    return jnp.sum(activation(x))


def test_an_opaque_function_shares_with_itself_over_other_data():
    sine = scaled_sine(1.0)

    def f(x, c):
        return jnp.sum(sine(c * x))

    gradient = compiled(lambda problem, x: problem.gradient(x))
    for c in (A, B):
        np.testing.assert_allclose(gradient(bound(f, args=(c,))), c * np.cos(c * X), rtol=1e-15)
    assert gradient.entries() == 1


def test_an_opaque_function_is_read_again_each_time():
    # The second time it computes something else: its identity is the same, its program is not.
    sine, scale = scaled_sine(1.0), [0.1]

    def f(x):
        return jnp.sum(scale[0] * sine(x))

    gradient = compiled(lambda problem, x: problem.gradient(x))
    for scale[0] in (0.1, float(np.nextafter(0.1, 1))):
        np.testing.assert_array_equal(gradient(bound(f)), scale[0] * np.cos(X))


def test_bound_methods_share_by_their_object():
    class Model:
        def __init__(self, k):
            self.sine = scaled_sine(k)

        def loss(self, x):
            return jnp.sum(self.sine(x))

    first, second = Model(1.0), Model(3.0)
    gradient = compiled(lambda problem, x: problem.gradient(x))
    for model, k in ((first, 1), (second, 3), (first, 1)):
        np.testing.assert_allclose(gradient(bound(model.loss)), k * np.cos(X), rtol=1e-15)
    assert gradient.entries() == 2


def test_functions_among_the_arguments_are_part_of_the_program():
    gradient = compiled(lambda problem, x: problem.gradient(x))
    first, second = scaled_sine(1.0), scaled_sine(3.0)
    for activation, k in ((first, 1), (second, 3), (first, 1)):
        np.testing.assert_allclose(gradient(bound(activated, args=(activation,))), k * np.cos(X), rtol=1e-15)
    assert gradient.entries() == 2


class Layer(eqx.Module):
    weights: jax.Array
    activation: object

    def __call__(self):
        return jnp.sum(self.activation(self.weights))


def test_functions_inside_a_model_are_part_of_the_program():
    gradient = compiled(lambda problem, x: problem.gradient(x))
    first, second = scaled_sine(1.0), scaled_sine(3.0)
    for activation, k in ((first, 1), (second, 3), (first, 1)):
        model = Layer(jnp.asarray(X), activation)
        point, _ = trees.split(model)
        out = gradient(bound(Layer.__call__, model), point)
        np.testing.assert_allclose(out.weights, k * np.cos(X), rtol=1e-15)
    assert gradient.entries() == 2


def test_functions_inside_an_nnx_model_are_part_of_the_program():
    from flax import nnx

    class Model(nnx.Module):
        def __init__(self, activation):
            self.weights = nnx.Param(jnp.asarray(X))
            self.activation = activation

    def loss(model):
        return jnp.sum(model.activation(model.weights[...]))

    gradient = compiled(lambda problem, x: problem.gradient(x))
    first, second = scaled_sine(1.0), scaled_sine(3.0)
    for activation, k in ((first, 1), (second, 3), (first, 1)):
        model = Model(activation)
        out = gradient(bound(loss, model), trees.split(model)[0])
        np.testing.assert_allclose(jax.tree.leaves(out)[0], k * np.cos(X), rtol=1e-15)
    assert gradient.entries() == 2


def test_values_inside_a_model_that_only_a_rule_uses_are_part_of_the_program():
    class Sloped(eqx.Module):
        weights: jax.Array
        slope: int

    def loss(model):
        return jnp.sum(scaled_sine(model.slope)(model.weights))

    gradient = compiled(lambda problem, x: problem.gradient(x))
    for slope in (1, 3, 1):
        model = Sloped(jnp.asarray(X), slope)
        out = gradient(bound(loss, model), trees.split(model)[0])
        np.testing.assert_allclose(out.weights, slope * np.cos(X), rtol=1e-15)
    assert gradient.entries() == 2


# --- through minimize -----------------------------------------------------------------------------


def test_minimize_compiles_equal_lambdas_once_and_others_again():
    def step(fn, args=()):
        return X - fl.minimize(fn, X, IDENTITY, args=args, steps=1, stop=None).x

    np.testing.assert_allclose(step(captured(A)), 2 * A * X, rtol=1e-14)
    entries = compiled_advance._cache_size()
    np.testing.assert_allclose(step(captured(B)), 2 * B * X, rtol=1e-14)
    np.testing.assert_allclose(step(captured_by_inner_jit(B)), 2 * B * X, rtol=1e-14)
    np.testing.assert_allclose(step(captured_by_inner_jit(A)), 2 * A * X, rtol=1e-14)
    assert compiled_advance._cache_size() == entries + 1  # the inner jit is another program
    (f, df), (g, dg) = vjp_rule()
    np.testing.assert_allclose(step(f), df, rtol=1e-14)
    np.testing.assert_allclose(step(g), dg, rtol=1e-14)
    assert compiled_advance._cache_size() == entries + 3


def test_minimize_under_jit_may_capture_what_is_traced():
    # Inside a scan the captured array sits in a program of its own.
    def final(c):
        @jax.jit
        def inner(t):
            return jnp.sum(c * t**2)

        def f(x):
            return jax.lax.scan(lambda s, _: (s + inner(x), None), 0.0, None, length=1)[0]

        return fl.minimize(f, X, IDENTITY, steps=1, stop=None).x

    run = jax.jit(final)
    np.testing.assert_allclose(run(jnp.asarray(A)), X - 2 * A * X, rtol=1e-14)
    np.testing.assert_allclose(run(jnp.asarray(B)), X - 2 * B * X, rtol=1e-14)


def test_a_key_captured_below_the_top_is_no_obstacle():
    key = jax.random.key(0)
    noise = np.asarray(jax.random.normal(key, (3,)))
    inner = jax.jit(lambda x: jnp.sum(x * jax.random.normal(key, (3,))))
    problem = bound(lambda x: jax.lax.scan(lambda s, _: (s + inner(x), None), 0.0, None, length=1)[0])
    np.testing.assert_allclose(compiled(lambda problem, x: problem.gradient(x))(problem), noise, rtol=1e-15)


def test_a_program_refuses_another_structure():
    program, consts = trace(lambda x: jnp.sum(x["a"]), {"a": X})
    with pytest.raises(TypeError, match="traced for"):
        program(consts, {"b": X})


def test_static_puts_a_tree_together_again():
    tree = {"a": X, "name": "text", "fn": jnp.sin, "count": 3, "none": None}
    leaves, static = Static.split(tree)
    assert [np.ndim(leaf) for leaf in leaves] == [1, 0]
    joined = static.join([B, 4])
    assert joined["fn"] is jnp.sin and joined["name"] == "text" and joined["count"] == 4 and joined["a"] is B
    other = Static.split({**tree, "a": A, "count": 5})[1]
    assert static == other and hash(static) == hash(other)
    assert static != Static.split({**tree, "name": "another"})[1]
