"""Surgery on layers: values, order, shapes, metadata, functions; and refusals."""

import keras
import numpy as np
import pytest

from tests.surgery.hand_made import (
    SOURCE,
    assert_like_fresh,
    assert_same_bits,
    batch,
    changed,
    consumed,
    convolutional_net,
    produced,
    rebuilt,
    summary,
    values,
    widen,
)
from tfgrow.surgery import rebuild, transaction
from tfgrow.types import AxisSource, LayerChange, VariableChange


def test_widened_net_is_like_a_fresh_one_and_keeps_its_function():
    model = convolutional_net()
    before, x = model(batch()[0]).numpy(), batch()[0]
    replaced = rebuild.apply_changes(model, widen(model))
    assert len(replaced) == 9
    assert_like_fresh(model)
    assert model.get_layer("flatten").output.shape == (None, 20)
    np.testing.assert_allclose(model(x), before, atol=1e-6)
    np.testing.assert_array_equal(model(x), rebuilt(model)(x))


def test_variables_keep_identity_order_and_settings():
    regularizer, constraint = keras.regularizers.L2(0.1), keras.constraints.NonNeg()
    model = convolutional_net()
    kernel = model.get_layer("conv1").kernel
    kernel.regularizer, kernel.constraint = regularizer, constraint
    weights, trainable = model.weights, model.trainable_variables
    paths = [variable.path for variable in weights]
    rebuild.apply_changes(model, widen(model))
    assert all(a is b for a, b in zip(model.weights, weights, strict=True))
    assert all(a is b for a, b in zip(model.trainable_variables, trainable, strict=True))
    assert [variable.path for variable in model.weights] == paths
    assert kernel.regularizer is regularizer
    assert kernel.constraint is constraint
    assert tuple(kernel.shape) == kernel.value.shape == (3, 3, 2, 5)
    np.testing.assert_allclose(model.losses[0], 0.1 * np.sum(kernel.numpy() ** 2), rtol=1e-6)


def test_value_is_copied():
    model = convolutional_net()
    changes = widen(model)
    rebuild.apply_changes(model, changes)
    array = changes[0].variables["kernel"].value
    expected = array.copy()
    array[:] = 7.0
    np.testing.assert_array_equal(model.get_layer("conv1").kernel.numpy(), expected)


def test_random_state_stays():
    model = convolutional_net()
    dropout = keras.layers.Dropout(0.5, seed=3)
    model = keras.Model(model.inputs, dropout(model.outputs[0]))
    state = dropout.seed_generator.state.numpy()
    keras.utils.set_random_seed(1)
    expected = keras.random.uniform((3,)).numpy()
    keras.utils.set_random_seed(1)
    rebuild.apply_changes(model, widen(model))
    np.testing.assert_array_equal(keras.random.uniform((3,)), expected)
    np.testing.assert_array_equal(dropout.seed_generator.state.numpy(), state)


def test_frozen_layer_can_be_unfrozen_later():
    model = convolutional_net(optimizer="sgd", run_eagerly=True)
    model.get_layer("conv1").trainable = False
    rebuild.apply_changes(model, widen(model))
    kernel = model.get_layer("conv1").kernel
    assert not kernel.trainable
    model.get_layer("conv1").trainable = True
    model.compile("sgd", "mse", run_eagerly=True)
    before = kernel.numpy()
    model.train_on_batch(*batch())
    assert np.any(kernel.numpy() != before)


def test_mixed_precision_and_its_dtypes_stay():
    keras.config.set_dtype_policy("mixed_bfloat16")
    model = convolutional_net()
    rebuild.apply_changes(model, widen(model))
    assert_like_fresh(model)
    assert model.get_layer("conv1").kernel.dtype == "float32"
    assert model.get_layer("relu").output.dtype == "bfloat16"


def test_pure_half_precision_variables():
    keras.config.set_dtype_policy("float16")
    model = convolutional_net()
    rebuild.apply_changes(model, widen(model))
    assert model.get_layer("conv1").kernel.value.dtype == "float16"


def test_save_and_load(tmp_path):
    model = convolutional_net()
    rebuild.apply_changes(model, widen(model))
    model.save(tmp_path / "grown.keras")
    loaded = keras.models.load_model(tmp_path / "grown.keras")
    np.testing.assert_array_equal(model(batch()[0]), loaded(batch()[0]))
    # Growing what was loaded: build configs are lists then, not tuples.
    rebuild.apply_changes(loaded, widen_again(loaded))
    assert_like_fresh(loaded)


