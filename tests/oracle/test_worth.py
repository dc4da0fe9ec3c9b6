"""Units go where those that are there are worth most for what they cost."""

import dataclasses

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
from tfgrow.oracle.limits import Limits
from tfgrow.oracle.worth import (
    MOST_TIMES,
    PRICE_RANGE,
    RETURNS,
    SPREAD,
    Widening,
    most_units,
    pick,
)
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
    return widening(worth, sites, costs, most).allocate(Limits(**limits))


def widening(worth, sites, costs, most=np.inf):
    return Widening(worth, sites, costs, dict.fromkeys(worth, most))


ALIKE = {"d0": 1.0, "d1": 1.0, "d2": 1.0}


@pytest.mark.parametrize("exponent", [0.0, 0.5, 1.0])
def test_the_next_unit_goes_where_it_is_worth_most_for_its_cost(exponent):
    """Beside what always taking the best single unit comes to; units cost 6 to 13 parameters."""
    sites, costs = parts_of(three_layers((2, 7, 3)))
    worth = {"d0": 1.0, "d1": 0.6, "d2": 0.6}
    extra = dict.fromkeys(worth, 0)
    for _ in range(12):
        before = costs.extra(extra).params

        def rate(site, extra=extra, before=before):
            price = costs.extra({**extra, site.name: extra[site.name] + 1}).params - before
            gain = (site.units / (site.units + extra[site.name])) ** RETURNS * worth[site.name]
            return gain / price**exponent

        best = max(sites, key=rate).name
        extra = {**extra, best: extra[best] + 1}
    limits = Limits(edits=12, cost_exponent=exponent)
    wanted, reason = widening(worth, sites, costs).allocate(limits)
    assert reason == "limit of 12 edits reached"
    assert {**dict.fromkeys(worth, 0), **wanted} == extra
    assert wanted == EXPECTED[exponent]


@pytest.mark.parametrize("exponent", [0.0, 0.5, 1.0])
def test_where_only_flops_count_the_root_of_the_worth_does(exponent):
    """Beside what always taking the best single unit comes to."""
    sites, costs = parts_of(convolutions())
    worth = {"c0": 4.0, "c1": 1.0, "c2": 0.25, "c3": 0.04}
    extra = dict.fromkeys(worth, 0)
    for _ in range(9):
        before = costs.extra(extra).flops

        def rate(site, extra=extra, before=before):
            price = costs.extra({**extra, site.name: extra[site.name] + 1}).flops - before
            gain = (site.units / (site.units + extra[site.name])) ** RETURNS
            return gain * worth[site.name] ** SPREAD / price**exponent

        best = max(sites, key=rate).name
        extra = {**extra, best: extra[best] + 1}
    limits = Limits(edits=9, params=10**6, prices=(0.0, 1.0), cost_exponent=exponent)
    wanted, _ = widening(worth, sites, costs).allocate(limits)
    assert {**dict.fromkeys(worth, 0), **wanted} == extra
    in_params = dataclasses.replace(limits, prices=None)
    assert widening(worth, sites, costs).allocate(in_params)[0] != wanted


EXPECTED = {
    0.0: {"d0": 3, "d1": 6, "d2": 3},
    0.5: {"d0": 3, "d1": 7, "d2": 2},
    1.0: {"d0": 2, "d1": 8, "d2": 2},
}


def test_wide_sites_grow_by_several_units_at_a_time_and_fill_the_budget():
    sites, costs = parts_of(three_layers((2, 64, 3)))
    worth = {"d0": 1e-9, "d1": 1.0, "d2": 1e-9}
    asked = []

    class Counting:
        def extra(self, units):
            asked.append(units)
            return costs.extra(units)

    wanted, _ = widening(worth, sites, Counting()).allocate(Limits(edits=40))
    assert wanted == {"d1": 40}
    assert len(asked) < 2 * 40, "one by one it would be 160"
    odd, _ = widening(worth, sites, costs).allocate(Limits(edits=40, round_to=8))
    assert odd == {"d1": 40}


