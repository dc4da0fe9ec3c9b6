"""Measures and tables: against scipy, and the text a reader sees."""

import io
import math

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from experiments import measures, tables

# Few distinct values, so that ties are common.
SAMPLES = st.lists(st.tuples(st.integers(-3, 3), st.integers(-3, 3)), min_size=3, max_size=30)


@hypothesis.given(SAMPLES)
def test_correlations_agree_with_scipy(pairs):
    stats = pytest.importorskip("scipy.stats")
    x, y = np.array(pairs, float).T
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        assert math.isnan(measures.pearson(x, y))
        assert math.isnan(measures.spearman(x, y))
        return
    assert measures.pearson(x, y) == pytest.approx(stats.pearsonr(x, y).statistic, abs=1e-12)
    assert measures.spearman(x, y) == pytest.approx(stats.spearmanr(x, y).statistic, abs=1e-12)


def test_median_relative_error():
    assert measures.median_relative_error([1.1, -2.0, 3.6], [1.0, -2.0, 4.0]) == pytest.approx(0.1)
    assert measures.median_relative_error([0.0, 1.0, 1.0], [0.0, 0.0, 0.0]) == np.inf
    assert measures.median_relative_error([0.0], [0.0]) == 0


def test_agreement_holds_all_measures():
    result = measures.agreement([1.0, 2.0, 4.0], [1.0, 2.0, 3.0])
    assert (result.count, result.spearman) == (3, pytest.approx(1))
    assert result.pearson == pytest.approx(0.98198, abs=1e-5)
    assert "Pearson 0.9820" in str(result)


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        ([1.0, 2.0], [1.0], "found 2 and 1 values"),
        ([], [], "found 0 and 0 values"),
        ([1.0, np.nan], [1.0, 2.0], r"finite.*positions \[1\]"),
    ],
)
def test_unusable_samples(x, y, message):
    for measure in (measures.pearson, measures.spearman, measures.median_relative_error):
        with pytest.raises(ValueError, match=message):
            measure(x, y)


def test_mean_std():
    assert measures.mean_and_std([1.0, 3.0]) == (2.0, pytest.approx(math.sqrt(2)))
    assert tables.mean_std([1, 2, 3]) == "2.00 ± 1.00"
    assert tables.mean_std([0.5], digits=1, scale=100, unit=" %") == "50.0 %"
    with pytest.raises(ValueError, match="at least one value"):
        tables.mean_std([])


COLUMNS = ("net", "params", "accuracy")
ROWS = [("seed", np.int64(5022), "58.1 ± 0.4"), ("grown | kept", 40_000, None)]


def test_plain_table():
    assert tables.plain(COLUMNS, ROWS).splitlines() == [
        "net           params    accuracy",
        "------------  ------  ----------",
        "seed           5,022  58.1 ± 0.4",
        "grown | kept  40,000           -",
    ]


def test_markdown_table():
    assert tables.markdown(COLUMNS, ROWS).splitlines() == [
        "| net | params | accuracy |",
        "| --- | ---: | ---: |",
        "| seed | 5,022 | 58.1 ± 0.4 |",
        "| grown \\| kept | 40,000 | - |",
    ]


@pytest.mark.parametrize("terminal", [False, True])
def test_show_frames_the_table_on_a_terminal_only(terminal):
    stream = io.StringIO()
    stream.isatty = lambda: terminal
    tables.show(COLUMNS, [("[bold]x", 0.123456, True)], title="Result", file=stream)
    text = stream.getvalue()
    assert all(part in text for part in ("Result", "accuracy", "[bold]x", "0.1235", "True"))
    assert ("┃" in text) is terminal


def test_rows_must_fit_the_columns():
    with pytest.raises(ValueError, match="Row 1 has 1 cells, expected 2"):
        tables.plain(("a", "b"), [(1, 2), (3,)])
