"""Estimates against depth: the networks, the places, the readings, the table."""

import json

import numpy as np
import pytest
from absl import flags

import tfgrow
from experiments import cells, datasets, depth, training
from tests.experiments.here import spare_the_process
from tfgrow.morphisms.registry import at_lengths

TINY = (
    "--dataset=digits", "--depths=4", "--epochs=1,2", "--max_train=300", "--width=3", "--places=3",
    "--samples=64", "--steps=2", "--seeds=1", "--threads=1",
)  # fmt: skip


def options(*arguments):
    values = flags.FlagValues()
    depth.define_flags(values)
    values(["program", *TINY, *arguments])
    return values


@pytest.fixture(scope="module")
def data():
    return datasets.load("digits", max_train=300)


@pytest.mark.parametrize("family", depth.FAMILIES)
def test_networks_have_the_depth_they_say(family, data):
    widths = depth.widths_of(family, 6, 3)
    model = training.seed_network(depth.MODELS[family], data, widths, 0)
    mixing = [layer.name for layer in model.layers if "Conv" in type(layer).__name__]
    own = [name for name in mixing if "shortcut" not in name and "stem" not in name]
    assert len(own) == 6


def test_places_are_spread_over_the_depth(data):
    model = training.seed_network("vgg", data, [3] * 5, 0)
    for kind in depth.KINDS:
        chosen = depth.picked(model, kind, 3, seed=0)
        assert [c.site.name for c in chosen] == ["conv1", "conv3", "conv5"]
        assert {c.morphism for c in chosen} == {kind}
    assert len(depth.picked(model, "add", 20, seed=0)) == 5


@pytest.mark.parametrize("family", depth.FAMILIES)
def test_a_cell_reads_estimates_beside_truths(family, tmp_path, monkeypatch):
    """Run in this process, whose threads and order of sums other tests share."""
    spare_the_process(monkeypatch)
    chosen = options(f"--results_dir={tmp_path}", f"--families={family}")
    (cell,) = depth.cells_of(chosen)
    result = depth.run_cell(cell)
    assert cells.load(cell) == json.loads(cell.path.read_text()) == json.loads(json.dumps(result))
    assert [reading["epochs"] for reading in result["readings"]] == [1, 2]
    for reading in result["readings"]:
        assert len(reading["true"]) == len(reading["estimated"]) == len(reading["kinds"])
        assert np.isfinite([*reading["true"], *reading["estimated"]]).all()
        assert reading["true together"] not in reading["true"]
    (row, _) = depth.rows_of([result])
    assert row[:4] == [family, 4, 1, 1]


def test_truth_is_that_of_a_really_expanded_copy(data):
    model = training.seed_network("mlp", data, [3, 3], 0)
    model.compile("sgd", training.LOSS)
    settings = {"places": 2, "samples": 64, "steps": 2}
    found = depth.examine(model, data, settings, seed=0)
    from experiments.fidelity import disjoint

    learn_on, judge_on = disjoint(data.x_train, data.y_train, 64, 0)
    chosen = [c for kind in depth.KINDS for c in depth.picked(model, kind, 2, 0)]
    estimator = tfgrow.GaussNewtonEstimator(model, curvature="exact", seed=0)
    learned = estimator.learn(chosen, learn_on, 2)
    lengths = estimator.interaction(learned, judge_on).best_lengths(least=0.0, most=1.0)
    some = np.flatnonzero(lengths)
    together = at_lengths([learned[i] for i in some], lengths[some])
    assert 0 < len(together) == np.sum(lengths > 0)
    assert found["true together"] == pytest.approx(
        tfgrow.measure_change(model, together, judge_on), rel=1e-3, abs=1e-6
    )
    assert found["estimated together"] == pytest.approx(
        estimator.joint_change(together, judge_on), rel=1e-3, abs=1e-6
    )
    assert found["estimated together"] < 0


def test_the_page_is_over_seeds(tmp_path):
    def reading(scale):
        return {
            "epochs": 1, "loss": 1.0, "kinds": ["split", "split", "add", "add"],
            "estimated": [-0.1, -0.2, -0.3, -0.4], "true": [-0.1, -0.2, -0.3 * scale, -0.4],
            "estimated together": -1.0, "true together": -scale,
        }  # fmt: skip

    results = [
        {"family": "plain", "depth": 8, "readings": [reading(scale)]} for scale in (0.5, 1.0)
    ]
    (row,) = depth.rows_of(results)
    settings = {"width": 8, "max_train": 900, "dataset": "digits", "places": 2, "samples": 64}
    told = [{**result, "settings": settings} for result in results]
    page, picture = depth.write_page(str(tmp_path / "docs" / "depth.md"), told)
    assert picture == tmp_path / "docs" / "images" / "depth.png"
    assert picture.stat().st_size > 5000
    assert "900 images of digits" in page.read_text()
    assert "| plain |" in page.read_text()
    assert "less than 25%" in page.read_text()
    assert row == ["plain", 8, 1, 2, "1.000 ± 0.000", "1.000", "0%", *row[7:9], "0.75 ± 0.35"]
    assert row[8] == "0%"
    assert float(row[7]) < 1


@pytest.mark.parametrize("argument", ["--depths=1,2", "--epochs=3,2", "--epochs=0", "--families=x"])
def test_flags_that_make_no_sense_are_refused(argument):
    with pytest.raises(flags.IllegalFlagValueError):
        options(argument)
