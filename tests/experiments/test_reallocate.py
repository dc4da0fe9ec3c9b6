"""The reallocation experiment: its cells on a tiny network, its share, its refusals."""

import json

import pytest
from absl import flags

from experiments import cells, reallocate, training
from tests.experiments.here import spare_the_process

TINY = (
    "--dataset=digits", "--model=mlp", "--good=5,5", "--bad=4,16", "--max_train=600", "--before=2",
    "--after=2", "--settle=1", "--every=1", "--rounds=2", "--seeds=1", "--threads=1",
)  # fmt: skip


def settings(*arguments):
    values = flags.FlagValues()
    reallocate.define_flags(values)
    values(["program", *TINY, *arguments])
    return reallocate.settings_of(values)


def test_cells_part_where_the_oracle_begins(tmp_path, monkeypatch, capsys):
    """Run in this process, whose threads and order of sums other tests share."""
    spare_the_process(monkeypatch)
    chosen = settings("--bad=4,7", "--good=4,7", f"--results_dir={tmp_path}")
    results = {}
    for arm in reallocate.ARMS:
        cell = cells.Cell(arm, 0, chosen)
        results[arm, 0] = reallocate.run_cell(cell)
        assert cells.load(cell) == json.loads(cell.path.read_text())
    bad, reallocated, good = (results[arm, 0] for arm in reallocate.ARMS)
    assert bad["history"]["val_loss"] == pytest.approx(good["history"]["val_loss"], rel=1e-3)
    for found in (bad, reallocated):
        assert len(found["history"]["loss"]) == 4
    first, second = (cell["history"]["val_loss"] for cell in (bad, reallocated))
    assert first[:2] == pytest.approx(second[:2], rel=1e-3)
    epochs = [e["epoch"] for e in reallocated["events"]]
    assert sorted(set(epochs)) == [2, 3]
    assert max(epochs.count(2), epochs.count(3)) == 2
    assert any(e["widths"] for e in reallocated["events"] if e["status"] == "applied")
    assert reallocated["widths"] != bad["widths"]
    assert all(e["params_after"] <= bad["params"] for e in reallocated["events"])
    assert reallocated["params"] <= bad["params"]
    assert not bad["events"]
    reallocate.show(results, [0])
    assert "recovered of the gap" in capsys.readouterr().out


def test_learning_rate_falls_twice():
    recipe = training.Recipe(epochs=5, batch_size=1, learning_rate=0.1, restart=3)
    rate = training._optimizer(recipe, steps_per_epoch=10)._learning_rate
    assert [float(rate(step)) for step in (0, 15, 30, 40)] == pytest.approx([0.1, 0.05, 0.1, 0.05])
    assert max(float(rate(29)), float(rate(49))) < 1e-3
    late = training._optimizer(training.Recipe(5, 1, 0.1, fall=0.4), steps_per_epoch=10)
    rates = [float(late._learning_rate(step)) for step in (0, 15, 30, 40, 50)]
    assert rates == pytest.approx([0.1, 0.1, 0.1, 0.05, 0.0])
    once = training._optimizer(training.Recipe(5, 1, 0.1), steps_per_epoch=10)._learning_rate
    assert [float(once(step)) for step in (0, 25, 50)] == pytest.approx([0.1, 0.05, 0.0])


def test_share():
    assert reallocate.recovered(0.5, 0.5, 0.6) == 0
    assert reallocate.recovered(0.5, 0.62, 0.6) == pytest.approx(1.2)
    assert reallocate.recovered(0.5, 0.45, 0.6) == pytest.approx(-0.5)
    assert reallocate.recovered(0.6, 0.7, 0.6) != reallocate.recovered(0.6, 0.7, 0.6)  # NaN


def test_shapes_of_unequal_size_are_refused():
    with pytest.raises(ValueError, match=r"equally many parameters.*'good': 415, 'bad': 510"):
        reallocate.check_sizes(settings())
    reallocate.check_sizes(settings("--bad=4,10", "--good=5,5", "--model=mlp"))
    with pytest.raises(flags.IllegalFlagValueError, match="whole numbers"):
        settings("--bad=4,0")
