"""Scores beside trained truth: the cells, the correlations, the refusals."""

import json

import pytest
from absl import flags

from experiments import agreement, datasets
from tests.experiments.here import spare_the_process

TINY = (
    "--dataset=digits", "--model=mlp", "--shapes=3-6", "--max_train=300", "--epochs=2", "--after=1",
    "--new_units=1", "--steps=2", "--seeds=1", "--threads=1", "--spend=0.2",
)  # fmt: skip


def options(*arguments):
    values = flags.FlagValues()
    agreement.define_flags(values)
    values(["program", *TINY, *arguments])
    return values


def test_cells_train_and_score(tmp_path, monkeypatch):
    spare_the_process(monkeypatch)
    cells = agreement.cells_of(options(f"--results_dir={tmp_path}"))
    assert [cell.what for cell in cells] == ["base", "scores", "0", "1"]
    found = {cell.what: agreement.run_cell(cell) for cell in cells}
    for cell in cells:
        assert json.loads(cell.path.read_text()) == json.loads(json.dumps(found[cell.what]))
    base, units = found["base"]["params"], found["scores"]["units"]
    for number, more in enumerate(units):
        spent = found[str(number)]["params"] - base
        assert 0 < spent / more < 2 * 0.2 * base
        assert abs(spent - 0.2 * base) <= spent / more, "a unit more or less"
    assert set(found["scores"]["scores"]) == set(agreement.NAMES)
    assert all(len(row) == 2 for row in found["scores"]["scores"].values())
    results = {cells[0].shape: {0: found}}
    assert [row[2] for row in agreement.rows_of(results)] == list(agreement.NAMES)
    assert [row[1] for row in agreement.gains_of(results)] == [1, 2]
    assert min(found["scores"]["scores"]["worth"]) > 0
    agreement.write_page(tmp_path / "docs" / "page.md", results)
    page = (tmp_path / "docs" / "page.md").read_text()
    assert "has 20% more parameters" in page
    assert all(page.count(f"| 3-6 | 1 | {name} |") == 1 for name in agreement.NAMES)


def test_units_cost_about_the_same_in_every_layer():
    (cell, *_) = agreement.cells_of(options())
    first, second = agreement.units_for(cell, datasets.load("digits", max_train=300))
    assert first < second, "a unit of the first layer reads 64 pixels"


def test_a_score_by_the_unit_is_not_one_by_the_parameter():
    """Where units are dear they bring more, though less for what they cost."""
    cells = {
        "base": {"val_loss": 2.0},
        **{str(number): {"val_loss": 2.0 - gain} for number, gain in enumerate((0.1, 0.3, 0.2))},
        "scores": {
            "units": [20, 1, 4],
            "scores": {name: [0.1, 0.4, 0.3] for name in agreement.NAMES},
        },
    }
    (row, *_) = agreement.rows_of({(3, 3, 3): {0: cells}})
    assert row[3:] == ["+1.00", "-1.00"]


def test_a_shape_that_is_none_is_refused():
    with pytest.raises(flags.IllegalFlagValueError, match="expected shapes such as"):
        options("--shapes=8-x")
