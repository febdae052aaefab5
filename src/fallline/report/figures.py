"""Figures of a report, as SVG text: the history of a run, and images of a direction."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

__all__ = ["INK", "history", "images", "new_figure", "to_svg"]

INK = ("#1f5fa8", "#c2571a", "#2f7d4f", "#7a4fa3")
"""Colors of lines, in order."""

_LARGEST = 1e100  # a run is long lost there, and the arithmetic of axes overflows further on


def new_figure(width: float, height: float) -> Any:
    """An empty Matplotlib figure without pyplot and its global state; sizes in inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def to_svg(figure: Any) -> str:
    """The figure as one `<svg>` element without ids that differ from run to run."""
    import matplotlib

    out = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "fallline"}):
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    text = out.getvalue()
    return text[text.index("<svg") :]


def history(record: Mapping[str, Any], lower_bound: float | None) -> str:
    """Every recorded quantity over the steps; the value above its lower bound where one is declared."""
    from matplotlib.ticker import MaxNLocator

    columns = [name for name in record if name != "step"]
    figure = new_figure(7.2, 2.3 * len(columns) + 0.3)
    steps = np.asarray(record["step"])
    axes = figure.subplots(len(columns), 1, sharex=True, squeeze=False)[:, 0]
    for axis, name, color in zip(axes, columns, INK * len(columns), strict=False):
        series, label = np.asarray(record[name], np.float64), name.replace("_", " ")
        series = np.where(np.abs(series) < _LARGEST, series, np.nan)
        if name == "value" and lower_bound is not None:
            series, label = series - lower_bound, "value − lower bound"
        finite = series[np.isfinite(series)]
        positive = finite[finite > 0]
        # A few values at or below zero are rounding at the end; a logarithm shows the rest.
        if len(positive) > 0.9 * len(finite) and positive.max() > 10 * positive.min():
            axis.set_yscale("log")
            series = np.where(series > 0, series, np.nan)
        axis.plot(steps, series, color=color, linewidth=1.4, marker="." if len(steps) < 3 else None)
        axis.set_ylabel(label)
        axis.grid(color="#e3e3e3", linewidth=0.6)
        axis.spines[["top", "right"]].set_visible(False)
    axes[-1].set_xlabel("step")
    axes[-1].xaxis.set_major_locator(MaxNLocator("auto", integer=True, steps=[1, 2, 5, 10]))
    figure.align_ylabels(axes)
    return to_svg(figure)


def images(pictures: Mapping[str, Any] | Sequence[tuple[str, Any]]) -> str:
    """Images side by side, each with its title, zero in the middle of the scale."""
    items = list(pictures.items()) if isinstance(pictures, Mapping) else list(pictures)
    figure = new_figure(2.7 * len(items), 2.9)
    for axis, (title, image) in zip(figure.subplots(1, len(items), squeeze=False)[0], items, strict=True):
        show_image(axis, title, image)
    return to_svg(figure)


def show_image(axis: Any, title: str, image: Any) -> None:
    """One image without ticks, zero in the middle of the scale."""
    top = float(np.max(np.abs(image))) or 1.0
    axis.imshow(image, cmap="RdBu_r", vmin=-top, vmax=top, interpolation="nearest")
    axis.set_title(title, fontsize=9)
    axis.set_xticks([])
    axis.set_yticks([])
    axis.spines[:].set_visible(False)
