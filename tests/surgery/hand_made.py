"""A tiny net and edits of it made by hand, with which the tests of surgery work."""

import gc

import keras
import numpy as np
import tensorflow as tf

from tfgrow.types import NEWBORN, AxisSource, LayerChange, VariableChange

SOURCE = np.array([0, 1, 2, 1, NEWBORN])
"""Three channels become five: channel 1 is split, the last one is newborn."""
BATCH = 8


def convolutional_net(**compile_arguments):
    """Conv -> bn -> relu -> conv -> flatten -> dense on 4x4x2 inputs, compiled if asked to."""
    inputs = keras.Input((4, 4, 2))
    x = keras.layers.Conv2D(3, 3, padding="same", name="conv1")(inputs)
    x = keras.layers.BatchNormalization(name="bn")(x)
    x = keras.layers.ReLU(name="relu")(x)
    x = keras.layers.Conv2D(3, 3, strides=2, padding="same", name="conv2")(x)
    x = keras.layers.Flatten(name="flatten")(x)
    outputs = keras.layers.Dense(2, name="dense", dtype="float32")(x)
    model = keras.Model(inputs, outputs, name="net")
    if compile_arguments:
        model.compile(loss="mse", **compile_arguments)
    return model


def batch(seed=0, size=BATCH):
    """Inputs `[size, 4, 4, 2]` and targets `[size, 2]`."""
    rng = np.random.default_rng(seed)
    return (
        rng.normal(size=(size, 4, 4, 2)).astype("float32"),
        rng.normal(size=(size, 2)).astype("float32"),
    )


def produced(axis, source=SOURCE):
    """Channels made by a producer: values are copied, a half of a split gets half the gradient."""
    half = np.array([0.5 if np.sum(source == parent) > 1 else 1.0 for parent in source])
    return AxisSource(axis, source, np.ones(len(source)), half)


def consumed(axis, source=SOURCE, positions=1, units=3):
    """Channels read by a consumer: halves of a split have half the weight, all the gradient."""
    half = np.array([0.5 if np.sum(source == parent) > 1 else 1.0 for parent in source])
    blocks = [np.where(source == NEWBORN, NEWBORN, source + p * units) for p in range(positions)]
    index = np.concatenate(blocks)
    return AxisSource(axis, index, np.tile(half, positions), np.ones(len(index)))


def changed(variable, *sources, born=0.0):
    """The variable's value carried along its sources; newborn entries hold `born`."""
    value = variable.numpy()
    for source in sources:
        shape = [1] * value.ndim
        shape[source.axis] = -1
        value = np.take(value, np.maximum(source.source, 0), axis=source.axis)
        value = value * source.value_scale.reshape(shape).astype(value.dtype)
        value = np.where((source.source == NEWBORN).reshape(shape), born, value)
    return VariableChange(value.astype(variable.dtype), sources)


def widen(model, source=SOURCE):
    """Both convolutions of `convolutional_net` from 3 to 5 channels; the function stays."""
    conv1, bn, conv2, dense = (model.get_layer(n) for n in ("conv1", "bn", "conv2", "dense"))
    out1, units = produced(3, source), len(source)
    per_channel = produced(0, source)
    return [
        LayerChange(
            conv1,
            {"filters": units},
            {
                "kernel": changed(conv1.kernel, out1, born=0.1),
                "bias": changed(conv1.bias, per_channel),
            },
        ),
        LayerChange(
            bn,
            {},
            {
                "gamma": changed(bn.gamma, per_channel, born=1.0),
                "beta": changed(bn.beta, per_channel),
                "moving_mean": changed(bn.moving_mean, per_channel),
                "moving_variance": changed(bn.moving_variance, per_channel, born=1.0),
            },
        ),
        LayerChange(
            conv2,
            {"filters": units},
            {
                "kernel": changed(conv2.kernel, consumed(2, source), out1),
                "bias": changed(conv2.bias, per_channel),
            },
        ),
        LayerChange(dense, {}, {"kernel": changed(dense.kernel, consumed(0, source, positions=4))}),
    ]


def narrow(model):
    """Undoes `widen`: the first three channels stay."""
    conv1, bn, conv2, dense = (model.get_layer(n) for n in ("conv1", "bn", "conv2", "dense"))
    keep = np.arange(3)
    out, per_channel = produced(3, keep), produced(0, keep)
    names = ("gamma", "beta", "moving_mean", "moving_variance")
    bias = {"bias": changed(conv1.bias, per_channel)}
    read = consumed(0, keep, positions=4, units=5)
    return [
        LayerChange(conv1, {"filters": 3}, {"kernel": changed(conv1.kernel, out), **bias}),
        LayerChange(bn, {}, {name: changed(getattr(bn, name), per_channel) for name in names}),
        LayerChange(
            conv2,
            {"filters": 3},
            {
                "kernel": changed(conv2.kernel, consumed(2, keep), out),
                "bias": changed(conv2.bias, per_channel),
            },
        ),
        LayerChange(dense, {}, {"kernel": changed(dense.kernel, read)}),
    ]


def summary(model):
    """What `model.summary()` prints."""
    lines = []
    model.summary(print_fn=lambda line, line_break=False: lines.append(line))
    return "\n".join(lines)


def values(variables):
    """Copies of the variables' values."""
    return [np.array(variable.numpy()) for variable in variables]


def assert_same_bits(found, expected):
    """Two lists of arrays agree in shape, type and every bit."""
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert a.shape == b.shape
        assert a.dtype == b.dtype
        assert a.tobytes() == b.tobytes()


