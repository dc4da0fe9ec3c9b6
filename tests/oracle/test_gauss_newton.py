"""What GaussNewtonOracle proposes: within its limits, where it may, on data kept apart."""

import inspect
import re

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfgrow
import tfgrow.oracle.gauss_newton
import tfgrow.oracle.selection
import tfgrow.oracle.worth
from tests.integration import fitting
from tests.integration.fitting import CLASSES, arrays, compiled, logits_loss, mlp
from tfgrow.morphisms.base import Candidate
from tfgrow.morphisms.registry import MORPHISMS, get
from tfgrow.oracle.data import split_data
from tfgrow.oracle.guard import commit
from tfgrow.types import Cost


def quick_oracle(**options):
    """One that goes by what edits do at once; `test_worth.py` has the other."""
    return fitting.quick_oracle(**{"score": "raw", **options})


def two_layers():
    """Dense 4 -> 3 -> 3 -> 3 with targets that ask for more: 39 parameters, 66 FLOPs."""
    keras.utils.set_random_seed(0)
    layers = [
        keras.Input((4,)),
        keras.layers.Dense(3, "tanh", name="first"),
        keras.layers.Dense(3, "tanh", name="second"),
        keras.layers.Dense(CLASSES, name="out"),
    ]
    return compiled(tfgrow.convert(keras.Sequential(layers)))


def proposed(model=None, **limits):
    settings = {"growth_per_step": None, "morphisms": "split", **limits}
    return quick_oracle(**settings).propose_plan(model or two_layers(), arrays())


LIMITS = {
    "free": ({}, lambda plan: len(plan.candidates) > 2 and len(plan.widths) == 2),
    "max_params": ({"max_params": 52}, lambda plan: 0 < plan.cost.params <= 52 - 39),
    "max_flops": ({"max_flops": 80}, lambda plan: 0 < plan.cost.flops <= 80 - 66),
    "edits": ({"growth_per_step": 2}, lambda plan: len(plan.candidates) == 2),
    "fraction": ({"growth_per_step": 0.25}, lambda plan: 0 < plan.cost.params <= 9),
    "round_to": (
        {"round_to": 4},
        lambda plan: plan.widths and all(after % 4 == 0 for _, after in plan.widths.values()),
    ),
    "include": ({"include": "sec.*"}, lambda plan: set(plan.widths) == {"second"}),
    "exclude": ({"exclude": ["second"]}, lambda plan: set(plan.widths) == {"first"}),
}


@pytest.mark.parametrize("case", list(LIMITS))
def test_a_plan_within_its_limits(case):
    limits, holds = LIMITS[case]
    model = two_layers()
    plan = proposed(model, **limits)
    assert holds(plan), (plan.cost, plan.widths, plan.reason)
    # The costs and widths that it states are those of the model that it makes.
    before = model.count_params()
    commit(model, plan.candidates, lambda grown: 0.0)
    assert model.count_params() - before == plan.cost.params
    for name, (_, after) in plan.widths.items():
        assert model.get_layer(name).units == after


def test_a_budget_too_small_for_any_edit_stops_without_learning(monkeypatch):
    monkeypatch.setattr(tfgrow.GaussNewtonEstimator, "learn", None)
    model = two_layers()
    trial, plan = quick_oracle(max_params=45).propose(model, arrays())
    assert trial.status == "STOPPED"
    expected = r"budget reached: .* adds 7 parameters .* only 6 parameters may be added"
    assert re.search(expected, plan.reason), plan.reason
    trial, plan = quick_oracle(max_flops=70).propose(model, arrays())
    assert trial.status == "STOPPED"


def test_growth_per_step_never_forbids_the_smallest_edit():
    """A tenth of a tiny model is less than any edit adds: it grows all the same, by one."""
    trial, plan = quick_oracle(growth_per_step=0.01).propose(two_layers(), arrays())
    assert (trial.status, len(plan.candidates)) == ("RUNNING", 1)
    assert "growth_per_step allows" in plan.reason


