"""Measurement operators against their dense matrices, NumPy's transforms, and the adjoint identity."""

import jax
import jax.numpy as jnp
import lineax
import numpy as np
import pytest

from fallline.core.errors import InputError
from fallline.recovery import (
    CodedDiffraction,
    Dense,
    Entries,
    Lineax,
    Operator,
    OversampledFourier,
    Recovery,
    coded_diffraction,
    gaussian_measurements,
    structured_sensing,
)
from fallline.recovery.operators import as_operator


def _random(rng, shape, is_complex):
    parts = rng.standard_normal((2, *shape))
    return parts[0] + 1j * parts[1] if is_complex else parts[0]


def _operators():
    rng = np.random.default_rng(0)
    matrix = _random(rng, (7, 6), True)
    rows, columns = np.divmod(rng.permutation(12)[:7], 4)
    return {
        "dense real": Dense(matrix.real),
        "dense complex": Dense(matrix),
        "dense complex, of JAX": Dense(jnp.asarray(matrix)),
        "dense on matrices": Dense(matrix.real, (2, 3)),
        "entries": Entries(rows, columns, (3, 4)),
        "coded diffraction": coded_diffraction(jax.random.key(1), (3, 4), 2, octanary=True),
        "real masks": CodedDiffraction(rng.standard_normal((2, 5))),
        "oversampled": OversampledFourier((3, 4)),
        "structured": structured_sensing(jax.random.key(2), 7, (3, 4)),
        "lineax": Lineax(lineax.MatrixLinearOperator(jnp.asarray(matrix))),
    }


NAMES = [
    "dense real", "dense complex", "dense complex, of JAX", "dense on matrices", "entries", "coded diffraction",
    "real masks", "oversampled", "structured", "lineax",
]  # fmt: skip


def _matrix(op):
    """The matrix of an operator, column by column."""
    columns = [op.mv(jnp.asarray(e.reshape(op.shape))).reshape(-1) for e in np.eye(op.size)]
    return np.stack(columns, axis=1)


