"""Figures: what is on the axes, whatever a run recorded."""

import base64
import io
import re
import xml.etree.ElementTree as ET

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from matplotlib.image import imread

import fallline as fl
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


# --- races -----------------------------------------------------------------------------------------


def sgd(rate):
    return fl.optimizer(optax.sgd, learning_rate=rate)


def start(key):
    return np.exp(np.asarray(jax.random.uniform(key, (), float)))


def ticks(svg, axis):
    """Texts of the labelled ticks of the axis "x" or "y", with their places in SVG's coordinates."""
    parser = ET.XMLParser(target=ET.TreeBuilder(insert_comments=True))
    found = {}
    for group in ET.fromstring(svg, parser).iter():
        if isinstance(group.tag, str) and group.get("id", "").startswith(f"{axis}tick_"):
            text = [part.text.strip() for part in group.iter() if part.tag is ET.Comment]
            mark = [part.get(axis) for part in group.iter() if str(part.tag).endswith("}use") and part.get(axis)]
            if text:
                found[text[0]] = float(mark[0])
    return found


def dotted(svg):
    """The dotted curves of a picture, as `lines` gives the others."""
    paths = re.findall(r'<path d="([^"]+)" clip-path="[^"]+" style="fill: none; stroke-dasharray: 1\.', svg)
    return [np.array(re.findall(r"[ML] (\S+) (\S+)", d), np.float64) for d in paths]


def value_at(svg, points):
    """Costs and values of points of a picture, read off its ticks; the vertical axis logarithmic."""
    costs = {float(text): place for text, place in ticks(svg, "x").items()}
    powers = {
        float(re.search(r"10\^\{(.*?)\}", text)[1].replace("−", "-")): place
        for text, place in ticks(svg, "y").items()
        if "10^" in text
    }
    (c0, x0), *_, (c1, x1) = sorted(costs.items())
    (p0, y0), *_, (p1, y1) = sorted(powers.items())
    cost = c0 + (points[:, 0] - x0) * (c1 - c0) / (x1 - x0)
    return cost, 10.0 ** (p0 + (points[:, 1] - y0) * (p1 - p0) / (y1 - y0))


def test_a_race_shows_the_median_of_the_keys_and_their_spread():
    # f = ½x², x_t = (1 − η)ᵗ x0: in logarithms a straight line over the cost t + 1, whatever the start.
    result = fl.race(lambda x: 0.5 * x**2, start, {"fast": sgd(0.5), "slow": sgd(0.2)}, cost=30, keys=(0, 1, 2))
    svg = figures.race(result, 0.0)
    starts = sorted(float(start(jax.random.key(seed))) for seed in (0, 1, 2))
    for curve, rate in zip(lines(svg), (0.5, 0.2), strict=True):
        cost, value = value_at(svg, curve[[0, -1]])
        np.testing.assert_allclose(cost, [1, 30], atol=0.05)
        expected = 0.5 * starts[1] ** 2 * (1 - rate) ** (2 * np.array([0, 29]))
        np.testing.assert_allclose(value, expected, rtol=0.05)
    assert {"fast", "slow", "lowest value so far − lower bound"} <= set(labels(svg))
    assert len(re.findall("opacity: 0.15", svg)) == 2


def test_a_single_key_has_no_band():
    result = fl.race(lambda x: 0.5 * x**2, 1.0, {"a": sgd(0.5)}, cost=10)
    assert "opacity: 0.15" not in figures.race(result, 0.0)


def test_a_solver_that_ended_by_itself_has_a_dot_and_goes_on_dotted():
    solvers = {"ends": sgd(0.5), "goes on": sgd(0.01)}
    result = fl.race(lambda x: 0.5 * x**2, 1.0, solvers, cost=100, stop=fl.gradient_norm(2.0**-10))
    svg = figures.race(result, 0.0)
    (ends, goes_on), (rest,) = lines(svg), dotted(svg)
    cost, value = value_at(svg, np.stack([ends[-1], rest[0], rest[-1], goes_on[-1]]))
    np.testing.assert_allclose(cost, [11, 12, 100, 100], atol=0.2)
    np.testing.assert_allclose(value[:3], 0.5 * 2.0**-20, rtol=0.05)
    assert len(re.findall(rf'<use [^>]*style="fill: {figures.INK[0]}', svg)) == 1


@pytest.mark.parametrize(
    ("fn", "bound", "logarithmic"),
    {
        "falls to its bound": (lambda x: 1 + x**2, 1.0, True),
        "reaches its bound": (lambda x: jnp.where(x > 1e-3, x**2, 0.0), 0.0, True),
        "falls over orders, positive": (lambda x: x**2, None, True),
        "is negative": (lambda x: x**2 - 2, None, False),
        "is within one order": (lambda x: 1 + 0.1 * x**2, None, False),
    }.values(),
    ids=lambda x: "",
)
def test_a_race_s_axis_is_logarithmic_where_that_shows_more(fn, bound, logarithmic):
    svg = figures.race(fl.race(fn, 1.0, {"a": sgd(0.25)}, cost=25), bound)
    ET.fromstring(svg)
    assert any("10^{" in text for text in labels(svg)) == logarithmic
    assert ("lowest value so far − lower bound" in labels(svg)) == (bound is not None)


def test_what_reaches_its_bound_leaves_the_picture_downwards():
    def fn(x):
        return jnp.where(x > 0.1, x**2, 0.0)

    svg = figures.race(fl.race(fn, 1.0, {"a": sgd(0.25), "b": sgd(0.01)}, cost=25), 0.0)
    falls, stays = lines(svg)
    assert falls[-1, 1] > max(ticks(svg, "y").values()) > stays[-1, 1]


def test_a_long_race_is_thinned_out():
    result = fl.race(lambda x: 0.5 * x**2, 1.0, {"a": sgd(1e-3)}, cost=20_000)
    costs = figures._costs(result)
    assert (costs[0], costs[-1]) == (1, 20_000) and len(costs) <= 600
    # Dense where it begins, and nowhere sparse.
    assert costs[:20].tolist() == list(range(1, 21)) and np.max(np.diff(costs)) <= 20_000 / 299 + 1


def test_nobody_finite_is_a_picture_too():
    result = fl.race(lambda x: jnp.log(x), -1.0, {"a": sgd(0.1)}, cost=5)
    ET.fromstring(figures.race(result, None))
    assert np.isnan(result.table()[0].value)


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
