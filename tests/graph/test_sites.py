"""find_sites: every place that can grow, and every other one with its reason."""

import keras
import numpy as np
import pytest
from keras import layers

import tfgrow
from tests.cases import CASES, by_name, inputs_of
from tfgrow.layers import Mixing
from tfgrow.morphisms.registry import get


def sites_by_name(model):
    return {site.name: site for site in tfgrow.find_sites(model)}


def build(*middle, shape=(6, 6, 2)):
    """convert(input -> conv 'a' -> the layers given -> flatten -> dense 'out')."""
    inputs = keras.Input(shape)
    x = layers.Conv2D(3, 3, name="a")(inputs)
    for layer in middle:
        x = layer(x)
    return tfgrow.convert(keras.Model(inputs, layers.Dense(2, name="out")(layers.Flatten()(x))))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_sites_of_the_table(case):
    model = case.model()
    sites = tfgrow.find_sites(model)
    assert tuple(site.name for site in sites if site.blocked is None) == case.sites
    for site in sites:
        assert site.producer is model.get_layer(site.name)
        if isinstance(site.producer, Mixing):
            assert site.units == site.producer.growth_units
        assert site.blocked or site.consumers
        assert site.name in repr(site)


def test_paths_and_consumers():
    site = sites_by_name(by_name("several_consumers").model())["stem"]
    assert [step.layer.name for step in site.steps] == ["bn", "relu", "gap"]
    assert {layer.name for layer in site.consumers} == {"left", "right", "pooled"}


def test_a_residual_stream_is_one_site_with_all_its_producers():
    model = by_name("residual_stream").model()
    site = sites_by_name(model)["stem"]
    assert site.names == ("stem", "back0", "back1")
    assert {layer.name for layer in site.consumers} == {"back0", "bottleneck", "project", "down"}
    assert "stem + back0 + back1" in repr(site)
    x = inputs_of(model, 3)
    before = np.asarray(model(x))
    event = tfgrow.widen(model, "back1", 2)  # it answers to each of its names
    assert event.widths == {"stem": (3, 5)}
    assert [model.get_layer(name).filters for name in site.names] == [5, 5, 5]
    np.testing.assert_allclose(model(x), before, atol=1e-5)


def test_channels_behind_a_concatenation_lie_beside_those_of_others():
    sites = sites_by_name(by_name("dense_block").model())
    (bn, pool) = (
        next(leaf for leaf in sites["second"].leaves if leaf.consumers[0].name == name)
        for name in ("third", "out")
    )
    np.testing.assert_array_equal(bn.channels.index[:, 0], [2, 3, 4])
    assert (bn.channels.size, pool.channels.size) == (5, 4 * 7)
    np.testing.assert_array_equal(pool.channels.index[1], 5 + 7 * np.arange(4))


def test_channels_tied_after_they_lay_side_by_side():
    """[a, b] is read as it is, and a + b is too: every unit feeds two inputs of 'both'."""
    inputs = keras.Input((3,))
    a, b = (layers.Dense(2, activation="tanh", name=name)(inputs) for name in "ab")
    both = layers.Dense(2, name="both")(layers.Concatenate()([b, a]))
    total = layers.Dense(2, name="total")(layers.Add()([a, b]))
    model = tfgrow.convert(keras.Model(inputs, layers.Concatenate()([both, total])))
    site = sites_by_name(model)["a"]
    leaf = next(leaf for leaf in site.leaves if leaf.consumers[0].name == "both")
    np.testing.assert_array_equal(leaf.channels.index, [[0, 2], [1, 3]])
    x = inputs_of(model, 4)
    before = np.asarray(model(x))
    rest = [get(c.morphism).scaled(c, 0.0) for c in tfgrow.candidates(model, sites=["a"])]
    tfgrow.apply(model, rest)
    np.testing.assert_allclose(model(x), before, atol=1e-5)
    assert model.get_layer("b").units == 2 + 2 + 4


@pytest.mark.parametrize(
    ("second", "reason"),
    [
        (3, "of several layers or can't grow"),
        (1, "the one channel of 'b' is spread by 'add' over those of others"),
    ],
)
def test_ties_that_block(second, reason):
    """To a concatenation, whose channels are of two layers; and one channel to many."""
    inputs = keras.Input((4,))
    a = layers.Dense(3, name="a")(inputs)
    b = layers.Dense(second, name="b")(inputs)
    if second == 3:
        b = layers.Concatenate()([layers.Dense(1, name="c")(inputs), layers.Dense(2)(b)])
    x = layers.Add(name="add")([a, b])
    model = tfgrow.convert(keras.Model(inputs, layers.Dense(2, name="out")(x)))
    name = "a" if second == 3 else "b"
    assert reason in blocked(model, name)
    assert sites_by_name(model)["b" if second == 3 else "a"].blocked is None


