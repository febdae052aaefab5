"""Points as pytrees: splitting, norms, and the real view."""

import re

import equinox as eqx
import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx

from fallline import InputError
from fallline.core import trees

QUICK = hypothesis.settings(max_examples=60, deadline=None, database=None, derandomize=True)
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
SHAPES = hnp.array_shapes(min_dims=0, max_dims=2, max_side=3)


def leaves(largest):
    """Arrays of every floating and complex type: entries up to `largest`, infinite ones too where it is None."""
    real = {"allow_nan": False, "min_value": None if largest is None else -largest, "max_value": largest}

    def of(name):
        if name == "bfloat16":
            return hnp.arrays(np.float16, SHAPES, elements=st.floats(width=16, **real)).map(
                lambda a: a.astype(BFLOAT16)
            )
        width = {"float16": 16, "float32": 32, "float64": 64, "complex64": 64, "complex128": 128}[name]
        if name.startswith("complex"):
            elements = st.complex_numbers(width=width, allow_nan=False, max_magnitude=largest)
        else:
            elements = st.floats(width=width, **real)
        return hnp.arrays(name, SHAPES, elements=elements)

    return st.sampled_from(["bfloat16", "float16", "float32", "float64", "complex64", "complex128"]).flatmap(of)


def points(largest=None):
    return st.lists(leaves(largest), min_size=1, max_size=3).map(lambda a: {"first": a[0], "rest": tuple(a[1:])})


def double(point):
    """All real coordinates in float64, in the order that `flatten` promises."""
    parts = []
    for leaf in jax.tree.leaves(point):
        parts += [leaf.real, leaf.imag] if np.iscomplexobj(leaf) else [leaf]
    return np.concatenate([np.asarray(part, np.float64).ravel() for part in parts])


# --- the real view --------------------------------------------------------------------------------


@QUICK
@hypothesis.given(points())
def test_flatten_and_unflatten_are_inverse(point):
    with jax.enable_x64(True):
        flat = trees.flatten(point)
        back = trees.unflatten(flat, point)
    assert flat.shape == (trees.flat_size(point),)
    np.testing.assert_array_equal(np.asarray(flat, np.float64), double(point))
    assert jax.tree.structure(back) == jax.tree.structure(point)
    for a, b in zip(jax.tree.leaves(point), jax.tree.leaves(back), strict=True):
        assert (b.shape, b.dtype) == (a.shape, a.dtype)
        assert np.asarray(b).tobytes() == a.tobytes()  # infinities and signed zeros too


@QUICK
@hypothesis.given(points(1000))
@hypothesis.example({"first": np.array(0.0), "rest": (np.array(4097j, np.complex64),)})
def test_norm_is_that_of_all_real_coordinates(point):
    reals = [np.float32 if leaf.dtype in (np.float16, BFLOAT16) else leaf.real.dtype for leaf in jax.tree.leaves(point)]
    info = np.finfo(np.result_type(np.float32, *reals))
    squares = double(point).astype(np.longdouble) ** 2
    # A square below the range of its type vanishes: it must not matter.
    hypothesis.assume(np.sum(squares) == 0 or np.sum(squares) > info.smallest_normal / info.eps)
    with jax.enable_x64(True):
        norm = np.asarray(trees.norm(point))
    assert norm.dtype == info.dtype
    np.testing.assert_allclose(norm, np.sqrt(np.sum(squares)).astype(np.float64), rtol=40 * info.eps)


def test_norm_of_many_bfloat16_entries_is_accumulated_in_float32():
    # In bfloat16 a sum of ones stops at 256.
    norm = trees.norm({"a": jnp.ones(1000, jnp.bfloat16), "b": jnp.full((24,), 2, jnp.bfloat16)})
    assert norm.dtype == np.float32
    assert float(norm) == pytest.approx(np.sqrt(1000 + 4 * 24), rel=1e-6)


def test_inner_products_of_complex_points_are_real_parts(x64):
    draw = np.random.default_rng(0)
    u, v = draw.normal(size=(2, 5)) + 1j * draw.normal(size=(2, 5))
    assert float(trees.flatten(u) @ trees.flatten(v)) == pytest.approx(np.vdot(u, v).real, rel=1e-14)


def test_sizes_and_types():
    point = {"a": np.zeros((2, 3), np.complex64), "b": np.zeros(4, np.float16)}
    assert trees.flat_size(point) == 16
    assert trees.real_dtype(point) == np.float32
    assert trees.real_dtype(np.zeros(1, BFLOAT16)) == np.float32
    with jax.enable_x64(True):
        assert trees.real_dtype({"a": np.zeros(1), "b": np.zeros(1, np.float16)}) == np.float64
        assert trees.real_dtype(np.zeros(1, np.complex128)) == np.float64
    assert trees.describe(point["a"]) == "complex64[2,3]"
    assert trees.describe("text") == "str"


def test_a_copy_shares_no_buffer():
    original = {"a": jnp.arange(3.0)}
    for copy in (trees.copy_tree(original), jax.jit(trees.copy_tree)(original)):
        assert copy["a"].unsafe_buffer_pointer() != original["a"].unsafe_buffer_pointer()
        np.testing.assert_array_equal(copy["a"], original["a"])


def test_cast_like():
    like = {"a": jnp.zeros(2, jnp.bfloat16), "b": jnp.zeros((), jnp.complex64)}
    cast = trees.cast_like({"a": jnp.ones(2, jnp.float32), "b": 2.0}, like)
    assert cast["a"].dtype == jnp.bfloat16 and cast["b"].dtype == jnp.complex64
    assert not trees.cast_like({"a": 1.0}, {"a": jnp.float32(0)})["a"].weak_type
    with pytest.raises(ValueError, match="shape"):
        trees.cast_like({"a": jnp.ones(3)}, {"a": jnp.ones(2)})
    with pytest.raises(ValueError, match="complex"):
        trees.cast_like({"a": jnp.ones(2, jnp.complex64)}, {"a": jnp.ones(2)})


