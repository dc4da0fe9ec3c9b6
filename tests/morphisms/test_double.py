"""Doubling: what the estimate promises is what the really doubled network does."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

import tfgrow
from tests.cases import inputs_of, randomize, regression_data
from tests.morphisms.effects import applied, capture_of, outputs
from tfgrow.capture.capture import observe, prepare_inputs
from tfgrow.capture.execute import execute
from tfgrow.graph.nodes import trace
from tfgrow.morphisms.base import perturb_all
from tfgrow.morphisms.registry import get, group_candidates
from tfgrow.passes import objective

KIND = get("double")


def perceptron():
    inputs = keras.Input((4,))
    x = layers.Dense(3, name="first")(inputs)
    x = layers.LayerNormalization(name="norm1")(x)
    x = layers.Dense(5, "gelu", name="second")(x)
    x = layers.RMSNormalization(name="norm2")(layers.Activation("tanh")(x))
    return keras.Model(inputs, layers.Dense(2, name="out")(x))


def convnext():
    """A block of ConvNeXt: the stream is normalised after a depthwise convolution of it."""
    inputs = keras.Input((6, 6, 2))
    x = layers.Conv2D(3, 2, strides=2, name="stem")(inputs)
    x = layers.LayerNormalization(epsilon=1e-6, name="stem_norm")(x)
    y = layers.Conv2D(3, 3, groups=3, padding="same", name="depthwise")(x)
    y = layers.LayerNormalization(name="norm")(y)
    y = layers.Dense(6, "gelu", name="inner")(y)
    x = layers.Add(name="stream")([x, layers.Dense(3, name="outer")(y)])
    x = layers.LayerNormalization(name="down_norm", center=False)(x)
    x = layers.Conv2D(4, 2, name="down")(x)
    x = layers.LayerNormalization(name="last_norm")(layers.GlobalAveragePooling2D()(x))
    return keras.Model(inputs, layers.Dense(2, name="out")(x))


def flattened():
    """Normalised over channels of all positions, and a concatenation behind it."""
    inputs = keras.Input((4, 4, 1))
    x = layers.Conv2D(2, 2, activation="tanh", name="conv")(inputs)
    x = layers.BatchNormalization(name="bn")(x)
    x = layers.LayerNormalization(name="norm")(layers.Flatten(name="flatten")(x))
    y = layers.Dense(3, "tanh", name="beside")(layers.Flatten(name="pixels")(inputs))
    x = layers.Concatenate(name="both")([x, y])
    return keras.Model(inputs, layers.Dense(2, name="out")(x))


NETS = {
    "perceptron": (perceptron, ["first", "second"], []),
    "convnext": (convnext, ["stem", "down"], ["inner"]),
    "flattened": (flattened, ["conv"], ["beside"]),
}


@pytest.fixture(scope="module", params=NETS)
def net(request):
    build, doubling, free = NETS[request.param]
    keras.utils.set_random_seed(0)
    stock = build()
    randomize(stock)
    for layer in stock.layers:  # as if trained
        if "norm" in layer.name:
            layer.set_weights(
                [
                    np.random.default_rng(n).uniform(0.5, 1.5, w.shape)
                    for n, w in enumerate(layer.get_weights())
                ]
            )
    return stock, tfgrow.convert(stock), doubling, free


def doublings(model):
    return tfgrow.candidates(model, "double", seed=3)


def test_sites_that_only_double_say_so(net):
    stock, model, doubling, free = net
    sites = tfgrow.find_sites(model)
    assert [site.name for site in sites if site.doubles] == doubling
    assert [site.name for site in sites if site.blocked is None] == free
    for site in sites:
        if site.doubles:
            assert "can only be doubled" in site.blocked
            assert site.resizable
            with pytest.raises(ValueError, match="can only be doubled"):
                tfgrow.candidates(model, "split", sites=site)
    x = inputs_of(model, 4)
    np.testing.assert_allclose(model(x), stock(x), atol=1e-6)
    for name in free:
        with pytest.raises(ValueError, match=r"can be split one by one"):
            tfgrow.candidates(model, "double", sites=name)


def test_function_is_preserved_and_shapes_are_doubled(net, tmp_path):
    _, model, doubling, _ = net
    x = inputs_of(model, 4, seed=8)
    before = outputs(model, x)
    rest = [KIND.scaled(candidate, 0.0) for candidate in doublings(model)]
    grown = applied(model, rest)
    np.testing.assert_allclose(outputs(grown, x), before, atol=2e-6)
    for name in doubling:
        assert grown.get_layer(name).growth_units == 2 * model.get_layer(name).growth_units
    grown.save(tmp_path / "doubled.keras")
    loaded = keras.models.load_model(tmp_path / "doubled.keras")
    np.testing.assert_allclose(outputs(loaded, x), before, atol=2e-6)
    plain = tfgrow.strip(grown)
    assert not any(type(layer).__module__.startswith("tfgrow") for layer in plain.layers)
    np.testing.assert_allclose(outputs(plain, x), before, atol=2e-6)


def test_cost_is_that_of_the_really_doubled_model(net):
    _, model, _, _ = net
    candidates = doublings(model)
    for candidate in candidates:
        added = applied(model, [candidate]).count_params() - model.count_params()
        assert added == candidate.cost.params > 0
        assert candidate.cost.flops > 0


def test_perturbation_is_the_real_change_at_the_consumers(net):
    """A consumer's response changes by its kernel times the perturbation of what it reads."""
    _, model, _, _ = net
    x = inputs_of(model, 4, seed=7)
    graph = trace(model)
    before = execute(graph, prepare_inputs(graph, x))
    for candidate in doublings(model):
        (group,), _ = group_candidates(model, [candidate])
        (perturbed,) = perturb_all(observe(graph, x), [group], [group.theta], fresh=False)
        claimed = group.morphism.tangents(group, group.theta, perturbed)
        consumers = {n.index for leaf in candidate.site.leaves for n in leaf.consumers}
        real = responses_with(applied(model, [candidate]), x, before, consumers)
        seen = 0
        for leaf in candidate.site.leaves:
            for node in leaf.consumers:
                value = (
                    before[("tensor", leaf.tensor)]
                    + claimed[
                        group.morphism.taps(candidate.site)[candidate.site.leaves.index(leaf)]
                    ]
                )
                layer = node.operation
                weights = {k: tf.constant(v) for k, v in layer.growable_variables().items()}
                expected = layer.linear(value, **weights)
                change = np.abs(expected - before[("linear", node.index)]).max()
                assert change > 1e-3
                np.testing.assert_allclose(real[node.index], expected, atol=2e-5)
                seen += 1
        assert seen == len(consumers)