def test_who_is_tied_to_a_blocked_layer_says_so():
    inputs = keras.Input((4,))
    a = layers.Dense(3, name="a")(inputs)
    b = layers.Dense(3, trainable=False, name="b")(inputs)
    model = tfgrow.convert(
        keras.Model(inputs, layers.Dense(2, name="out")(layers.Multiply(name="gate")([a, b])))
    )
    assert "tied to those of 'b', which can't grow: layer 'b' is frozen" in blocked(model, "a")


def test_a_join_of_your_own_ties_once_it_is_registered():
    @keras.saving.register_keras_serializable("tests")
    class Distance(layers.Layer):
        def call(self, inputs):
            return abs(inputs[0] - inputs[1])

    def net():
        inputs = keras.Input((4,))
        x = Distance(name="distance")([layers.Dense(3, name=name)(inputs) for name in "ab"])
        return tfgrow.convert(keras.Model(inputs, layers.Dense(2, name="out")(x)))

    assert "reach 'distance' (Distance), which mixes channels or is unknown" in blocked(net())
    assert "declare its class with" in blocked(net())
    assert "register_join" in blocked(net())
    tfgrow.layers.register_join(Distance)
    assert sites_by_name(net())["a"].names == ("a", "b")


def test_flatten_maps_channels_to_strided_blocks():
    site = sites_by_name(by_name("strides_valid_flatten").model())["conv2"]
    (leaf,) = site.leaves
    positions = leaf.channels.size // 2
    np.testing.assert_array_equal(leaf.channels.index[1], 1 + 2 * np.arange(positions))


def test_nothing_with_weights_is_left_out():
    inputs = keras.Input((5, 3))
    x = layers.LSTM(4, name="lstm")(inputs)
    x = layers.Dense(3, name="dense")(x)
    x = layers.LayerNormalization(name="norm")(x)
    model = tfgrow.convert(keras.Model(inputs, layers.Dense(2, name="out")(x)))
    sites = sites_by_name(model)
    assert set(sites) == {"lstm", "dense", "out"}, "'norm' is on the path of 'dense'"
    assert "LSTM" in sites["lstm"].blocked
    assert (
        "'norm' (LayerNormalization), which normalises over the channels" in sites["dense"].blocked
    )
    assert "output layer" in sites["out"].blocked
    assert sites["lstm"].units == 4


def blocked(model, name="a"):
    reason = sites_by_name(model)[name].blocked
    assert reason, f"site {name} is not blocked"
    return reason


def test_blocked_by_its_own_activation():
    inputs = keras.Input((3,))
    hidden = layers.Dense(3, activation="softmax", name="a")(inputs)
    model = tfgrow.convert(keras.Model(inputs, layers.Dense(2)(hidden)))
    assert "activation that mixes channels or is unknown" in blocked(model)


@pytest.mark.parametrize(
    "activation", [layers.ReLU(), layers.LeakyReLU(), layers.ELU(), layers.Activation("tanh")]
)
def test_layers_given_as_activations_are_part_of_the_path(activation):
    model = tfgrow.convert(
        keras.Sequential(
            [keras.Input((4,)), layers.Dense(3, activation=activation, name="a"), layers.Dense(2)]
        )
    )
    x = np.linspace(-1, 1, 12, dtype="float32").reshape(3, 4)
    before = np.asarray(model(x))
    tfgrow.widen(model, "a", 2)
    np.testing.assert_allclose(model(x), before, atol=1e-6)


@pytest.mark.parametrize("activation", [layers.PReLU(), layers.Softmax()])
def test_other_layers_as_activations_block(activation):
    model = tfgrow.convert(
        keras.Sequential(
            [keras.Input((4,)), layers.Dense(3, activation=activation, name="a"), layers.Dense(2)]
        )
    )
    assert "call it after the layer" in sites_by_name(model)["a"].blocked


