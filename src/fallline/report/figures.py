"""Figures of a report, as SVG text: the history of a run, and images of a direction."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..core.race import Race

__all__ = ["INK", "history", "images", "new_figure", "race", "to_svg"]

INK = ("#1f5fa8", "#c2571a", "#2f7d4f", "#7a4fa3")
"""Colors of lines, in order."""

_LINES = ("-", "--", "-.")  # when the colors are used up
_POINTS = 300  # of a curve that is drawn
_ROUNDING = 1e-16  # of a value beside the largest
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
        if _is_logarithmic(series[np.isfinite(series)]):
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


def _is_logarithmic(values: Any) -> bool:
    """Whether a logarithmic axis shows more of these finite values."""
    positive = values[values > 0]
    # A few values at or below zero are rounding at the end; a logarithm shows the rest.
    return len(positive) > 0.9 * len(values) and positive.max() > 10 * positive.min()


def race(result: Race, lower_bound: float | None) -> str:
    """The lowest value so far against the cost: a line for the median of the keys, a band for their spread.

    A line ends in a dot where the runs ended by themselves, and goes on dotted. The value is that above
    the lower bound where one is declared.
    """
    costs = _costs(result)
    shift = 0.0 if lower_bound is None else lower_bound
    values = {name: reached - shift for name, reached in result.at(costs).items()}
    figure = new_figure(7.2, 4.2)
    axis = figure.subplots()
    shown = np.concatenate([reached[np.abs(reached) < _LARGEST] for reached in values.values()])
    if _is_logarithmic(shown[shown != 0]):  # what reached its bound leaves the picture downwards
        axis.set_yscale("log", nonpositive="clip")
        top = shown.max()
        axis.set_ylim(max(shown[shown > 0].min(), _ROUNDING * top) / 2, 2 * top)
    for i, row in enumerate(result.table()):
        reached = np.where(np.abs(values[row.name]) < _LARGEST, values[row.name], np.nan)
        known = np.isfinite(reached).any(axis=0)
        at, reached = costs[known], reached[:, known]
        median, own = np.nanmedian(reached, axis=0), at <= row.cost
        style: dict[str, Any] = {"color": INK[i % len(INK)], "linewidth": 1.5}
        axis.plot(at[own], median[own], linestyle=_LINES[i // len(INK) % len(_LINES)], label=row.name, **style)
        if own.any() and not own.all():
            axis.plot(at[own][-1], median[own][-1], "o", markersize=4, color=style["color"])
            axis.plot(at[~own], median[~own], linestyle=":", **style)
        if len(reached) > 1:
            low, high = np.nanmin(reached, axis=0), np.nanmax(reached, axis=0)
            axis.fill_between(at, low, high, color=style["color"], alpha=0.15, linewidth=0)
    axis.set_xlabel("cost of the oracle calls, in gradients")
    axis.set_ylabel("lowest value so far" if lower_bound is None else "lowest value so far − lower bound")
    axis.grid(color="#e3e3e3", linewidth=0.6)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False)
    return to_svg(figure)


def _costs(result: Race) -> Any:
    """Where the curves of a race are drawn: at their own records, thinned out where there are many."""
    own = [curve.cost for curves in result.curves.values() for curve in curves]
    costs = np.unique(np.append(np.concatenate(own), result.cost))
    costs = costs[costs <= result.cost]
    if len(costs) > _POINTS:
        thinned = np.concatenate([np.linspace(0, len(costs) - 1, _POINTS), np.geomspace(1, len(costs) - 1, _POINTS)])
        costs = costs[np.unique(thinned.astype(int))]
    return costs


def images(pictures: Mapping[str, Any] | Sequence[tuple[str, Any]]) -> str:
    """Images side by side, each with its title, zero in the middle of the scale."""
    items = list(pictures.items()) if isinstance(pictures, Mapping) else list(pictures)
    figure = new_figure(2.7 * len(items), 2.9)
    for axis, (title, image) in zip(figure.subplots(1, len(items), squeeze=False)[0], items, strict=True):
        show_image(axis, title, image)
    return to_svg(figure)


def photographs(pictures: Mapping[str, Any]) -> str:
    """Grey images in two columns, each with its title, between the ends of its own scale."""
    rows = -(-len(pictures) // 2)
    height, width = np.shape(next(iter(pictures.values())))
    figure = new_figure(8.0, rows * (4.0 * min(height / width, 1.5) + 0.4))
    axes = figure.subplots(rows, 2, squeeze=False).reshape(-1)
    for axis, (title, image) in zip(axes, pictures.items(), strict=False):
        axis.imshow(image, cmap="gray", interpolation="antialiased")
        axis.set_title(title, fontsize=9)
    for axis in axes:
        axis.set_axis_off()
    return to_svg(figure)


def show_image(axis: Any, title: str, image: Any) -> None:
    """One image without ticks, zero in the middle of the scale."""
    top = float(np.max(np.abs(image))) or 1.0
    axis.imshow(image, cmap="RdBu_r", vmin=-top, vmax=top, interpolation="nearest")
    axis.set_title(title, fontsize=9)
    axis.set_xticks([])
    axis.set_yticks([])
    axis.spines[:].set_visible(False)
