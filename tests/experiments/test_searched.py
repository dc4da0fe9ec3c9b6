"""Hyperband over widths: within the budget, and for as long as growing takes."""

import dataclasses
import json

import keras_tuner
import numpy as np
import pytest

from experiments import compare, datasets, searched, training
from tests.experiments.here import spare_the_process
from tests.experiments.test_compare import options

PLACE = ("--methods=hyperband", "--claims=grown,from_scratch", "--seeds=1")


def kept(folder, method, claim):
    (path,) = folder.glob(f"cells/*/{method}-{claim}-seed0.json")
    return json.loads(path.read_text())


def test_a_search_beside_a_growing_network(tmp_path, monkeypatch):
    """It takes as long as `gauss_newton` did, of whose cell that is all it reads."""
    spare_the_process(monkeypatch)
    monkeypatch.setattr(compare, "in_fresh_process", lambda work, *arguments: work(*arguments))
    cells = list(compare.cells_of(options(*PLACE, f"--results_dir={tmp_path}")))
    clocked = dataclasses.replace(cells[0], method="gauss_newton")
    clocked.path.parent.mkdir(parents=True)
    clocked.path.write_text(json.dumps({"settings": clocked.key, "seconds": 4.0}))
    compare.sweep(cells)
    found, again = (kept(tmp_path, "hyperband", claim) for claim in ("grown", "from_scratch"))
    assert found["seconds"] >= 0.8 * 4.0
    assert 0.7 * 450 < found["params"] <= 450
    assert again["widths"] == found["widths"]
    assert (again["params"], again["flops"]) == (found["params"], found["flops"])
    assert again["epochs"] == 3
    best = found["by_epoch"]["val_accuracy"]
    assert best == sorted(best)
    assert len(best) == len(found["by_epoch"]["seconds"]) == found["epochs"]
    assert found["training_flops"] == sum(found["by_epoch"]["flops"])
    assert not found["events"]
    assert abs(found["test_accuracy"] - best[-1]) < 0.15, "the weights are those of the best"


def test_a_search_comes_after_what_it_takes_as_long_as():
    cells = compare.cells_of(options("--methods=hyperband,gauss_newton", "--seeds=1"))
    first, *_ = cells
    assert (first.method, first.claim) == ("gauss_newton", "grown")


def test_a_search_without_its_clock_says_what_is_missing(tmp_path):
    alone = options("--methods=hyperband", "--seeds=1", f"--results_dir={tmp_path}")
    with pytest.raises(ValueError, match=r"as long as gauss_newton grows.*among --methods"):
        compare.sweep(list(compare.cells_of(alone)))


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_every_shape_fills_the_budget(seed):
    data = datasets.load("digits", None, seed=0, max_train=200)
    recipe = training.Recipe(epochs=1, batch_size=64, learning_rate=1e-3)
    build = searched.Widths("mlp", data, [3, 6], 900, recipe)
    hp = keras_tuner.HyperParameters()
    build.of(hp)  # makes the entries known
    rng = np.random.default_rng(seed)
    for name in list(hp.values):
        hp.values[name] = float(np.exp(rng.uniform(-1, 1) * np.log(searched.MOST)))
    model = build(hp)
    first, second = build.of(hp)
    assert 900 - 100 < model.count_params() <= 900
    wanted = 0.5 * hp.values["factor_0"] / hp.values["factor_1"]
    assert 0.6 * wanted < first / second < 1.6 * wanted
