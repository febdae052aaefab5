"""How time and iterations grow with the size of the problem, for each family of recovery problems.

Each to a relative error of 1e-6 in float64, at a fixed number of measurements for each degree of freedom; the
exponent is the slope of log time against log n, by least squares. Compilation is apart.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import jax

jax.config.update("jax_enable_x64", True)

import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from timing import report  # noqa: E402

import fallline as fl  # noqa: E402
from fallline import recovery as fr  # noqa: E402
from fallline.recovery.structures import product_distance  # noqa: E402

Run = Callable[[], fl.Solution]


def gaussian(n: int) -> tuple[Run, Callable[[Any], float]]:
    """Complex Gaussian rows, m = 6n, truncated amplitude flow."""
    op = fr.gaussian_measurements(jax.random.key(1), 6 * n, n, jnp.complex128)
    signal = jax.random.normal(jax.random.key(2), (n,), jnp.complex128)
    y = jnp.abs(op.mv(signal)) ** 2
    error = fr.Recovery(op, y, loss=fr.TruncatedAmplitude()).distance
    return lambda: fl.phase_retrieval(op, y), lambda x: float(error(x, signal))


def diffraction(side: int) -> tuple[Run, Callable[[Any], float]]:
    """Images of side × side pixels behind 12 masks."""
    op = fr.coded_diffraction(jax.random.key(1), (side, side))
    image = jax.random.uniform(jax.random.key(2), (side, side))
    y = jnp.abs(op.mv(image)) ** 2
    error = fr.Recovery(op, y, loss=fr.TruncatedAmplitude()).distance
    return lambda: fl.phase_retrieval(op, y, real=True, step_size=1.0), lambda x: float(error(x, image))


def sensing(n: int) -> tuple[Run, Callable[[Any], float]]:
    """n × n matrices of rank 4 from 6 · 2nr structured measurements, scaled gradient descent."""
    left, right = (jnp.linalg.qr(jax.random.normal(jax.random.key(k), (n, 4)))[0] for k in (2, 3))
    op = fr.structured_sensing(jax.random.key(1), 48 * n, (n, n))
    y, truth = op.mv(left @ right.T), fr.Factors(left, right)
    return lambda: fl.matrix_sensing(op, y, 4, method="scaled"), lambda x: float(product_distance(x, truth))


def completion(n: int) -> tuple[Run, Callable[[Any], float]]:
    """n × n matrices of rank 5, 100 entries known in each row, alternating least squares."""
    draw = np.random.default_rng(0)
    left, right = draw.normal(size=(2, n, 5)) / np.sqrt(n)
    flat = np.unique(draw.integers(0, n * n, 100 * n))
    rows, columns = flat // n, flat % n
    values = np.sum(left[rows] * right[columns], axis=1)
    truth = fr.Factors(jnp.asarray(left), jnp.asarray(right))

    def run() -> fl.Solution:
        return fl.matrix_completion(rows, columns, values, (n, n), 5, method="alternating_least_squares")

    return run, lambda x: float(product_distance(x, truth))


def outliers(n: int) -> tuple[Run, Callable[[Any], float]]:
    """n × n matrices of rank 5 with a tenth of the entries corrupted."""
    draw = np.random.default_rng(0)
    left, right = draw.normal(size=(2, n, 5)) / np.sqrt(n)
    bad = np.where(draw.random((n, n)) < 0.1, draw.uniform(-25 / n, 25 / n, (n, n)), 0)
    problem = fr.RobustPCA(jnp.asarray(left @ right.T + bad), 5, 0.15)
    truth = fr.Factors(jnp.asarray(left), jnp.asarray(right))

    def run() -> fl.Solution:
        return fl.minimize(problem, fr.robust_pca_start(problem, jax.random.key(0)), fl.robust_pca(), steps=1000)

    return run, lambda x: float(product_distance(x, truth))


FAMILIES = {
    "Gaussian phase retrieval, complex, m = 6n": (gaussian, [125, 250, 500, 1000]),
    "coded diffraction, side of the image": (diffraction, [64, 128, 256, 512]),
    "structured sensing, rank 4": (sensing, [64, 128, 256, 512]),
    "completion, 100 entries a row": (completion, [500, 1000, 2000, 4000]),
    "robust PCA, rank 5": (outliers, [100, 200, 400, 800]),
}


def main() -> None:
    for name, (make, sizes) in FAMILIES.items():
        figures: dict[str, float] = {}
        seconds = []
        for n in sizes:
            run, error = make(n)
            run()  # compiles
            began = time.perf_counter()
            solution = run()
            seconds.append(time.perf_counter() - began)
            assert error(solution.x) < 1e-6, f"{name}, {n}: {solution.status}, error {error(solution.x):.1e}"
            figures |= {f"n = {n}, ms": 1e3 * seconds[-1], f"n = {n}, iterations": int(solution.steps)}
        figures["exponent of the time"] = float(np.polyfit(np.log(sizes), np.log(seconds), 1)[0])
        report(f"growth: {name}", figures, "reported")


if __name__ == "__main__":
    main()