def responses_with(grown, x, before, consumers):
    """The responses of consumers, what they make of them held back."""
    seen = {}

    def hold(tap, value):
        kind, index = tap
        if kind == "linear" and index in consumers:
            seen[index] = np.asarray(value)
            if value.shape == before[tap].shape:
                return before[tap]
        return value

    graph = trace(grown)
    execute(graph, prepare_inputs(graph, x), hold)
    return seen


def test_the_gradient_written_out_is_that_of_automatic_differentiation(net):
    _, model, _, _ = net

    class Net:
        graph = trace(model)
        data = regression_data(model, 6)

    for candidate in doublings(model):
        (group,), _ = group_candidates(model, [candidate])
        captured = capture_of(Net, group.morphism.taps(group.site))
        theta = {name: tf.constant(value) for name, value in group.theta.items()}
        with tf.GradientTape(persistent=True) as tape:
            tape.watch(theta)
            (perturbed,) = perturb_all(captured, [group], [theta], fresh=False)
            covectors = KIND.covectors(captured, group, theta, perturbed)
            found = KIND.scalars(group, covectors, perturbed)
            expected = tf.reduce_sum(found[0]) + 0.5 * tf.reduce_sum(found[1:] ** 2)
        total, slopes = objective([group], [covectors], [perturbed])
        np.testing.assert_allclose(total, expected, rtol=1e-4)
        for name, value in theta.items():
            by_hand = tape.gradient(perturbed.values, value, output_gradients=slopes[0])
            by_tape = tape.gradient(expected, value).numpy()
            np.testing.assert_allclose(
                by_hand, by_tape, atol=1e-4 * max(np.abs(by_tape).max(), 1e-6), err_msg=name
            )


