"""The comparison: its cells on tiny networks, its sweep, its tables, its refusals."""

import csv
import json
import math

import numpy as np
import pytest
from absl import flags

import tfgrow
from experiments import compare, contest, datasets, standings, training
from tests.experiments.here import spare_the_process
from tfgrow.graph.cost import CostModel
from tfgrow.graph.nodes import trace
from tfgrow.strategies.registry import STRATEGIES

TINY = (
    "--datasets=digits", "--models=mlp", "--widths=3,3", "--budgets=450", "--max_train=400",
    "--epochs=3", "--every=1", "--settle=0.3", "--seeds=2", "--threads=1",
    "--methods=template,gauss_newton,uniform",
)  # fmt: skip


def options(*arguments):
    values = flags.FlagValues()
    compare.define_flags(values)
    values(["program", *TINY, *arguments])
    return values


def swept(folder):
    """All cells of a tiny comparison, in this process, whose threads other tests share."""
    chosen = options(f"--results_dir={folder}")
    with pytest.MonkeyPatch.context() as patch:
        spare_the_process(patch)
        patch.setattr(compare, "in_fresh_process", lambda work, *arguments: work(*arguments))
        cells = list(compare.cells_of(chosen))
        compare.sweep(cells)
    return folder, cells


def kept(cell):
    return json.loads(cell.path.read_text())


def test_cells_are_seed_by_seed_and_what_they_need_comes_first():
    cells = list(compare.cells_of(options("--budgets=450,900")))
    assert [cell.seed for cell in cells] == sorted(cell.seed for cell in cells)
    of_one = [(c.method, c.claim) for c in cells if (c.seed, c.budget) == (0, 450)]
    assert of_one == [
        ("template", "from_scratch"),
        ("gauss_newton", "grown"),
        ("gauss_newton", "from_scratch"),
        ("gauss_newton", "same_flops"),
        ("gauss_newton", "same_time"),
        ("uniform", "grown"),
        ("uniform", "from_scratch"),
    ]
    assert len({cell.path for cell in cells}) == len(cells)


def test_gains_are_per_flop_where_budgets_count_flops():
    def exponents(*arguments):
        cells = compare.cells_of(options("--methods=gauss_newton", *arguments))
        return {cell.settings["cost_exponent"] for cell in cells}

    assert exponents() == {0.5}
    assert exponents("--budget_in=flops") == {1.0}
    assert exponents("--budget_in=flops", "--cost_exponent=0.25") == {0.25}


def test_seeds_may_begin_where_others_ended():
    cells = list(compare.cells_of(options("--first_seed=3", "--seeds=2")))
    assert sorted({cell.seed for cell in cells}) == [3, 4]
    earlier = compare.cells_of(options("--seeds=2"))
    assert not {cell.path for cell in cells} & {cell.path for cell in earlier}


def check_every_cell_is_within_its_budget_and_of_the_widths_that_were_found(swept):
    _, cells = swept
    for cell in cells:
        found = kept(cell)
        assert 0 < found["params"] <= cell.budget
        if cell.claim not in ("grown",) and cell.method != "template":
            grown = json.loads(
                (cell.path.parent / f"{cell.method}-grown-seed{cell.seed}.json").read_text()
            )
            assert found["widths"] == grown["widths"]
            assert found["params"] == grown["params"]
            assert found["flops"] == grown["flops"]
            assert not found["events"]
        if cell.claim == "grown":
            assert [e for e in found["events"] if e["status"] == "applied"]
            assert found["params"] > 240, "it grew"
            assert found["growth_seconds"] > 0
            assert found["newborn_alive"] is not None
        if cell.claim == "from_scratch":
            assert found["epochs"] == 3
        curve = found["by_epoch"]
        assert len(curve["seconds"]) == len(curve["flops"]) == found["epochs"]
        assert sum(curve["flops"]) == found["training_flops"]
        assert sum(curve["seconds"]) == pytest.approx(found["seconds"], rel=0.5)


