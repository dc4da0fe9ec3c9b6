"""Figures: what is drawn is what was given (read back from the figure), and files are written."""

import sys

import numpy as np
import pytest

from experiments import _drawing, comparison_figures, figures
from experiments.compare import METHODS
from tfgrow.types import GrowthEvent

pytest.importorskip("matplotlib")


def event(epoch, widths, before, after, status="applied"):
    return GrowthEvent(
        epoch, (), widths, before, after, 0, 0, -0.1, -0.1, 1.0, 1.0, {}, {}, status=status
    )


EVENTS = [
    event(2, {"conv10": (8, 10), "conv9": (4, 7)}, 100, 150),
    event(4, {"conv9": (7, 20)}, 150, 150, status="rejected"),
    event(5, {"conv9": (7, 8)}, 150, 170),
]
HISTORY = {"loss": [3.0, 2.0, 1.5, 1.2, 1.0, 0.9], "val_loss": [3.1, 2.2, 1.7, 1.5, 1.4, 1.3]}


@pytest.fixture
def drawn(monkeypatch):
    """Collects the figures that are written."""
    collected = []

    def keep(figure, path):
        collected.append(figure)
        return _drawing.write(figure, path)

    for module in (figures, comparison_figures):
        monkeypatch.setattr(module, "write", keep)
    return collected


def texts(axes):
    return [text.get_text().strip() for text in axes.texts]


def test_growth_shows_widths_loss_and_params(drawn, tmp_path):
    path = figures.plot_growth(EVENTS, HISTORY, tmp_path / "new" / "growth.png")
    assert path.read_bytes()[:4] == b"\x89PNG"
    top, middle, bottom = drawn[0].axes
    assert texts(top) == ["conv9 4→8", "conv10 8→10"]
    bands = [band.get_paths()[0].vertices for band in top.collections]
    assert [band[:, 1].max() for band in bands] == [8, 18]
    curves = {line.get_label(): line for line in middle.lines}
    np.testing.assert_array_equal(curves["training"].get_ydata(), HISTORY["loss"])
    np.testing.assert_array_equal(curves["validation"].get_xdata(), [1, 2, 3, 4, 5, 6])
    assert {"growth", "no growth"} < set(curves)
    np.testing.assert_array_equal(bottom.lines[0].get_xdata(), [0, 2, 5, 6])
    np.testing.assert_array_equal(bottom.lines[0].get_ydata(), [100, 150, 170, 170])


def test_growth_names_sites_that_kept_their_width(drawn, tmp_path):
    initial = {"conv10": 8, "conv9": 4, "dense": 6}
    figures.plot_growth(EVENTS, HISTORY, tmp_path / "a.svg", initial_widths=initial)
    assert texts(drawn[0].axes[0]) == ["conv10 8→10", "conv9 4→8", "dense 6"]


def test_growth_without_events_or_validation(drawn, tmp_path):
    figures.plot_growth([], {"loss": [2.0, 1.0], "tfgrow_params": [50, 50]}, tmp_path / "a.png")
    top, middle, bottom = drawn[0].axes
    assert texts(top) == ["no site grew"]
    assert [line.get_label() for line in middle.lines] == ["training"]
    np.testing.assert_array_equal(bottom.lines[0].get_ydata(), [50, 50])


def test_growth_takes_the_history_object_and_needs_a_loss(tmp_path):
    import keras

    history = keras.callbacks.History()
    history.history = {"accuracy": [0.1]}
    with pytest.raises(ValueError, match=r"found the keys \['accuracy'\]"):
        figures.plot_growth([], history, tmp_path / "a.png")


def test_estimates_show_points_diagonal_and_agreement(drawn, tmp_path):
    measured = np.array([-0.04, -0.03, -0.02, -0.01])
    figures.plot_estimates(measured * 1.1, measured, tmp_path / "a.png", ["b", "a", "b", "a"])
    (axes,) = drawn[0].axes
    points = {dots.get_label(): np.asarray(dots.get_offsets()) for dots in axes.collections}
    np.testing.assert_allclose(points["a"], [[-0.03, -0.033], [-0.01, -0.011]])
    assert len(points["b"]) == 2
    assert "Pearson 1.0000" in axes.get_title()
    assert "relative error 10.0%" in axes.get_title()
    diagonal = axes.lines[0]
    np.testing.assert_array_equal(diagonal.get_xdata(), diagonal.get_ydata())
    assert axes.get_xlim() == axes.get_ylim()
    assert axes.get_xlim()[0] < -0.044