def convolutions():
    """Two of high resolution, whose units cost FLOPs, and two of low."""
    keras.utils.set_random_seed(0)
    layers = [keras.Input((16, 16, 3))]
    for number, units in enumerate((4, 4, 8, 8)):
        layers.append(keras.layers.Conv2D(units, 3, padding="same", name=f"c{number}"))
        if number == 1:
            layers.append(keras.layers.MaxPooling2D(4))
    end = [keras.layers.GlobalMaxPooling2D(), keras.layers.Dense(3)]
    return tfgrow.convert(keras.Sequential([*layers, *end]))


@pytest.mark.parametrize("exponent", [0.5, 1.0])
@pytest.mark.parametrize("flops", [200_000, 500_000, 600_000, 10**9])
def test_two_budgets_are_spent_together(flops, exponent):
    """FLOPs cost nothing where there are enough, and as much as needed where there are not."""
    sites, costs = parts_of(convolutions())
    worth = dict.fromkeys([site.name for site in sites], 1.0)
    left = Limits(params=6000, flops=flops)
    limits = Limits(params=1000, flops=flops, step=True, cost_exponent=exponent)
    priced = widening(worth, sites, costs, most=1).with_prices(limits, left)
    assert dataclasses.replace(priced, prices=None) == limits

    def spent(limits):
        both = dataclasses.replace(limits, params=left.params, flops=left.flops)
        cost = costs.extra(widening(worth, sites, costs).allocate(both)[0])
        return cost.params / left.params, cost.flops / left.flops

    if flops == 10**9:
        assert priced.prices is None
    elif flops == 200_000:  # not even the cheapest units are cheap enough
        assert priced.prices == (1.0, PRICE_RANGE * 6000 / flops)
        assert spent(priced)[0] > 2 * spent(limits)[0]
        assert spent(priced)[1] > 0.95
    else:
        assert priced.unit == "params"
        assert spent(priced)[0] > 0.95 > spent(limits)[0]
        assert spent(priced)[1] > 0.9


def test_in_the_last_step_it_counts_what_sites_can_take():
    sites, costs = parts_of(convolutions())
    worth = {"c0": 3.0, "c1": 3.0, "c2": 1.0, "c3": 1.0}
    bounded = widening(worth, sites, costs, most=12)
    last = Limits(params=5000, flops=400_000)
    one_of_many = dataclasses.replace(last, params=500, step=True)
    priced = [bounded.with_prices(limits, last) for limits in (last, one_of_many)]
    assert priced[0].prices < priced[1].prices  # many steps can spend all on the first two
    cost = costs.extra(bounded.allocate(priced[0])[0])
    assert cost.params > 0.95 * last.params
    assert cost.flops > 0.95 * last.flops


def test_an_oracle_of_two_budgets_counts_flops_too():
    model = compiled(convolutions())
    params, flops = model.count_params() + 6000, parts_of(model)[1].base.flops + 300_000

    def planned(**budget):
        oracle = quick_oracle(score="worth", growth_per_step=0.5, **budget)
        return oracle.propose_plan(model, arrays(model, samples=96)).cost

    one, both = planned(max_params=params), planned(max_params=params, max_flops=flops)
    assert one.params > 500 < both.params
    assert both.flops < 0.7 * one.flops


def test_returns_diminish():
    wanted, _ = allocated(ALIKE, edits=30, cost_exponent=0.0)
    shares = [units + wanted[f"d{i}"] for i, units in enumerate((2, 3, 4))]
    # equal worths at different widths: each unit's share of 1/c^2 is evened out, c ~ width
    np.testing.assert_allclose(np.array(shares) / sum(shares), np.array([2, 3, 4]) / 9, atol=0.03)


