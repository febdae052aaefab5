"""Measurement operators: linear maps from a signal to its measurements, known by their products.

    u = A x,   ⟨A x, v⟩ = ⟨x, A* v⟩

An operator has a signal shape and a measurement shape, any of them; `gain` is the mean eigenvalue of A*A,
Σᵢ ‖aᵢ‖² / n, so that A*A / gain is the identity on average for every operator here: losses, starts and
steps are in units of it, and mean the same for Gaussian rows, Fourier masks and sampled entries.

Where the signal is a matrix known by factors, `mv_product` measures L Rᵀ and `backproject` gives the
products with E = A* v; operators on which neither needs a dense matrix override them.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from ..core import trees
from ..core.errors import InputError, check_count, is_traced

__all__ = [
    "CodedDiffraction",
    "Dense",
    "Entries",
    "Lineax",
    "Operator",
    "OversampledFourier",
    "StructuredSensing",
    "as_operator",
    "check_adjoint",
    "check_once",
    "coded_diffraction",
    "gaussian_measurements",
    "structured_sensing",
]

_MOST_BYTES = 4e9  # of a dense array that is made for the user without being asked twice
_PROBES = 64
_CACHED = 2**19  # bytes of a dense matrix that are read again while they are in the cache
_CACHES = 16  # times that, below which a matrix is not cut up
_PIECE = 8  # entries of one row that are added up at once: 4 to 32 are as fast, up to the pads
_INSIDE: Any = "promise_in_bounds"  # indices are checked where they come in
Times = Callable[[Array], Array]


class Operator(eqx.Module):
    """A linear map; a subclass defines the three properties and `mv`, and `adjoint` where it knows a faster one."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of a signal."""
        raise NotImplementedError

    @property
    def out_shape(self) -> tuple[int, ...]:
        """Shape of the measurements."""
        raise NotImplementedError

    @property
    def dtype(self) -> Any:
        """Dtype of the map: complex where it makes complex numbers of real ones."""
        raise NotImplementedError

    def mv(self, x: Array) -> Array:
        """A x, of shape `out_shape`."""
        raise NotImplementedError

    def adjoint(self, v: Array) -> Array:
        """A* v, of shape `shape`: the conjugate transpose."""
        signal = jax.ShapeDtypeStruct(self.shape, jnp.result_type(self.dtype, v.dtype))
        return jnp.conj(jax.linear_transpose(self.mv, signal)(jnp.conj(v))[0])

    def squared_row_norms(self) -> Float[Array, ...]:
        """‖aᵢ‖², of a shape that broadcasts to `out_shape`. By default an estimate from random signs."""
        return _row_norms(self)

    def squared_column_norms(self) -> Float[Array, ...] | None:
        """The diagonal of A*A, of the shape of a signal, where it is known and far from constant; else None."""
        return None

    @property
    def size(self) -> int:
        """Number of coordinates of a signal, n."""
        return math.prod(self.shape)

    @property
    def count(self) -> Any:
        """Number of measurements, m; rows of zeros are none."""
        return jnp.sum(jnp.broadcast_to(self.squared_row_norms(), self.out_shape) > 0)

    @property
    def gain(self) -> Float[Array, ""]:
        """Mean eigenvalue of A*A: Σᵢ ‖aᵢ‖² / n."""
        return jnp.sum(jnp.broadcast_to(self.squared_row_norms(), self.out_shape)) / self.size

    @property
    def parts(self) -> tuple[Operator, Callable[[Array], Array]] | None:
        """The operator as a stack of smaller ones, and how an array of its measurements is stacked likewise.

        For losses whose terms know nothing of each other: what belongs to one part stays in the cache.
        """
        return None

    def mv_product(self, left: Float[Array, "n1 r"], right: Float[Array, "n2 r"]) -> Array:
        """A(L Rᵀ), for signals that are matrices."""
        return self.mv(left @ right.T)

    def backproject(self, v: Array) -> tuple[Times, Times]:
        """The products R ↦ E R and L ↦ Eᵀ L with E = A* v, for signals that are matrices."""
        e = self.adjoint(v)
        return lambda right: e @ right, lambda left: e.T @ left