def widen_again(model):
    """conv2 of an already widened net loses its last two channels again."""
    conv2, dense = model.get_layer("conv2"), model.get_layer("dense")
    keep = np.arange(3)
    return [
        LayerChange(
            conv2,
            {"filters": np.int64(3)},
            {
                "kernel": changed(conv2.kernel, produced(3, keep)),
                "bias": changed(conv2.bias, produced(0, keep)),
            },
        ),
        LayerChange(
            dense,
            {},
            {"kernel": changed(dense.kernel, consumed(0, keep, positions=4, units=5))},
        ),
    ]


def chain(layers, shape, style):
    """The layers as a model in one of the ways that Keras knows."""
    if style == "add":
        model = keras.Sequential([keras.Input(shape)])
        for layer in layers:
            model.add(layer)
        return model
    if style == "sequential":
        return keras.Sequential([keras.Input(shape), *layers])
    inner = keras.Sequential([keras.Input(shape), *layers[:1]], name="inner")
    middle_shape = inner.output_shape[1:]
    middle = keras.Input(middle_shape)
    x = middle
    for layer in layers[1:-1]:
        x = layer(x)
    inputs = keras.Input(shape)
    return keras.Model(inputs, layers[-1](keras.Model(middle, x, name="middle")(inner(inputs))))


def layer_cases():
    """(input shape, producer, layers that follow the width with their variables, consumer)."""
    conv = keras.layers.Conv2D
    return {
        "dense": ((4,), keras.layers.Dense(3, name="p"), [], keras.layers.Dense(2, name="c")),
        "norms": (
            (4,),
            keras.layers.Dense(3, name="p"),
            [keras.layers.LayerNormalization(), keras.layers.BatchNormalization()],
            keras.layers.Dense(2, name="c"),
        ),
        "prelu": (
            (4, 4, 1),
            conv(3, 2, name="p"),
            [keras.layers.PReLU(shared_axes=[1, 2]), keras.layers.PReLU()],
            conv(2, 2, name="c"),
        ),
        "conv1d": (
            (6, 2),
            keras.layers.Conv1D(3, 2, padding="causal", name="p"),
            [keras.layers.SpatialDropout1D(0.5), keras.layers.MaxPooling1D()],
            keras.layers.Conv1D(2, 2, name="c"),
        ),
        "conv3d": (
            (3, 3, 3, 1),
            keras.layers.Conv3D(3, 2, name="p"),
            [keras.layers.GlobalAveragePooling3D(), keras.layers.Rescaling(2.0)],
            keras.layers.Dense(2, name="c"),
        ),
        "depthwise": (
            (5, 5, 1),
            conv(3, 2, name="p"),
            [keras.layers.DepthwiseConv2D(2), keras.layers.UpSampling2D()],
            conv(2, 2, name="c"),
        ),
    }


FOLLOWERS = {"gamma": 0, "beta": 0, "moving_mean": 0, "moving_variance": 0, "bias": 0}


@pytest.mark.parametrize("style", ["sequential", "add", "nested"])
@pytest.mark.parametrize("case", list(layer_cases()))
def test_every_kind_of_layer_in_every_kind_of_model(case, style):
    shape, producer, path, consumer = layer_cases()[case]
    model = chain([producer, *path, consumer], shape, style)
    x = np.random.default_rng(0).normal(size=(3, *shape)).astype("float32")
    kept = np.arange(3)  # nothing is split: LayerNormalization mixes channels
    source = np.append(kept, 2) if case == "norms" else SOURCE
    out = produced(producer.kernel.ndim - 1, source)
    attribute = "units" if hasattr(producer, "units") else "filters"
    edits = [
        LayerChange(
            producer,
            {attribute: len(source)},
            {
                "kernel": changed(producer.kernel, out, born=0.1),
                "bias": changed(producer.bias, produced(0, source)),
            },
        ),
        LayerChange(
            consumer,
            {},
            {"kernel": changed(consumer.kernel, consumed(consumer.kernel.ndim - 2, source))},
        ),
    ]
    for layer in path:
        axes = {**FOLLOWERS, "kernel": 2, "alpha": len(layer.input.shape) - 2}
        variables = {
            name: changed(getattr(layer, name), produced(axis, source), born=1.0)
            for name, axis in axes.items()
            if isinstance(getattr(layer, name, None), keras.Variable)
        }
        if variables:
            edits.append(LayerChange(layer, {}, variables))
    before = model(x).numpy()
    rebuild.apply_changes(model, edits)
    assert_like_fresh(model)
    np.testing.assert_array_equal(model(x), rebuilt(model)(x))
    if case != "norms":
        np.testing.assert_allclose(model(x), before, atol=1e-5)