@pytest.mark.parametrize(
    ("worth", "limits", "expected", "reason"),
    [
        (ALIKE, {"edits": 1}, {"d1": 1}, "limit of 1 edits reached"),
        (ALIKE, {"params": 6}, {}, "budget of 6 extra parameters reached"),
        ({**ALIKE, "d1": 0.0}, {"edits": 2}, {"d0": 1, "d2": 1}, "limit of 2 edits"),
        (ALIKE, {"min_gain_per_param": 0.2}, {}, "worth per parameter fell under 0.2"),
        (ALIKE, {"flops": 1000, "min_gain_per_param": 1.0}, {}, "per FLOP fell under 1"),
        (ALIKE, {"round_to": 4, "edits": 6}, {"d1": 1, "d2": 4}, "limit of 6 edits"),
    ],
)
def test_limits(worth, limits, expected, reason):
    wanted, said = allocated(worth, **limits)
    assert wanted == expected
    assert reason in said


def test_no_more_units_than_can_be_made():
    wanted, reason = allocated(ALIKE, most=2)
    assert wanted == {"d0": 2, "d1": 2, "d2": 2}
    assert reason == "one step makes no site wider than that"
    sites, _ = parts_of(three_layers())
    assert most_units(sites[0], several("split")) == 2
    assert most_units(sites[2], several(("split", "add"))) == 8, "three times as many"
    assert most_units(sites[0], several("add"), at_least=5) == 5
    assert most_units(sites[1], several("add"), at_least=1, multiple=16) == 13
    assert most_units(sites[0], several("prune")) == 0


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
    measured = tfgrow.measure_change(model, plan.candidates, (x, y))
    assert measured == pytest.approx(plan.estimated_change, rel=0.3)
    again = tfgrow.GaussNewtonOracle("loss", score="worth", growth_per_step=4, seed=0)
    assert again.propose_plan(model, (x, y)).estimated_change == plan.estimated_change


def test_its_progress_is_that_of_both_passes():
    seen = []
    oracle = quick_oracle(score="worth")
    x, y = arrays(samples=256)
    oracle.propose_plan(
        compiled(three_layers()),
        (np.concatenate([x, x[:, :1]], axis=1), y),
        progress=lambda done, total: seen.append((done, total)),
    )
    total = seen[0][1]
    assert seen == [(number + 1, total) for number in range(total)]


def test_what_training_would_change_anyway_does_not_count():
    """Only the output's bias is off: the gradient is large, and says nothing of the layers."""
    x, y = data(2048, 1)
    model = student(2, 8, "tanh")
    model.fit(x, y, epochs=10, batch_size=64, verbose=0)
    settings = {"score": "worth", "growth_per_step": 6, "cost_exponent": 0.5, "seed": 0}
    plans = [
        tfgrow.GaussNewtonOracle("loss", **settings).propose_plan(model, (x, targets))
        for targets in (y, y + 10.0)
    ]
    assert plans[0].widths == plans[1].widths


def test_a_site_of_one_unit_grows_too_and_so_does_what_has_not_learned_anything():
    x, y = arrays(samples=256)
    x = np.concatenate([x, x[:, :1]], axis=1)
    settings = {"score": "worth", "growth_per_step": 3, "cost_exponent": 0.0}
    plan = quick_oracle(**settings).propose_plan(compiled(three_layers((1, 3, 3))), (x, y))
    assert plan.widths["d0"][0] == 1, "it is worth as much as the best"
    assert len(plan.candidates) == 3
    plan = quick_oracle(**settings).propose_plan(compiled(three_layers((1, 1, 1))), (x, y))
    assert len(plan.candidates) == 3
    silent = compiled(three_layers())
    silent.get_layer("out").set_weights([np.zeros((4, 3)), np.zeros(3)])
    assert len(quick_oracle(**settings).propose_plan(silent, (x, y)).candidates) == 3
    few = quick_oracle(**settings, min_gain_per_param=1e-6).propose_plan(silent, (x, y))
    assert not few.candidates
    assert "worth per parameter fell under 1e-06" in few.reason


