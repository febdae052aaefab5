"""The problems of measured data: photographs behind masks, matrices with missing entries."""

import jax
import numpy as np
import pytest
from PIL import Image

import fallline as fl
from fallline.core.errors import InputError
from fallline.problems import coded_diffraction, missing_entries

KEY = jax.random.key(0)


@pytest.fixture
def photo(tmp_path):
    pixels = (np.add.outer(np.arange(12) * 9, np.arange(16) * 5) + 20).astype(np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    return str(tmp_path / "a.png"), pixels / 255


@pytest.fixture
def table(tmp_path):
    """A 12 × 9 matrix of rank 2, of which every seventh entry is missing."""
    draw = np.random.default_rng(0)
    matrix = draw.normal(size=(12, 2)) @ draw.normal(size=(2, 9))
    known = matrix.copy()
    known.reshape(-1)[::7] = np.nan
    np.savez(tmp_path / "a.npz", matrix=known)
    return str(tmp_path / "a.npz"), matrix, known


def test_the_intensities_of_a_photograph_are_those_of_numpy(photo, dtype):
    file, image = photo
    made = coded_diffraction(file, loss="intensity", patterns=3, seed=5)
    masks = np.asarray(made.problem.op.masks, np.complex128)
    assert set(np.round(masks.reshape(-1), 12)) == {1, 1j, -1, -1j}
    expected = np.abs(np.fft.fft2(masks.conj() * image)) ** 2
    np.testing.assert_allclose(made.problem.y, expected, rtol=1e-4 if dtype == np.float32 else 1e-10, atol=1e-4)
    assert made.problem.y.dtype == dtype and made.start(KEY).dtype == dtype
    assert float(made.problem.value(np.asarray(image, dtype))) == pytest.approx(0, abs=1e-8)
    assert made.measure(-image)["relative error of the image"] == pytest.approx(0, abs=1e-6)
    assert list(made.view(made.start(KEY), -image)) == [
        "one of the patterns (log)", "where it starts", "recovered", "the photograph",
    ]  # fmt: skip
    np.testing.assert_array_equal(made.view(image, -image)["recovered"], image)


@pytest.mark.parametrize("loss", ["intensity", "truncated-poisson", "amplitude", "reweighted_amplitude"])
def test_every_loss_recovers_a_photograph(loss, photo, x64):
    file, image = photo
    made = coded_diffraction(file, loss=loss)
    solution = fl.minimize(made.problem, made.start(KEY), made.solver, steps=2000, stop=made.stop)
    assert solution.status.converged
    assert made.measure(solution.x)["relative error of the image"] < 1e-7


def test_missing_entries_of_a_file(table, x64):
    file, matrix, known = table
    made = missing_entries(file, rank=2, held_out=0.1)
    hidden = int(np.sum(~np.isnan(known))) - len(made.problem.y)
    assert 3 <= hidden <= 15
    solution = fl.minimize(made.problem, made.start(KEY), made.solver, steps=500, stop=made.stop)
    np.testing.assert_allclose(solution.x.left @ solution.x.right.T, matrix, atol=1e-5)
    assert made.measure(solution.x)["relative error of entries held back"] < 1e-5
    pictures = made.view(made.start(KEY), solution.x)
    assert np.sum(np.isnan(pictures["what is known"])) == hidden + np.sum(np.isnan(known))
    assert "relative error of entries held back" not in missing_entries(file, rank=2, held_out=0.0).measure(solution.x)


def test_the_scene_is_the_default(dtype):
    made = missing_entries()
    assert made.problem.op.shape == (3600, 200) and made.problem.y.dtype == dtype
    assert len(made.problem.y) == pytest.approx(0.2 * 720_000, rel=0.01)
    assert set(made.measure(made.start(KEY))) == {
        "relative error of the known entries", "relative error of entries held back",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: missing_entries(rank=0), "rank: got 0"),
        (lambda: missing_entries(rank=201), "rank: got 201; expected at most the smaller dimension, 200"),
        (lambda: missing_entries(known=0.0), "known: got 0.0; expected a share that leaves entries"),
        (lambda: missing_entries(held_out=1.0), "held_out: got 1.0"),
        (lambda: missing_entries(seed=-1), "seed: got -1"),
        (lambda: coded_diffraction(seed=-1), "seed: got -1"),
        (lambda: coded_diffraction("a.pdf"), "--data: got a.pdf"),
    ],
)
def test_bad_input(make, words):
    with pytest.raises(InputError, match=words):
        make()
