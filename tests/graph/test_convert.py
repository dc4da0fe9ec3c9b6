"""convert and strip: the same function, weights, configs and training state, in other layers."""

import json
import zipfile

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

import tfgrow
from tests.cases import CASES, by_name, inputs_of, regression_data
from tfgrow.graph.convert import copy_model
from tfgrow.layers.registry import GROWABLE_CLASSES

TABLE = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def outputs(model, x):
    return np.asarray(model(x, training=False))


def flat_layers(model):
    """The layers of a model, those of nested models in the place of the model."""
    for layer in model.layers:
        if isinstance(layer, keras.Model):
            yield from flat_layers(layer)
        elif not isinstance(layer, layers.InputLayer):
            yield layer


@TABLE
def test_convert_is_exact_and_strip_its_inverse(case):
    stock = case.stock()
    x, weights = inputs_of(stock, 5), [w.copy() for w in stock.get_weights()]
    model = tfgrow.convert(stock)
    plain = tfgrow.strip(model)
    np.testing.assert_allclose(outputs(model, x), outputs(stock, x), atol=1e-6)
    np.testing.assert_allclose(outputs(plain, x), outputs(stock, x), atol=1e-6)
    assert any(isinstance(layer, GROWABLE_CLASSES) for layer in model.layers)
    for before, after in zip(weights, stock.get_weights(), strict=True):
        np.testing.assert_array_equal(before, after)
    originals = {layer.name: layer for layer in flat_layers(stock)}
    twins = {layer.name: layer for layer in flat_layers(plain)}
    if case.expanded:
        assert not set(twins) <= set(originals)
        return
    assert set(originals) == set(twins)
    for name, layer in originals.items():
        assert type(twins[name]) is type(layer)
        assert twins[name].get_config() == layer.get_config()
        assert twins[name] is not layer


def test_converting_twice_changes_nothing():
    model = by_name("conv_bn_relu").model()
    again = tfgrow.convert(model)
    assert [type(layer) for layer in again.layers] == [type(layer) for layer in model.layers]
    x = inputs_of(model, 3)
    np.testing.assert_array_equal(outputs(again, x), outputs(model, x))


def test_stripped_file_knows_nothing_of_tfgrow(tmp_path):
    model = by_name("depthwise").model()
    model.compile("adam", "mse")
    tfgrow.widen(model, "conv1", 2)
    path = tmp_path / "plain.keras"
    tfgrow.strip(model).save(path)
    with zipfile.ZipFile(path) as file:
        config = file.read("config.json").decode()
    assert "tfgrow" not in config
    assert json.loads(config)["config"]["name"] == model.name
    x = inputs_of(model, 3)
    loaded = keras.models.load_model(path)
    np.testing.assert_allclose(outputs(loaded, x), outputs(model, x), atol=1e-6)
    assert all(type(layer).__module__.startswith("keras.") for layer in loaded.layers)


@pytest.mark.parametrize(
    "name", ["bn_after_activation", "nested", "two_inputs", "operations", "separable",
             "time_distributed"]
)  # fmt: skip
def test_training_goes_on_as_it_would_have(name):
    stock = by_name(name).stock()
    stock.compile(keras.optimizers.Adam(0.01), "mse", metrics=["mae"])
    x, y = regression_data(stock, 8)
    stock.train_on_batch(x, y)
    model = tfgrow.convert(stock)
    plain = tfgrow.strip(model)
    for step in range(2):
        expected = stock.train_on_batch(x, y)
        np.testing.assert_allclose(model.train_on_batch(x, y), expected, rtol=1e-5, err_msg=step)
        np.testing.assert_allclose(plain.train_on_batch(x, y), expected, rtol=1e-5, err_msg=step)
    assert int(model.optimizer.iterations) == 3
    assert model.optimizer is not stock.optimizer
    np.testing.assert_allclose(outputs(model, x), outputs(stock, x), atol=2e-5)


def half_squared(y_true, y_pred):
    return 0.5 * keras.ops.mean(keras.ops.square(y_pred - y_true), axis=-1)


def cubic(x):
    return x * x * x


