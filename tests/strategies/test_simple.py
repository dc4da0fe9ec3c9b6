"""Uniform, random and Net2Net growth: what their papers say, within the budget, repeatably."""

import keras
import numpy as np
import pytest
from keras import layers

import tfgrow
from tests.cases import by_name, class_data, inputs_of, regression_data
from tests.morphisms.effects import applied, outputs
from tfgrow.capture.batches import batches_of
from tfgrow.morphisms.registry import get
from tfgrow.oracle.data import GrowthData
from tfgrow.strategies import Net2Net, RandomUnits, Uniform
from tfgrow.strategies import get as strategy

EVERY = ("uniform", "random", "net2net")
ALL = (*EVERY, "splitting", "firefly", "gradmax", "tiny")


def chain(*widths):
    inputs = keras.Input((5,))
    x = inputs
    for number, width in enumerate(widths):
        x = layers.Dense(width, "relu", name=f"hidden{number}")(x)
    model = tfgrow.convert(keras.Model(inputs, layers.Dense(3, "softmax", name="out")(x)))
    model.compile("sgd", "sparse_categorical_crossentropy")
    return model


@pytest.fixture(scope="module")
def net():
    model = by_name("conv_bn_relu").model()
    model.compile("sgd", "mse")
    return model


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("case", ["conv_bn_relu", "residual_stream", "depthwise", "perceptron"])
def test_a_step_keeps_the_function_and_its_budget(name, case):
    model = by_name(case).model()
    data = regression_data(model, 16)
    most = int(1.4 * model.count_params())
    settings = {"noise": 0.0} if name == "net2net" else {}
    oracle = strategy(name, max_params=most, growth_per_step=None, seed=1, **settings)
    plan = oracle.propose_plan(model, data)
    assert plan.candidates
    assert plan.estimated_change is None
    x = inputs_of(model, 4)
    grown = applied(model, plan.candidates)
    np.testing.assert_allclose(outputs(grown, x), outputs(model, x), atol=1e-5)
    assert model.count_params() < grown.count_params() <= most
    assert grown.count_params() - model.count_params() == plan.cost.params
    widths = {site.name: site.units for site in tfgrow.find_sites(grown)}
    assert {name: after for name, (_, after) in plan.widths.items()}.items() <= widths.items()


@pytest.mark.parametrize("name", ALL)
def test_equal_seeds_give_equal_steps(name, net):
    data = regression_data(net, 16)
    first, second, third = (
        strategy(name, growth_per_step=0.5, seed=seed).propose_plan(net, data) for seed in (1, 1, 2)
    )
    assert first.candidates
    assert first.widths == second.widths
    assert len(first.candidates) == len(second.candidates)
    for one, other in zip(first.candidates, second.candidates, strict=True):
        assert one.key == other.key
        for parameter, value in one.theta.items():
            np.testing.assert_array_equal(value, other.theta[parameter])
    weights = [
        np.concatenate([v.ravel() for c in plan.candidates for v in c.theta.values()])
        for plan in (first, third)
    ]
    assert weights[0].shape != weights[1].shape or (weights[0] != weights[1]).any()


def test_uniform_takes_the_largest_factor_that_fits():
    model = chain(4, 8, 2)
    plan = Uniform(max_params=700, growth_per_step=None).propose_plan(model, class_data(model, 16))
    factors = [after / before for before, after in plan.widths.values()]
    assert max(factors) - min(factors) <= 1 / 2, "up to whole units of the narrowest"
    grown = applied(model, plan.candidates)
    assert grown.count_params() <= 700
    for name in plan.widths:
        more = tfgrow.candidates(grown, "add", sites=name, new_units=1)
        assert grown.count_params() + more[0].cost.params > 700, "nothing is left over"


def test_units_are_limited_by_growth_per_step():
    model = chain(4, 8, 2)
    data = class_data(model, 16)
    for name in (*EVERY, "gradmax", "tiny"):
        plan = strategy(name, growth_per_step=3).propose_plan(model, data)
        assert 0 < len(plan.candidates) <= 3


@pytest.mark.parametrize("name", [*EVERY, "gradmax", "tiny"])
def test_widths_are_rounded(name):
    model = chain(4, 8, 4)
    plan = strategy(name, growth_per_step=None, max_params=600, round_to=4).propose_plan(
        model, class_data(model, 16)
    )
    assert plan.candidates
    for _, after in plan.widths.values():
        assert after % 4 == 0