def test_stopped_where_no_multiple_fits_the_budget(monkeypatch):
    monkeypatch.setattr(tfgrow.GaussNewtonEstimator, "learn", None)
    model = two_layers()
    room = tfgrow.candidates(model, "add", new_units=1)[0].cost.params + 1
    oracle = quick_oracle(round_to=8, max_params=model.count_params() + room)
    trial, plan = oracle.propose(model, arrays())
    assert (trial.status, plan.candidates) == ("STOPPED", ())
    assert "budget reached: the smallest edit adds" in plan.reason


def test_what_cannot_be_afforded_is_not_learned(monkeypatch):
    seen = []
    learn = tfgrow.GaussNewtonEstimator.learn

    def spy(self, candidates, *arguments, **options):
        seen.extend(candidates)
        return learn(self, candidates, *arguments, **options)

    monkeypatch.setattr(tfgrow.GaussNewtonEstimator, "learn", spy)
    keras.utils.set_random_seed(0)
    layers = [keras.Input((4,)), keras.layers.Dense(2, name="cheap")]
    layers += [keras.layers.Dense(9, name="dear"), keras.layers.Dense(CLASSES, name="out")]
    model = compiled(tfgrow.convert(keras.Sequential(layers)))
    proposed(model, max_params=model.count_params() + 8)
    assert {candidate.site.name for candidate in seen} == {"dear"}  # 6 parameters, not 14


def test_nothing_is_chosen_twice():
    plan = proposed()
    keys = [candidate.key for candidate in plan.candidates]
    assert len(set(keys)) == len(keys)


def test_equal_seeds_propose_equal_plans():
    first, second = (proposed(seed=3, morphisms=("split", "add")) for _ in range(2))
    assert [c.key for c in first.candidates] == [c.key for c in second.candidates]
    assert first.estimated_change == second.estimated_change
    for one, two in zip(first.candidates, second.candidates, strict=True):
        for name, value in one.theta.items():
            np.testing.assert_array_equal(value, two.theta[name])


def test_the_estimate_of_a_scaled_set():
    """With exact curvature it is, at scale 1, the plan's own estimate; towards 0 it vanishes."""
    model, oracle = two_layers(), quick_oracle(curvature="exact")
    data = oracle.split(arrays())
    plan = oracle.propose_plan(model, data)
    whole = oracle.estimate(model, plan.candidates, data.score)
    assert whole == pytest.approx(plan.estimated_change, rel=1e-3)
    tiny = [get(c.morphism).scaled(c, 1e-3) for c in plan.candidates]
    assert abs(oracle.estimate(model, tiny, data.score)) < 0.01 * abs(whole)


# ---- open to new morphisms -----------------------------------------------------------------------


def test_the_oracle_names_no_morphism():
    """A new morphism is one new file: nothing here asks for one by name, but the default."""
    for module in (tfgrow.oracle.gauss_newton, tfgrow.oracle.selection, tfgrow.oracle.worth):
        code = inspect.getsource(module).replace('morphisms: Sequence[str] = ("split", "add")', "")
        code = re.sub(r'""".*?"""', "", code, flags=re.DOTALL)
        for name in MORPHISMS:
            assert f'"{name}"' not in code, f"{module.__name__} asks for {name!r}"


def test_a_morphism_says_whether_it_edits_an_old_unit():
    site = tfgrow.find_sites(two_layers())[0]

    def excluded(morphism):
        candidate = Candidate(site, morphism, 1, {}, {}, Cost())
        return tfgrow.oracle.gauss_newton._group(candidate).excludes

    assert (excluded("split"), excluded("add")) == (1, None)


# ---- data ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("samples", [3, 50, 96, 6000])
@pytest.mark.parametrize("kind", ["arrays", "dataset"])
def test_the_parts_have_no_sample_in_common(samples, kind):
    x = np.arange(samples, dtype="float32")[:, None]
    data = (x, x)
    if kind == "dataset":
        data = tf.data.Dataset.from_tensor_slices(data).batch(32)
    parts = split_data(data, 8, 4, 2, seed=1)
    seen = [np.concatenate([b[0] for b in part]).ravel() for part in
            (parts.learn, parts.score, parts.held_out)]  # fmt: skip
    assert all(len(part) for part in seen)
    together = np.concatenate(seen)
    assert len(np.unique(together)) == len(together)
    assert len(seen[0]) >= len(seen[1]) >= len(seen[2]) or samples < 14