@pytest.mark.parametrize("name", NAMES)
def test_the_adjoint_is_the_conjugate_transpose_and_the_row_norms_and_the_gain_are_those_of_the_matrix(x64, name):
    op = _operators()[name]
    a, rng = _matrix(op), np.random.default_rng(1)
    assert a.shape == (int(np.prod(op.out_shape)), op.size) and np.iscomplexobj(a) == jnp.issubdtype(
        op.dtype, jnp.complexfloating
    )
    for is_complex in {np.iscomplexobj(a), True} - ({True} if name in ("entries", "structured") else set()):
        x, v = _random(rng, op.shape, is_complex), _random(rng, op.out_shape, is_complex)
        u, back = op.mv(jnp.asarray(x)), op.adjoint(jnp.asarray(v))
        np.testing.assert_allclose(np.ravel(u), a @ x.ravel(), rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(np.ravel(back), a.conj().T @ v.ravel(), rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(np.vdot(u, v), np.vdot(x, back), rtol=1e-12)
    norms = np.broadcast_to(np.asarray(op.squared_row_norms()), op.out_shape)
    exact = np.sum(np.abs(a) ** 2, axis=1).reshape(op.out_shape)
    if name == "structured":  # its rows have this norm on average over the signs
        np.testing.assert_allclose(np.mean(norms), op.size / 7, rtol=1e-12)
    else:
        np.testing.assert_allclose(norms, exact, rtol=1e-10)
        np.testing.assert_allclose(float(op.gain), np.sum(exact) / op.size, rtol=1e-10)
    assert int(op.count) == int(np.prod(op.out_shape))


@pytest.mark.parametrize("name", ["dense on matrices", "entries", "structured"])
def test_products_with_factors_are_those_of_the_matrix_that_they_make(x64, name):
    op, rng = _operators()[name], np.random.default_rng(2)
    left, right = rng.standard_normal((op.shape[0], 2)), rng.standard_normal((op.shape[1], 2))
    v = rng.standard_normal(op.out_shape)
    np.testing.assert_allclose(op.mv_product(jnp.asarray(left), jnp.asarray(right)), op.mv(left @ right.T), atol=1e-12)
    times, transposed = op.backproject(jnp.asarray(v))
    e = np.asarray(op.adjoint(jnp.asarray(v)))
    np.testing.assert_allclose(times(jnp.asarray(right)), e @ right, atol=1e-12)
    np.testing.assert_allclose(transposed(jnp.asarray(left)), e.T @ left, atol=1e-12)


def test_coded_diffraction_is_numpys_transform_of_the_conjugate_mask_times_the_signal(x64):
    op, rng = coded_diffraction(jax.random.key(3), (4, 6), 3), np.random.default_rng(3)
    x = _random(rng, (4, 6), True)
    expected = np.stack([np.fft.fft2(np.conj(mask) * x) for mask in np.asarray(op.masks)])
    np.testing.assert_allclose(op.mv(jnp.asarray(x)), expected, atol=1e-12)


def test_quaternary_masks_make_a_multiple_of_the_identity_and_octanary_ones_a_diagonal(x64):
    x = jnp.asarray(_random(np.random.default_rng(4), (5, 4), True))
    quaternary = coded_diffraction(jax.random.key(4), (5, 4), 6)
    assert set(np.unique(np.asarray(quaternary.masks))) <= {1, -1, 1j, -1j}
    np.testing.assert_allclose(quaternary.adjoint(quaternary.mv(x)), 20 * 6 * x, atol=1e-11)
    octanary = coded_diffraction(jax.random.key(4), (5, 4), 6, octanary=True)
    diagonal = 20 * np.sum(np.abs(np.asarray(octanary.masks)) ** 2, axis=0)
    assert np.ptp(diagonal) > 20
    np.testing.assert_allclose(octanary.adjoint(octanary.mv(x)), diagonal * x, atol=1e-11)
    np.testing.assert_allclose(octanary.squared_column_norms(), diagonal, rtol=1e-12)
    sizes = np.abs(np.asarray(coded_diffraction(jax.random.key(5), (100, 100), 3, octanary=True).masks)) ** 2
    assert set(np.round(np.unique(np.round(sizes, 9)), 6)) == {0.5, 3.0}
    assert abs(np.mean(sizes > 1) - 0.2) < 4 * np.sqrt(0.2 * 0.8 / sizes.size)


def test_the_parts_of_coded_diffraction_are_its_masks_one_by_one(x64):
    op = coded_diffraction(jax.random.key(6), (4, 3), 5, octanary=True)
    x = jnp.asarray(_random(np.random.default_rng(5), (4, 3), True))
    one_by_one = jax.vmap(lambda part: part.mv(x), in_axes=0)(op.parts[0])
    np.testing.assert_allclose(one_by_one[:, 0], op.mv(x), atol=1e-12)


def test_a_complex_matrix_is_kept_as_it_is_and_a_signal_may_be_real(x64):
    matrix = _random(np.random.default_rng(6), (5, 3), True)
    op = Dense(matrix)
    np.testing.assert_array_equal(op.matrix, matrix)
    assert np.shares_memory(op.rows, matrix) and op.shape == (3,) and op.dtype == np.complex128
    x = np.arange(3.0)
    np.testing.assert_allclose(op.mv(jnp.asarray(x)), matrix @ x, rtol=1e-13)


def test_gaussian_rows_have_unit_variance_and_with_normalized_a_gain_of_one(x64):
    for dtype in (jnp.float64, jnp.complex128):
        op = gaussian_measurements(jax.random.key(7), 400, 50, dtype)
        spread = 4 * np.sqrt(2 / 20_000)
        assert abs(float(op.gain) / 400 - 1) < spread
        assert abs(float(gaussian_measurements(jax.random.key(7), 400, 50, dtype, normalized=True).gain) - 1) < spread
    assert gaussian_measurements(jax.random.key(7), 5, (2, 3)).shape == (2, 3)


def test_rows_of_zeros_are_not_counted(x64):
    matrix = np.vstack([np.ones((3, 2)), np.zeros((4, 2))])
    op = Dense(matrix)
    assert int(op.count) == 3 and float(op.gain) == 3.0


def test_an_operator_without_an_adjoint_of_its_own_gets_the_conjugate_transpose(x64):
    class Twisted(Operator):
        shape = (3,)
        out_shape = (3,)
        dtype = np.complex128

        def mv(self, x):
            return jnp.roll(x, 1) * jnp.asarray([1j, 2.0, 1 - 1j])

    op = as_operator(Twisted())
    a, v = _matrix(op), jnp.asarray([1.0, 2j, 3.0])
    np.testing.assert_allclose(op.adjoint(v), a.conj().T @ np.asarray(v), atol=1e-14)
    np.testing.assert_allclose(op.squared_row_norms(), [1, 4, 2], rtol=1e-12)


def test_a_wrong_adjoint_is_refused_with_the_measured_mismatch(x64):
    matrix = jnp.asarray(_random(np.random.default_rng(8), (4, 3), True))

    class Unconjugated(Operator):
        shape = (3,)
        out_shape = (4,)
        dtype = np.complex128

        def mv(self, x):
            return matrix @ x

        def adjoint(self, v):
            return matrix.T @ v

    with pytest.raises(InputError, match=r"op: got Unconjugated with ⟨Ax, v⟩ and ⟨x, A\*v⟩ apart by 0?\.?\d+") as error:
        Recovery(Unconjugated(), jnp.ones(4))
    keys = jax.random.split(jax.random.key(0))
    x, v = (np.asarray(jax.random.normal(k, (n,), jnp.complex128)) for k, n in zip(keys, (3, 4), strict=True))
    a = np.asarray(matrix)
    mismatch = abs(np.vdot(a @ x, v) - np.vdot(x, a.T @ v)) / (np.linalg.norm(a @ x) * np.linalg.norm(v))
    assert f"{mismatch:.2g} of" in str(error.value)

    class Short(Unconjugated):
        def adjoint(self, v):
            return jnp.zeros(2)

    with pytest.raises(InputError, match=r"an adjoint of shape \(2,\)"):
        as_operator(Short())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Dense(np.zeros((2, 2), int)), "matrix: got int64"),
        (lambda: Dense(np.ones(3)), "matrix: got float64"),
        (lambda: Dense(np.ones((0, 3))), "matrix: got float64"),
        (lambda: Dense(np.ones((2, 6)), (2, 2)), "signal: got .2, 2.; expected a shape of 6"),
        (lambda: CodedDiffraction(np.ones(3)), "masks: got float64"),
        (lambda: coded_diffraction(jax.random.key(0), (3, 3), 0), "patterns: got 0"),
        (lambda: OversampledFourier((3,), 0), "factor: got 0"),
        (lambda: gaussian_measurements(jax.random.key(0), 0, 3), "count: got 0"),
        (
            lambda: gaussian_measurements(jax.random.key(0), 10**6, 10**4),
            "count: got a dense 1000000 × 10000 array, 80",
        ),
        (lambda: structured_sensing(jax.random.key(0), 10, (3, 3)), "count: got 10; expected at most"),
        (lambda: Entries(np.array([0, 0]), np.array([1, 1]), (2, 2)), r"the entry \(0, 1\) 2 times"),
        (lambda: Entries(np.array([2]), np.array([1]), (2, 2)), "rows: got from 2 to 2; expected from 0 to 1"),
        (lambda: as_operator("a"), "op: got str; expected an operator"),
    ],
)
def test_what_is_no_operator_is_refused(x64, make, message):
    with pytest.raises(InputError, match=message):
        make()