@pytest.mark.parametrize("name", ["perceptron", "two_inputs"])
def test_unregistered_losses_and_metrics_survive(name):
    stock = by_name(name).stock()
    stock.compile("sgd", half_squared, metrics=[half_squared, keras.metrics.MeanSquaredError()])
    model = tfgrow.convert(stock)
    x, y = regression_data(stock)
    assert model.loss is half_squared
    np.testing.assert_allclose(
        model.evaluate(x, y, verbose=0), stock.evaluate(x, y, verbose=0), rtol=1e-6
    )
    assert all(mine is not theirs for mine, theirs in zip(model.metrics, stock.metrics))  # noqa: B905


def test_unregistered_activations_survive():
    stock = keras.Sequential([keras.Input((3,)), layers.Dense(4, activation=cubic, name="a")])
    model = tfgrow.strip(tfgrow.convert(stock))
    assert model.get_layer("a").activation is cubic


def test_uncompiled_stays_uncompiled():
    stock = by_name("two_inputs").stock()
    assert not tfgrow.convert(stock).compiled
    stock.compile("adam", "mse")
    assert tfgrow.convert(stock).compiled
    assert not copy_model(stock, compiled=False).compiled


class DoubleSteps(keras.Model):
    def train_step(self, data):
        super().train_step(data)
        return super().train_step(data)


class OwnArguments(keras.Model):
    def __init__(self, width):
        inputs = keras.Input((3,))
        super().__init__(inputs, layers.Dense(2)(layers.Dense(width)(inputs)))


class OwnArgumentsAndSteps(OwnArguments):
    def train_step(self, data):
        return super().train_step(data)


def test_class_with_its_own_training_is_kept():
    inputs = keras.Input((3,))
    stock = DoubleSteps(inputs, layers.Dense(2)(layers.Dense(3)(inputs)))
    assert type(tfgrow.convert(stock)) is type(stock)


def test_class_with_its_own_training_is_kept_after_it_was_trained():
    inputs = keras.Input((3,))
    model = DoubleSteps(inputs, layers.Dense(2)(layers.Dense(3, name="hidden")(inputs)))
    model.compile("sgd", "mse")
    x = inputs_of(model, 8)
    model.fit(x, x[:, :2], verbose=0)
    model.evaluate(x, x[:, :2], verbose=0)
    expected = model.predict(x, verbose=0)
    for copy in (tfgrow.convert, tfgrow.strip, tfgrow.convert):
        model = copy(model)
        assert isinstance(model, DoubleSteps)
        np.testing.assert_allclose(model.predict(x, verbose=0), expected, atol=1e-6)
    model.fit(x, x[:, :2], verbose=0)


def test_attributes_that_a_copy_lacks_are_named():
    inputs = keras.Input((3,))
    model = DoubleSteps(inputs, layers.Dense(2)(inputs))
    model.factors = np.ones(2)
    with pytest.warns(UserWarning, match=r"attributes \['factors'\].*Set them on it"):
        assert not hasattr(tfgrow.convert(model), "factors")


def test_class_with_its_own_arguments_becomes_plain_unless_it_trains_its_own_way():
    model = tfgrow.convert(OwnArguments(4))
    assert not isinstance(model, OwnArguments)
    assert [site.units for site in tfgrow.find_sites(model)] == [4, 2]
    with pytest.raises(TypeError, match=r"OwnArgumentsAndSteps with its own train_step"):
        tfgrow.convert(OwnArgumentsAndSteps(4))


def test_layers_of_equal_name_in_nested_models_are_told_apart():
    def block(name):
        return keras.Sequential(
            [keras.Input((3,)), layers.Dense(3, activation="relu", name="dense")], name=name
        )

    inputs = keras.Input((3,))
    stock = keras.Model(inputs, layers.Dense(2, name="out")(block("b")(block("a")(inputs))))
    model = tfgrow.convert(stock)
    x = inputs_of(stock, 4)
    assert [site.name for site in tfgrow.find_sites(model)] == ["a_dense", "b_dense", "out"]
    np.testing.assert_allclose(outputs(model, x), outputs(stock, x), atol=1e-6)


def dense_pair(name):
    return keras.Sequential([keras.Input((4,)), layers.Dense(4, name="d")], name=name)