@pytest.mark.parametrize("name", [*EVERY, "firefly"])
def test_a_step_too_small_for_the_next_multiple_takes_it_all_the_same(name):
    model = chain(16, 16)
    plan = strategy(name, growth_per_step=0.1, round_to=8, max_params=5000, seed=0).propose_plan(
        model, class_data(model, 64)
    )
    assert list(plan.widths.values()) == [(16, 24)]


@pytest.mark.parametrize("name", ["uniform", "random"])
def test_a_step_without_any_limit_is_refused(name):
    with pytest.raises(ValueError, match="Nothing limits what a step"):
        strategy(name, growth_per_step=None)


@pytest.mark.parametrize("name", ALL)
def test_data_that_do_not_fit_are_refused_before_training(name):
    model = chain(4, 8, 2)
    x, y = class_data(model, 16)
    oracle = strategy(name, growth_per_step=1.0)
    oracle.check(model, (x, y))
    for data, message in (
        ((x, y + 1), "labels 1 to 3"),
        ((x[:2], y[:2]), "2 samples"),
        ((x[:, :3], y), r"shape \(3,\)"),
        ([(x[0], y[0])], r"single samples of shape \(5,\): batch it"),
    ):
        with pytest.raises(ValueError, match=message):
            oracle.check(model, data)


def test_include_and_exclude():
    model = chain(4, 8, 2)
    model.compile("adam", "sparse_categorical_crossentropy")
    data = class_data(model, 256)
    for name in ALL:
        plan = strategy(name, growth_per_step=0.3, include="hidden1").propose_plan(model, data)
        assert set(plan.widths) == {"hidden1"}


def test_random_places_are_all_drawn():
    model = chain(4, 4, 4)
    data = class_data(model, 16)
    drawn = {
        next(iter(RandomUnits(growth_per_step=1, seed=s).propose_plan(model, data).widths))
        for s in range(12)
    }
    assert drawn == {"hidden0", "hidden1", "hidden2"}


def test_net2net_copies_a_unit_and_halves_what_it_hands_on():
    """The closed form of the paper's section 2.3: U' = U, W'_j = W_g(j) / number of copies."""
    model = chain(4, 3)
    before = {layer.name: layer.get_weights() for layer in model.layers if layer.get_weights()}
    plan = Net2Net(growth_per_step=1, include="hidden0", noise=0.0, seed=3).propose_plan(
        model, class_data(model, 16)
    )
    (candidate,) = plan.candidates
    grown = applied(model, [candidate])
    kernel, bias = grown.get_layer("hidden0").get_weights()
    source = candidate.unit
    np.testing.assert_array_equal(kernel, before["hidden0"][0][:, [0, 1, 2, 3, source]])
    np.testing.assert_array_equal(bias, before["hidden0"][1][[0, 1, 2, 3, source]])
    rows = before["hidden1"][0][[0, 1, 2, 3, source]]
    rows[[source, 4]] /= 2
    np.testing.assert_allclose(grown.get_layer("hidden1").get_weights()[0], rows, rtol=1e-6)


def test_net2net_noise_sets_copies_apart():
    model = chain(4, 3)
    data = class_data(model, 16)
    sizes = []
    for noise in (0.02, 0.2):
        oracle = Net2Net(growth_per_step=4, include="hidden0", noise=noise, seed=0)
        plan = oracle.propose_plan(model, data)
        kernel = model.get_layer("hidden0").kernel.numpy()
        theta = np.array([c.theta["kernel"] for c in plan.candidates])
        usual = np.sqrt(np.mean(kernel[:, [c.unit for c in plan.candidates]] ** 2, axis=0))
        sizes.append(np.sqrt(np.mean((theta / usual[:, None]) ** 2)) / noise)
    np.testing.assert_allclose(sizes, 1.0, atol=0.5)
    np.testing.assert_allclose(sizes[0], sizes[1], rtol=1e-4)


def test_statistics_of_new_units_are_measured(net):
    x, y = regression_data(net, 32)
    plan = Uniform(growth_per_step=None, max_params=400, batches=4).propose_plan(net, (x, y))
    grown = applied(net, plan.candidates)
    norm, conv = grown.get_layer("bn1"), grown.get_layer("conv1")
    old = net.get_layer("conv1").filters
    made = conv(x).numpy()[..., old:]
    mean = made.mean(axis=(0, 1, 2))
    assert old < conv.filters
    # on most of these samples, in another order
    spread = made.std(axis=(0, 1, 2))
    assert (np.abs(norm.moving_mean.numpy()[old:] - mean) < 0.3 * spread).all()
    np.testing.assert_allclose(norm.moving_variance.numpy()[old:], spread**2, rtol=0.5)