def check_same_flops_and_same_time_are_those_of_the_grown(swept):
    _, cells = swept
    by_claim = {(c.claim, c.seed): kept(c) for c in cells if c.method == "gauss_newton"}
    for seed in (0, 1):
        grown, flops = by_claim["grown", seed], by_claim["same_flops", seed]
        per_epoch = flops["training_flops"] / flops["epochs"]
        assert abs(flops["training_flops"] - grown["training_flops"]) <= per_epoch / 2
        assert by_claim["same_time", seed]["seconds"] >= grown["seconds"]
        assert by_claim["same_time", seed]["epochs"] > 3, "growing takes time besides training"


def check_training_flops_are_three_forward_passes_of_what_the_network_was(swept):
    _, cells = swept
    for cell in cells:
        found = kept(cell)
        samples = found["by_epoch"]["flops"][-1] / (3 * found["flops"])
        assert samples == 399, "400 at most, equally many of each class"
        steps = [e["flops_after"] for e in found["events"] if e["status"] == "applied"]
        assert set(steps) <= {flops / (3 * samples) for flops in found["by_epoch"]["flops"]}


def check_the_template_scales_all_widths_alike_and_fills_the_budget(swept):
    _, cells = swept
    for cell in cells:
        if cell.method == "template":
            first, second = kept(cell)["widths"].values()
            assert abs(first - second) <= 2, "alike, then what is left over"
            assert kept(cell)["params"] > 450 - 80, "one more unit would cost 64 + 10 + ..."


def check_finished_cells_are_not_run_again(swept, monkeypatch, capsys):
    folder, cells = swept

    def never(*_):
        raise AssertionError("ran again")

    monkeypatch.setattr(compare, "in_fresh_process", never)
    compare.sweep(cells)
    assert f"{len(cells)} cells, 0 of them to run" in capsys.readouterr().out
    other = list(compare.cells_of(options(f"--results_dir={folder}", "--learning_rate=0.01")))
    with pytest.raises(ValueError, match=r"other settings.*learning_rate"):
        compare.sweep(other)
    # what only Gauss-Newton heeds makes no other method's cells void
    other = list(compare.cells_of(options(f"--results_dir={folder}", "--new_units=7")))
    compare.sweep([cell for cell in other if cell.method != "gauss_newton"])
    with pytest.raises(ValueError, match="new_units"):
        compare.sweep(other)