def two_levels():
    def pair(name):
        both = [keras.Input((4,)), dense_pair("x"), dense_pair("y")]
        return keras.Sequential(both, name=name)

    return keras.Sequential([keras.Input((4,)), pair("p"), pair("q"), layers.Dense(3)])


def taken_name():
    parts = [dense_pair("x"), dense_pair("y"), layers.Dense(3, name="x_d")]
    return keras.Sequential([keras.Input((4,)), *parts])


def operations_of_equal_name():
    def doubled(name):
        keras.backend.clear_session()  # numbers the operation's name anew
        inputs = keras.Input((4,))
        return keras.Model(inputs, layers.Dense(4, name="d")(inputs) * 2.0, name=name)

    first, second = doubled("one"), doubled("two")
    inputs = keras.Input((4,))
    return keras.Model(inputs, second(first(inputs)))


@pytest.mark.parametrize("build", [two_levels, taken_name, operations_of_equal_name])
def test_names_that_clash_when_nested_models_are_inlined(build):
    stock = build()
    model = tfgrow.convert(stock)
    x = inputs_of(stock, 3)
    np.testing.assert_allclose(outputs(model, x), outputs(stock, x), atol=1e-6)
    names = [operation.name for operation in model.operations]
    assert len(set(names)) == len(names)


def normalised():
    layer = layers.Normalization()
    layer.adapt(np.array([[1.0, 20.0], [3.0, 60.0]]))
    return keras.Sequential([keras.Input((2,)), layer, layers.Dense(3, name="a"), layers.Dense(1)])


def test_adapted_statistics_are_kept():
    stock, x = normalised(), np.array([[2.0, 50.0]], "float32")
    model = tfgrow.convert(stock)
    np.testing.assert_array_equal(outputs(model, x), outputs(stock, x))
    np.testing.assert_array_equal(outputs(tfgrow.strip(model), x), outputs(stock, x))
    new_unit = tfgrow.candidates(model, "add", new_units=1)
    data = x, np.ones((1, 1))
    assert abs(tfgrow.measure_change(model, new_unit, data, loss="mse")) < 1e-6


@pytest.mark.parametrize(
    "lookup", [layers.StringLookup(), layers.TextVectorization(output_sequence_length=1)]
)
def test_adapted_vocabularies_are_kept(lookup):
    words = np.array(["a", "b", "c"])
    lookup.adapt(words)
    shape = (1,) if isinstance(lookup, layers.StringLookup) else ()
    inputs = keras.Input(shape, dtype="string")
    x = layers.Flatten()(layers.Embedding(8, 4)(lookup(inputs)))
    stock = keras.Model(inputs, layers.Dense(2)(x))
    x = tf.constant(words.reshape(3, *shape))
    np.testing.assert_array_equal(outputs(tfgrow.convert(stock), x), outputs(stock, x))


class Tempered(keras.Model):
    def __init__(self, *args, temperature=1.0, **kwargs):
        super().__init__(*args, **kwargs)
        self.temperature = temperature

    def compute_loss(self, *args, **kwargs):
        return self.temperature * super().compute_loss(*args, **kwargs)


class TemperedWithConfig(Tempered):
    def get_config(self):
        return {**super().get_config(), "temperature": self.temperature}


def tempered(kind, **arguments):
    inputs = keras.Input((4,))
    return kind(inputs, layers.Dense(2)(inputs), **arguments)


def test_arguments_of_a_class_with_its_own_training_are_kept_or_it_is_refused():
    assert tfgrow.convert(tempered(TemperedWithConfig, temperature=9.0)).temperature == 9.0
    assert tfgrow.convert(tempered(Tempered)).temperature == 1.0
    with pytest.raises(TypeError, match=r"'temperature'.*get_config"):
        tfgrow.convert(tempered(Tempered, temperature=9.0))


def test_layer_frozen_after_the_optimizer_was_built():
    hidden = [layers.Dense(3, name="a"), layers.Dense(3, name="b")]
    stock = keras.Sequential([keras.Input((4,)), *hidden, layers.Dense(1)])
    stock.compile("adam", "mse")
    x, y = np.ones((8, 4), "float32"), np.ones((8, 1), "float32")
    stock.fit(x, y, verbose=0)
    stock.get_layer("b").trainable = False
    stock.fit(x, y, verbose=0)
    for model in (tfgrow.convert(stock), tfgrow.strip(tfgrow.convert(stock))):
        for old, new in zip(stock.optimizer.variables, model.optimizer.variables, strict=True):
            np.testing.assert_array_equal(old, new)
        model.fit(x, y, verbose=0)