@pytest.mark.parametrize("wanted", [(8, 4, 2), (30, 20, 10)], ids=["enough", "too few"])
def test_samples_of_different_shapes_stay_apart(wanted):
    """Sequences are as long as the longest of their batch."""
    x = [np.full((4, 2 + n % 3), n, "float32") for n in range(14)]
    parts = split_data([(one, one[:, 0]) for one in x], *wanted)
    batches = [*parts.learn, *parts.score, *parts.held_out]
    found = np.concatenate([y for _, y, _ in batches])
    np.testing.assert_array_equal(np.sort(found), np.repeat(np.arange(14), 4))
    for one, y, _ in batches:
        assert one.shape[1] == 2 + int(y[0]) % 3
    assert all(len(part) for part in (parts.learn, parts.score, parts.held_out))
    assert (len(batches) == 14) == (sum(wanted) == 14)


@pytest.mark.parametrize("wanted", [(200, 1, 1), (1, 200, 1), (1, 1, 200), (100, 100, 1)])
@pytest.mark.parametrize("samples", [3, 4, 50, 90])
def test_no_part_is_empty_however_unequal_they_are(wanted, samples):
    x = np.arange(samples, dtype="float32")[:, None]
    parts = split_data((x, x), *wanted)
    sizes = [len(part) for part in (parts.learn, parts.score, parts.held_out)]
    assert min(sizes) >= 1
    assert sum(sizes) == samples


def test_endless_data_is_read_no_further_than_needed():
    read = []

    def stream():
        while True:
            read.append(1)
            yield np.zeros((8, 4), "float32"), np.zeros(8, "int64")

    data = tf.data.Dataset.from_generator(
        stream,
        output_signature=(tf.TensorSpec((8, 4)), tf.TensorSpec((8,), tf.int64)),
    )
    parts = split_data(data.repeat(), 4, 2, 2)
    assert [len(part) for part in (parts.learn, parts.score, parts.held_out)] == [4, 2, 2]
    assert len(read) < 20


def test_too_little_data():
    with pytest.raises(ValueError, match="has 2 samples; a growth step needs at least 3"):
        split_data((np.zeros((2, 4)), np.zeros(2)), 4, 2, 2)


# ---- bad arguments -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"morphisms": ("split", "fuse")}, "Unknown morphism 'fuse'"),
        ({"curvature": "rough"}, "Unknown curvature 'rough'; expected 'auto'"),
        ({"learn_steps": 0}, "learn_steps must be"),
        ({"score_batches": -1}, "score_batches must be"),
        ({"held_out_batches": 1.5}, "held_out_batches must be"),
        ({"new_units": 0}, "new_units must be"),
        ({"max_params": 0}, "max_params must be"),
    ],
)
def test_bad_arguments(arguments, named):
    with pytest.raises(ValueError, match=re.escape(named)):
        tfgrow.GaussNewtonOracle(**arguments)


def test_a_model_that_is_not_compiled():
    with pytest.raises(ValueError, match=r"not compiled with a loss.*compile"):
        quick_oracle().check(mlp(), arrays())


def test_a_site_that_does_not_exist():
    with pytest.raises(ValueError, match=r"conv9.*Found: \['first', 'second'\]"):
        proposed(include=["conv9"])


def test_an_exceeded_budget():
    with pytest.raises(ValueError, match="39 parameters, more than max_params=10"):
        quick_oracle(max_params=10).propose(two_layers(), arrays())


def test_targets_that_do_not_fit_the_loss():
    model = compiled(mlp(), loss=keras.losses.CategoricalCrossentropy(from_logits=True))
    with pytest.raises(ValueError, match="shape"):
        quick_oracle().check(model, arrays())
    model = compiled(mlp(), loss=logits_loss())
    quick_oracle().check(model, arrays())


