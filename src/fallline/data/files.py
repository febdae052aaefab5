"""What users bring: photographs, diffraction patterns, matrices with missing entries."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Complex, Float, Int

from ..core.errors import InputError

__all__ = ["IMAGES", "Observed", "Patterns", "read_image", "read_matrix", "read_patterns"]

IMAGES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".webp", ".gif")
_ARGUMENT = "--data"


class Patterns(NamedTuple):
    """Diffraction patterns behind masks: intensities |fft(conj(mask) ⊙ x)|², both of shape (L, *signal)."""

    masks: Complex[np.ndarray, "L ..."]
    intensities: Float[np.ndarray, "L ..."]


class Observed(NamedTuple):
    """The known entries of a matrix of this shape."""

    rows: Int[np.ndarray, " m"]
    columns: Int[np.ndarray, " m"]
    values: Float[np.ndarray, " m"]
    shape: tuple[int, int]


def read_image(path: Path | str) -> Float[np.ndarray, "height width"]:
    """The luminance of an image file, from 0 to 1.

    **Raises:** `InputError` where it is no image that can be read.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            grey = np.asarray(image.convert("F"), np.float64)
    except (OSError, UnidentifiedImageError, ValueError) as error:
        raise InputError(_ARGUMENT, path, f"an image file{_reason(error)}") from None
    top = 255.0 if grey.max(initial=0.0) <= 255 else 65535.0
    return grey / top


def read_patterns(path: Path | str) -> Patterns:
    """A `.npz` file with `masks` and `magnitudes` (or `intensities`), both of shape (L, *signal).

    **Raises:** `InputError` where an array is missing, or they do not fit each other.
    """
    arrays = _arrays(path)
    masks = _member(path, arrays, "masks")
    kind = "intensities" if "intensities" in arrays else "magnitudes"
    sizes = _member(path, arrays, kind)
    if masks.dtype.kind not in "fciu" or masks.ndim < 2:
        raise InputError(_ARGUMENT, f"masks: {_describe(masks)}", "numbers of shape (L, *signal)")
    if sizes.dtype.kind not in "fiu" or sizes.shape != masks.shape:
        raise InputError(_ARGUMENT, f"{kind}: {_describe(sizes)}", f"real numbers of the masks' shape {masks.shape}")
    sizes = sizes.astype(np.float64)
    if not np.all(sizes >= 0):  # NaN too
        where = np.argwhere(~(sizes >= 0))[0].tolist()
        raise InputError(_ARGUMENT, f"{kind}: {sizes[tuple(where)]:g} at {where}", "numbers of at least 0")
    return Patterns(masks.astype(np.complex128), sizes if kind == "intensities" else sizes**2)


