"""Phase diagrams as pictures: success rates as shades, and the line where a rate is reached."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from ..core.errors import InputError
from ..recovery.phase_diagram import PhaseDiagram
from .figures import INK, new_figure, to_svg

__all__ = ["draw_phase_diagram", "save_phase_diagram"]


def draw_phase_diagram(diagram: PhaseDiagram, axes: Any, *, rate: float | None = 0.5) -> None:
    """Draw a phase diagram on Matplotlib axes: the first numbers to the right, the second upwards.

    **Arguments:** `axes` — of Matplotlib; they get a color bar beside them. `rate` — a line runs to the left of
    the cells from which on this rate is reached, see `PhaseDiagram.threshold`; None draws none.
    """
    from matplotlib.colors import LinearSegmentedColormap

    shades = LinearSegmentedColormap.from_list("success", ["#10243d", INK[0], "#f4f6f8"])
    right, up = _edges(diagram.first), _edges(diagram.second)
    mesh = axes.pcolormesh(right, up, diagram.rates.T, cmap=shades, vmin=0, vmax=1, linewidth=0, rasterized=True)
    trials = "1 trial" if diagram.seeds == 1 else f"{diagram.seeds} trials"
    bar = axes.figure.colorbar(mesh, ax=axes, label=f"success rate of {trials}", pad=0.02)
    bar.outline.set_visible(False)
    axes.set(xlabel=diagram.labels[0], ylabel=diagram.labels[1])
    for axis, numbers in ((axes.xaxis, diagram.first), (axes.yaxis, diagram.second)):
        if len(numbers) == 1:
            axis.set_ticks(numbers)
    axes.spines[:].set_visible(False)
    if rate is not None:
        index = np.searchsorted(diagram.first, diagram.threshold(rate))
        reached = index < len(diagram.first)
        border = np.where(reached, right[np.minimum(index, len(diagram.first))], np.nan)
        axes.stairs(border, up, orientation="horizontal", baseline=None, color=INK[1], linewidth=1.8)
        if reached.any():
            bar.ax.axhline(rate, color=INK[1], linewidth=1.8)


def _edges(numbers: Float[np.ndarray, " k"]) -> Float[np.ndarray, " k+1"]:
    """The borders of cells: halfway between two numbers; the outer cells are as wide to both sides."""
    if len(numbers) == 1:
        return numbers[0] + np.array([-0.5, 0.5])
    middle = (numbers[1:] + numbers[:-1]) / 2
    return np.concatenate([[2 * numbers[0] - middle[0]], middle, [2 * numbers[-1] - middle[-1]]])


def save_phase_diagram(diagram: PhaseDiagram, path: str | Path, *, rate: float | None = 0.5) -> Path:
    """Write a phase diagram to a PNG or SVG file; returns its path.

    **Raises:** `InputError` for another suffix, or a folder that does not exist.
    """
    path = Path(path)
    if path.suffix not in (".png", ".svg"):
        raise InputError("path", path, "a name that ends in .png or .svg")
    if not path.parent.is_dir():
        raise InputError("path", path, f"a file in a folder that exists: there is no {path.parent}")
    figure = new_figure(5.6, 4.0)
    draw_phase_diagram(diagram, figure.subplots(), rate=rate)
    if path.suffix == ".svg":
        path.write_text(to_svg(figure), encoding="utf-8")
    else:
        figure.savefig(path, dpi=160)
    return path
