"""Which programs have kinks: a table of functions that are twice differentiable, and of such that are not."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fallline as fl
from fallline.core.smoothness import kinks

X = np.array([0.3, -0.7, 1.1, 0.2])
Z = X + 0.5j
SYMMETRIC = np.arange(16.0).reshape(4, 4) + np.arange(16.0).reshape(4, 4).T
GROUPS = np.array([0, 0, 1, 1])


def matrix(x):
    return jnp.outer(x, x) + 5 * jnp.eye(4)


def scanned(body):
    return lambda x: jax.lax.scan(lambda c, t: (c + body(t) * c, None), 1.0, x)[0]


def windowed(combine, start):
    return lambda x: jnp.sum(jax.lax.reduce_window(x, start, combine, (2,), (1,), "VALID"))


def straight_through(x):
    return jnp.sum(x + jax.lax.stop_gradient(jnp.round(x) - x))


def host(x):
    return jnp.sum(jax.pure_callback(np.abs, jax.ShapeDtypeStruct(x.shape, x.dtype), x))


@jax.custom_vjp
def soft_step(x):
    return jnp.sum(jnp.where(x > 0, x, 0))


soft_step.defvjp(lambda x: (soft_step(x), x), lambda x, g: (g * jax.nn.sigmoid(x),))

SMOOTH = {
    "polynomial": lambda x: jnp.sum(x**4 - 3 * x**2),
    "ratio": lambda x: jnp.sum(x / (1 + x**2)),
    "power": lambda x: jnp.sum((2 + x) ** 1.5),
    "product": jnp.prod,
    "running product": lambda x: jnp.sum(jnp.cumprod(x)),
    "trigonometric": lambda x: jnp.sum(jnp.sin(x) * jnp.exp(-x) + jnp.arctan(x)),
    "special": lambda x: jnp.sum(jax.scipy.special.erf(x) + jax.scipy.special.gammaln(3 + x)),
    "variance": jnp.var,
    "norm squared": lambda x: jnp.linalg.norm(x) ** 2,
    "square of abs": lambda x: jnp.sum(jnp.abs(x) ** 2),
    "abs times itself": lambda x: (lambda a: jnp.sum(a * a))(jnp.abs(x)),
    "square of complex abs": lambda x: jnp.sum(jnp.abs(jnp.fft.fft(x)) ** 2),
    "log of abs": lambda x: jnp.sum(jnp.log(jnp.abs(x))),
    "inverse": lambda x: jnp.sum(jnp.linalg.inv(matrix(x))),
    "solve": lambda x: x @ jnp.linalg.solve(matrix(x), x),
    "Cholesky": lambda x: jnp.sum(jnp.log(jnp.diag(jnp.linalg.cholesky(matrix(x))))),
    "tanh": lambda x: jnp.sum(jnp.tanh(x)),
    "sigmoid": lambda x: jnp.sum(jax.nn.sigmoid(x)),
    "softplus": lambda x: jnp.sum(jax.nn.softplus(x)),
    "log sigmoid": lambda x: jnp.sum(jax.nn.log_sigmoid(x)),
    "gelu": lambda x: jnp.sum(jax.nn.gelu(x)),
    "silu": lambda x: jnp.sum(jax.nn.silu(x)),
    "mish": lambda x: jnp.sum(jax.nn.mish(x)),
    "logaddexp": lambda x: jnp.logaddexp(x[0], x[1]),
    "logsumexp": jax.nn.logsumexp,
    "softmax": lambda x: jax.nn.softmax(x) @ np.arange(4.0),
    "log softmax": lambda x: jax.nn.log_softmax(x)[2],
    "cross entropy": lambda x: optax.softmax_cross_entropy_with_integer_labels(x, 2),
    "attention": lambda x: x @ jax.nn.softmax(jnp.outer(x, x), axis=-1) @ x,
    "remat": jax.checkpoint(lambda x: jnp.sum(jnp.tanh(x))),
    "scan": scanned(jnp.tanh),
    "loop": lambda x: jnp.sum(jax.lax.fori_loop(0, 3, lambda i, s: s * x, x)),
    "constant choice": lambda x: jax.lax.cond(jnp.arange(3)[1] > 0, jnp.sum, jnp.prod, x),
    "constant mask": lambda x: jnp.sum(jnp.where(np.arange(4) > 1, x, 0)),
    "constant maximum": lambda x: jnp.sum(x * jnp.max(jnp.arange(3.0))),
    "constant spectrum": lambda x: jnp.linalg.eigvalsh(SYMMETRIC)[-1] * jnp.sum(x**2),
    "constant rows": lambda x: jnp.sum(x[np.array([0, 2])] ** 2),
    "scatter": lambda x: jnp.sum(jnp.zeros(2).at[GROUPS].add(x) ** 2),
    "mean pool": windowed(jax.lax.add, 0.0),
    "a maximum that nobody uses": lambda x: (jnp.max(x), jnp.sum(x))[1],
    "a maximum without influence": lambda x: jnp.sum(x**2) + jax.lax.stop_gradient(jnp.max(x)),
    "check for NaN": lambda x: jnp.sum(jnp.where(jnp.isnan(x), 0, x)),
}

NOT_SMOOTH = {
    "abs": (lambda x: jnp.sum(jnp.abs(x)), "abs"),
    "cube of abs": (lambda x: jnp.sum(jnp.abs(x) ** 3), "abs"),
    "abs, squared and not": (lambda x: (lambda a: jnp.sum(a * a + a))(jnp.abs(x)), "abs"),
    "abs times another": (lambda x: jnp.sum(jnp.abs(x) * x), "abs"),
    "abs of Fourier": (lambda x: jnp.sum(jnp.abs(jnp.fft.fft(x))), "abs"),
    "1-norm": (lambda x: jnp.linalg.norm(x, 1), "abs"),
    "max": (jnp.max, "reduce_max"),
    "min": (jnp.min, "reduce_min"),
    "maximum": (lambda x: jnp.sum(jnp.maximum(x, 0)), "max"),
    "clip": (lambda x: jnp.sum(jnp.clip(x, 0, 1)), "max"),
    "running max": (lambda x: jnp.sum(jax.lax.cummax(x)), "cummax"),
    "max, shift and not": (
        lambda x: jnp.sum(jnp.exp(x - jax.lax.stop_gradient(jnp.max(x)))) + jnp.max(x),
        "reduce_max",
    ),
    "group max": (lambda x: jnp.sum(jax.ops.segment_max(x, GROUPS, 2)), "max"),
    "max pool": (windowed(jax.lax.max, -np.inf), "reduce_window_max"),
    "min pool": (windowed(jax.lax.min, np.inf), "reduce_window_min"),
    "sort": (lambda x: jnp.sort(x) @ np.arange(4.0), "sort"),
    "median": (jnp.median, "sort"),
    "top k": (lambda x: jnp.sum(jax.lax.top_k(x, 2)[0]), "top_k"),
    "argmax": (lambda x: x[jnp.argmax(x)], "argmax"),
    "nuclear norm": (lambda x: jnp.linalg.norm(x.reshape(2, 2), "nuc"), "svd"),
    "largest eigenvalue": (lambda x: jnp.linalg.eigvalsh(matrix(x))[-1], "eigh"),
    "sign": (lambda x: jnp.sum(jnp.sign(x)), "sign"),
    "floor": (lambda x: jnp.sum(jnp.floor(x)), "floor"),
    "modulo": (lambda x: jnp.sum(x % 2), "rem"),
    "straight through": (straight_through, "round"),
    "bits": (lambda x: jnp.sum(jax.lax.bitcast_convert_type(x, jnp.int32).astype(np.float32)), "bitcast_convert_type"),
    "integer index": (lambda x: x[x.astype(int)[0]], "cast to integer"),
    "where": (lambda x: jnp.sum(jnp.where(x > 0, x, 0)), "where"),
    "Huber": (lambda x: jnp.sum(optax.huber_loss(x)), "abs"),
    "mask": (lambda x: jnp.sum(x * (x > 0)), "comparison"),
    "branch": (lambda x: jax.lax.cond(x[0] > 0, jnp.sum, jnp.prod, x), "cond"),
    "switch": (lambda x: jax.lax.switch(jnp.int32(x[0]), [jnp.sum, jnp.prod], x), "cond"),
    "relu": (lambda x: jnp.sum(jax.nn.relu(x)), "max"),
    "square of relu": (lambda x: jnp.sum(jax.nn.relu(x) ** 2), "max"),  # once differentiable
    "leaky relu": (lambda x: jnp.sum(jax.nn.leaky_relu(x)), "where"),
    "elu": (lambda x: jnp.sum(jax.nn.elu(x)), "where"),
    "hard tanh": (lambda x: jnp.sum(jax.nn.hard_tanh(x)), "where"),
    "relu in a scan": (scanned(jax.nn.relu), "max"),
    "relu in a jit": (lambda x: jax.jit(lambda x: jnp.sum(jax.nn.relu(x)))(x), "max"),
    "relu in a remat": (jax.checkpoint(lambda x: jnp.sum(jax.nn.relu(x))), "max"),
    "relu in a branch": (
        lambda x: jax.lax.cond(np.arange(2)[1] > 0, lambda: jnp.sum(jax.nn.relu(x)), lambda: 0.0),
        "max",
    ),
    "gradient of relu": (lambda x: jnp.sum(jax.grad(lambda x: jnp.sum(jax.nn.relu(x) ** 3))(x)), "max"),
    "custom rule": (soft_step, "where"),
    "host": (host, "pure_callback"),
}


@pytest.mark.parametrize("name", SMOOTH)
def test_smooth_programs_have_no_kinks(name, x32):
    assert fl.Objective(SMOOTH[name]).kinks(X.astype(np.float32)) == []


@pytest.mark.parametrize("name", NOT_SMOOTH)
def test_kinks_are_found(name, x32):
    fn, primitive = NOT_SMOOTH[name]
    assert primitive in fl.Objective(fn).kinks(X.astype(np.float32))


def test_complex_programs(x32):
    z = Z.astype(np.complex64)
    assert fl.Objective(lambda z: jnp.sum(jnp.abs(z) ** 2)).kinks(z) == []
    assert fl.Objective(lambda z: jnp.sum(z.real**2 + z.imag**4)).kinks(z) == []
    assert fl.Objective(lambda z: jnp.sum(jnp.abs(z))).kinks(z) == ["abs"]


def test_smooth_is_taken_at_its_word(x32):
    assert fl.Objective(jnp.max, smooth=True).kinks(X.astype(np.float32)) == []


def test_data_may_have_kinks(x32):
    # What does not depend on the point is data: the second input, here.
    jaxpr = jax.make_jaxpr(lambda x, y: jnp.sum(x**2) + jnp.max(y))(X, X).jaxpr
    assert kinks(jaxpr, [True, False]) == []
    assert kinks(jaxpr, [True, True]) == kinks(jaxpr, [False, True]) == ["reduce_max"]


def test_names_are_sorted_and_given_once(x32):
    fn = lambda x: jnp.sum(jnp.abs(x)) + jnp.max(x) + jnp.sum(jnp.abs(x + 1))  # noqa: E731
    assert fl.Objective(fn).kinks(X.astype(np.float32)) == ["abs", "reduce_max"]