def check_tables_follow_from_the_csv_alone(swept, tmp_path):
    folder, cells = swept
    results = standings.collect(folder)
    written = standings.write(results, tmp_path, str(tmp_path / "docs" / "results.md"))
    assert all(path.stat().st_size for path in written)
    with open(tmp_path / "compare.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(cells)
    assert {"dataset", "model", "budget", "method", "seed", "claim", "test_accuracy", "params"} <= {
        *rows[0]
    }
    page = (tmp_path / "docs" / "results.md").read_text()
    assert page == standings.page_of(standings.read(tmp_path), tmp_path)
    assert f"from `{tmp_path}`;" in page
    pictures = {path.name for path in written if path.suffix == ".png"}
    assert pictures == {f"{tmp_path.name}-{which}.png" for which in standings.PICTURES}
    assert all(f"(images/{name})" in page for name in pictures)
    accuracy = {(c.method, c.claim, c.seed): 100 * kept(c)["test_accuracy"] for c in cells}
    ours = [accuracy["gauss_newton", "from_scratch", seed] for seed in (0, 1)]
    theirs = [accuracy["template", "from_scratch", seed] for seed in (0, 1)]
    gains = np.subtract(ours, theirs)
    error = np.std(gains, ddof=1) / math.sqrt(2)
    assert f"{np.mean(gains):+.2f} ± {error:.2f} (s.e.)" in page
    assert f"{np.mean(ours):.2f} ± {np.std(ours, ddof=1):.2f} %" in page
    assert page.count("same_time") == 1, "one line of one method"
    assert "--epochs=3" in page, "the recipe"
    (own,) = [line for line in page.splitlines() if line.startswith("gauss_newton: `")]
    assert "--curvature=sampled" in own
    assert "--epochs" not in own


def test_a_sweep(tmp_path, monkeypatch, capsys):
    """One sweep for all that is to be seen of one: several workers would each run it."""
    found = swept(tmp_path / "sweep")
    check_every_cell_is_within_its_budget_and_of_the_widths_that_were_found(found)
    check_same_flops_and_same_time_are_those_of_the_grown(found)
    check_training_flops_are_three_forward_passes_of_what_the_network_was(found)
    check_the_template_scales_all_widths_alike_and_fills_the_budget(found)
    check_finished_cells_are_not_run_again(found, monkeypatch, capsys)
    check_tables_follow_from_the_csv_alone(found, tmp_path)


def test_at_a_glance():
    """Ours in its place, beside the best of the others; nothing where there is nothing to say."""

    def row(method, seed, accuracy, claim="grown", budget=100):
        place = {"dataset": "digits", "model": "mlp", "budget_in": "params", "budget": budget}
        return {
            **place, "method": method, "seed": seed, "claim": claim, "test_accuracy": accuracy,
            "flops": (3 if method == "tiny" else 2) * 1e6 + seed * 1e6,
        }  # fmt: skip

    rows = [row("gauss_newton", 0, 0.50), row("gauss_newton", 1, 0.54)]
    rows += [row("tiny", 0, 0.53), row("tiny", 1, 0.55), row("random", 0, 0.90, budget=200)]
    rows += [row("gradmax", 0, 0.40), row("gauss_newton", 0, 0.6, "from_scratch")]
    (line,) = standings.at_a_glance(standings.Results(rows, []))
    assert line[:3] == ["digits, mlp, at most 100 parameters", "grown", "2 of 3"]
    assert line[3:7] == ["52.00 ± 2.83 %", "tiny", "54.00 ± 1.41 %", "-2.00 ± 1.00 (s.e.)"]
    assert line[7:] == ["2.5 ± 0.7", "3.5 ± 0.7"]


def test_a_budget_of_flops(tmp_path):
    chosen = options("--budget_in=flops", "--budgets=900", f"--results_dir={tmp_path}")
    cells = list(compare.cells_of(chosen))
    assert {cell.path.parent.name for cell in cells} == {"digits-mlp-900flops"}
    grown = next(cell for cell in cells if (cell.method, cell.claim) == ("uniform", "grown"))
    assert grown.limit == {"max_flops": 900}
    data = datasets.load("digits", max_train=300)
    widths = contest._template(grown, data)
    smallest, filled, over = (
        flops_of(training.seed_network("mlp", data, shape, 0))
        for shape in ([3, 3], [*widths.values()], [units + 1 for units in widths.values()])
    )
    assert smallest < filled <= 900 < over
    with pytest.raises(ValueError, match="hyperband fills budgets of parameters"):
        list(compare.cells_of(options("--budget_in=flops", "--methods=hyperband")))


def flops_of(model):
    return CostModel(trace(model), tfgrow.find_sites(model)).base.flops


def test_cost_until_the_accuracy_from_scratch():
    cell = {
        "dataset": "d", "model": "m", "budget_in": "params", "budget": 1, "method": "gauss_newton"
    }  # fmt: skip

    def curve(claim, seed, values):
        return [
            {**cell, "claim": claim, "seed": seed, "epoch": n + 1, "val_accuracy": value,
             "training_flops": 10.0 * (n + 1), "seconds": 4.0 * (n + 1)}
            for n, value in enumerate(values)
        ]  # fmt: skip

    curves = [
        *curve("grown", 0, [0.2, 0.6, 0.7]), *curve("from_scratch", 0, [0.1, 0.2, 0.3, 0.55]),
        *curve("grown", 1, [0.2, 0.3, 0.4]), *curve("from_scratch", 1, [0.1, 0.2, 0.3, 0.55]),
    ]  # fmt: skip
    results = standings.Results([], curves)
    grown = [{**cell, "claim": "grown", "seed": seed} for seed in (0, 1)]
    assert standings._until(results, grown[:1]) == ("0.50 x", "0.50 x")
    assert standings._until(results, grown) == ("0.50 x (1 of 2 never)",) * 2
    assert standings._until(results, grown[1:]) == ("never", "never")


def test_every_strategy_is_a_method():
    assert set(compare.METHODS) == {contest.TEMPLATE, contest.SEARCH, *STRATEGIES}


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--methods=magic", "expected some of template, firefly"),
        ("--claims=", "expected some of grown"),
        ("--budgets=0", "whole numbers"),
        ("--widths=4,x", "whole numbers"),
    ],
)
def test_flags_that_make_no_sense_are_refused(argument, message):
    with pytest.raises(flags.IllegalFlagValueError, match=message):
        options(argument)
