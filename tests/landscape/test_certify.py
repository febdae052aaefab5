"""The certificate against spectra that are known in closed form."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fallline as fl
from fallline import Verdict
from fallline.landscape import certify as module
from fallline.landscape import spectrum


@pytest.fixture(autouse=True)
def _double():
    with jax.enable_x64(True):
        yield


def quadratic(d):
    """½ Σ dᵢ xᵢ² + ¼ Σ xᵢ⁴: at the origin the Hessian is diag(d)."""
    return lambda x, d: 0.5 * jnp.sum(d * x * x) + 0.25 * jnp.sum(x**4), (d,)


# --- dense verdicts -------------------------------------------------------------------------------


def test_saddle_has_the_known_direction_and_decrease():
    # ½x² − ½y² + ¼(x⁴ + y⁴): λ_min = −1 along y, lowest at y = ±1 with value −¼.
    fn, args = quadratic(jnp.array([1.0, -1.0]))
    c = fl.certify(fn, np.zeros(2), args=args)
    assert c.verdict is Verdict.STRICT_SADDLE and c.method == "dense"
    assert c.rayleigh == pytest.approx(-1, abs=1e-12)
    assert np.abs(np.asarray(c.direction)) == pytest.approx([0, 1], abs=1e-12)
    x = fl.escape(c)
    assert float(fn(x, *args)) == pytest.approx(c.value - c.decrease, abs=1e-15)
    assert abs(c.step) == pytest.approx(1.0) and c.decrease == pytest.approx(0.25)


def test_minimum_bounds_the_smallest_eigenvalue():
    rng = np.random.default_rng(0)
    q = np.linalg.qr(rng.standard_normal((30, 30)))[0]
    h = (q * np.linspace(0.5, 4, 30)) @ q.T
    c = fl.certify(lambda x, h: 0.5 * x @ h @ x, np.zeros(30), args=(jnp.asarray(h),))
    assert c.verdict is Verdict.LOCAL_MINIMUM
    assert c.rayleigh == pytest.approx(0.5, rel=1e-12)
    assert 0.5 - 1e-10 < c.lower <= 0.5
    assert int(c.calls.hvp) >= 30 and c.largest == pytest.approx(4, rel=1e-12)


def test_flat_minimum_is_second_order_stationary_only():
    c = fl.certify(lambda x: x[0] ** 2 + x[1] ** 4, np.zeros(2))
    assert c.verdict is Verdict.SECOND_ORDER_STATIONARY


def test_degenerate_saddle_is_not_called_a_minimum():
    # The Hessian at 0 is diag(2, 0), but −y⁴ falls: no second-order test can see it.
    c = fl.certify(lambda x: x[0] ** 2 - x[1] ** 4, np.zeros(2))
    assert c.verdict is Verdict.SECOND_ORDER_STATIONARY and not c.is_minimum


def test_linear_objective_is_not_stationary():
    c = fl.certify(lambda x: 3 * x[0] + x[1], np.ones(2))
    assert c.verdict is Verdict.NOT_STATIONARY
    with pytest.raises(fl.InputError, match="certificate.*not stationary.*minimize"):
        fl.escape(c)


def test_verdict_does_not_depend_on_the_units_of_the_value():
    for scale in (1e-12, 1.0, 1e12):

        def fn(x, s=scale):
            return s * (x[0] ** 2 - x[1] ** 2 + x[1] ** 4)

        assert fl.certify(fn, np.zeros(2)).verdict is Verdict.STRICT_SADDLE
        assert fl.certify(fn, np.array([0.0, np.sqrt(0.5)])).verdict is Verdict.LOCAL_MINIMUM
        assert fl.certify(fn, np.array([0.1, 0.5])).verdict is Verdict.NOT_STATIONARY


def test_float32_point():
    with jax.enable_x64(False):
        c = fl.certify(lambda x: x[0] ** 2 - x[1] ** 2 + x[1] ** 4, np.zeros(2, np.float32))
    assert c.verdict is Verdict.STRICT_SADDLE and np.asarray(c.direction).dtype == np.float32


def test_pytree_point_and_direction():
    def fn(p):
        return p["a"] ** 2 - jnp.sum(p["b"] ** 2) + jnp.sum(p["b"] ** 4)

    c = fl.certify(fn, {"a": np.float64(0), "b": np.zeros((2, 1))})
    assert c.verdict is Verdict.STRICT_SADDLE
    assert c.direction["b"].shape == (2, 1)
    assert float(fn(fl.escape(c))) == pytest.approx(-c.decrease)


# --- symmetry --------------------------------------------------------------------------------------


def rotation(x):
    return jnp.stack([jnp.array([-x[1], x[0]])])


def test_rotation():
    # (‖x‖² − 1)² on the plane: the circle is a minimum, flat along it; radial curvature 8.
    def fn(x):
        return (x @ x - 1) ** 2

    x = np.array([np.cos(0.3), np.sin(0.3)])
    assert fl.certify(fn, x).verdict is Verdict.SECOND_ORDER_STATIONARY
    c = fl.certify(fl.Objective(fn, symmetry=rotation), x)
    assert c.verdict is Verdict.MINIMUM_MODULO_SYMMETRY
    assert (c.symmetry_dimension, c.dimension) == (1, 1)
    assert c.rayleigh == pytest.approx(8, rel=1e-9) and c.symmetry_residual < 1e-12
    bounded = fl.certify(fl.Objective(fn, symmetry=rotation, lower_bound=0.0), x)
    assert bounded.verdict is Verdict.GLOBAL_MINIMUM


def test_phase_of_complex_variables():
    # Σᵢ (|zᵢ|² − 1)²-like through one measurement: f(z) = (|aᴴz|² − 1)² + |bᴴz|², z ∈ C².
    def fn(z):
        return (z[0].real ** 2 + z[0].imag ** 2 - 1) ** 2 + (z[1].real ** 2 + z[1].imag ** 2)

    z = np.array([np.exp(0.7j), 0])
    c = fl.certify(fl.Objective(fn, symmetry=lambda z: (1j * z)[None]), z)
    assert c.verdict is Verdict.MINIMUM_MODULO_SYMMETRY
    assert (c.dimension, c.symmetry_dimension) == (3, 1)
    assert c.rayleigh == pytest.approx(2, rel=1e-9) and c.largest == pytest.approx(8, rel=1e-9)
    at_zero = fl.certify(fn, np.zeros(2, complex))
    assert at_zero.verdict is Verdict.STRICT_SADDLE and at_zero.rayleigh == pytest.approx(-4, rel=1e-9)
    assert np.iscomplexobj(np.asarray(at_zero.direction))


def general_linear(p):
    """Tangents of (W1 G, G⁻¹ W2): (W1 E, −E W2) for the k² matrix units E."""
    w1, w2 = p
    k = w1.shape[1]
    units = jnp.eye(k * k).reshape(-1, k, k)
    return jnp.einsum("ik,akj->aij", w1, units), -jnp.einsum("aij,jd->aid", units, w2)


@pytest.mark.parametrize("dense", [True, False])
def test_general_linear_symmetry_of_a_factorization(dense, monkeypatch):
    # ½‖W1 W2 − diag(4, 2, 1)‖² with k = 2: minima keep the two largest, saddles swap them.
    target = np.diag([4.0, 2.0, 1.0])

    def fn(p):
        return 0.5 * jnp.sum((p[0] @ p[1] - target) ** 2)

    problem = fl.Objective(fn, symmetry=general_linear)

    def at(kept):
        root = np.sqrt(np.diag(target)[kept])
        return np.eye(3)[:, kept] * root, (np.eye(3)[:, kept] * root).T

    if not dense:
        monkeypatch.setattr(module, "DENSE_LIMIT", 1)
    best = fl.certify(problem, at([0, 1]), key=0)
    assert best.verdict is Verdict.MINIMUM_MODULO_SYMMETRY
    assert (best.symmetry_dimension, best.dimension) == (4, 8)
    saddle = fl.certify(problem, at([0, 2]), key=0)
    # Around the saddle the discarded 2 beats the kept 1: the Hessian block [[1, −2], [−2, 1]] gives −1.
    assert saddle.verdict is Verdict.STRICT_SADDLE
    assert saddle.rayleigh == pytest.approx(-1, rel=1e-6)
    zero_unit = (np.eye(3)[:, [0, 1]] * [2, 0], (np.eye(3)[:, [0, 1]] * [2, 0]).T)
    widened = fl.certify(problem, zero_unit, key=0)
    assert widened.verdict is Verdict.STRICT_SADDLE and widened.rayleigh == pytest.approx(-2, rel=1e-6)


def test_a_symmetry_that_is_none_is_refused():
    problem = fl.Objective(lambda x: x[0] ** 2 + 2 * x[1] ** 2, symmetry=lambda x: jnp.array([[1.0, 0.0]]))
    with pytest.raises(fl.InputError, match="symmetry.*constant"):
        fl.certify(problem, np.zeros(2))
    wrong_shape = fl.Objective(lambda x: x @ x, symmetry=lambda x: jnp.ones((1, 3)))
    with pytest.raises(fl.InputError, match="symmetry"):
        fl.certify(wrong_shape, np.zeros(2))


def test_a_value_below_the_declared_bound_is_refused():
    with pytest.raises(fl.InputError, match="lower_bound"):
        fl.certify(fl.Objective(lambda x: x @ x - 1, lower_bound=0.0), np.zeros(2))


# --- where a Hessian proves nothing ------------------------------------------------------------------


def test_kinks_are_refused_a_second_order_verdict():
    def relu(x):
        return jax.nn.relu(x[0]) - x[1] ** 2 + x[0] ** 2

    for fn in (lambda x: jnp.sum(jnp.abs(x)), lambda x: jnp.max(x**2), relu):
        c = fl.certify(fn, np.zeros(2))
        assert c.verdict is Verdict.INCONCLUSIVE and "kink" in c.reason
    away = fl.certify(lambda x: jnp.sum(jnp.abs(x)), np.array([1.0, -2.0]))
    assert away.verdict is Verdict.NOT_STATIONARY


def test_smooth_can_be_declared_and_is_still_checked():
    # max(x, −x)² is smooth at 0 in truth; |x| is not.
    ok = fl.Objective(lambda x: jnp.sum(jnp.where(x > 5, x**3, x**2)), smooth=True)
    assert fl.certify(ok, np.zeros(2)).verdict is Verdict.LOCAL_MINIMUM
    lie = fl.Objective(lambda x: jnp.sum(jnp.maximum(x, -x) * 1.0) + x @ x, smooth=True)
    c = fl.certify(lie, np.zeros(2))
    assert not c.is_minimum


@pytest.mark.parametrize("power", [3, 4, 6])
def test_a_hessian_that_is_exactly_zero_is_no_kink(power):
    # Σ xᵢᵖ is flat at 0 to second order: nothing is decided, and nothing is called a kink.
    c = fl.certify(lambda x: jnp.sum(x**power), np.zeros(3))
    assert c.verdict is Verdict.SECOND_ORDER_STATIONARY and c.rayleigh == 0


def test_a_wrong_hessian_is_noticed():
    # JAX gives abs(z)**2 a zero Hessian at z = 0, where it is 2I: the difference check sees it.
    c = fl.certify(lambda z: 1 - jnp.sum(jnp.abs(z) ** 2) + jnp.sum(jnp.abs(z) ** 4), np.zeros(2, complex))
    assert c.verdict is Verdict.INCONCLUSIVE and "disagree" in c.reason


# --- Lanczos ------------------------------------------------------------------------------------------


def trap(n, seed=0):
    rng = np.random.default_rng(seed)
    return jnp.asarray(np.concatenate([rng.uniform(1, 100, n - 1), [-0.02]]))


def test_the_trap_is_never_called_a_minimum():
    """One eigenvalue −0.02 under n − 1 in [1, 100]: twenty steps see nothing of it, and must say so."""
    fn, args = quadratic(trap(100_000))
    delta, false = 0.01, 0
    for seed in range(100):
        c = fl.certify(fn, np.zeros(100_000), args=args, key=seed, failure_probability=delta, max_hvp=58)
        assert c.lanczos_steps == 20
        false += c.is_minimum or c.verdict is Verdict.SECOND_ORDER_STATIONARY
        assert c.lower <= -0.02
    assert false <= 100 * delta


def test_the_trap_is_found_with_more_products():
    fn, args = quadratic(trap(100_000))
    c = fl.certify(fn, np.zeros(100_000), args=args, key=1)
    assert c.verdict is Verdict.STRICT_SADDLE
    assert c.rayleigh == pytest.approx(-0.02, rel=1e-3)
    assert abs(float(c.direction[-1])) == pytest.approx(1, abs=1e-3)


def test_lanczos_certifies_a_minimum_with_its_probability():
    n = 5000
    d = jnp.asarray(np.random.default_rng(1).uniform(1, 10, n))
    fn, args = quadratic(d)
    c = fl.certify(fn, np.zeros(n), args=args, key=0, failure_probability=1e-6)
    assert c.verdict is Verdict.LOCAL_MINIMUM and c.method == "lanczos"
    assert 0 < c.lower <= float(d.min()) and c.failure_probability == 1e-6
    assert c.rayleigh >= float(d.min()) - 1e-9


def test_lower_bound_holds_over_seeds_and_matches_the_dense_verdict(monkeypatch):
    monkeypatch.setattr(module, "DENSE_LIMIT", 1)
    rng = np.random.default_rng(2)
    q = np.linalg.qr(rng.standard_normal((60, 60)))[0]
    h = jnp.asarray((q * np.concatenate([[-1.0], rng.uniform(0, 50, 59)])) @ q.T)
    for seed in range(20):
        c = fl.certify(lambda x, h: 0.5 * x @ h @ x + jnp.sum(x**4), np.zeros(60), args=(h,), key=seed)
        assert c.verdict is Verdict.STRICT_SADDLE
        assert c.lower <= -1 + 1e-9 and c.rayleigh == pytest.approx(-1, abs=1e-3)


def test_few_distinct_eigenvalues_end_the_iteration_early():
    n = 4000
    d = jnp.asarray(np.repeat([1.0, 2.0, 5.0], [1000, 2000, 1000]))
    c = fl.certify(lambda x, d: 0.5 * jnp.sum(d * x * x), np.zeros(n), args=(d,), key=0)
    assert c.verdict is Verdict.LOCAL_MINIMUM and c.lower == pytest.approx(1, abs=1e-9)


def test_the_account_counts_real_products():
    count = 0

    class Counted(fl.Problem):
        d: jax.Array

        def value(self, x):
            return 0.5 * jnp.sum(self.d * x * x) + 0.25 * jnp.sum(x**4)

        def hvp(self, x, v):
            def tick(_):
                nonlocal count
                count += 1

            jax.debug.callback(tick, v[0])
            return jax.jvp(self.gradient, (x,), (v,))[1]

    for n in (2500, 40):
        count = 0
        d = jnp.asarray(np.linspace(-1, 30, n))
        c = fl.certify(Counted(d), np.zeros(n), key=0)
        jax.effects_barrier()
        assert c.verdict is Verdict.STRICT_SADDLE
        assert count == int(c.calls.hvp)


def test_million_parameter_network_holds_few_vectors():
    """The compiled Lanczos chunk of a 1M-parameter tanh network needs at most five vectors."""
    sizes = (64, 970, 960, 10)
    rng = np.random.default_rng(0)
    with jax.enable_x64(False):
        params = [
            jnp.asarray(rng.standard_normal((a, b)) / np.sqrt(a), jnp.float32)
            for a, b in zip(sizes[:-1], sizes[1:], strict=True)
        ]
        data = jnp.asarray(rng.standard_normal((16, 64)), jnp.float32)

        def loss(params, data):
            h = data
            for w in params[:-1]:
                h = jnp.tanh(h @ w)
            return jnp.mean((h @ params[-1]) ** 2)

        from fallline.core import trees
        from fallline.core.problem import bind

        n = trees.flat_size(params)
        assert n > 1_000_000 - 10_000
        problem = bind(loss, params, lambda x: x, args=(data,))
        nothing = jnp.zeros((0, n), jnp.float32)
        run = jax.eval_shape(lambda: spectrum.start_lanczos(jnp.zeros(n, jnp.float32), spectrum._CAPACITY))
        memory = spectrum._extend.lower(problem, params, nothing, run, np.int32(60)).compile().memory_analysis()
        vectors = memory.temp_size_in_bytes / (4 * n)
        # Beside its arguments (the point, and the run's two vectors) and its result.
        assert vectors <= 5.5


# --- bad input ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"tolerance": -1.0}, "tolerance"),
        ({"curvature_tolerance": 0.0}, "curvature_tolerance"),
        ({"failure_probability": 1.5}, "failure_probability"),
        ({"max_hvp": 0}, "max_hvp"),
    ],
)
def test_bad_numbers(kwargs, words):
    with pytest.raises(fl.InputError, match=f"^{words}: got "):
        fl.certify(lambda x: x @ x, np.zeros(2), **kwargs)


def test_random_start_needs_a_key():
    with pytest.raises(fl.InputError, match="^key: got None.*random"):
        fl.certify(lambda x: x @ x, np.zeros(2001))


def test_inside_jit_is_refused():
    with pytest.raises(fl.InputError, match="outside jit"):
        jax.jit(lambda x: fl.certify(lambda y: y @ y, x).value)(jnp.zeros(2))
