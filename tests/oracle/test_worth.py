"""Units go where those that are there are worth most for what they cost."""

import keras
import numpy as np
import pytest

import tfgrow
from tests.integration.fitting import arrays, compiled, quick_oracle
from tests.integration.test_selection_example import data, student
from tfgrow.graph.cost import CostModel
from tfgrow.graph.nodes import trace
from tfgrow.graph.sites import sites_of
from tfgrow.morphisms.registry import get, several
from tfgrow.oracle.data import split_data
from tfgrow.oracle.selection import Limits
from tfgrow.oracle.worth import RETURNS, allocate, most_units, pick, worth_of_units
from tfgrow.types import Interaction


def three_layers(units=(2, 3, 4)):
    """Dense 5 -> 2 -> 3 -> 4 -> 3: a unit of the first costs 9, the second 7, the third 7."""
    keras.utils.set_random_seed(0)
    hidden = [keras.layers.Dense(n, "tanh", name=f"d{i}") for i, n in enumerate(units)]
    layers = [keras.Input((5,)), *hidden, keras.layers.Dense(3, name="out")]
    return tfgrow.convert(keras.Sequential(layers))


def parts_of(model):
    graph = trace(model)
    sites = [site for site in sites_of(model, graph) if site.blocked is None]
    return sites, CostModel(graph, sites)


def allocated(worth, most=np.inf, **limits):
    sites, costs = parts_of(three_layers())
    bounds = dict.fromkeys(worth, most)
    return allocate(worth, sites, costs, Limits(**limits), bounds)


ALIKE = {"d0": 1.0, "d1": 1.0, "d2": 1.0}


def test_the_next_unit_goes_where_it_is_worth_most_for_its_cost():
    sites, costs = parts_of(three_layers())
    for exponent in (0.0, 0.5, 1.0):
        limits = {"params": 120, "cost_exponent": exponent}
        wanted, reason = allocated({"d0": 3.0, "d1": 1.0, "d2": 0.5}, **limits)
        assert reason == "no further unit fits the budget"
        assert costs.extra(wanted).params <= 120
        # no single unit could be moved to where it would be worth more for what it costs
        rates, last = {}, {}
        for site, worth in zip(sites, (3.0, 1.0, 0.5), strict=True):
            more, name = wanted.get(site.name, 0), site.name
            for found, count in ((rates, more), (last, more - 1)):
                gain = worth * (site.units / (site.units + count)) ** RETURNS
                without = costs.extra({**wanted, name: count})
                cost = costs.extra({**wanted, name: count + 1}).params - without.params
                found[name] = gain / cost**exponent if count >= 0 else np.inf
        assert min(last.values()) > 0.8 * max(rates.values()), (wanted, rates, last)


def test_returns_diminish():
    wanted, _ = allocated(ALIKE, edits=30, cost_exponent=0.0)
    shares = [units + wanted[f"d{i}"] for i, units in enumerate((2, 3, 4))]
    # equal worths at different widths: each unit's share of 1/c^2 is evened out, c ~ width
    np.testing.assert_allclose(np.array(shares) / sum(shares), np.array([2, 3, 4]) / 9, atol=0.03)


@pytest.mark.parametrize(
    ("worth", "limits", "expected", "reason"),
    [
        (ALIKE, {"edits": 1}, {"d1": 1}, "fits the budget"),
        (ALIKE, {"params": 6}, {}, "fits the budget"),
        ({**ALIKE, "d1": 0.0}, {"edits": 2}, {"d0": 1, "d2": 1}, "fits the budget"),
        (dict.fromkeys(ALIKE, 0.0), {"edits": 2}, {}, "no unit that is there is worth anything"),
        (ALIKE, {"min_gain_per_param": 0.2}, {}, "worth per parameter fell under 0.2"),
        (ALIKE, {"flops": 1000, "min_gain_per_param": 1.0}, {}, "per FLOP fell under 1"),
        (ALIKE, {"round_to": 4, "edits": 6}, {"d1": 1, "d2": 4}, "fits the budget"),
    ],
)
def test_limits(worth, limits, expected, reason):
    wanted, said = allocated(worth, **limits)
    assert wanted == expected
    assert reason in said