@pytest.mark.parametrize(
    "layer",
    [layers.Dense(3, activation=lambda x: x * SCALE), layers.Lambda(lambda x: x * SCALE)],
    ids=["activation", "Lambda"],
)
def test_lambdas_are_taken_as_they_are(layer):
    stock = keras.Sequential([keras.Input((4,)), layer, layers.Dense(2, name="out")])
    x = inputs_of(stock, 3)
    model = tfgrow.convert(stock)
    np.testing.assert_array_equal(outputs(model, x), outputs(stock, x))
    np.testing.assert_array_equal(outputs(tfgrow.strip(model), x), outputs(stock, x))


SCALE = 2.0
"""A global that lambdas use: their byte code alone would not find it."""


class Tripled(tfgrow.layers.Dense):
    def call(self, inputs, training=None):
        return 3 * super().call(inputs, training=training)


def test_subclasses_of_growable_layers_are_not_stripped():
    model = keras.Sequential([keras.Input((4,)), Tripled(3), tfgrow.layers.Dense(2)])
    plain, x = tfgrow.strip(model), inputs_of(model, 3)
    np.testing.assert_array_equal(outputs(plain, x), outputs(model, x))
    assert [type(layer) for layer in plain.layers] == [Tripled, layers.Dense]


def test_dictionaries_of_inputs_and_outputs_keep_their_structure():
    inputs = {"a": keras.Input((3,), name="a"), "b": keras.Input((3,), name="b")}
    total = inputs["a"] + inputs["b"]
    stock = keras.Model(inputs, {"y": layers.Dense(2, name="y")(layers.Dense(4)(total))})
    model = tfgrow.convert(stock)
    x = {"a": np.ones((2, 3), "float32"), "b": np.ones((2, 3), "float32")}
    np.testing.assert_allclose(model(x)["y"], stock(x)["y"], atol=1e-6)
    assert model.input.keys() == stock.input.keys()


def test_frozen_layers_stay_frozen():
    stock = by_name("conv_bn_relu").stock()
    stock.get_layer("conv1").trainable = False
    model = tfgrow.convert(stock)
    assert len(model.trainable_variables) == len(stock.trainable_variables)
    stock.trainable = False
    assert not tfgrow.convert(stock).trainable_variables


def test_mixed_precision_is_kept():
    keras.config.set_dtype_policy("mixed_float16")
    stock = by_name("two_inputs").stock()
    stock.compile("adam", "mse")
    keras.config.set_dtype_policy("float32")
    model = tfgrow.convert(stock)
    assert model.dtype_policy.name == model.get_layer("first").dtype_policy.name == "mixed_float16"
    assert isinstance(model.optimizer, keras.optimizers.LossScaleOptimizer)


class Subclassed(keras.Model):
    def call(self, inputs):
        return inputs


@pytest.mark.parametrize("function", [tfgrow.convert, tfgrow.strip, tfgrow.find_sites])
def test_models_without_a_graph_are_refused(function):
    with pytest.raises(ValueError, match=r"'unbuilt' is not built.*keras.Input"):
        function(keras.Sequential([layers.Dense(2)], name="unbuilt"))
    with pytest.raises(TypeError, match=r"'own' is a subclassed model \(Subclassed\)"):
        function(Subclassed(name="own"))
    with pytest.raises(TypeError, match=r"Expected a keras.Model, found int"):
        function(3)


def test_nested_subclassed_model_is_refused():
    inputs = keras.Input((3,))
    stock = keras.Model(inputs, layers.Dense(2)(Subclassed(name="own")(inputs)))
    with pytest.raises(TypeError, match=r"'own' is a subclassed model"):
        tfgrow.convert(stock)


class Times(layers.Layer):
    def __init__(self, factors, **kwargs):
        super().__init__(**kwargs)
        self.factors = factors

    def call(self, inputs):
        return inputs * self.factors


