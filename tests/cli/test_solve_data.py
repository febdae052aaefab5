"""`solve --data`: a user's own files, and problems that bring their method."""

import json
import re

import numpy as np
import pytest
from PIL import Image

from fallline.problems import instance


@pytest.fixture
def photo(folder):
    """A small picture with an edge and a slope; its luminance as NumPy reads it."""
    rows, columns = np.mgrid[:24, :32]
    pixels = (60 + 4 * rows + 60 * (columns > 14)).astype(np.uint8)
    Image.fromarray(pixels).save(folder / "photo.png")
    return pixels / 255


def found(folder):
    with np.load(folder / "point.npz") as file:
        return file["x"]


def test_a_photograph_is_recovered_from_its_patterns(run, photo, folder):
    result = run("solve", "coded-diffraction", "--data", "photo.png", "--out", "report", "--json")
    assert result.code == 0
    x = found(folder / "report")
    error = min(np.linalg.norm(x - photo), np.linalg.norm(x + photo)) / np.linalg.norm(photo)
    assert error < 1e-8
    assert result.json["measure"]["relative error of the image"] == pytest.approx(error, abs=1e-12)
    page = (folder / "report" / "index.html").read_text()
    for title in ("one of the patterns", "where it starts", "recovered", "the photograph"):
        assert title in page
    again = json.loads((folder / "report" / "run.json").read_text())["command"]
    assert f"data={folder / 'photo.png'}" in again


def test_measured_patterns_need_no_photograph(run, photo, folder):
    """The user's own masks and magnitudes: complex, and known up to a phase."""
    draw = np.random.default_rng(0)
    masks = np.exp(2j * np.pi * draw.random((8, 24, 32)))
    signal = photo * np.exp(1j * photo)
    np.savez("measured.npz", masks=masks, magnitudes=np.abs(np.fft.fft2(masks.conj() * signal)))
    result = run("solve", "coded-diffraction", "--data", "measured.npz", "--out", "report", "--json")
    assert result.code == 0
    x = found(folder / "report")
    turn = np.vdot(x, signal)
    assert np.linalg.norm(x * turn / abs(turn) - signal) < 1e-7 * np.linalg.norm(signal)
    assert set(result.json["measure"]) == {"misfit of the magnitudes"}


def test_another_method_and_another_loss(run, photo):
    result = run(
        "solve", "coded-diffraction", "--data", "photo.png", "--option", "loss=truncated-poisson",
        "--with", "sgd", "--set", "learning_rate=0.2", "--json",
    )  # fmt: skip
    assert result.code == 0 and result.json["measure"]["relative error of the image"] < 1e-8


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("coded-diffraction", "--data", "no.txt"), "--data: got .*no.txt; expected an image"),
        (("coded-diffraction", "--data", "absent.png"), "No such file"),
        (("coded-diffraction", "--option", "loss=square"), "loss: got"),
        (("coded-diffraction", "--option", "patterns=0"), "patterns: got 0"),
        (("coded-diffraction", "--set", "learning_rate=1"), "--set: got learning_rate; expected none without --with"),
        (("rosenbrock",), "--with: got nothing; expected a method or an optimizer: rosenbrock has none of its own"),
        (("rosenbrock", "--with", "adam", "--data", "photo.png"), "data"),
    ],
)
def test_bad_input(words, message, run, photo):
    result = run("solve", *words)
    assert result.code == 2
    assert re.search(message, result.err), result.err


def test_the_photograph_of_scikit_learn_is_the_default():
    made = instance("coded-diffraction", patterns=1)
    assert made.problem.op.shape == (427, 640) and "china" in made.description