def test_no_more_units_than_can_be_made():
    wanted, _ = allocated(ALIKE, most=2)
    assert wanted == {"d0": 2, "d1": 2, "d2": 2}
    sites, _ = parts_of(three_layers())
    assert most_units(sites[0], several("split")) == 2
    assert most_units(sites[0], several(("split", "add"))) == np.inf
    assert most_units(sites[0], several("prune")) == 0


def test_copies_of_a_unit_are_worth_nothing_and_a_lone_one_much():
    """Five units that say the same stand in for each other; the two after them are needed."""
    x, y = data(1024, 0)
    model = student(2, 2, "tanh")
    model.fit(x, y, epochs=20, batch_size=64, verbose=0)
    copied = student(6, 2, "tanh")
    copied.get_layer("out").set_weights(model.get_layer("out").get_weights())
    kernel, bias = model.get_layer("hidden").get_weights()
    copied.get_layer("hidden").set_weights([np.repeat(kernel, 3, axis=1), np.repeat(bias, 3)])
    kernel, bias = model.get_layer("bottleneck").get_weights()
    copied.get_layer("bottleneck").set_weights([np.repeat(kernel, 3, axis=0) / 3, bias])
    np.testing.assert_allclose(copied.predict(x, verbose=0), model.predict(x, verbose=0), atol=1e-5)

    def worths(net):
        sites, _ = parts_of(net)
        parts = split_data((x, y), 12, 12, 1, seed=0)
        estimator = tfgrow.GaussNewtonEstimator(net, curvature="exact", seed=0, at_minimum=True)
        return worth_of_units(estimator, sites, parts)

    few, many = worths(model), worths(copied)
    assert few["hidden"] > 0.02
    assert many["hidden"] < 0.05 * few["hidden"]
    assert many["bottleneck"] == pytest.approx(few["bottleneck"], rel=0.3)


def test_picks_as_many_as_wanted_the_best_beside_the_others():
    linear = np.array([-3.0, -2.9, -1.0, -0.5, -0.2])
    gram = np.diag(np.full(5, 2.0))
    gram[0, 1] = gram[1, 0] = 1.9  # the second says what the first says
    exclusive = np.zeros((5, 5), bool)
    exclusive[2, 3] = exclusive[3, 2] = True
    sites = ["a", "a", "a", "b", "b"]
    chosen = pick(Interaction(linear, gram), sites, {"a": 2, "b": 1}, -np.ones(5), exclusive)
    assert chosen == [0, 2, 4]


def test_growth_goes_to_the_layer_that_starves():
    x, y = data(2048, 1)
    model = student(2, 8, "tanh")
    model.fit(x, y, epochs=10, batch_size=64, verbose=0)
    oracle = tfgrow.GaussNewtonOracle("loss", score="worth", growth_per_step=4, seed=0)
    plan = oracle.propose_plan(model, (x, y))
    assert plan.widths == {"hidden": (2, 6)}
    assert {"worth", "learn"} <= set(plan.seconds)
    assert tfgrow.measure_change(model, plan.candidates, (x, y)) < 0
    again = tfgrow.GaussNewtonOracle("loss", score="worth", growth_per_step=4, seed=0)
    assert again.propose_plan(model, (x, y)).estimated_change == plan.estimated_change


def test_a_site_of_one_unit_grows_too_and_so_does_what_has_not_learned_anything():
    model = compiled(three_layers((1, 3, 3)))
    x, y = arrays(samples=256)
    x = np.concatenate([x, x[:, :1]], axis=1)
    plan = quick_oracle(score="worth", growth_per_step=3).propose_plan(model, (x, y))
    assert sum(after - before for before, after in plan.widths.values()) == 3
    assert len(plan.candidates) == 3


def test_it_is_for_single_units():
    for kind in ("prune", "enlarge_kernel", "deepen"):
        with pytest.raises(ValueError, match=rf"single units are to be added; \['{kind}'\] do"):
            tfgrow.GaussNewtonOracle(score="worth", morphisms=("add", kind))
    assert get("heads").units == get("add_heads").units == 1