def test_layer_without_a_config_is_named():
    twice = Times(np.full(3, 2.0, "float32"), name="twice")
    stock = keras.Sequential([keras.Input((3,)), twice])
    with pytest.raises(ValueError, match=r"'twice' \(Times\) can't be made anew from its config"):
        tfgrow.convert(stock)


# ---- layers that are taken apart ------------------------------------------------------------


SEPARABLE = {
    "1d": ((7, 2), layers.SeparableConv1D(3, 2, dilation_rate=2, activation="relu", name="s")),
    "2d": ((6, 5, 2), layers.SeparableConv2D(3, (3, 2), padding="same", name="s")),
    "multiplied": (
        (6, 5, 2),
        layers.SeparableConv2D(2, 2, strides=2, depth_multiplier=3, use_bias=False, name="s"),
    ),
    "configured": (
        (6, 5, 2),
        layers.SeparableConv2D(
            2,
            2,
            depthwise_regularizer=keras.regularizers.L2(0.1),
            pointwise_regularizer=keras.regularizers.L1(0.2),
            bias_regularizer=keras.regularizers.L2(0.3),
            activity_regularizer=keras.regularizers.L2(0.4),
            depthwise_constraint=keras.constraints.MaxNorm(0.5),
            pointwise_constraint=keras.constraints.NonNeg(),
            bias_initializer="ones",
            pointwise_initializer=keras.initializers.HeNormal(seed=3),
            name="s",
        ),
    ),
}


def one_layer_net(shape, layer):
    layer = type(layer).from_config(layer.get_config())
    inputs = keras.Input(shape)
    x = layers.Flatten()(layers.Activation("tanh")(layer(inputs)))
    return keras.Model(inputs, layers.Dense(2, name="out")(x))


@pytest.mark.parametrize("kind", SEPARABLE)
def test_separable_convolutions_become_depthwise_and_pointwise(kind):
    stock = one_layer_net(*SEPARABLE[kind])
    stock.compile(keras.optimizers.AdamW(0.01), "mse")
    x, y = regression_data(stock, 6)
    stock.train_on_batch(x, y)
    model = tfgrow.convert(stock)
    names = [layer.name for layer in model.layers]
    assert names.index("s") == names.index("s_depthwise") + 1
    np.testing.assert_allclose(outputs(model, x), outputs(stock, x), atol=1e-6)
    assert [w.shape for w in model.trainable_variables] == [
        w.shape for w in stock.trainable_variables
    ]
    for step in range(2):  # loss with penalties, constraints, slots
        expected = stock.train_on_batch(x, y)
        np.testing.assert_allclose(model.train_on_batch(x, y), expected, rtol=1e-5, err_msg=step)
    for mine, theirs in zip(model.optimizer.variables, stock.optimizer.variables, strict=True):
        np.testing.assert_allclose(mine, theirs, atol=1e-6)
    assert next(site for site in tfgrow.find_sites(model) if site.name == "s").blocked is None
    config, old = model.get_layer("s").get_config(), stock.get_layer("s").get_config()
    for name in ("initializer", "regularizer", "constraint"):
        assert config[f"kernel_{name}"] == old[f"pointwise_{name}"]
        assert config[f"bias_{name}"] == old[f"bias_{name}"]
        assert (
            model.get_layer("s_depthwise").get_config()[f"depthwise_{name}"]
            == (old[f"depthwise_{name}"])
        )


def test_what_is_taken_apart_stays_frozen_and_half():
    layer = layers.SeparableConv2D(2, 2, trainable=False, dtype="mixed_float16", name="s")
    stock = one_layer_net((6, 5, 2), layer)
    model = tfgrow.convert(stock)
    for name in ("s", "s_depthwise"):
        assert not model.get_layer(name).trainable
        assert model.get_layer(name).compute_dtype == "float16"
    assert len(model.trainable_variables) == 2
    inner = layers.Dense(3, name="inner")
    stock = one_layer_net((4, 2), layers.Dense(2))
    inputs = keras.Input((4, 2))
    x = layers.TimeDistributed(inner, name="outer")(inputs)
    stock = keras.Model(inputs, layers.Dense(2)(x))
    stock.get_layer("outer").trainable = False
    assert not tfgrow.convert(stock).get_layer("inner").trainable


