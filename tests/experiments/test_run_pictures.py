"""The pictures of a run, and drawing them again."""

import re
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
from experiment_helpers import Called, assert_picture, command

import bilevel_jax as bj
from bilevel_jax.experiments.present import plots
from bilevel_jax.experiments.present.pictures import picture

pytestmark = pytest.mark.usefixtures("as_from_the_shell")


@pytest.mark.slow
def test_pictures_are_written_and_redrawn(rooms, tmp_path):
    names = ["learning_curves.png", "incentive.png"]
    copy = tmp_path / "copy"
    shutil.copytree(rooms.directory, copy)
    for name in names:
        assert_picture(rooms.directory / name)
        (copy / name).unlink()
    called = command("plot", copy)
    assert called == Called(0, "".join(f"{copy / name}\n" for name in names), "")
    for name in names:
        assert (copy / name).read_bytes() == (rooms.directory / name).read_bytes()


@pytest.mark.slow
def test_no_picture_of_a_problem_without_panels(synthetic, monkeypatch):
    monkeypatch.setattr(plots, "build_problem", lambda section: object())
    called = command("plot", synthetic.directory)
    assert called == Called(0, f"{synthetic.directory / 'learning_curves.png'}\n", "")
    assert_picture(synthetic.directory / "learning_curves.png")


@pytest.mark.slow
def test_learning_curves(rooms):
    """A line for each setting, the median of its seeds (runs i and i + 16), with a band from least to most."""
    figure = plots.learning_curves(rooms.config, rooms.directory)
    for panel, column in zip(figure.axes, ("objective", "gradient_norm"), strict=True):
        curves = np.array([rooms.curve(number, column) for number in range(32)]).reshape(2, 16, 3)
        assert len(panel.lines) == len(panel.collections) == 16
        for i, (drawn, band) in enumerate(zip(panel.lines, panel.collections, strict=True)):
            np.testing.assert_array_equal(drawn.get_xdata(), [0, 2, 3])
            np.testing.assert_allclose(drawn.get_ydata(), np.median(curves[:, i], 0))
            vertices = band.get_paths()[0].vertices
            assert vertices[:, 1].min() == curves[:, i].min()
            assert vertices[:, 1].max() == curves[:, i].max()
    assert "objective" in figure.axes[0].get_ylabel()
    assert "gradient" in figure.axes[1].get_ylabel()
    assert "2 seeds" in figure.get_suptitle()


@pytest.mark.slow
def test_learning_curves_without_spread(synthetic):
    """A line for each seed of the problem, which is a setting; no band, as each ran from one start."""
    figure = plots.learning_curves(synthetic.config, synthetic.directory)
    assert [len(panel.lines) for panel in figure.axes] == [5, 5]
    assert [len(panel.collections) for panel in figure.axes] == [0, 0]
    (legend,) = figure.legends
    labels = [text.get_text() for text in legend.get_texts()]
    assert [label.split(",")[0] for label in labels] == [f"seed {seed}" for seed in range(5)]


@pytest.mark.parametrize("goals", [((1, 9), (11, 11)), ((11, 1),), ((1, 9), (11, 11), (1, 1))])
def test_incentive_has_a_panel_for_each_context(goals):
    problem = bj.problems.make("four_rooms", goals=goals)
    states = len(problem.grid.cells)
    x = np.random.default_rng(0).normal(size=states + 1)
    policy = np.random.default_rng(1).dirichlet(np.ones(4), (len(goals), states))
    figure = picture(problem, x, SimpleNamespace(policy=policy, result=np.zeros(len(policy), np.int32)))
    panels = [axes for axes in figure.axes if axes.images]
    assert len(panels) == len(goals)
    heat = np.asarray(problem.incentive(x))
    for i, panel in enumerate(panels):
        drawn = panel.images[0].get_array()
        np.testing.assert_array_equal(np.ma.getmaskarray(drawn), problem.grid.walls)
        np.testing.assert_array_equal(drawn[~problem.grid.walls], heat)
        low, high = panel.images[0].get_clim()
        assert low <= heat.min() < heat.max() <= high
        # an arrow in each cell: right minus left, down minus up
        (arrows,) = [artist for artist in panel.collections if hasattr(artist, "U")]
        np.testing.assert_allclose(arrows.U, policy[i, :, 1] - policy[i, :, 3])
        np.testing.assert_allclose(arrows.V, policy[i, :, 2] - policy[i, :, 0])
        np.testing.assert_array_equal(arrows.XY, problem.grid.cells[:, ::-1])
        goal = [text.get_position() for text in panel.texts if text.get_text() == "G"]
        assert goal == [goals[i][::-1]]
    titles = [panel.get_title() for panel in panels]
    named = [f"goal at row {row}, column {column}" for row, column in goals]
    assert titles == ([""] if len(goals) == 1 else named)
    assert any("a dot where it is even" in text.get_text() for text in figure.texts)


@pytest.mark.slow
def test_plot_of_no_run(tmp_path, synthetic):
    for directory in (tmp_path, tmp_path / "nowhere"):
        called = command("plot", directory)
        assert called.code == 2
        assert called.out == ""
        assert re.fullmatch(rf"bilevel-jax: error: {directory}: holds no finished run \(resolved.yaml.*\n", called.err)
    shutil.copytree(synthetic.directory, tmp_path / "copy")
    (tmp_path / "copy" / "metrics.csv").unlink()
    called = command("plot", tmp_path / "copy")
    assert called.code == 2
    assert "(metrics.csv missing)" in called.err