@pytest.mark.parametrize("limits", [{"max_params": 100_000}, {"growth_per_step": 10_000}])
def test_no_site_becomes_too_wide_in_a_step(limits):
    """What its units are worth now tells nothing of ten times as many."""
    x, y = data(512, 1)
    oracle = quick_oracle(**{"score": "worth", "growth_per_step": None, **limits})
    plan = oracle.propose_plan(student(6, 8, "tanh"), (x, y))
    assert plan.widths == {"hidden": (6, 6 * MOST_TIMES), "bottleneck": (8, 8 * MOST_TIMES)}
    assert plan.reason == "one step makes no site wider than that"


def test_a_network_that_nothing_can_mend_does_not_grow():
    """Its first layer is dead, and no new unit of it would reach the output alone."""
    keras.utils.set_random_seed(0)
    off = keras.initializers.Constant(-100.0)
    first = keras.layers.Dense(4, "relu", name="first", bias_initializer=off)
    layers = [keras.Input((4,)), first, keras.layers.Dense(8, "relu"), keras.layers.Dense(3)]
    plan = quick_oracle(score="worth").propose_plan(
        compiled(tfgrow.convert(keras.Sequential(layers))), arrays(samples=256)
    )
    assert not plan.candidates
    assert plan.reason == "no set of new units lowers the estimate"


@pytest.mark.parametrize(
    ("limits", "holds"),
    [
        ({"max_flops": 150}, lambda plan: 0 < plan.cost.flops <= 150),
        ({"exclude": ["d0", "d2"], "growth_per_step": 3}, lambda plan: list(plan.widths) == ["d1"]),
        (
            {"round_to": 4, "max_params": 150},
            lambda plan: all(after % 4 == 0 for _, after in plan.widths.values()),
        ),
        ({"morphisms": "split", "growth_per_step": 30}, lambda plan: plan.widths["d0"] == (2, 4)),
    ],
)  # fmt: skip
def test_limits_of_an_oracle(limits, holds):
    x, y = arrays(samples=256)
    x = np.concatenate([x, x[:, :1]], axis=1)
    oracle = quick_oracle(**{"score": "worth", "growth_per_step": None, **limits})
    plan = oracle.propose_plan(compiled(three_layers()), (x, y))
    assert plan.candidates
    assert holds(plan), (plan.cost, plan.widths, plan.reason)


def test_heads_are_shared_out_too():
    keras.utils.set_random_seed(0)
    sequence = keras.Input((6, 8))
    first = keras.layers.MultiHeadAttention(2, 4, name="narrow")(sequence, sequence)
    second = keras.layers.MultiHeadAttention(4, 4, name="wide")(first, first)
    pooled = keras.layers.GlobalAveragePooling1D()(second)
    model = tfgrow.convert(keras.Model(sequence, keras.layers.Dense(3)(pooled)))
    rng = np.random.default_rng(0)
    batch = rng.normal(size=(96, 6, 8)).astype("float32"), rng.integers(0, 3, 96)
    settings = {"score": "worth", "growth_per_step": 3, "morphisms": ("heads", "add_heads")}
    plan = quick_oracle(**settings).propose_plan(compiled(model), batch)
    assert len(plan.candidates) == 3
    assert sum(after - before for before, after in plan.widths.values()) == 3


def test_it_is_for_single_units_and_needs_a_limit():
    for kind in ("prune", "enlarge_kernel", "deepen"):
        with pytest.raises(ValueError, match=rf"single units are to be added; \['{kind}'\] do"):
            tfgrow.GaussNewtonOracle(score="worth", morphisms=("add", kind))
    with pytest.raises(ValueError, match="nothing limits it"):
        tfgrow.GaussNewtonOracle(score="worth", growth_per_step=None)
    assert get("heads").units == get("add_heads").units == 1