# --- splitting ------------------------------------------------------------------------------------


def test_plain_containers_are_optimized_whole(x64):
    x0 = {"a": np.ones(2), "b": [jnp.ones((1, 2), jnp.float32), 0.5, np.float32(3)], "c": 1 + 2j}
    x, rebuild = trees.split(x0)
    assert rebuild(x) is x
    found = [(a.shape, str(a.dtype)) for a in jax.tree.leaves(x)]
    assert found == [((2,), "float64"), ((1, 2), "float32"), ((), "float64"), ((), "float32"), ((), "complex128")]


def test_python_numbers_have_the_default_precision(x32):
    assert [a.dtype for a in jax.tree.leaves(trees.split([0.5, 1j])[0])] == [np.float32, np.complex64]


class Model(eqx.Module):
    layers: list
    steps: jax.Array
    name: str = eqx.field(static=True)
    rate: float = 0.1

    def __call__(self, v):
        for layer in self.layers:
            v = layer(v)
        return v * self.steps


def test_an_equinox_model_keeps_all_but_its_floating_arrays(x32):
    linear = eqx.nn.Linear(2, 3, key=jax.random.key(0))
    model = Model([linear, jnp.tanh], jnp.int32(7), "net")
    x, rebuild = trees.split(model)
    assert sorted(a.shape for a in jax.tree.leaves(x)) == [(3,), (3, 2)]
    moved = rebuild(jax.tree.map(lambda a: a + 1, x))
    assert moved.name == "net" and moved.rate == 0.1 and int(moved.steps) == 7 and moved.layers[1] is jnp.tanh
    weights, bias = np.asarray(linear.weight) + 1, np.asarray(linear.bias) + 1
    np.testing.assert_allclose(moved(jnp.ones(2)), 7 * np.tanh(weights @ np.ones(2) + bias), rtol=1e-6)
    inside, rebuild = trees.split({"model": model, "scale": jnp.ones(2)})
    assert len(jax.tree.leaves(inside)) == 3 and rebuild(inside)["model"].name == "net"


class Net(nnx.Module):
    def __init__(self, rngs):
        self.linear = nnx.Linear(2, 3, rngs=rngs)
        self.norm = nnx.BatchNorm(3, rngs=rngs)
        self.activation = jnp.tanh


def test_an_nnx_model_is_optimized_in_its_parameters(x32):
    net = Net(nnx.Rngs(0))
    net.norm.mean[...] = jnp.full(3, 5.0)  # a running statistic is no parameter
    x, rebuild = trees.split(net)
    assert sorted(a.shape for a in jax.tree.leaves(x)) == [(2, 3), (3,), (3,), (3,)]
    moved = rebuild(jax.tree.map(lambda a: a + 1, x))
    assert isinstance(moved, Net) and moved.activation is jnp.tanh
    np.testing.assert_array_equal(moved.linear.kernel[...], net.linear.kernel[...] + 1)
    np.testing.assert_array_equal(moved.norm.mean[...], np.full(3, 5))


@pytest.mark.parametrize(
    ("x0", "argument", "got", "expected"),
    [
        ({}, "x0", "dict without leaves", "at least one array"),
        (None, "x0", "NoneType without leaves", "at least one array"),
        ({"a": np.ones(2, np.float32), "b": np.arange(3)}, "x0['b']", r"int64\[3\]", "a floating or complex array"),
        ([1.5, 2], "x0[1]", "int", "a floating or complex array"),
        ({"a": "text"}, "x0['a']", "str", "a floating or complex array"),
        (np.array([True]), "x0", r"bool\[1\]", "a floating or complex array"),
        (np.zeros((0, 2), np.float32), "x0", r"float32\[0,2\]", "at least one entry"),
        ([np.ones(2)], "x0[0]", r"float64\[2\]", r"float32 \(pass .astype\('float32'\)\).*jax_enable_x64"),
        (np.ones(2) * 1j, "x0", r"complex128\[2\]", r"complex64 \(pass .astype\('complex64'\)\).*jax_enable_x64"),
        ({"a": np.array([1, np.nan, np.nan], np.float32)}, "x0['a']", r"float32\[3\] with 2 NaN", "no NaN"),
        (np.array([1, complex(0, np.nan)], np.complex64), "x0", r"complex64\[2\] with 1 NaN", "no NaN"),
        (jnp.array([jnp.nan], jnp.bfloat16), "x0", r"bfloat16\[1\] with 1 NaN", "no NaN"),
        (Model([jnp.tanh], jnp.int32(1), "empty"), "x0", "Model without floating arrays", "a model with parameters"),
    ],
    ids=lambda part: part if isinstance(part, str) else type(part).__name__,  # no addresses: workers must agree
)
def test_points_that_cannot_be_used_are_refused(x32, x0, argument, got, expected):
    with pytest.raises(InputError, match=rf"^{re.escape(argument)}: got {got}; expected .*{expected}") as caught:
        trees.split(x0)
    assert caught.value.argument == argument


def test_infinities_are_no_nan_and_traced_points_are_not_looked_at(x32):
    trees.check_no_nan("x0", np.array([np.inf, -np.inf, 0], np.float32))
    trees.check_no_nan("x0", {"empty": np.zeros(0, np.float32), "integer": np.arange(2), "text": "a"})
    jax.jit(lambda x: trees.split({"a": x})[0]["a"])(np.array([np.nan], np.float32))