@pytest.mark.parametrize("name", EVERY)
def test_a_fit_by_name(name):
    keras.utils.set_random_seed(0)
    model = chain(4, 4)
    model.compile("adam", "sparse_categorical_crossentropy")
    data = class_data(model, 64)
    growth = tfgrow.callbacks.Growth(name, data=data, every=1)
    model.fit(*data, epochs=3, verbose=0, callbacks=[growth])
    assert [event.status for event in growth.events] == ["applied", "applied"]
    for event in growth.events:
        assert event.estimated_change is None
        assert abs(event.measured_change) < 1e-2
        assert event.params_after > event.params_before
        assert event.alpha == 1.0
    assert growth.events[0].to_json()["estimated_change"] is None


def test_a_budget_that_is_used_up_ends_growth():
    model = chain(4, 4)
    model.compile("adam", "sparse_categorical_crossentropy")
    data = class_data(model, 64)
    full = model.count_params() + 3
    oracle = strategy("uniform", max_params=full)
    plan = oracle.propose_plan(model, data)
    assert not plan.candidates
    assert "fits the budget" in plan.reason


def test_by_name():
    assert isinstance(strategy("gauss_newton"), tfgrow.GaussNewtonOracle)
    oracle = Uniform()
    assert strategy(oracle) is oracle
    with pytest.raises(ValueError, match=r"Unknown oracle 'unform'.*'uniform'"):
        strategy("unform")
    with pytest.raises(TypeError, match=r"or the name of one.*Found: int"):
        strategy(3)
    with pytest.raises(ValueError, match="is made already"):
        strategy(oracle, seed=1)
    with pytest.raises(ValueError, match="noise must be"):
        Net2Net(noise=-1.0)
    with pytest.raises(ValueError, match="batches must be"):
        Uniform(batches=0)


def test_a_strategy_of_ones_own():
    class First(tfgrow.strategies.Strategy):
        """One unit at the first site."""

        def choose(self, room):
            return room.new_units({next(iter(room.sites)): 1})

    tfgrow.strategies.register_strategy("first", First)
    model = chain(4, 4)
    plan = strategy("first").propose_plan(model, class_data(model, 16))
    assert plan.widths == {"hidden0": (4, 5)}
    assert get(plan.candidates[0].morphism).name == "add"


@pytest.mark.parametrize("case", ["conv_bn_relu", "residual_stream", "depthwise"])
@pytest.mark.parametrize(
    ("name", "settings"), [("splitting", {"step": 0.1}), ("firefly", {"new_units": 2, "steps": 8})]
)
def test_strategies_that_estimate_keep_their_budget_and_lower_the_loss(name, settings, case):
    model = by_name(case).model()
    model.compile("sgd", "mse")
    data = regression_data(model, 64)
    (batch,) = batches_of(data, len(data[0]))
    most = int(1.4 * model.count_params())
    oracle = strategy(name, max_params=most, growth_per_step=None, seed=1, **settings)
    plan = oracle.propose_plan(model, GrowthData([batch], [batch], [batch]))
    assert plan.candidates
    grown = applied(model, plan.candidates)
    assert model.count_params() < grown.count_params() <= most
    assert grown.count_params() - model.count_params() == plan.cost.params
    assert plan.estimated_change < 0
    assert tfgrow.measure_change(model, plan.candidates, data) < 0


@pytest.mark.parametrize("name", ["splitting", "firefly"])
def test_strategies_that_estimate_round_and_grow_in_a_fit(name):
    """Smooth units, whose splits can gain something."""
    keras.utils.set_random_seed(0)
    inputs = keras.Input((5,))
    x = layers.Dense(4, "tanh", name="hidden0")(inputs)
    x = layers.Dense(6, "tanh", name="hidden1")(x)
    model = tfgrow.convert(keras.Model(inputs, layers.Dense(2, name="out")(x)))
    model.compile("adam", "mse")
    data = regression_data(model, 256)
    most = model.count_params() + 80
    plan = strategy(name, max_params=most, growth_per_step=None, round_to=4).propose_plan(
        model, data
    )
    assert plan.candidates
    assert all(after % 4 == 0 for _, after in plan.widths.values())
    growth = tfgrow.callbacks.Growth(name, data=data, every=1)
    model.fit(*data, epochs=2, verbose=0, callbacks=[growth])
    (event,) = growth.events
    assert event.status == "applied"
    assert event.estimated_change < 0
    assert event.params_after > event.params_before