def test_a_64_bit_matrix_in_32_bit_mode_is_refused(x32):
    with pytest.raises(InputError, match="matrix: got complex128"):
        Dense(np.ones((2, 2), complex))


@pytest.mark.parametrize("is_complex", [False, True])
@pytest.mark.parametrize("of_complex", [False, True])
def test_a_matrix_larger_than_the_cache_is_cut_up(is_complex, of_complex):
    """15 MB or 31, in 2,400 rows; 2,399 is a prime, and its matrix stays whole."""
    with jax.enable_x64(True):
        draw = np.random.default_rng(0)
        for m in (2400, 2399):
            matrix = _random(draw, (m, 800), is_complex)
            op = Dense(matrix)
            assert (op.parts is None) == (m == 2399)
            x, v = _random(draw, (800,), of_complex), _random(draw, (m,), of_complex)
            np.testing.assert_allclose(op.mv(jnp.asarray(x)), matrix @ x, atol=1e-10)
            np.testing.assert_allclose(op.adjoint(jnp.asarray(v)), matrix.conj().T @ v, atol=1e-10)
        stack, split = Dense(_random(draw, (2400, 800), is_complex)).parts
        assert split(jnp.zeros(2400)).shape == stack.rows.shape[:2]
        assert stack.rows[0].nbytes <= 2**19
