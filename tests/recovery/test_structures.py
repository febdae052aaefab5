"""What points stand for: lifts, distances, symmetries; and the operators that measure matrices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fallline as fl
from fallline.recovery.losses import Squared
from fallline.recovery.operators import Dense, Entries, structured_sensing
from fallline.recovery.problem import Recovery
from fallline.recovery.structures import PSD, Factors, TwoFactors, Vector, product_distance

pytestmark = pytest.mark.usefixtures("x64")

N1, N2, R = 8, 6, 2
RNG = np.random.default_rng(0)
LEFT, RIGHT = RNG.standard_normal((N1, R)), RNG.standard_normal((N2, R))


def factors(left=LEFT, right=RIGHT):
    return Factors(jnp.asarray(left), jnp.asarray(right))


# ---- distances ------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1.0, 1e-3, 1e-8, 1e-15])
def test_product_distance_is_exact_however_small(size):
    """Compared with long double; the difference of two dense products would lose all of 1e-15 and half of 1e-8."""
    left = LEFT + size * RNG.standard_normal((N1, R))
    exact = left.astype(np.longdouble) @ RIGHT.T.astype(np.longdouble) - LEFT.astype(np.longdouble) @ RIGHT.T.astype(
        np.longdouble
    )
    expected = np.sqrt((exact**2).sum()) / np.linalg.norm(LEFT @ RIGHT.T)
    np.testing.assert_allclose(
        product_distance(factors(left), factors()), float(expected), rtol=max(1e-12, 1e-16 / size)
    )


def test_product_distance_is_the_frobenius_norm_for_other_ranks_too():
    other = factors(RNG.standard_normal((N1, 4)), RNG.standard_normal((N2, 4)))
    apart = np.linalg.norm(np.asarray(other.left @ other.right.T) - LEFT @ RIGHT.T)
    expected = apart / np.linalg.norm(LEFT @ RIGHT.T)
    np.testing.assert_allclose(product_distance(other, factors()), expected, rtol=1e-12)


def test_distances_do_not_see_the_ambiguity():
    turn = np.array([[3.0, 1.0], [0.5, 2.0]])
    same = factors(LEFT @ turn, RIGHT @ np.linalg.inv(turn).T)
    assert TwoFactors(R).distance(same, factors(), False) < 1e-14
    rotation = np.array([[0.6, -0.8], [0.8, 0.6]])
    assert PSD(R).distance(jnp.asarray(LEFT @ rotation), jnp.asarray(LEFT), False) < 1e-14
    x = jnp.asarray(RNG.standard_normal(5) + 1j * RNG.standard_normal(5))
    assert Vector().distance(np.exp(0.7j) * x, x, True) < 1e-15
    assert Vector().distance(-x, x, False) == 2


def test_distance_of_vectors_is_over_the_best_phase():
    x, truth = (jnp.asarray(RNG.standard_normal(5) + 1j * RNG.standard_normal(5)) for _ in range(2))
    phases = np.exp(1j * np.linspace(0, 2 * np.pi, 100_001))
    apart = np.linalg.norm(phases[:, None] * np.asarray(x) - np.asarray(truth), axis=1).min()
    np.testing.assert_allclose(Vector().distance(x, truth, True), apart / np.linalg.norm(truth), rtol=1e-8)


# ---- lifts, and the directions along which they stand still ---------------------------------------


def test_lift_and_measure_agree():
    op = Dense(jnp.asarray(RNG.standard_normal((11, N1 * N2))), (N1, N2))
    square = Dense(jnp.asarray(RNG.standard_normal((11, N1 * N1))), (N1, N1))
    np.testing.assert_allclose(TwoFactors(R).lift(factors()), LEFT @ RIGHT.T, rtol=1e-14)
    np.testing.assert_allclose(PSD(R).lift(jnp.asarray(LEFT)), LEFT @ LEFT.T, rtol=1e-14)
    for structure, operator, x in ((TwoFactors(R), op, factors()), (PSD(R), square, jnp.asarray(LEFT))):
        measured = np.asarray(operator.matrix) @ np.ravel(structure.lift(x))
        np.testing.assert_allclose(structure.measure(operator, x), measured, rtol=1e-12)


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_tangents_keep_signal_and_penalty(rank):
    """r (r − 1)/2 of them, independent, and along each the lift has no derivative."""
    left, right = RNG.standard_normal((N1, rank)), RNG.standard_normal((N2, rank))
    cases = [(TwoFactors(rank), factors(left, right)), (PSD(rank), jnp.asarray(left))]
    for structure, x in cases:
        tangents = structure.tangents(x, False)
        if rank == 1:
            assert tangents is None
            continue
        count = rank * (rank - 1) // 2
        assert all(len(leaf) == count for leaf in jax.tree.leaves(tangents))
        flat = np.concatenate([np.reshape(leaf, (count, -1)) for leaf in jax.tree.leaves(tangents)], axis=1)
        assert np.linalg.matrix_rank(flat) == count
        for k in range(count):
            v = jax.tree.map(lambda leaf, k=k: leaf[k], tangents)
            assert np.abs(jax.jvp(structure.lift, (x,), (v,))[1]).max() < 1e-13
            if isinstance(structure, TwoFactors):
                assert abs(jax.jvp(lambda x: structure.penalty(x)[0], (x,), (v,))[1]) < 1e-13  # noqa: B023


def test_penalty_and_its_gradient():
    structure = TwoFactors(R, balance=0.7)
    value, gradient = structure.penalty(factors())
    apart = LEFT.T @ LEFT - RIGHT.T @ RIGHT
    np.testing.assert_allclose(value, 0.7 / 8 * (apart**2).sum(), rtol=1e-13)
    by_jax = jax.grad(lambda x: structure.penalty(x)[0])(factors())
    for got, want in zip(gradient, by_jax, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-12)


def test_units_are_the_largest_singular_value():
    op = Entries(*(jnp.asarray(i.ravel()) for i in np.indices((N1, N1))), (N1, N1))
    y = op.mv(jnp.asarray(LEFT @ LEFT.T))
    sigma = np.linalg.svd(LEFT @ LEFT.T, compute_uv=False)[0]
    np.testing.assert_allclose(TwoFactors(R).unit(op, y), sigma, rtol=1e-10)
    np.testing.assert_allclose(PSD(R).unit(op, y), 2 * sigma, rtol=1e-10)


# ---- structured measurements ----------------------------------------------------------------------


def test_structured_measurements_are_signs_a_cosine_transform_and_a_choice():
    from scipy.fft import dctn

    op = structured_sensing(jax.random.key(0), 20, (N1, N2))
    x = RNG.standard_normal((N1, N2))
    expected = dctn(np.asarray(op.signs) * x, norm="ortho").ravel()[np.asarray(op.chosen)] * np.sqrt(N1 * N2 / 20)
    np.testing.assert_allclose(op.mv(jnp.asarray(x)), expected, atol=1e-12)
    assert set(np.unique(op.signs)) == {-1.0, 1.0} and len(set(np.asarray(op.chosen).tolist())) == 20


def test_structured_measurements_have_their_adjoint_and_are_the_identity_on_average():
    op = structured_sensing(jax.random.key(0), 20, (N1, N2))
    columns = np.asarray(jax.vmap(op.mv)(jnp.eye(N1 * N2).reshape(-1, N1, N2))).T
    rows = np.asarray(jax.vmap(op.adjoint)(jnp.eye(20))).reshape(20, -1)
    np.testing.assert_allclose(rows, columns, atol=1e-12)
    # All rows are orthogonal and of one length; over the choices and signs A*A is the identity.
    np.testing.assert_allclose(columns @ columns.T, np.eye(20) * N1 * N2 / 20, atol=1e-12)
    np.testing.assert_allclose(op.gain, 1.0, rtol=1e-12)
    x = jnp.asarray(RNG.standard_normal((N1, N2)))

    def round_trip(key):
        op = structured_sensing(key, 20, (N1, N2))
        return op.adjoint(op.mv(x))

    draws = np.asarray(jax.jit(jax.vmap(round_trip))(jax.random.split(jax.random.key(1), 400)))
    off = draws.mean(axis=0) - np.asarray(x)
    assert np.abs(off / (draws.std(axis=0) / np.sqrt(400))).max() < 4.5  # 48 means in units of their errors


def test_products_with_factors_are_those_with_the_matrix():
    op = structured_sensing(jax.random.key(0), 20, (N1, N2))
    v = jnp.asarray(RNG.standard_normal(20))
    times, transposed = op.backproject(v)
    np.testing.assert_allclose(op.mv_product(*factors()), op.mv(jnp.asarray(LEFT @ RIGHT.T)), atol=1e-12)
    np.testing.assert_allclose(times(jnp.asarray(RIGHT)), op.adjoint(v) @ RIGHT, atol=1e-12)
    np.testing.assert_allclose(transposed(jnp.asarray(LEFT)), op.adjoint(v).T @ LEFT, atol=1e-12)


# ---- bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("build", "said"),
    [
        (lambda: PSD(0), "rank: got 0"),
        (lambda: TwoFactors(1.5), "rank: got 1.5"),
        (lambda: TwoFactors(2, balance=-0.1), "balance: got -0.1"),
        (
            lambda: Recovery(Dense(jnp.ones((3, 4))), jnp.ones(3), PSD(1)),
            r"op: got an operator on signals of shape \(4,\)",
        ),
        (lambda: structured_sensing(jax.random.key(0), 49, (N1, N2)), "count: got 49"),
        (lambda: structured_sensing(jax.random.key(0), 0, (N1, N2)), "count: got 0"),
    ],
)
def test_refused(build, said):
    with pytest.raises(fl.InputError, match=said):
        build()


def test_plain_structures_have_no_unit():
    assert Vector().unit(Dense(jnp.ones((3, 4))), jnp.ones(3)) == 1.0
    assert not Squared.phaseless