def test_shared_layers_of_a_second_model_follow():
    model = convolutional_net()
    features = keras.Model(model.input, model.get_layer("relu").output)
    other_head = keras.layers.Dense(1)(features.output)
    rebuild.apply_changes(model, widen(model))
    assert features.output_shape == (None, 4, 4, 5)
    assert features(batch()[0]).shape == (8, 4, 4, 5)
    assert other_head.shape == (None, 4, 4, 1)


def test_layer_without_get_config_is_saved_with_its_new_width(tmp_path):
    @keras.saving.register_keras_serializable(package="test_rebuild")
    class Plain(keras.layers.Layer):
        def __init__(self, units, **kwargs):
            super().__init__(**kwargs)
            self.units = units

        def build(self, shape):
            self.w = self.add_weight(shape=(shape[-1], self.units), name="w")

        def call(self, inputs):
            return keras.ops.matmul(inputs, self.w)

    model = keras.Sequential([keras.Input((4,)), Plain(3, name="p"), Plain(2, name="c")])
    first, second = model.layers
    rebuild.apply_changes(
        model,
        [
            LayerChange(first, {"units": 5}, {"w": changed(first.w, produced(1))}),
            LayerChange(second, {}, {"w": changed(second.w, consumed(0))}),
        ],
    )
    model.save(tmp_path / "plain.keras")
    loaded = keras.models.load_model(tmp_path / "plain.keras")
    assert loaded.layers[0].output.shape == first.output.shape == (None, 5)
    np.testing.assert_array_equal(loaded(np.eye(4)), model(np.eye(4)))


def test_weight_decay_exclusions_follow():
    optimizer = keras.optimizers.SGD(0.0, weight_decay=0.5)
    model = convolutional_net()
    excluded = model.get_layer("conv1").kernel
    optimizer.exclude_from_weight_decay(var_list=[excluded])
    model.compile(optimizer, "mse", run_eagerly=True)
    optimizer.learning_rate = 0.1
    model.train_on_batch(*batch())
    transaction.edit(model, widen(model))
    optimizer.learning_rate = 0.1
    gamma = model.get_layer("bn").gamma
    assert not optimizer._use_weight_decay(excluded)
    assert optimizer._use_weight_decay(gamma)


def test_compiled_functions_are_renewed_only_where_they_existed():
    model = convolutional_net(optimizer="sgd")
    rebuild.apply_changes(model, widen(model))
    assert (model.train_function, model.test_function, model.predict_function) == (None,) * 3
    model.predict(batch()[0], verbose=0)
    old = model.predict_function
    rebuild.apply_changes(model, widen_again(model))
    assert model.train_function is None
    assert model.predict_function is None
    assert old is not None
    np.testing.assert_allclose(model.predict(batch()[0], verbose=0), model(batch()[0]), atol=1e-6)


def bad_changes(model):
    """(changes, part of the message) for every refusal."""
    conv1, dense = model.get_layer("conv1"), model.get_layer("dense")
    kernel = conv1.kernel.numpy()
    good = changed(conv1.kernel, produced(3))
    other = keras.layers.Dense(3, name="stranger")
    other.build((None, 2))

    def of(value, *sources, layer=conv1, name="kernel"):
        return [LayerChange(layer, {}, {name: VariableChange(value, sources)})]

    ones = np.ones(3)
    last = np.array([0, 1, 1])
    wider_dense = {
        "kernel": changed(dense.kernel, produced(1, last)),
        "bias": changed(dense.bias, produced(0, last)),
    }
    return {
        "foreign layer": ([LayerChange(other, {}, {})], "stranger"),
        "twice": ([LayerChange(dense, {}, {})] * 2, "changed twice"),
        "attribute": ([LayerChange(conv1, {"units": 5}, {})], "no attribute 'units'"),
        "variable": (of(kernel, name="gamma"), "no variable 'gamma'"),
        "not a variable": (of(kernel, name="filters"), "no variable 'filters'"),
        "rank": (of(kernel[0]), "another rank"),
        "no source": (of(good.value), "axis 3 descends"),
        "two sources": (of(good.value, produced(3), produced(3)), "one axis"),
        "axis": (of(kernel, AxisSource(4, np.arange(3), ones, ones)), "no axis 4"),
        "length": (of(kernel, AxisSource(3, np.arange(2), ones, ones)), "entries"),
        "range": (of(kernel, AxisSource(3, np.array([0, 1, 3]), ones, ones)), "sources of axis 3"),
        "forgotten attribute": ([LayerChange(dense, {}, wider_dense)], "attributes say"),
        "forgotten bias": (of(good.value, *good.sources), "'conv1'"),
        "forgotten consumer": (widen(model)[:1], "'bn'"),
        "forgotten dense": (widen(model)[:3], "'dense'"),
    }


