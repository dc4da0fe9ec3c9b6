"""deepen: a new layer that changes nothing at first, on every model of the table, and in fit."""

import keras
import numpy as np
import pytest

import tfgrow
from tests.cases import CASES, by_name, inputs_of, regression_data
from tfgrow.graph.nodes import trace

layers = keras.layers
PERCEPTRON, CONVOLUTIONAL = by_name("perceptron"), by_name("conv_bn_relu")


def outputs(model, x):
    return np.asarray(model(x, training=False))


def functional(activation, shape=(4,), **arguments):
    """A net whose layer "a" has an activation, and after which a layer "b" stands."""
    inputs = keras.Input(shape)
    layer = layers.Dense if len(shape) == 1 else layers.Conv2D
    size = () if len(shape) == 1 else (3,)
    x = layer(3, *size, activation=activation, name="a", **arguments)(inputs)
    return keras.Model(inputs, layer(2, *size, name="b")(x))


@pytest.mark.parametrize("kind", ["identity", "residual"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_place_of_every_model_keeps_its_function(case, kind):
    """After each layer in turn: a new layer and the same function, or an error that says why."""
    model = case.model()
    x = inputs_of(model, 3)
    before = outputs(model, x)
    deepened = 0
    for name in [node.name for node in trace(model).nodes]:
        count, old = model.count_params(), len(model.layers)
        try:
            event = tfgrow.deepen(model, name, kind)
        except ValueError as error:
            reason = str(error)
        else:
            reason = ""
            deepened += 1
            assert event.flops_after > event.flops_before > 0
            assert (event.params_before, event.params_after) == (count, model.count_params())
            assert event.params_after > count
        expected = ("is an output layer", "change them a second time", "no branch")
        assert not reason or any(words in reason for words in expected)
        assert (len(model.layers) == old) == bool(reason)
        np.testing.assert_allclose(outputs(model, x), before, atol=1e-6)
    stacked = isinstance(model, keras.Sequential)
    assert deepened or (kind == "residual" if stacked else case.smooth)
    fresh = type(model).from_config(model.get_config())
    fresh.set_weights(model.get_weights())
    np.testing.assert_allclose(outputs(fresh, x), before, atol=1e-6)


@pytest.mark.parametrize(
    ("activation", "kind"),
    [
        ("relu", "identity"),
        ("relu6", "identity"),
        ("hard_tanh", "identity"),
        (None, "identity"),
        ("tanh", "residual"),
        ("gelu", "residual"),
        ("softmax", "residual"),
        (layers.ReLU(max_value=2.0), "identity"),
        (layers.LeakyReLU(negative_slope=0.1), "residual"),
    ],
)
@pytest.mark.parametrize("shape", [(4,), (6, 6, 2)])
def test_auto_is_the_identity_where_the_activation_allows_it(activation, kind, shape):
    model = functional(activation, shape)
    x = inputs_of(model, 4)
    before = outputs(model, x)
    event = tfgrow.deepen(model, "a")
    assert event.applied == ({"site": "a", "morphism": "deepen", "units": [0, 1, 2]},)
    np.testing.assert_array_equal(outputs(model, x), before)
    names = [layer.name for layer in model.layers[1:] if "activation" not in layer.name]
    assert names == (
        ["a", "deepen_a", "b"]
        if kind == "identity"
        else ["a", "deepen_a", "deepen_a_last", "skip_a", "b"]
    )
    new = model.get_layer("deepen_a")
    assert type(new) is (tfgrow.layers.Dense if len(shape) == 1 else tfgrow.layers.Conv2D)
    if len(shape) > 1:
        assert (new.kernel_size, new.padding) == ((3, 3), "same")
    # The new layer is one that can learn: its gradient is not zero.
    last = new if kind == "identity" else model.get_layer("deepen_a_last")
    model.compile("sgd", "mse")
    kernel = last.kernel.numpy()
    model.train_on_batch(x, before + 1)
    assert np.any(last.kernel.numpy() != kernel)


def test_the_activation_goes_with_it():
    """The identity is followed by the activation, which shows once its weights have moved."""
    for activation, expected in (("relu", "relu"), ("relu6", "relu6"), (None, "linear")):
        model = functional(activation)
        tfgrow.deepen(model, "a")
        assert model.get_layer("deepen_a").activation.__name__ == expected
    model = functional(layers.ReLU(max_value=2.0))
    tfgrow.deepen(model, "a")
    own = model.get_layer("deepen_a_activation")
    assert type(own) is layers.ReLU
    assert own.max_value == 2.0
    model = by_name("prelu").model()
    tfgrow.deepen(model, "prelu1")
    assert type(model.get_layer("deepen_prelu1_activation")) is tfgrow.layers.PReLU
    model = by_name("residual").model()
    tfgrow.deepen(model, "gap")  # pooled values stay in the range of the relu before
    assert type(model.get_layer("deepen_gap")) is tfgrow.layers.Dense
    assert model.get_layer("deepen_gap").activation is keras.activations.relu


def test_kinds_of_layers_follow_those_that_made_the_channels():
    expected = {
        "conv1d_causal": ("relu", tfgrow.layers.Conv1D, "causal"),
        "conv3d": ("conv1", tfgrow.layers.Conv3D, "same"),
        "dense_on_sequences": ("dense1", tfgrow.layers.Dense, None),
        "strides_valid_flatten": ("flatten", tfgrow.layers.Dense, None),
    }
    for name, (after, kind, padding) in expected.items():
        model = by_name(name).model()
        tfgrow.deepen(model, after)
        new = model.get_layer(f"deepen_{after}")
        assert type(new) is kind
        assert getattr(new, "padding", None) == padding
    stock = by_name("conv1d_causal").stock()
    tfgrow.deepen(stock, "relu")  # past a stock BatchNormalization
    assert stock.get_layer("deepen_relu").padding == "causal"


def test_regularizers_and_policies_are_those_of_the_neighbours():
    model = functional(
        "relu", (6, 6, 2), kernel_regularizer=keras.regularizers.L2(0.1), dtype="mixed_bfloat16"
    )
    tfgrow.deepen(model, "a")
    new = model.get_layer("deepen_a")
    assert new.kernel_regularizer.l2 == pytest.approx(0.1)
    assert (new.compute_dtype, new.variable_dtype) == ("bfloat16", "float32")


@pytest.mark.parametrize(
    ("case", "after", "kind"),
    [
        (PERCEPTRON, "dense1", "identity"),
        (CONVOLUTIONAL, "relu1", "identity"),
        (CONVOLUTIONAL, "pool", "residual"),
        (by_name("bn_after_activation"), "dense1", "residual"),
    ],
    ids=lambda value: getattr(value, "name", value),
)
def test_inside_fit_the_function_and_the_optimizer_stay(case, after, kind, tmp_path):
    model = case.model()
    x, y = regression_data(model, 16)
    model.compile(keras.optimizers.Adam(0.01), "mse", metrics=["mae"])
    optimizer, old = model.optimizer, list(model.layers)
    seen = {}

    class Deepening(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            self.due = epoch == 1

        def on_train_batch_begin(self, batch, logs=None):
            if self.due and not seen:
                before, slots = self.model.predict(x, verbose=0), [
                    (variable, variable.numpy()) for variable in optimizer.variables
                ]  # fmt: skip
                seen["event"] = tfgrow.deepen(self.model, after, kind)
                seen["change"] = np.abs(self.model.predict(x, verbose=0) - before).max()
                seen["kept"] = all(np.array_equal(v, value) for v, value in slots)

    history = model.fit(
        x, y, batch_size=8, epochs=3, validation_data=(x, y), callbacks=[Deepening()], verbose=0
    ).history
    assert seen["change"] <= 1e-6
    assert seen["kept"]
    assert model.optimizer is optimizer
    assert int(optimizer.iterations) == 6
    assert len(history["val_mae"]) == 3
    assert all(any(layer is now for now in model.layers) for layer in old)
    model.save(tmp_path / "deep.keras")
    loaded = keras.models.load_model(tmp_path / "deep.keras")
    np.testing.assert_array_equal(outputs(loaded, x), outputs(model, x))
    for ours, theirs in zip(optimizer.variables, loaded.optimizer.variables, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    before, after_fit = loaded.evaluate(x, y, verbose=0), model.evaluate(x, y, verbose=0)
    np.testing.assert_allclose(before, after_fit, rtol=1e-6)


def test_growth_goes_on_in_the_new_layers():
    model = CONVOLUTIONAL.model()
    x = inputs_of(model, 4)
    before = outputs(model, x)
    event = tfgrow.deepen(model, "relu1", "residual", seed=1)
    assert event.widths == {"deepen_relu1": (0, 3)}
    assert event.newborn == {"deepen_relu1": 3}
    assert tfgrow.widen(model, "deepen_relu1", 2).widths == {"deepen_relu1": (3, 5)}
    event = tfgrow.deepen(model, "deepen_relu1")
    assert event.widths == {"deepen_deepen_relu1": (0, 5)}
    tfgrow.deepen(model, "relu1", "identity")
    assert model.get_layer("deepen_relu1_1").filters == 3
    np.testing.assert_allclose(outputs(model, x), before, atol=1e-5)
    stripped = tfgrow.strip(model)
    np.testing.assert_allclose(outputs(stripped, x), before, atol=1e-5)
    assert tfgrow.GrowthEvent.from_json(event.to_json()) == event


def test_a_callback_grows_what_deepen_made():
    model = PERCEPTRON.model()
    data = regression_data(model, 64)
    model.compile("adam", "mse")
    tfgrow.deepen(model, "dense1")
    oracle = tfgrow.GaussNewtonOracle("loss", max_params=model.count_params() + 60, seed=0)
    growth = tfgrow.callbacks.Growth(oracle, data=data, every=1, guard=False)
    model.fit(*data, epochs=2, callbacks=[growth], verbose=0)
    assert growth.events[0].status == "applied"


def test_the_seed_decides_the_residual_block():
    kernels = []
    for seed in (0, 0, 1):
        model = functional("tanh")
        tfgrow.deepen(model, "a", seed=seed)
        kernels.append(model.get_layer("deepen_a").kernel.numpy())
    np.testing.assert_array_equal(kernels[0], kernels[1])
    assert np.any(kernels[0] != kernels[2])


def channels_first():
    inputs = keras.Input((2, 6, 6))
    x = layers.Conv2D(3, 3, activation="relu", data_format="channels_first", name="a")(inputs)
    return keras.Model(inputs, layers.Flatten()(layers.ReLU(name="relu")(x)))


def of_integers():
    inputs = keras.Input((4,), dtype="int32")
    x = layers.Identity(name="same")(inputs)
    return keras.Model(inputs, layers.Embedding(9, 2)(x))


def with_softmax():
    inputs = keras.Input((4,))
    return keras.Model(inputs, layers.Softmax(name="softmax")(layers.Dense(3)(inputs)))


def of_unknown_channels():
    inputs = keras.Input((None, 3))
    x = layers.Permute((2, 1), name="turned")(inputs)
    return keras.Model(inputs, layers.GlobalMaxPooling1D(name="pool", keepdims=True)(x))


def shared():
    inputs, twice = keras.Input((4,)), layers.Dense(4, name="twice")
    return keras.Model(inputs, layers.Dense(2)(twice(twice(inputs))))


REFUSED = {
    "unknown": (PERCEPTRON.model, ("nowhere",), "no layer 'nowhere'"),
    "input": (by_name("two_inputs").model, ("one",), "'one' .* is an input"),
    "output": (PERCEPTRON.model, ("out",), "'out' .* is an output layer"),
    "softmax": (with_softmax, ("softmax",), "'softmax' .* is an output layer"),
    "twice": (shared, ("twice",), "'twice' is called 2 times"),
    "channels first": (channels_first, ("relu",), "'a', which has data_format='channels_first'"),
    "integers": (of_integers, ("same",), "dtype int32"),
    "no width": (of_unknown_channels, ("turned",), r"shape \(None, 3, None\)"),
    "kind": (PERCEPTRON.model, ("dense1", "deep"), "kind must be one of"),
    "not idempotent": (lambda: functional("tanh"), ("a", "identity"), "'tanh'.*kind='residual'"),
    "stack": (PERCEPTRON.model, ("swish",), "no branch"),
    "nested": (by_name("nested").stock, ("crop",), "nested model 'features'.*tfgrow.convert"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(case):
    make, arguments, words = REFUSED[case]
    model = make()
    config = model.get_config()
    with pytest.raises(ValueError, match=words):
        tfgrow.deepen(model, *arguments)
    assert model.get_config() == config


def test_refuses_what_is_no_name():
    model = PERCEPTRON.model()
    with pytest.raises(TypeError, match="name of a layer"):
        tfgrow.deepen(model, model.layers[0])