def test_layers_without_weights_may_be_shared():
    relu, inputs = layers.ReLU(name="relu"), keras.Input((4,))
    x = relu(layers.Dense(3, name="a")(inputs))
    x = relu(layers.Dense(3, name="b")(x))
    model = tfgrow.convert(keras.Model(inputs, layers.Dense(2, name="out")(x)))
    assert [s.name for s in tfgrow.find_sites(model) if s.blocked is None] == ["a", "b"]
    x = np.linspace(-1, 1, 12, dtype="float32").reshape(3, 4)
    before = np.asarray(model(x))
    tfgrow.widen(model, "a", 2)
    tfgrow.widen(model, "b", 1)
    np.testing.assert_allclose(model(x), before, atol=1e-6)
    assert model.get_layer("b").output.shape == (None, 4)


def test_part_of_another_model_is_blocked():
    model = tfgrow.convert(
        keras.Sequential([keras.Input((4,)), layers.Dense(3, name="a"), layers.Dense(2)])
    )
    features = keras.Model(model.inputs, model.layers[0].output)
    assert sites_by_name(model)["a"].blocked is None, "a view of it has no layers of its own"
    inputs = keras.Input((4,))
    outer = keras.Model(inputs, layers.Dense(1)(model(inputs)))
    assert "part of another model" in sites_by_name(model)["a"].blocked
    assert sites_by_name(tfgrow.convert(outer))["a"].blocked is None
    with pytest.raises(ValueError, match="part of another model"):
        tfgrow.widen(model, "a", 1)
    assert features.output_shape == (None, 3)


def test_layers_that_feed_another_model_are_blocked():
    inputs = keras.Input((4,))
    hidden = tfgrow.layers.Dense(3, name="a")(inputs)
    model = keras.Model(inputs, tfgrow.layers.Dense(2, name="out")(hidden))
    other = keras.Model(inputs, tfgrow.layers.Dense(5, name="elsewhere")(hidden))
    assert "also reach layer 'elsewhere'" in sites_by_name(model)["a"].blocked
    assert "also reach layer 'out'" in sites_by_name(other)["a"].blocked


def test_declared_activations_pass():
    @tfgrow.layers.register_elementwise
    def twice(x):
        return 2 * x

    def undeclared(x):
        return 3 * x

    def net(activation):
        inputs = keras.Input((3,))
        hidden = layers.Dense(3, name="a")(inputs)
        hidden = layers.Activation(activation, name="activation")(hidden)
        return tfgrow.convert(keras.Model(inputs, layers.Dense(2)(hidden)))

    assert sites_by_name(net(twice))["a"].blocked is None
    assert "register_elementwise" in blocked(net(undeclared))


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (layers.Softmax(name="x"), "'x' .Softmax., which compares channels"),
        (layers.LayerNormalization(name="x"), "LayerNormalization"),
        (layers.BatchNormalization(axis=1, name="x"), "normalises axis 1"),
        (layers.Rescaling([1.0, 2.0, 3.0], name="x"), "rescales each channel"),
        (layers.Reshape((16, 3, 1), name="x"), "Reshape"),
        (layers.DepthwiseConv2D(2, activation="softmax", name="x"), "activation that mixes"),
        (layers.Conv2D(2, 1, trainable=False, name="x"), "'x', which is frozen"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, layers.Layer) else "",
)
def test_blocked_by_what_follows(layer, reason):
    model = build(type(layer).from_config(layer.get_config()))
    with pytest.raises(ValueError, match=f"'a' can't grow.*{reason}"):
        tfgrow.candidates(model, sites=["a"])


def test_blocked_by_a_merge_output_sharing_and_freezing():
    inputs = keras.Input((3,))
    a = layers.Dense(3, name="a")(inputs)
    shared = layers.Dense(3, name="shared")
    frozen = layers.Dense(3, name="frozen", trainable=False)(shared(shared(a)))
    tail = layers.Dense(3, name="tail")(frozen)
    out = layers.ReLU(name="relu")(layers.Add(name="add")([tail, inputs]))
    model = tfgrow.convert(keras.Model(inputs, [out, layers.ReLU()(a)]))
    assert "reach the model's output unmixed" in blocked(model, "a") or "shared" in blocked(model)
    assert "called 2 times" in blocked(model, "shared")
    assert "frozen (trainable=False)" in blocked(model, "frozen")
    assert "'add' ties the channels of 'tail' to those of the model's input" in blocked(
        model, "tail"
    )
    assert sites_by_name(model)["shared"].node is None


