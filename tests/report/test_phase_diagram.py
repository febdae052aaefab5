"""The picture of a phase diagram: every rate in its place, and the line where it is reached."""

import xml.etree.ElementTree as ET

import numpy as np
import pytest
from matplotlib.image import imread

from fallline import InputError
from fallline.recovery import PhaseDiagram
from fallline.report.figures import INK, new_figure
from fallline.report.phase_diagram import draw_phase_diagram, save_phase_diagram

RATES = np.array([[0.0, 0.0, 0.1], [0.6, 0.0, 0.2], [1.0, 0.3, 0.5], [1.0, 0.9, 0.4]])
DIAGRAM = PhaseDiagram(np.array([1.0, 2.0, 3.0, 5.0]), np.array([0.0, 0.1, 0.2]), RATES, 10, ("m / n", "noise"))


def drawn(diagram=DIAGRAM, **options):
    figure = new_figure(5.6, 4.0)
    axes = figure.subplots()
    draw_phase_diagram(diagram, axes, **options)
    figure.canvas.draw()
    return figure, axes


def borders(axes):
    return [patch.get_data() for patch in axes.patches]


def test_each_cell_has_the_shade_of_its_rate():
    _, axes = drawn()
    mesh = axes.collections[0]
    np.testing.assert_array_equal(mesh.get_array(), RATES.T)
    assert (mesh.norm.vmin, mesh.norm.vmax) == (0, 1)
    corners = mesh.get_coordinates()
    np.testing.assert_allclose(corners[0, :, 0], [0.5, 1.5, 2.5, 4, 6])
    np.testing.assert_allclose(corners[:, 0, 1], [-0.05, 0.05, 0.15, 0.25])
    luminance = mesh.cmap(np.linspace(0, 1, 21))[:, :3] @ [0.2126, 0.7152, 0.0722]
    assert np.all(np.diff(luminance) > 0)  # readable without colors


def test_the_line_runs_to_the_left_of_the_first_cell_that_reaches_the_rate():
    _, axes = drawn()
    values, edges, _ = borders(axes)[0]
    np.testing.assert_allclose(values, [1.5, 4, np.nan])  # the third row falls back at the end
    np.testing.assert_allclose(edges, [-0.05, 0.05, 0.15, 0.25])
    np.testing.assert_allclose(borders(drawn(rate=0.95)[1])[0][0], [2.5, np.nan, np.nan])
    assert borders(drawn(rate=None)[1]) == []


def test_the_axes_say_what_they_are():
    figure, axes = drawn()
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("m / n", "noise")
    bar = figure.axes[1]
    assert bar.get_ylabel() == "success rate of 10 trials"
    assert [line.get_ydata()[0] for line in bar.lines if line.get_color() == INK[1]] == [0.5]


def test_a_single_row_is_a_band():
    one = PhaseDiagram(DIAGRAM.first, np.array([3.0]), RATES[:, :1], 1, ("m", "rank"))
    figure, axes = drawn(one)
    assert axes.get_ylim() == (2.5, 3.5) and axes.get_yticks().tolist() == [3.0]
    assert figure.axes[1].get_ylabel() == "success rate of 1 trial"


def test_the_saved_pictures_show_success_in_light_and_failure_in_dark(tmp_path):
    image = imread(save_phase_diagram(DIAGRAM, tmp_path / "diagram.png"))[..., :3].mean(axis=-1)
    height, width = image.shape
    assert (width, height) == (896, 640)
    rows, columns = slice(int(0.1 * height), int(0.8 * height)), slice(int(0.2 * width), int(0.75 * width))
    inner = image[rows, columns]
    assert inner[-20:, -20:].mean() > 0.9 and inner[-20:, :20].mean() < 0.25 and inner[:20, :20].mean() < 0.3
    root = ET.parse(save_phase_diagram(DIAGRAM, str(tmp_path / "diagram.svg"))).getroot()
    assert root.tag == "{http://www.w3.org/2000/svg}svg"


def test_only_files_that_can_be_written_are_asked_for(tmp_path):
    with pytest.raises(InputError, match=r"path.*\.png or \.svg"):
        save_phase_diagram(DIAGRAM, tmp_path / "diagram.jpeg")
    with pytest.raises(InputError, match="a folder that exists"):
        save_phase_diagram(DIAGRAM, tmp_path / "missing" / "diagram.png")
