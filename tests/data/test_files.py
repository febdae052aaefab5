"""What users bring: each format gives back what was written, and each fault is named."""

import numpy as np
import pytest
import scipy.io
import scipy.sparse
from PIL import Image

from fallline.core.errors import InputError
from fallline.data.files import read_image, read_matrix, read_patterns
from fallline.data.packaged import indian_pines, photograph

NAN = np.nan
MATRIX = np.array([[1.5, NAN, -2.0], [NAN, NAN, 4.0], [0.0, 7.0, NAN], [NAN, 3.0, 8.0]])


def dense(observed):
    """The matrix with NaN where nothing is known."""
    matrix = np.full(observed.shape, NAN)
    matrix[observed.rows, observed.columns] = observed.values
    return matrix


def triplets(path, **arrays):
    np.savez(path, **{name: np.asarray(array) for name, array in arrays.items()})
    return path


def test_an_image_is_its_luminance_from_0_to_1(tmp_path):
    pixels = np.arange(24, dtype=np.uint8).reshape(2, 4, 3) * 10
    Image.fromarray(pixels).save(tmp_path / "colour.png")
    expected = np.round(pixels @ np.array([0.299, 0.587, 0.114])) / 255
    np.testing.assert_allclose(read_image(tmp_path / "colour.png"), expected, atol=1 / 255)
    deep = np.array([[0, 65535, 32768]], np.uint16)
    Image.fromarray(deep).save(tmp_path / "deep.png")
    np.testing.assert_allclose(read_image(tmp_path / "deep.png"), deep / 65535, atol=1e-6)


def test_a_file_that_is_no_image_is_refused(tmp_path):
    (tmp_path / "no.png").write_text("words")
    with pytest.raises(InputError, match=r"^--data: got .*no\.png; expected an image file"):
        read_image(tmp_path / "no.png")
    with pytest.raises(InputError, match="No such file"):
        read_image(tmp_path / "absent.png")


def test_a_matrix_comes_back_from_every_format(tmp_path):
    rows, columns = np.nonzero(~np.isnan(MATRIX))
    values = MATRIX[rows, columns]
    np.savez(tmp_path / "a.npz", matrix=MATRIX)
    np.save(tmp_path / "a.npy", MATRIX)
    triplets(tmp_path / "b.npz", rows=rows, columns=columns, values=values, shape=MATRIX.shape)
    (tmp_path / "a.csv").write_text("x, y, z\n1.5,,-2\nnan,NaN,4\n0,7,\n,3,8\n")
    stored = scipy.sparse.coo_array((values, (rows, columns)), MATRIX.shape)
    scipy.io.mmwrite(tmp_path / "a.mtx", stored)
    for name in ("a.npz", "a.npy", "b.npz", "a.csv", "a.mtx"):
        np.testing.assert_array_equal(dense(read_matrix(tmp_path / name)), MATRIX, err_msg=name)


def test_indices_alone_say_the_shape(tmp_path):
    found = read_matrix(triplets(tmp_path / "a.npz", rows=[0, 4], columns=[2, 1], values=[1, 2]))
    assert found.shape == (5, 3) and found.values.dtype == np.float64


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("1,2\n3\n", r"line 2: 1 cells; expected 2"),
        ("1,2\n3,four\n", r"line 2: .*four"),
        ("a,b\n", "at least one line of numbers"),
        ("", "at least one line of numbers"),
        (",\n,\n", "no known entry"),
        ("1,inf\n", "an infinite entry"),
    ],
)
def test_faults_of_a_table(content, words, tmp_path):
    (tmp_path / "a.csv").write_text(content)
    with pytest.raises(InputError, match=words):
        read_matrix(tmp_path / "a.csv")


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"rows": [0]}, r"an array called columns"),
        ({"rows": [0.5], "columns": [0], "values": [1]}, "whole numbers, whole numbers and numbers"),
        ({"rows": [0, 1], "columns": [0], "values": [1]}, "all of one shape"),
        ({"rows": [3], "columns": [0], "values": [1], "shape": [2, 2]}, r"shape: \(2, 2\)"),
        ({"rows": [0], "columns": [0], "values": [np.nan]}, "not finite"),
        ({"matrix": [[1 + 1j]]}, "real numbers"),
        ({"matrix": [1.0, 2.0]}, "a matrix"),
    ],
)
def test_faults_of_arrays(arrays, words, tmp_path):
    with pytest.raises(InputError, match=words):
        read_matrix(triplets(tmp_path / "a.npz", **arrays))


def test_faults_of_files(tmp_path):
    for name, words in {
        "a.txt": r"\.npz, \.npy, \.csv or \.mtx",
        "a.npz": "No such file",
        "a.mtx": "Matrix Market",
    }.items():
        with pytest.raises(InputError, match=words):
            read_matrix(tmp_path / name)
    (tmp_path / "bad.npz").write_bytes(b"PK no")
    with pytest.raises(InputError, match=r"a \.npz file of arrays"):
        read_patterns(tmp_path / "bad.npz")


def test_patterns_are_squared_where_they_are_magnitudes(tmp_path):
    masks, sizes = np.exp(1j * np.arange(24.0)).reshape(2, 3, 4), np.arange(24.0).reshape(2, 3, 4)
    for kind, expected in {"magnitudes": sizes**2, "intensities": sizes}.items():
        found = read_patterns(triplets(tmp_path / f"{kind}.npz", masks=masks, **{kind: sizes}))
        np.testing.assert_array_equal(found.masks, masks)
        np.testing.assert_array_equal(found.intensities, expected)


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"masks": np.ones((2, 3))}, "an array called magnitudes"),
        ({"masks": np.ones((2, 3)), "magnitudes": np.ones((3, 2))}, r"magnitudes: float64\[3, 2\]"),
        ({"masks": np.ones((2, 3)), "magnitudes": -np.ones((2, 3))}, r"-1 at \[0, 0\]"),
        ({"masks": np.ones((2, 3)), "intensities": np.full((2, 3), NAN)}, r"nan at \[0, 0\]"),
        ({"masks": np.ones(3), "magnitudes": np.ones(3)}, "masks: "),
    ],
)
def test_faults_of_patterns(arrays, words, tmp_path):
    with pytest.raises(InputError, match=words):
        read_patterns(triplets(tmp_path / "a.npz", **arrays))


def test_what_packages_carry():
    assert photograph().shape == (427, 640) and photograph().min() >= 0 and photograph().max() <= 1
    assert photograph("camera").shape == (512, 512) and photograph("cell").max() <= 1
    with pytest.raises(InputError, match="photograph: got 'dog'"):
        photograph("dog")
    cube = indian_pines()
    assert cube.shape == (145, 145, 200) and cube.max() == 1
    singular = np.linalg.svd(cube.reshape(-1, 200), compute_uv=False)
    best = np.sqrt(1 - np.sum(singular[:3] ** 2) / np.sum(singular**2))
    assert abs(best - 0.0395) < 1e-4  # the error of the best rank 3, as measured with TensorLy's array itself