def test_blocked_by_masks():
    inputs = keras.Input((5,), dtype="int32")
    x = layers.Embedding(7, 3, mask_zero=True, name="embedding")(inputs)
    x = layers.Dense(3, activation="relu", name="a")(x)
    x = layers.GlobalAveragePooling1D(name="gap")(x)
    x = layers.Dense(3, activation="relu", name="b")(x)
    model = tfgrow.convert(keras.Model(inputs, layers.Dense(2, name="out")(x)))
    assert "'gap' (GlobalAveragePooling1D), which reads a mask" in blocked(model, "a")
    assert sites_by_name(model)["b"].blocked is None


def test_images_of_any_size_do_not_block():
    inputs = keras.Input((None, None, 2))
    x = layers.Conv2D(3, 3, name="a")(inputs)
    b = layers.Conv2D(2, 1, name="b")(layers.GlobalMaxPooling2D(keepdims=True)(x))
    model = tfgrow.convert(keras.Model(inputs, b))
    assert sites_by_name(model)["a"].blocked is None


def test_channels_first_is_blocked():
    inputs = keras.Input((2, 6, 6))
    x = layers.Conv2D(3, 3, data_format="channels_first", name="a")(inputs)
    x = layers.GlobalAveragePooling2D(data_format="channels_first")(x)
    model = tfgrow.convert(keras.Model(inputs, layers.Dense(2)(x)))
    assert "channels_last" in blocked(model)


def test_stock_and_nested_models_name_the_way_out():
    stock = by_name("nested").stock()
    reasons = [site.blocked for site in tfgrow.find_sites(stock)]
    assert reasons
    assert all("tfgrow.convert(model)" in reason for reason in reasons)
    plain = by_name("perceptron").stock()
    assert "stock Dense" in blocked(plain, "dense1")


def test_sites_of_a_deleted_model_do_not_keep_it_alive():
    import gc

    model = by_name("two_inputs").model()
    site = tfgrow.find_sites(model)[0]
    assert site.model() is model
    reference = site.model
    del model, site
    keras.backend.clear_session()
    gc.collect()
    assert reference() is None


def test_what_is_alike_by_chance_while_one_channel_wide_is_not_tied():
    """Two positions of one channel, and one channel that a depthwise layer doubles."""
    inputs = keras.Input((2, 1, 2))
    flat = layers.Flatten(name="flat")(layers.Conv2D(1, 1, name="a")(inputs))
    doubled = layers.DepthwiseConv2D(1, depth_multiplier=2)(layers.Conv2D(1, 1, name="b")(inputs))
    doubled = layers.GlobalAveragePooling2D()(doubled)
    x = layers.Add(name="add")([flat, doubled])
    model = tfgrow.convert(keras.Model(inputs, layers.Dense(2)(x)))
    assert "'add' ties the channels of 'a'" in blocked(model, "a")
    assert "'add' ties the channels of 'b'" in blocked(model, "b")


def test_positions_of_one_channel_twice_stay_tied():
    inputs = keras.Input((2, 1, 2))
    flat = layers.Flatten()(layers.Conv2D(1, 1, name="a")(inputs))
    b = layers.GlobalAveragePooling2D()(layers.Conv2D(1, 1, name="b")(inputs))
    x = layers.Add()([flat, layers.Concatenate()([b, b])])
    model = tfgrow.convert(keras.Model(inputs, layers.Dense(2)(x)))
    x = inputs_of(model, 3)
    before = model.predict(x, verbose=0)
    tfgrow.widen(model, "a", 2)
    np.testing.assert_allclose(model.predict(x, verbose=0), before, atol=1e-6)
    assert tfgrow.find_sites(model)[0].units == 3


def test_a_concatenation_shared_by_images_and_vectors_is_one_of_positions_and_one_of_channels():
    inputs = keras.Input((3, 3, 2))
    a, b = (layers.Conv2D(2, 1, name=name)(inputs) for name in "ab")
    concatenate = layers.Concatenate(axis=1)
    above = layers.Flatten()(concatenate([a, b]))
    beside = concatenate([layers.GlobalAveragePooling2D()(x) for x in (a, b)])
    outputs = layers.Add()([layers.Dense(2)(above), layers.Dense(2)(beside)])
    model = tfgrow.convert(keras.Model(inputs, outputs))
    x = inputs_of(model, 3)
    before = model.predict(x, verbose=0)
    tfgrow.widen(model, "a", 1)
    np.testing.assert_allclose(model.predict(x, verbose=0), before, atol=1e-6)