class Dense(Operator):
    """An explicit matrix: row i is the measurement aᵢᴴ. Its shape is (m, n).

    **Arguments:** `signal` — the shape of a signal where that is no vector: n is then its size, and rows
    are flattened in C order.

    A row of zeros measures nothing and is not counted: matrices of one shape with fewer rows that are not share
    compiled code. A complex matrix is held as real numbers, `rows` of shape (m, 2 n) with real and imaginary parts in
    turn: its products are real ones, at the speed of memory.
    """

    rows: Array
    signal: tuple[int, ...] | None = eqx.field(static=True)
    is_complex: bool = eqx.field(static=True)

    def __init__(self, matrix: Any, signal: tuple[int, ...] | None = None):
        if not trees.is_floating(matrix) or np.ndim(matrix) != 2 or 0 in np.shape(matrix):
            raise InputError("matrix", trees.describe(matrix), "a floating or complex array of shape (m, n)")
        trees.check_width("matrix", matrix)
        if signal is not None and math.prod(signal) != np.shape(matrix)[1]:
            raise InputError("signal", signal, f"a shape of {np.shape(matrix)[1]} coordinates")
        self.is_complex = bool(jnp.iscomplexobj(matrix))
        self.rows = _interleaved(matrix, axis=1) if self.is_complex else matrix
        self.signal = None if signal is None else tuple(signal)

    @property
    def matrix(self) -> Array:
        return jax.lax.complex(self.rows[:, ::2], self.rows[:, 1::2]) if self.is_complex else self.rows

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.rows.shape[1] // (1 + self.is_complex),) if self.signal is None else self.signal

    @property
    def out_shape(self) -> tuple[int, ...]:
        return (self.rows.shape[0],)

    @property
    def dtype(self) -> Any:
        return jnp.result_type(self.rows.dtype, jnp.complex64) if self.is_complex else self.rows.dtype

    def _cut(self, v: Array) -> tuple[Operator, Callable[[Array], Array]] | None:
        """`parts`, where a product takes two real ones and would read the matrix twice."""
        return self.parts if (self.is_complex or jnp.iscomplexobj(v)) and jax.default_backend() == "cpu" else None

    def mv(self, x: Array) -> Array:
        x = x.reshape(-1)
        if (cut := self._cut(x)) is not None:
            return jax.lax.map(lambda part: part.mv(x), cut[0]).reshape(-1)
        if self.is_complex:
            # Products with conj(x) and i conj(x) = conj(−i x), as real vectors, are the parts of A x.
            return jax.lax.complex(self.rows @ _interleaved(jnp.conj(x)), self.rows @ _interleaved(1j * jnp.conj(x)))
        if jnp.iscomplexobj(x):
            return jax.lax.complex(self.rows @ jnp.real(x), self.rows @ jnp.imag(x))
        return self.rows @ x

    def adjoint(self, v: Array) -> Array:
        if not (self.is_complex or jnp.iscomplexobj(v)):
            return (v @ self.rows).reshape(self.shape)
        if (cut := self._cut(v)) is not None:
            stack, split = cut

            def add(total: Array, part: tuple[Operator, Array]) -> tuple[Array, None]:
                return total + part[0].adjoint(part[1]), None

            zeros = jnp.zeros(self.shape, jnp.result_type(self.dtype, v.dtype))
            return jax.lax.scan(add, zeros, (stack, split(v)))[0]
        real, imag = jnp.real(v) @ self.rows, jnp.imag(v) @ self.rows
        if self.is_complex:
            real, imag = real[::2] + imag[1::2], imag[::2] - real[1::2]
        return jax.lax.complex(real, imag).reshape(self.shape)

    def squared_row_norms(self) -> Float[Array, " m"]:
        return jnp.sum(jnp.square(self.rows), axis=1)

    @property
    def parts(self) -> tuple[Operator, Callable[[Array], Array]] | None:
        m, width = self.rows.shape
        most = max(_CACHED // (width * self.rows.dtype.itemsize), 1)
        each = max(k for k in range(1, min(most, m) + 1) if m % k == 0)
        if m * width * self.rows.dtype.itemsize < _CACHES * _CACHED or each < most / 4:
            return None
        stack = jnp.asarray(self.rows).reshape(m // each, each, width)
        return eqx.tree_at(lambda op: op.rows, self, stack), lambda a: a.reshape(m // each, each)


class _Pieces(eqx.Module):
    """The entries of each row in pieces of 8: pads point to a value of 0. Nothing is added up over more than pieces.

    `entries`: positions among the values, m where there is none; `others`: the entries' columns; `owners`: the row
    of each piece, ascending. The number of pieces depends on m and n alone: other entries compile nothing.
    """

    entries: Int[Array, "pieces 8"]
    others: Int[Array, "pieces 8"]
    owners: Int[Array, " pieces"]
    count: int = eqx.field(static=True)

    def __init__(self, rows: Int[np.ndarray, " m"], columns: Int[np.ndarray, " m"], count: int):
        m = len(rows)
        order = np.argsort(rows, kind="stable").astype(np.int32)
        degrees = np.bincount(rows, minlength=count)
        needed = -(-degrees // _PIECE)
        # A row begins at a new piece: each entry moves on by what the pads of the rows before take.
        pads = np.cumsum(needed) * _PIECE - np.cumsum(degrees) - (needed * _PIECE - degrees)
        places = np.arange(m) + np.repeat(pads, degrees)
        pieces = (m + count * (_PIECE - 1)) // _PIECE
        entries = np.full(pieces * _PIECE, m, np.int32)
        entries[places] = order
        others = np.zeros(pieces * _PIECE, np.int32)
        others[places] = columns[order]
        owners = np.full(pieces, count - 1, np.int32)
        owners[: needed.sum()] = np.repeat(np.arange(count, dtype=np.int32), needed)
        self.entries, self.others = (jnp.asarray(a.reshape(pieces, _PIECE)) for a in (entries, others))
        self.owners, self.count = jnp.asarray(owners), count

    def times(self, v: Float[Array, " m"], right: Float[Array, "n r"]) -> Float[Array, "count r"]:
        """The sparse matrix with the values v times `right`."""
        right = jnp.asarray(right)
        values = jnp.append(v, jnp.zeros(1, v.dtype)).at[self.entries].get(mode=_INSIDE)
        total = sum(values[:, k, None] * right.at[self.others[:, k]].get(mode=_INSIDE) for k in range(_PIECE))
        return jax.ops.segment_sum(total, self.owners, self.count, indices_are_sorted=True, mode=_INSIDE)


class Entries(Operator):
    """Some entries of a matrix: (A X)ₖ = X[rowsₖ, columnsₖ]. Never a dense matrix where factors will do.

    **Arguments:** `rows`, `columns` — integers of shape (m,), each pair at most once; `matrix` — the shape (n1, n2).

    Products with factors take O(m r) and some 30 bytes an entry beside the data. They are fastest where the
    entries are sorted by rows. Made of indices that are traced, an operator has no plan of its sums, and is slower.

    **Raises:** `InputError` for indices out of range, duplicates, no entries, or lengths that differ.
    """

    rows: Int[Array, " m"]
    columns: Int[Array, " m"]
    matrix: tuple[int, int] = eqx.field(static=True)
    by_row: _Pieces | None
    by_column: _Pieces | None

    def __init__(self, rows: Any, columns: Any, matrix: tuple[int, int]):
        self.matrix = (int(matrix[0]), int(matrix[1]))
        self.rows = _indices("rows", rows, self.matrix[0])
        self.columns = _indices("columns", columns, self.matrix[1])
        if self.rows.shape != self.columns.shape:
            raise InputError("columns", trees.describe(self.columns), f"as many as rows, {len(self.rows)}")
        self.by_row = self.by_column = None
        if is_traced((rows, columns)):
            return
        i, j = np.asarray(self.rows), np.asarray(self.columns)
        check_once(i, j, self.matrix[1])
        self.by_row, self.by_column = _Pieces(i, j, self.matrix[0]), _Pieces(j, i, self.matrix[1])
        self.rows, self.columns = jnp.asarray(i), jnp.asarray(j)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.matrix

    @property
    def out_shape(self) -> tuple[int, ...]:
        return (len(self.rows),)

    @property
    def dtype(self) -> Any:
        return jnp.float32

    def mv(self, x: Array) -> Array:
        return x[self.rows, self.columns]

    def adjoint(self, v: Array) -> Array:
        _check_bytes("adjoint", self.matrix, v.dtype, "factors, whose products need no dense matrix")
        return jnp.zeros(self.matrix, v.dtype).at[self.rows, self.columns].set(v)

    def squared_row_norms(self) -> Float[Array, ""]:
        return jnp.ones(())

    @property
    def count(self) -> Any:
        return len(self.rows)

    @property
    def gain(self) -> Float[Array, ""]:
        return jnp.asarray(len(self.rows) / self.size)  # counted, not added up: float32 ends at 2²⁴

    def mv_product(self, left: Float[Array, "n1 r"], right: Float[Array, "n2 r"]) -> Float[Array, " m"]:
        # Column by column it is one pass without a gathered row in memory, 3 to 17 times as fast on a CPU.
        total = jnp.zeros(len(self.rows), jnp.result_type(left, right))
        for a, b in zip(jnp.asarray(left).T, jnp.asarray(right).T, strict=True):
            total = total + a.at[self.rows].get(mode=_INSIDE) * b.at[self.columns].get(mode=_INSIDE)
        return total

    def backproject(self, v: Float[Array, " m"]) -> tuple[Times, Times]:
        n1, n2 = self.matrix
        if self.by_row is not None and self.by_column is not None:
            return functools.partial(self.by_row.times, v), functools.partial(self.by_column.times, v)

        def times(right: Array) -> Array:
            return jax.ops.segment_sum(v[:, None] * jnp.asarray(right)[self.columns], self.rows, n1)

        def transposed(left: Array) -> Array:
            return jax.ops.segment_sum(v[:, None] * jnp.asarray(left)[self.rows], self.columns, n2)

        return times, transposed


class CodedDiffraction(Operator):
    """Fourier transforms of a signal behind masks: (A x)ₗ = fft(conj(Dₗ) ⊙ x) over all axes, not normalized.

    **Arguments:** `masks` — complex or real array of shape (L, *signal).
    """

    masks: Array

    def __init__(self, masks: Any):
        if not trees.is_floating(masks) or np.ndim(masks) < 2 or 0 in np.shape(masks):
            raise InputError("masks", trees.describe(masks), "a floating or complex array of shape (L, *signal)")
        trees.check_width("masks", masks)
        self.masks = masks

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.masks.shape[1:])

    @property
    def out_shape(self) -> tuple[int, ...]:
        return tuple(self.masks.shape)

    @property
    def dtype(self) -> Any:
        return jnp.result_type(self.masks.dtype, jnp.complex64)

    @property
    def parts(self) -> tuple[Operator, Callable[[Array], Array]]:
        return eqx.tree_at(lambda op: op.masks, self, jnp.asarray(self.masks)[:, None]), lambda a: a[:, None]

    @property
    def _axes(self) -> tuple[int, ...]:
        return tuple(range(1, self.masks.ndim))

    def mv(self, x: Array) -> Array:
        return jnp.fft.fftn(jnp.conj(self.masks) * x, axes=self._axes)

    def adjoint(self, v: Array) -> Array:
        # The inverse transform divides by n, the adjoint does not.
        return self.size * jnp.sum(self.masks * jnp.fft.ifftn(v, axes=self._axes), axis=0)

    def squared_row_norms(self) -> Float[Array, "L ..."]:
        return jnp.sum(self._squares, axis=self._axes, keepdims=True)

    def squared_column_norms(self) -> Float[Array, ...]:
        return self.size * jnp.sum(self._squares, axis=0)

    @property
    def _squares(self) -> Float[Array, "L ..."]:
        return jnp.real(self.masks) ** 2 + jnp.imag(self.masks) ** 2


class OversampledFourier(Operator):
    """The Fourier transform of a signal padded with zeros to `factor` times its length on each axis.

    From its magnitudes alone a signal is known only up to shifts and conjugate reflection: the methods of
    this room need masks (`CodedDiffraction`), or further knowledge of the signal.
    """

    signal: tuple[int, ...] = eqx.field(static=True)
    factor: int = eqx.field(static=True, default=2)

    def __init__(self, signal: Sequence[int], factor: int = 2):
        check_count("factor", factor, 1)
        self.signal, self.factor = tuple(int(n) for n in signal), int(factor)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.signal

    @property
    def out_shape(self) -> tuple[int, ...]:
        return tuple(self.factor * n for n in self.signal)

    @property
    def dtype(self) -> Any:
        return jnp.complex64

    def mv(self, x: Array) -> Array:
        return jnp.fft.fftn(x, self.out_shape)

    def adjoint(self, v: Array) -> Array:
        whole = math.prod(self.out_shape) * jnp.fft.ifftn(v)
        return whole[tuple(slice(n) for n in self.signal)]

    def squared_row_norms(self) -> Float[Array, ""]:
        return jnp.full((), float(self.size))


class StructuredSensing(Operator):
    """Random signs, a cosine transform and `m` of its coefficients: matrices measured in O(n² log n), nothing stored.

        A X = √(N/m) · (C (S ⊙ X))[chosen],   N = n1 n2

    `C` is the orthonormal two-dimensional DCT; E A*A is the identity over the signs and the choice.
    """

    signs: Float[Array, "n1 n2"]
    chosen: Int[Array, " m"]

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.signs.shape)

    @property
    def out_shape(self) -> tuple[int, ...]:
        return (len(self.chosen),)

    @property
    def dtype(self) -> Any:
        return self.signs.dtype

    @property
    def _factor(self) -> float:
        return math.sqrt(self.size / len(self.chosen))

    def mv(self, x: Array) -> Array:
        return self._factor * jax.scipy.fft.dctn(self.signs * x, norm="ortho").reshape(-1)[self.chosen]

    def adjoint(self, v: Array) -> Array:
        placed = jnp.zeros(self.size, v.dtype).at[self.chosen].set(v).reshape(self.shape)
        return self._factor * self.signs * jax.scipy.fft.idctn(placed, norm="ortho")

    def squared_row_norms(self) -> Float[Array, ""]:
        return jnp.full((), self.size / len(self.chosen), self.dtype)


class Lineax(Operator):
    """Any `lineax.AbstractLinearOperator` between arrays; its adjoint is `lineax.conj(operator).T`.

    Its row norms are exact up to 4 million numbers, and beyond an estimate from random signs.
    """

    operator: Any
    norms: Float[Array, ...]

    def __init__(self, operator: Any):
        for name in ("in_structure", "out_structure"):
            structure = getattr(operator, name)()
            if not isinstance(structure, jax.ShapeDtypeStruct):
                raise InputError(
                    "op", f"a Lineax operator whose {name} is {structure}", "one from an array to an array"
                )
        self.operator = operator
        self.norms = jnp.zeros(())  # until `mv` can be asked
        self.norms = _row_norms(self)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.operator.in_structure().shape

    @property
    def out_shape(self) -> tuple[int, ...]:
        return self.operator.out_structure().shape

    @property
    def dtype(self) -> Any:
        return self.operator.out_structure().dtype

    def mv(self, x: Array) -> Array:
        return self.operator.mv(x.astype(self.operator.in_structure().dtype))

    def adjoint(self, v: Array) -> Array:
        import lineax  # not every import of fallline should pay for it

        return lineax.conj(self.operator).T.mv(v.astype(self.dtype))

    def squared_row_norms(self) -> Float[Array, ...]:
        return self.norms


def as_operator(op: Any, name: str = "op") -> Operator:
    """An operator from an `Operator`, a matrix of shape (m, n), or a Lineax operator.

    **Raises:** `InputError` for anything else, and for an operator whose adjoint is not one.
    """
    if isinstance(op, Operator):
        if type(op).__module__ != __name__:  # somebody's own
            check_adjoint(op, name)
        return op
    if hasattr(op, "in_structure") and hasattr(op, "mv"):
        op = Lineax(op)
        check_adjoint(op, name)
        return op
    if hasattr(op, "ndim") and op.ndim == 2:
        return Dense(op)
    raise InputError(name, trees.describe(op), "an operator, a matrix of shape (m, n), or a Lineax operator")


def check_adjoint(op: Operator, name: str = "op") -> None:
    """Refuse an operator for which ⟨A x, v⟩ and ⟨x, A* v⟩ differ, at random x and v, by more than rounding.

    **Raises:** `InputError` with the measured mismatch, relative to ‖A x‖ ‖v‖.
    """
    dtype = jnp.result_type(op.dtype, jnp.zeros(()))
    keys = jax.random.split(jax.random.key(0))
    x, v = (jax.random.normal(k, s, dtype) for k, s in zip(keys, (op.shape, op.out_shape), strict=True))
    u, back = op.mv(x), op.adjoint(v)
    for word, got, want in (("measurements", u, op.out_shape), ("an adjoint", back, op.shape)):
        if got.shape != want:
            raise InputError(name, f"{type(op).__name__} with {word} of shape {got.shape}", f"shape {want}")
    mismatch = jnp.abs(jnp.vdot(u, v) - jnp.vdot(x, back)) / (jnp.linalg.norm(u) * jnp.linalg.norm(v))
    if is_traced(mismatch):
        return
    if not float(mismatch) <= (most := math.sqrt(float(jnp.finfo(dtype).eps))):
        got = f"{type(op).__name__} with ⟨Ax, v⟩ and ⟨x, A*v⟩ apart by {float(mismatch):.2g} of ‖Ax‖‖v‖"
        raise InputError(name, got, f"an adjoint (conjugate transpose) that fits within {most:.1g}")


def gaussian_measurements(
    key: Array, count: int, shape: int | tuple[int, ...], dtype: Any = None, *, normalized: bool = False
) -> Dense:
    """Rows with independent standard normal entries (complex ones with E|a|² = 1); with `normalized` over √m.

    **Raises:** `InputError` for counts below 1, and where the matrix would take more than 4 GB.
    """
    signal = (shape,) if isinstance(shape, int) else tuple(shape)
    check_count("count", count, 1)
    for n in signal:
        check_count("shape", n, 1)
    dtype = jnp.dtype(jax.dtypes.canonicalize_dtype(float)) if dtype is None else jnp.dtype(dtype)
    _check_bytes("count", (count, *signal), dtype, "structured_sensing, which stores no matrix")
    matrix = jax.random.normal(key, (count, math.prod(signal)), dtype)
    return Dense(matrix / math.sqrt(count) if normalized else matrix, None if len(signal) == 1 else signal)


def coded_diffraction(
    key: Array, shape: Sequence[int], patterns: int = 12, *, octanary: bool = False
) -> CodedDiffraction:
    """Random masks with values in {±1, ±i}, and, for `octanary`, magnitudes √½ (with probability .8) and √3.

    **Source:** Candès, Li and Soltanolkotabi (2015), Section 4.
    """
    check_count("patterns", patterns, 1)
    phase, size = jax.random.split(key)
    full = (patterns, *shape)
    real = jax.dtypes.canonicalize_dtype(float)
    masks = jnp.asarray([1, 1j, -1, -1j])[jax.random.randint(phase, full, 0, 4)].astype(
        jnp.result_type(real, jnp.complex64)
    )
    if octanary:
        masks = masks * jnp.where(jax.random.bernoulli(size, 0.2, full), math.sqrt(3.0), math.sqrt(0.5)).astype(real)
    return CodedDiffraction(masks)


def structured_sensing(key: Array, count: int, shape: tuple[int, int]) -> StructuredSensing:
    """`count` structured random measurements of matrices of this shape.

    **Raises:** `InputError` where `count` is below 1 or above n1 n2.
    """
    check_count("count", count, 1)
    if count > math.prod(shape):
        raise InputError("count", count, f"at most the entries of a matrix, {math.prod(shape)}")
    signs, chosen = jax.random.split(key)
    real = jax.dtypes.canonicalize_dtype(float)
    picked = jax.random.permutation(chosen, math.prod(shape))[:count].astype(jnp.int32)
    return StructuredSensing(jax.random.rademacher(signs, shape, real), picked)


def _interleaved(z: Any, axis: int = 0) -> Any:
    """Real and imaginary parts in turn along an axis; of a NumPy array its own memory."""
    if isinstance(z, np.ndarray) and z.flags.c_contiguous and axis == z.ndim - 1:
        return z.view(z.real.dtype)
    stacked = jnp.stack([jnp.real(z), jnp.imag(z)], axis=axis + 1)
    return stacked.reshape(*z.shape[:axis], 2 * z.shape[axis], *z.shape[axis + 1 :])


def _row_norms(op: Operator) -> Float[Array, ...]:
    dtype = jnp.result_type(op.dtype, jnp.zeros(()))

    def squares(x: Array) -> Array:
        u = op.mv(x.reshape(op.shape).astype(dtype))
        return jnp.real(u) ** 2 + jnp.imag(u) ** 2

    exact = op.size * math.prod(op.out_shape) <= 4_000_000
    many = op.size if exact else _PROBES

    def add(i: Any, total: Array) -> Array:
        signs = jax.random.rademacher(jax.random.fold_in(jax.random.key(0), i), (op.size,), total.dtype)
        return total + squares(jax.nn.one_hot(i, op.size, dtype=total.dtype) if exact else signs)

    total = jax.lax.fori_loop(0, many, add, jnp.zeros(op.out_shape, jnp.finfo(dtype).dtype))
    return total if exact else total / many


def _indices(name: str, indices: Any, below: int) -> Int[Array, " m"]:
    if not hasattr(indices, "dtype") or not jnp.issubdtype(indices.dtype, jnp.integer) or indices.ndim != 1:
        raise InputError(name, trees.describe(indices), "integers of shape (m,)")
    if not len(indices):
        raise InputError(name, "no entry", "at least one observed entry")
    if not is_traced(indices) and not (int(np.min(indices)) >= 0 and int(np.max(indices)) < below):
        raise InputError(name, f"from {int(np.min(indices))} to {int(np.max(indices))}", f"from 0 to {below - 1}")
    return indices.astype(np.int32)


def check_once(rows: Int[np.ndarray, " m"], columns: Int[np.ndarray, " m"], width: int) -> None:
    flat = np.sort(rows.astype(np.int64) * width + columns)
    again = flat[1:] == flat[:-1]
    if np.any(again):
        i, j = divmod(int(flat[np.argmax(again)]), width)
        times = int(np.sum(flat == flat[np.argmax(again)]))
        raise InputError("rows and columns", f"the entry ({i}, {j}) {times} times", "each entry once")


def _check_bytes(name: str, shape: Sequence[int], dtype: Any, instead: str) -> None:
    size = math.prod(shape) * jnp.dtype(dtype).itemsize
    if size > _MOST_BYTES:
        asked = f"a dense {' × '.join(map(str, shape))} array, {size / 1e9:.1f} GB"
        raise InputError(name, asked, f"at most {_MOST_BYTES / 1e9:.0f} GB; use {instead}")