def test_with_prune_a_full_budget_does_not_end_growth():
    model = two_layers()
    limits = {"max_params": model.count_params(), "growth_per_step": None}
    kept = quick_oracle(morphisms=("add",), **limits)
    assert kept.propose(model, arrays())[0].status == "STOPPED"
    oracle = quick_oracle(morphisms=("split", "add", "prune"), max_trials=1, **limits)
    trial, plan = oracle.propose(model, arrays())
    assert trial.status in ("RUNNING", "IDLE")
    assert plan.cost.params <= 0
    removed = {(c.site.name, c.unit): c for c in plan.candidates if c.morphism == "prune"}
    for (site, unit), candidate in removed.items():
        for other_site, other in removed:
            if other_site == site and other != unit:
                assert abs(candidate.theta["share"][other]) <= 0.1


def test_round_to_and_prune_exclude_each_other():
    with pytest.raises(
        ValueError, match=r"round_to=4 works with morphisms that add single units; .*'prune'"
    ):
        quick_oracle(morphisms=("add", "prune"), round_to=4)


# ---- what training would bring anyway -----------------------------------------------------------


def test_the_marginal_score_proposes_what_really_lowers_the_loss():
    """It chooses for settled weights, but applies at lengths that suit the weights as they are."""
    data = arrays(samples=1024)
    settings = {"score": "marginal", "growth_per_step": None, "score_batches": 8, "learn_steps": 4}

    model = two_layers()
    plan = quick_oracle(**settings).propose_plan(model, data)
    assert {"settle", "lengths"} <= set(plan.seconds)
    assert plan.estimated_change < 0
    measured = tfgrow.measure_change(model, plan.candidates, data)
    assert measured == pytest.approx(plan.estimated_change, rel=0.5)
    again = quick_oracle(**settings).propose_plan(two_layers(), data)
    assert again.widths == plan.widths
    assert again.estimated_change == plan.estimated_change


def test_the_marginal_score_needs_edits_that_can_be_scaled():
    with pytest.raises(ValueError, match=r"can be applied in part; \['prune'\] can't"):
        tfgrow.GaussNewtonOracle(score="marginal", morphisms=("add", "prune"))
    with pytest.raises(ValueError, match=r"Unknown score 'net'; expected one of"):
        tfgrow.GaussNewtonOracle(score="net")
    with pytest.raises(ValueError, match="cost_exponent must be a number from 0 to 1"):
        tfgrow.GaussNewtonOracle(cost_exponent=2)


@pytest.mark.parametrize(
    ("settings", "score"),
    [
        ({"max_params": 9}, "worth"),
        ({"max_flops": 9, "growth_per_step": None}, "worth"),
        ({"max_params": 9, "morphisms": ("heads", "add_heads")}, "worth"),
        ({"max_params": 9, "morphisms": ("add", "prune")}, "raw"),
        ({"max_params": 9, "morphisms": ("split", "deepen")}, "raw"),
        ({"max_params": 9, "min_gain_per_param": 1e-6}, "raw"),
        ({}, "raw"),
    ],
)
def test_what_it_goes_by_if_nothing_is_said(settings, score):
    assert tfgrow.GaussNewtonOracle(**settings).score == score


def test_the_cost_exponent_reaches_the_selection():
    limits = tfgrow.GaussNewtonOracle(cost_exponent=0.25, max_params=100).limits(10)
    assert limits.cost_exponent == 0.25
    assert tfgrow.GaussNewtonOracle(score="raw").limits(10).cost_exponent == 1.0
    assert tfgrow.GaussNewtonOracle(score="worth").limits(10).cost_exponent == 0.5
    for budget, exponent in (({"max_params": 50}, 0.5), ({"max_flops": 50}, 1.0),
                             ({"max_params": 50, "max_flops": 50}, 0.5)):  # fmt: skip
        assert tfgrow.GaussNewtonOracle(**budget).cost_exponent == exponent