def test_what_is_learned_is_what_it_brings(net):
    _, stock_model, doubling, _ = net
    model = tfgrow.convert(stock_model)
    model.compile("adam", "mse")
    data = regression_data(model, 96)
    model.fit(*data, epochs=1, verbose=0)
    estimator = tfgrow.GaussNewtonEstimator(model, curvature="exact")
    start = doublings(model)
    learned = estimator.learn(start, data, steps=40)
    scores = estimator.score(learned, data)
    assert (scores < 0).all()
    assert (scores < estimator.score(start, data)).all()
    assert estimator.joint_change(learned, data) == pytest.approx(
        estimator.interaction(learned, data).change(), rel=1e-3, abs=1e-6
    )
    for candidate in learned:
        small = KIND.scaled(candidate, 0.01)
        estimated = estimator.score([small], data)[0]
        # Normalised over three channels, some of which hardly vary, nothing is quadratic for long.
        assert tfgrow.measure_change(model, small, data) == pytest.approx(estimated, rel=0.2)
    slot = [np.array(v) for v in model.optimizer.variables]
    event = tfgrow.apply(model, learned[:1])
    assert event.widths == {doubling[0]: (start[0].site.units, 2 * start[0].site.units)}
    assert event.newborn == {doubling[0]: start[0].site.units}
    assert len(model.optimizer.variables) == len(slot)
    model.fit(*data, epochs=1, verbose=0)


def test_the_oracle_doubles_within_its_budget():
    keras.utils.set_random_seed(1)
    rng = np.random.default_rng(0)
    x = rng.standard_normal((4096, 6)).astype("float32")
    y = np.sin(2 * x).sum(axis=1, keepdims=True).astype("float32")
    inputs = keras.Input((6,))
    z = layers.Dense(3, name="hidden")(inputs)
    z = layers.Activation("tanh")(layers.LayerNormalization(name="norm")(z))
    model = tfgrow.convert(keras.Model(inputs, layers.Dense(1, name="out")(z)))
    model.compile(keras.optimizers.Adam(0.01), "mse")
    data = tf.data.Dataset.from_tensor_slices((x, y)).batch(64)
    model.fit(data, epochs=10, verbose=0)
    oracle = tfgrow.GaussNewtonOracle(
        morphisms="double", growth_per_step=None, max_params=70, learn_steps=50
    )
    growth = tfgrow.callbacks.Growth(oracle, data=data, every=1)
    model.fit(data, epochs=3, verbose=0, callbacks=[growth])
    assert model.get_layer("hidden").units == 6
    assert model.count_params() <= 70
    first = growth.events[0]
    assert first.applied == ({"site": "hidden", "morphism": "double", "units": [0]},)
    assert first.measured_change < 0


@pytest.mark.parametrize("layer", [layers.LayerNormalization, layers.RMSNormalization])
def test_what_is_there_twice_is_normalised_as_before(layer):
    model = tfgrow.convert(keras.Sequential([keras.Input((5, 3)), layer(name="norm")]))
    norm = model.get_layer("norm")
    rng = np.random.default_rng(0)
    norm.set_weights([rng.standard_normal(3) for _ in norm.get_weights()])
    x = rng.standard_normal((4, 5, 3)).astype("float32")
    twice = {name: np.tile(value, 2) for name, value in norm.growable_variables().items()}
    found = np.asarray(norm.apply_channels(tf.constant(np.tile(x, 2)), twice))
    np.testing.assert_allclose(found, np.tile(model(x), 2), atol=1e-6)


@pytest.mark.parametrize("axis", [1, [1, 2]])
def test_other_axes_are_blocked(axis):
    inputs = keras.Input((4, 2))
    x = layers.Conv1D(3, 2, name="conv")(inputs)
    x = layers.LayerNormalization(axis=axis, name="norm")(x)
    model = tfgrow.convert(keras.Model(inputs, layers.Dense(1)(layers.Flatten()(x))))
    (site,) = [site for site in tfgrow.find_sites(model) if site.name == "conv"]
    assert not site.doubles
    assert "normalises over the axes" in site.blocked


def test_channels_of_several_layers_cannot_double():
    inputs = keras.Input((4,))
    x = layers.Concatenate()([layers.Dense(3, name="a")(inputs), layers.Dense(3, name="b")(inputs)])
    x = layers.LayerNormalization(name="norm")(x)
    model = tfgrow.convert(keras.Model(inputs, layers.Dense(1, name="out")(x)))
    sites = {site.name: site for site in tfgrow.find_sites(model)}
    assert "over channels of other layers" in sites["a"].blocked
    assert not sites["a"].doubles