@pytest.mark.parametrize("case", list(bad_changes(convolutional_net())))
def test_refusals_name_the_layer_and_leave_the_model_alone(case):
    model = convolutional_net(optimizer="adam", run_eagerly=True)
    model.train_on_batch(*batch())
    text, before = summary(model), values(model.variables + model.optimizer.variables)
    changes, message = bad_changes(model)[case]
    with pytest.raises(ValueError, match=message):
        transaction.edit(model, changes)
    assert summary(model) == text
    assert_same_bits(values(model.variables + model.optimizer.variables), before)
    model.train_on_batch(*batch())


def test_refuses_subclassed_unbuilt_lora_and_quantized():
    class Subclassed(keras.Model):
        def call(self, inputs):
            return inputs

    with pytest.raises(TypeError, match="Functional or Sequential"):
        rebuild.apply_changes(Subclassed(), [])
    with pytest.raises(ValueError, match="not built"):
        rebuild.apply_changes(keras.Sequential([keras.layers.Dense(2)]), [])
    model = convolutional_net()
    model.get_layer("dense").enable_lora(2)
    with pytest.raises(ValueError, match="'dense' has LoRA"):
        rebuild.apply_changes(model, [LayerChange(model.layers[-1], {}, {})])
    model = convolutional_net()
    model.get_layer("dense").quantize("int8")
    with pytest.raises(ValueError, match="'dense' has LoRA or quantized"):
        rebuild.apply_changes(model, [LayerChange(model.layers[-1], {}, {})])


class GrowAtSecondEpoch(keras.callbacks.Callback):
    """Widens the net before the first batch of epoch 1, and counts steps."""

    def on_epoch_begin(self, epoch, logs=None):
        self.epoch = epoch

    def on_train_batch_begin(self, step, logs=None):
        if self.epoch == 1 and step == 0:
            self.function = self.model.train_function
            transaction.edit(self.model, widen(self.model))
            self.at_growth = values(self.model.trainable_variables)


@pytest.mark.parametrize(
    "settings",
    [{}, {"jit_compile": True}, {"steps_per_execution": 2}, {"policy": "mixed_float16"}],
    ids=["plain", "jit", "steps2", "mixed_float16"],
)
def test_growing_inside_fit(settings, tmp_path):
    settings = dict(settings)
    keras.config.set_dtype_policy(settings.pop("policy", "float32"))
    model = convolutional_net(optimizer=keras.optimizers.Adam(0.01), **settings)
    optimizer = model.optimizer
    callback = GrowAtSecondEpoch()
    x, y = batch(size=32)
    history = model.fit(
        x, y, batch_size=8, epochs=3, callbacks=[callback], validation_data=(x, y), verbose=0
    )
    assert model.optimizer is optimizer
    assert int(optimizer.iterations.numpy()) == 12
    assert model.train_function is not callback.function
    assert model.jit_compile == settings.get("jit_compile", False)
    assert np.all(np.isfinite(history.history["loss"]))
    assert history.history["val_loss"][-1] < history.history["val_loss"][0]
    inherited = [
        np.any(a != b.numpy())
        for a, b in zip(callback.at_growth, model.trainable_variables, strict=True)
    ]
    assert all(inherited)  # every variable goes on training
    model.save(tmp_path / "fit.keras")
    loaded = keras.models.load_model(tmp_path / "fit.keras")
    assert_same_bits(values(loaded.variables), values(model.variables))
    assert_same_bits(values(loaded.optimizer.variables), values(model.optimizer.variables))
