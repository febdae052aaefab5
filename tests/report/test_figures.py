"""Figures: what is on the axes, whatever a run recorded."""

import base64
import io
import re
import xml.etree.ElementTree as ET

import numpy as np
import pytest
from matplotlib.image import imread

from fallline.report import figures

N = np.arange(200)


def labels(svg):
    """Texts of a figure; Matplotlib keeps each as a comment beside its outlines."""
    return [text.strip() for text in re.findall(r"<!--(.*?)-->", svg, re.DOTALL)]


def record(value, steps=N, gradient_norm=None):
    norms = np.ones(len(steps)) if gradient_norm is None else gradient_norm
    return {"step": steps, "value": np.asarray(value), "gradient_norm": norms}


def lines(svg):
    """The curves of a figure as arrays of points in SVG's coordinates, in the order of the panels."""
    paths = re.findall(r'<path d="([^"]+)" clip-path="[^"]+" style="fill: none; stroke: (#\w+)', svg)
    curves = [d for d, color in paths if color in figures.INK]
    return [np.array(re.findall(r"[ML] (\S+) (\S+)", d), np.float64) for d in curves]


@pytest.mark.parametrize(
    ("value", "bound", "logarithmic"),
    {
        "falls to its bound": (1 + np.exp(-N / 5), 1.0, True),
        "falls over orders, positive": (np.exp(-N / 20), None, True),
        "is within one order": (1 + 1 / (1 + N), None, False),
        "is negative": (-np.exp(N / 20), None, False),
        "is half below its bound": (np.exp(-N / 5) - 1e-9, 0.0, False),
        "is all below its bound": (-1 - np.exp(-N / 5), 0.0, False),
        "rounds below its bound at the end": (np.where(N < 195, np.exp(-N / 10), -1e-17), 0.0, True),
        "is constant": (np.full(200, 3.0), None, False),
        "is zero": (np.zeros(200), 0.0, False),
        "diverges": (10.0 ** (1.5 * N), None, True),
        "diverges with both signs": (np.where(N % 2, 1.7e308, -1.7e308), None, False),
        "ends in infinity": (np.where(N < 100, 2.0, np.inf), None, False),
        "ends in NaN": (np.where(N < 100, 2.0 + N, np.nan), None, True),
        "is NaN": (np.full(200, np.nan), 0.0, False),
    }.values(),
    ids=lambda x: "",
)
def test_the_axis_is_logarithmic_where_that_shows_more(value, bound, logarithmic):
    svg = figures.history(record(value), bound)
    ET.fromstring(svg)
    texts = labels(svg)
    assert any(r"10^{" in text for text in texts) == logarithmic
    assert ("value − lower bound" in texts) == (bound is not None)
    assert "gradient norm" in texts and "step" in texts


def test_an_exponential_is_a_line_from_corner_to_corner():
    svg = figures.history(record(np.exp(-N / 5.0)), 0.0)
    curve = lines(svg)[0]
    across, down = curve[-1] - curve[0]  # SVG's y grows downwards
    assert across > 300 and down > 100
    distances = (curve - curve[0]) @ [-down, across] / np.hypot(across, down)
    assert np.max(np.abs(distances)) < 0.5


def test_values_beyond_what_an_axis_can_hold_are_left_out():
    value = np.array([1.0, 1e20, 1e40, 1e200])
    curve = lines(figures.history(record(value, N[:4]), None))[0]
    assert len(curve) >= 2
    third = (curve[-1, 0] - curve[0, 0]) / 2
    panel = lines(figures.history(record(value, N[:4]), None))[1]
    assert panel[-1, 0] - curve[-1, 0] == pytest.approx(third, rel=1e-3)


@pytest.mark.parametrize("rows", [1, 2])
def test_few_records_are_marked(rows):
    svg = figures.history(record(np.array([3.0, 1.0])[:rows], N[:rows]), None)
    marks = re.findall(rf'<use [^>]*style="fill: {figures.INK[0]}', svg)
    assert len(marks) == rows


def test_ticks_are_at_whole_steps():
    ticks = [text for text in labels(figures.history(record([3.0, 2.0, 2.0], N[:3]), None)) if text.isdigit()]
    assert ticks == ["0", "1", "2"]


def test_every_recorded_quantity_has_a_panel():
    svg = figures.history({**record(np.exp(-N)), "since_noise": N % 7}, None)
    assert {"value", "gradient norm", "since noise"} <= set(labels(svg))
    assert len(lines(svg)) == 3


def test_a_figure_is_the_same_bytes_again():
    assert figures.history(record(np.exp(-N)), None) == figures.history(record(np.exp(-N)), None)


def pixels(svg):
    return [imread(io.BytesIO(base64.b64decode(data))) for data in re.findall(r'"data:image/png;base64,([^"]+)"', svg)]


def test_images_show_signs_in_red_and_blue_and_zero_in_white():
    (shown,) = pixels(figures.images({"signs": np.tile([2.0, 0.0, -2.0], (3, 1))}))
    side = shown.shape[1]
    red, white, blue = (shown[10, int(side * middle), :3] for middle in (1 / 6, 1 / 2, 5 / 6))
    assert red[0] > 2 * red[2] and blue[2] > 2 * blue[0] and white == pytest.approx(white[0], abs=0.01)
    assert white[0] > 0.95


def test_images_stand_side_by_side_under_their_titles():
    svg = figures.images({"first": np.eye(2), "all zero": np.zeros((2, 2))})
    assert [text for text in labels(svg) if text in ("first", "all zero")] == ["first", "all zero"]
    assert len(pixels(svg)) == 2
    assert pixels(svg)[1][..., :3] == pytest.approx(pixels(svg)[1][0, 0, 0], abs=0.01)
