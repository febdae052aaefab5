"""The 1,797 handwritten digits of scikit-learn, 8 × 8 pixels each."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from jaxtyping import Float, Int

__all__ = ["SIDE", "as_image", "digits", "leading_pattern"]

SIDE = 8


@functools.cache
def digits() -> tuple[Float[np.ndarray, "1797 64"], Int[np.ndarray, " 1797"]]:
    """Pixels scaled to [0, 1], one digit a row, and the labels 0 to 9.

    **Source:** E. Alpaydin and C. Kaynak, *Optical Recognition of Handwritten Digits*, UCI Machine
    Learning Repository (1998), the test part, as scikit-learn carries it.
    """
    from sklearn.datasets import load_digits

    data: Any = load_digits()
    return data.data / 16.0, data.target


def as_image(pixels: Float[np.ndarray, " 64"]) -> Float[np.ndarray, "8 8"]:
    """A vector of pixels as an image, its sign such that the largest entry is positive."""
    pixels = np.asarray(pixels, np.float64)
    return (pixels * np.sign(pixels[np.argmax(np.abs(pixels))])).reshape(SIDE, SIDE)


def leading_pattern(weights: Float[np.ndarray, "64 units"]) -> Float[np.ndarray, " 64"]:
    """The unit vector of pixels that a matrix of incoming weights moves most: its first left singular vector."""
    return np.linalg.svd(np.asarray(weights, np.float64), full_matrices=False)[0][:, 0]