def read_matrix(path: Path | str) -> Observed:
    """The known entries of a matrix in a file.

    - `.npz` with `matrix`, missing entries NaN; or with `rows`, `columns`, `values` and, if it is larger than these
      say, `shape`;
    - `.npy`, as `matrix`;
    - `.csv`: one row a line, missing entries empty or `nan`; a line of names above is passed over;
    - `.mtx`: Matrix Market, coordinates or an array.

    **Raises:** `InputError` for a file of another kind, or one that contradicts itself.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix == ".mtx":
        return _market(path)
    if suffix == ".csv":
        return _known(path, _table(path))
    if suffix not in (".npz", ".npy"):
        raise InputError(_ARGUMENT, path, "a .npz, .npy, .csv or .mtx file")
    arrays = _arrays(path)
    if "matrix" in arrays:
        return _known(path, arrays["matrix"])
    rows, columns, values = (_member(path, arrays, name) for name in ("rows", "columns", "values"))
    if rows.dtype.kind not in "iu" or columns.dtype.kind not in "iu" or not rows.shape == columns.shape == values.shape:
        got = f"rows: {_describe(rows)}, columns: {_describe(columns)}, values: {_describe(values)}"
        raise InputError(_ARGUMENT, got, "whole numbers, whole numbers and numbers, all of one shape (m,)")
    least = (int(rows.max(initial=-1)) + 1, int(columns.max(initial=-1)) + 1)
    shape = tuple(int(n) for n in np.ravel(arrays["shape"])) if "shape" in arrays else least
    if len(shape) != 2 or shape[0] < least[0] or shape[1] < least[1]:
        raise InputError(_ARGUMENT, f"shape: {shape}", f"two numbers, at least {least} as the indices say")
    return Observed(rows, columns, _real(path, values), (shape[0], shape[1]))


def _market(path: Path) -> Observed:
    import scipy.io

    try:
        found: Any = scipy.io.mmread(path)
    except (OSError, ValueError, TypeError) as error:
        raise InputError(_ARGUMENT, path, f"a Matrix Market file{_reason(error)}") from None
    if isinstance(found, np.ndarray):
        return _known(path, found)
    return Observed(found.row, found.col, _real(path, found.data), (int(found.shape[0]), int(found.shape[1])))


def _table(path: Path) -> Float[np.ndarray, "n1 n2"]:
    try:
        lines = [line.strip() for line in path.read_text("utf-8-sig").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(_ARGUMENT, path, f"a .csv file{_reason(error)}") from None
    rows: list[list[float]] = []
    for number, line in enumerate(lines, 1):
        cells = [cell.strip() for cell in line.split(",")]
        try:
            rows.append([float(cell) if cell else np.nan for cell in cells])
        except ValueError as error:
            if number > 1:
                raise InputError(_ARGUMENT, f"{path}, line {number}: {error}", "numbers with commas between") from None
            continue
        if len(rows[-1]) != len(rows[0]):
            got = f"{path}, line {number}: {len(rows[-1])} cells"
            raise InputError(_ARGUMENT, got, f"{len(rows[0])}, as in the lines above")
    if not rows:
        raise InputError(_ARGUMENT, path, "a .csv file with at least one line of numbers")
    return np.asarray(rows)


def _known(path: Path | str, matrix: Any) -> Observed:
    if matrix.ndim != 2 or 0 in matrix.shape:
        raise InputError(_ARGUMENT, f"{path}: {_describe(matrix)}", "a matrix")
    dense = np.asarray(matrix)
    if dense.dtype.kind not in "fiu":
        raise InputError(_ARGUMENT, f"{path}: {_describe(dense)}", "real numbers")
    dense = dense.astype(np.float64)
    if np.any(np.isinf(dense)):
        raise InputError(_ARGUMENT, f"{path}: an infinite entry", "numbers, and NaN where an entry is missing")
    rows, columns = np.nonzero(~np.isnan(dense))
    if not len(rows):
        raise InputError(_ARGUMENT, f"{path}: no known entry", "at least one")
    return Observed(rows, columns, dense[rows, columns], (dense.shape[0], dense.shape[1]))


def _real(path: Path | str, values: Any) -> Float[np.ndarray, " m"]:
    if values.dtype.kind not in "fiu" or not np.all(np.isfinite(values)):
        raise InputError(_ARGUMENT, f"{path}: values that are not finite real numbers", "what was observed alone")
    return values.astype(np.float64)


def _arrays(path: Path | str) -> dict[str, Any]:
    try:
        with Path(path).open("rb") as file:
            loaded: Any = np.load(file, allow_pickle=False)
            return {"matrix": loaded} if isinstance(loaded, np.ndarray) else {k: loaded[k] for k in loaded.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise InputError(_ARGUMENT, path, f"a .npz file of arrays{_reason(error)}") from None


def _member(path: Path | str, arrays: dict[str, Any], name: str) -> Any:
    if name not in arrays:
        raise InputError(_ARGUMENT, f"{path} with {', '.join(arrays) or 'nothing'}", f"an array called {name}")
    return arrays[name]


def _describe(array: Any) -> str:
    return f"{array.dtype}{list(array.shape)}"


def _reason(error: Exception) -> str:
    return f" ({error.strerror})" if isinstance(error, OSError) and error.strerror else ""
