"""Data that installed packages carry: nothing is ever downloaded."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from jaxtyping import Float

from ..core.errors import InputError, check_choice

__all__ = ["PHOTOGRAPHS", "indian_pines", "photograph"]

PHOTOGRAPHS = ("china", "flower", "camera", "moon", "cell")
"""Names of photographs: the first two are scikit-learn's, the others scikit-image's."""


@functools.cache
def photograph(name: str = "china") -> Float[np.ndarray, "height width"]:
    """The luminance of one of `PHOTOGRAPHS`, from 0 to 1.

    **Source:** scikit-learn's sample images (Creative Commons Attribution 2.0, from Flickr: china by danielbuechele,
    flower by vultilion); those of scikit-image's package, which says where each is from.

    **Raises:** `InputError` for another name, or where scikit-image is not installed.
    """
    check_choice("photograph", name, PHOTOGRAPHS)
    if name in ("china", "flower"):
        from sklearn.datasets import load_sample_image

        image: Any = load_sample_image(f"{name}.jpg")
        return (image / 255.0) @ np.array([0.299, 0.587, 0.114])
    try:
        from skimage import data
    except ImportError:
        raise InputError("photograph", f"{name} without scikit-image", "pip install 'fallline[data]'") from None
    return np.asarray(getattr(data, name)(), np.float64) / 255.0


@functools.cache
def indian_pines() -> Float[np.ndarray, "145 145 200"]:
    """The hyperspectral scene Indian Pines, 145 × 145 pixels in 200 bands, its largest value 1.

    **Source:** M. F. Baumgardner, L. L. Biehl and D. A. Landgrebe, *220 Band AVIRIS Hyperspectral Image Data Set:
    June 12, 1992 Indian Pine Test Site 3*, Purdue University (2015), as TensorLy carries it.

    **Raises:** `InputError` where TensorLy is not installed.
    """
    try:
        from tensorly.datasets import load_indian_pines
    except ImportError:
        raise InputError("data", "Indian Pines without TensorLy", "pip install 'fallline[data]'") from None
    scene: Any = load_indian_pines()
    cube = np.asarray(scene.tensor, np.float64)
    return cube / cube.max()