def test_time_distributed_dense_becomes_its_dense_layer():
    inputs = keras.Input((4, 5, 3))
    inner = layers.Dense(
        3,
        activation="softmax",
        kernel_regularizer="l2",
        activity_regularizer=keras.regularizers.L2(5.0),  # goes unused inside of the wrapper
        name="inner",
    )
    wrapper = layers.TimeDistributed(
        inner, activity_regularizer=keras.regularizers.L1(0.3), name="outer"
    )
    stock = keras.Model(inputs, layers.Dense(2, name="out")(wrapper(inputs)))
    stock.compile("adam", "mse")
    x, y = regression_data(stock, 6)
    stock.train_on_batch(x, y)
    model = tfgrow.convert(stock)
    assert [layer.name for layer in model.layers[1:]] == ["inner", "out"]
    for _ in range(2):
        np.testing.assert_allclose(
            model.train_on_batch(x, y), stock.train_on_batch(x, y), rtol=1e-5
        )
    np.testing.assert_allclose(outputs(model, x), outputs(stock, x), atol=1e-5)


def test_other_layers_in_time_distributed_stay():
    inputs = keras.Input((3, 6, 6, 2))
    x = layers.TimeDistributed(layers.Conv2D(2, 2), name="outer")(inputs)
    model = tfgrow.convert(keras.Model(inputs, layers.Dense(2)(layers.Flatten()(x))))
    assert type(model.get_layer("outer")) is layers.TimeDistributed
    reasons = {site.name: site.blocked for site in tfgrow.find_sites(model)}
    assert "of which only TimeDistributed(Dense)" in reasons["outer"]


@pytest.mark.parametrize("sequential", [True, False])
def test_names_of_what_is_taken_apart_are_free(sequential):
    """In nested models of one name each, too, and beside layers that are called so already."""

    def part(name):
        stack = [
            keras.Input((6, 6, 2)),
            layers.SeparableConv2D(2, 3, padding="same", name="s"),
            layers.DepthwiseConv2D(1, name="s_depthwise"),
        ]
        return keras.Sequential(stack, name=name)

    if sequential:
        stock = part("alone")
    else:
        inputs = keras.Input((6, 6, 2))
        stock = keras.Model(inputs, part("two")(part("one")(inputs)))
    model = tfgrow.convert(stock)
    x = inputs_of(stock, 3)
    np.testing.assert_allclose(outputs(model, x), outputs(stock, x), atol=1e-6)
    names = [layer.name for layer in model.layers]
    assert len(set(names)) == len(names)
    assert {"s_depthwise_1"} <= set(names) or {"one_s_depthwise_1", "two_s"} <= set(names)
    assert len(model.layers) == (3 if sequential else 7)


def test_a_shared_separable_convolution_stays_shared():
    inputs, shared = keras.Input((6, 6, 2)), layers.SeparableConv2D(2, 3, padding="same", name="s")
    stock = keras.Model(inputs, layers.Dense(2)(shared(shared(inputs))))
    model = tfgrow.convert(stock)
    x = inputs_of(stock, 3)
    assert model.count_params() == stock.count_params()
    np.testing.assert_allclose(outputs(model, x), outputs(stock, x), atol=1e-6)


def test_time_distributed_dense_under_a_mask():
    inputs = keras.Input((4, 3))
    x = layers.Masking(name="mask")(inputs)
    x = layers.TimeDistributed(layers.Dense(3, name="inner"), name="outer")(x)
    stock = keras.Model(inputs, layers.GRU(2)(x))
    x = inputs_of(stock, 3)
    x[:, 2:] = 0.0
    np.testing.assert_allclose(outputs(tfgrow.convert(stock), x), outputs(stock, x), atol=1e-6)


def test_operations_are_not_shared_with_the_stock_model():
    stock = by_name("spatial_gate_and_operations").stock()
    model = tfgrow.convert(stock)
    assert not {id(o) for o in model.operations} & {id(o) for o in stock.operations}
    assert [o.name for o in model.operations] == [o.name for o in stock.operations]