def photograph(model):
    """Everything visible of a model and its optimizer, with identities where those matter."""
    variables = model.variables + model.metrics_variables
    if getattr(model, "optimizer", None) is not None:
        variables = variables + model.optimizer.variables
    return {
        "values": values(variables),
        "variables": [id(variable) for variable in variables],
        "backend variables": [id(variable.value) for variable in variables],
        "trainable": [id(variable) for variable in model.trainable_variables],
        "summary": summary(model),
        "shapes": [
            tensor.shape
            for layer in model.layers
            for tensor in keras.tree.flatten([layer.input, layer.output])
        ],
        "specs": [id(layer.input_spec) for layer in model.layers if layer.name != "net"],
        "configs": [(layer.get_config(), layer.get_build_config()) for layer in model.layers],
        "functions": [model.train_function, model.test_function, model.predict_function],
        "attributes": [
            {name: id(value) for name, value in vars(item).items()}
            for item in (model, *model.layers)
        ],
        "nodes": [
            (len(layer._inbound_nodes), len(layer._outbound_nodes)) for layer in model.layers
        ],
        "known": dict(model.optimizer._trainable_variables_indices)
        if getattr(model, "optimizer", None) is not None
        else None,
    }


def assert_as_on(picture, model):
    now = photograph(model)
    assert_same_bits(now.pop("values"), picture["values"])
    for name, found in now.items():
        assert found == picture[name], name


def slot_kind(optimizer_name, slot_name):
    """What a slot is by its variable's name; one optimizer calls averaged weights its momentum."""
    averaged = (optimizer_name, slot_name) == ("schedule free", "momentum")
    return "average" if averaged else slot_name


OPTIMIZERS = {
    "sgd": lambda: keras.optimizers.SGD(0.01),
    "momentum": lambda: keras.optimizers.SGD(0.01, momentum=0.9, clipnorm=1.0),
    "nesterov": lambda: keras.optimizers.SGD(0.01, momentum=0.9, nesterov=True, use_ema=True),
    "adam": lambda: keras.optimizers.Adam(keras.optimizers.schedules.CosineDecay(0.01, 20)),
    "amsgrad": lambda: keras.optimizers.Adam(0.01, amsgrad=True, ema_momentum=0.5, use_ema=True),
    "accumulating": lambda: keras.optimizers.Adam(0.01, gradient_accumulation_steps=2),
    "adamw": lambda: keras.optimizers.AdamW(0.01, weight_decay=0.1),
    "nadam": lambda: keras.optimizers.Nadam(0.01),
    "adamax": lambda: keras.optimizers.Adamax(0.01),
    "lamb": lambda: keras.optimizers.Lamb(0.01),
    "rmsprop": lambda: keras.optimizers.RMSprop(0.01, momentum=0.5, centered=True),
    "adagrad": lambda: keras.optimizers.Adagrad(0.01),
    "adadelta": lambda: keras.optimizers.Adadelta(0.1),
    "lion": lambda: keras.optimizers.Lion(0.001),
    "loss scale": lambda: keras.optimizers.LossScaleOptimizer(keras.optimizers.Adam(0.01)),
}
if hasattr(keras.optimizers, "ScheduleFreeAdamW"):
    OPTIMIZERS["schedule free"] = lambda: keras.optimizers.ScheduleFreeAdamW(0.01)
if hasattr(keras.optimizers, "Muon"):
    OPTIMIZERS["muon"] = lambda: keras.optimizers.Muon(0.01)


def trained_net(make_optimizer, steps=3):
    model = convolutional_net(optimizer=make_optimizer(), run_eagerly=True)
    for step in range(steps):
        model.train_on_batch(*batch(step))
    return model


def by_name(optimizer):
    return {variable.name: variable.numpy() for variable in optimizer.variables}


def assert_trains_on_like_its_file(model, path):
    """One more step, save, load: same bits; one more step of both: same bits."""
    before = values(model.trainable_variables)
    for step in (3, 4):  # two, because an accumulating optimizer updates at every second
        model.train_on_batch(*batch(step))
    assert all(
        np.any(a != b.numpy()) for a, b in zip(before, model.trainable_variables, strict=True)
    )
    model.save(path)
    loaded = keras.models.load_model(path)
    assert_same_bits(values(loaded.variables), values(model.variables))
    assert_same_bits(values(loaded.optimizer.variables), values(model.optimizer.variables))
    assert_same_bits([loaded(batch()[0]).numpy()], [model(batch()[0]).numpy()])
    for net in (model, loaded):
        net.train_on_batch(*batch(5))
        net.train_on_batch(*batch(6))
    assert_same_bits(values(loaded.variables), values(model.variables))
    assert_same_bits(values(loaded.optimizer.variables), values(model.optimizer.variables))


def rebuilt(model):
    """The model as Keras builds it from its config, with its weights."""
    clone = model.__class__.from_config(model.get_config())
    clone.set_weights(model.get_weights())
    return clone


def assert_like_fresh(model):
    """Everything Keras shows of a model is what a model built from its config shows."""
    fresh = rebuilt(model)
    assert summary(model) == summary(fresh)
    assert model.output_shape == fresh.output_shape
    assert model.count_params() == fresh.count_params()
    for layer, other in zip(model.layers, fresh.layers, strict=True):
        assert layer.output.shape == other.output.shape
        assert str(layer.input_spec) == str(other.input_spec)
        assert layer.get_build_config() == other.get_build_config()
        names = [(v.name, tuple(v.shape), v.dtype, v.trainable) for v in layer.weights]
        assert names == [(v.name, tuple(v.shape), v.dtype, v.trainable) for v in other.weights]


def live_variables():
    gc.collect()
    return sum(isinstance(item, tf.Variable) for item in gc.get_objects())