def test_estimates_refuse_what_does_not_fit(tmp_path):
    with pytest.raises(ValueError, match="found 2 and 1 values"):
        figures.plot_estimates([1.0, 2.0], [1.0], tmp_path / "a.png")
    with pytest.raises(ValueError, match="one group for each of 2 points, found 1"):
        figures.plot_estimates([1.0, 2.0], [1.0, 2.0], tmp_path / "a.png", ["a"])
    assert not list(tmp_path.iterdir())


def test_accuracy_averages_the_seeds(drawn, tmp_path):
    rows = [
        {"method": "grown", "params": 20_000, "accuracy": 0.7},
        {"method": "grown", "params": 5_000, "accuracy": 0.6},
        {"method": "grown", "params": 20_000, "accuracy": 0.72},
        {"method": "scratch", "params": 20_000, "accuracy": 0.69},
    ]
    figures.plot_accuracy_params(rows, tmp_path / "a.png")
    grown, scratch = (bars.lines[0] for bars in drawn[0].axes[0].containers)
    np.testing.assert_allclose(grown.get_xydata(), [[5_000, 60], [20_000, 71]])
    np.testing.assert_allclose(scratch.get_xydata(), [[20_000, 69]])
    with pytest.raises(ValueError, match="at least one row"):
        figures.plot_accuracy_params([], tmp_path / "b.png")


def test_colours_are_distinct_for_few_and_many_series():
    for count in (1, 7, 8, 30):
        assert len({tuple(np.ravel(color)) for color in _drawing.colors(count)}) == count


def test_every_method_has_a_style_of_its_own_and_ours_stands_out():
    known = comparison_figures.styles(METHODS)
    assert len({(style.color, style.marker) for style in known.values()}) == len(METHODS)
    assert len({style.color for style in known.values()}) == len(METHODS)
    assert [name for name, style in known.items() if style.linewidth > 2] == ["gauss_newton"]
    assert known == comparison_figures.styles(METHODS[::-1])


@pytest.mark.parametrize("methods", [("firefly", "gauss_newton"), ("firefly", "uniform")])
def test_curves_show_every_method_as_grown_and_one_from_scratch(drawn, tmp_path, methods):
    point = {"dataset": "digits", "model": "mlp", "budget_in": "params", "budget": 9, "seed": 0}
    rows = [
        {**point, "method": method, "claim": claim, "epoch": epoch, "val_accuracy": 0.1 * epoch,
         "training_flops": 1e12 * epoch, "seconds": epoch}
        for method in methods for claim in ("grown", "from_scratch") for epoch in (1, 2)
    ]  # fmt: skip
    comparison_figures.plot_curves(rows, tmp_path / "curves.png")
    (figure,) = drawn
    for axes in figure.axes:
        assert [line.get_linestyle() for line in axes.lines] == ["-", "-", "--"]
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    reference = "gauss_newton" if "gauss_newton" in methods else "firefly"
    assert labels == [*methods, f"{reference} from scratch"]


def test_curves_end_where_the_first_seed_ends(drawn, tmp_path):
    """Averaged over the seeds that are left, they would jump back and forth."""
    point = {"dataset": "digits", "model": "mlp", "budget_in": "params", "budget": 9}
    rows = [
        {**point, "method": "search", "claim": "grown", "epoch": epoch, "seed": seed,
         "val_accuracy": 0.1 * epoch + seed, "training_flops": 1e12 * epoch, "seconds": epoch}
        for seed, epochs in ((0, 4), (1, 2)) for epoch in range(1, 1 + epochs)
    ]  # fmt: skip
    comparison_figures.plot_curves(rows, tmp_path / "curves.png")
    for axes in drawn[0].axes:
        np.testing.assert_allclose(axes.lines[0].get_xydata(), [[1, 60], [2, 70]])


def test_budgets_are_the_ticks(drawn, tmp_path):
    point = {"dataset": "digits", "model": "mlp", "budget_in": "params", "seed": 0}
    rows = [
        {**point, "method": "uniform", "claim": "grown", "budget": budget, "test_accuracy": 0.5}
        for budget in (10_000, 20_000)
    ]
    comparison_figures.plot_standings(rows, tmp_path / "standings.png")
    axis = drawn[0].axes[1].xaxis
    assert [axis.get_major_formatter()(tick, 0) for tick in axis.get_majorticklocs()] == [
        "10k", "20k",
    ]  # fmt: skip


def test_missing_matplotlib_says_how_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r'Drawing figures needs.*"tfgrow\[experiments\]"'):
        figures.plot_growth([], {"loss": [1.0]}, tmp_path / "a.png")
