"""What a growable layer says of itself: its algebra, its children, its place in files."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers, ops

import tfgrow
from tests.cases import CASES, inputs_of
from tfgrow import _keras
from tfgrow.layers import Axes, Mixing, Moments
from tfgrow.layers.registry import (
    GROWABLE_CLASSES,
    blocked_reason,
    channelwise_view,
    growable_class,
    producer_blocked,
)
from tfgrow.layers.stateless import _REGISTRY
from tfgrow.types import ChannelMap

MIXING = {
    "dense": (tfgrow.layers.Dense(3), (5,)),
    "dense on sequences": (tfgrow.layers.Dense(3, use_bias=False), (4, 5)),
    "conv1d": (tfgrow.layers.Conv1D(3, 3, strides=2), (9, 2)),
    "conv1d causal": (
        tfgrow.layers.Conv1D(3, 3, padding="causal", dilation_rate=2),
        (7, 2),
    ),
    "conv2d same": (tfgrow.layers.Conv2D(3, (3, 2), padding="same"), (6, 5, 2)),
    "conv2d strided": (tfgrow.layers.Conv2D(3, 3, strides=(2, 1), padding="same"), (6, 5, 2)),
    "conv2d dilated": (tfgrow.layers.Conv2D(3, 2, dilation_rate=2), (6, 5, 2)),
    "conv3d": (tfgrow.layers.Conv3D(3, 2, padding="same", strides=2), (4, 5, 4, 2)),
    "transposed 1d": (tfgrow.layers.Conv1DTranspose(3, 3, strides=2, padding="same"), (5, 2)),
    "transposed 2d": (tfgrow.layers.Conv2DTranspose(3, (3, 2), strides=(2, 3)), (3, 4, 2)),
    "transposed 2d padded": (
        tfgrow.layers.Conv2DTranspose(3, 3, strides=2, padding="same", output_padding=1),
        (3, 4, 2),
    ),
    "transposed 3d": (
        tfgrow.layers.Conv3DTranspose(3, 2, strides=(1, 2, 1), use_bias=False),
        (2, 3, 2, 2),
    ),
    "einsum": (tfgrow.layers.EinsumDense("abcd,de->abce", (None, 4, 3), bias_axes="e"), (2, 4, 5)),
    "einsum elided": (tfgrow.layers.EinsumDense("...x,xy->...y", 3), (5,)),
}


@pytest.mark.parametrize("name", sorted(MIXING))
def test_linear_and_unfold_are_the_layer(name):
    template, shape = MIXING[name]
    layer = type(template).from_config(template.get_config())
    x = np.random.default_rng(0).standard_normal((2, *shape)).astype("float32")
    expected = layer(x).numpy()  # no activation: the layer is its linear map
    if layer.bias is not None:
        layer.bias.assign([0.1, -0.2, 0.3])
        expected = expected + layer.bias.numpy()
    weights = layer.growable_variables()
    np.testing.assert_allclose(layer.linear(x, **weights), expected, atol=1e-5)
    seen = layer.unfold(tf.constant(x))
    positions = int(np.prod(expected.shape[1:-1]))
    taps = int(np.prod(layer.kernel_spatial))
    assert tuple(seen.shape) == (2, shape[-1], positions, taps)
    rows = np.random.default_rng(1).standard_normal((taps, shape[-1], 3)).astype("float32")
    layer.kernel.assign(layer.kernel_from_rows(rows))
    expected = layer(x).numpy()
    unfolded = np.einsum("ncpt,tco->npo", seen, rows).reshape(expected.shape)
    if layer.bias is not None:
        unfolded = unfolded + layer.bias.numpy()
    np.testing.assert_allclose(unfolded, expected, atol=1e-5)


@pytest.mark.parametrize("name", sorted(MIXING))
def test_linear_takes_any_number_of_channels(name):
    template, shape = MIXING[name]
    layer = type(template).from_config(template.get_config())
    layer.build((None, *shape))
    taps = int(np.prod(layer.kernel_spatial))
    rng = np.random.default_rng(1)
    x = rng.standard_normal((2, *shape[:-1], 4)).astype("float32")
    rows = rng.standard_normal((taps, 4, 7)).astype("float32")
    found = layer.linear(x, layer.kernel_from_rows(rows))
    assert found.shape[-1] == 7
    fewer = layer.linear(x[..., :2], layer.kernel_from_rows(rows[:, :2]))
    rest = layer.linear(x[..., 2:], layer.kernel_from_rows(rows[:, 2:]))
    np.testing.assert_allclose(found, fewer + rest, atol=1e-4)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_channelwise_layers_treat_channels_alone(case):
    """Half the channels, with their share of the variables, give half of the outputs."""
    model = case.model()
    tried = 0
    for layer in model.layers:
        view = channelwise_view(layer)
        shape = getattr(getattr(layer, "input", None), "shape", ())
        if view is None or None in shape[1:] or shape[-1] < 2 or blocked_reason(layer):
            continue
        if view.over_channels:
            continue
        x = np.random.default_rng(2).standard_normal((2, *shape[1:])).astype("float32")
        keep = np.arange(0, shape[-1], 2)
        channels = ChannelMap.identity(shape[-1])
        variables = {
            name: np.take(
                variable,
                view.variable_map(name, channels).index[keep].reshape(-1),
                axis=layer.variable_axes[name].channel,
            )
            for name, variable in (
                layer.growable_variables().items() if hasattr(layer, "variable_axes") else ()
            )
        }
        whole = np.asarray(layer(x, training=False) if _trains(layer) else layer(x))
        some = np.asarray(view.apply_channels(tf.constant(x[..., keep]), variables))
        where = view.channel_map(channels, shape).index[keep]
        mine = view.channel_map(ChannelMap.identity(len(keep)), shape)
        assert mine.size == some.shape[-1]
        np.testing.assert_allclose(some[..., mine.index], whole[..., where], atol=1e-5)
        tried += 1
    assert tried or case.name == "two_inputs"


def _trains(layer):
    return "training" in __import__("inspect").signature(layer.call).parameters


def statistics_layer(**kwargs):
    layer = tfgrow.layers.BatchNormalization(epsilon=1e-2, **kwargs)
    layer.build((None, 3))
    rng = np.random.default_rng(3)
    for variable in layer.variables:
        variable.assign(rng.uniform(0.5, 2.0, variable.shape))
    return layer


@pytest.mark.parametrize("scale", [True, False])
@pytest.mark.parametrize("center", [True, False])
def test_children_of_batchnorm_compute_what_their_parents_do(scale, center):
    layer = statistics_layer(scale=scale, center=center)
    parents = layer.growable_variables()
    moments = Moments(np.float32([1.0, -2.0, 0.3]), np.float32([0.1, 4.0, 0.0]))
    children = layer.child_variables(parents, moments)
    x = np.random.default_rng(4).standard_normal((50, 3)).astype("float32")
    expected = layer.apply_channels(x, parents)
    np.testing.assert_allclose(layer.apply_channels(x, children), expected, atol=1e-5)
    np.testing.assert_allclose(layer(x, training=False), expected, atol=1e-5)
    if scale:
        np.testing.assert_array_equal(children["moving_variance"], moments.variance)
    if center:
        np.testing.assert_array_equal(children["moving_mean"], moments.mean)
    unmeasured = layer.child_variables(parents, None)
    np.testing.assert_array_equal(unmeasured["moving_mean"], layer.moving_mean)


def test_newborn_units_of_batchnorm_are_normalised():
    layer = statistics_layer()
    x = np.random.default_rng(5).normal(3.0, 2.0, (200, 3)).astype("float32")
    moments = Moments(x.mean(axis=0), x.var(axis=0))
    out = layer.apply_channels(x, layer.newborn_variables(layer.growable_variables(), moments))
    np.testing.assert_allclose(np.mean(out, axis=0), 0.0, atol=1e-5)
    np.testing.assert_allclose(np.std(out, axis=0), 1.0, atol=2e-2)


def test_depthwise_map_of_a_flattened_tensor():
    layer = tfgrow.layers.DepthwiseConv2D(2, depth_multiplier=2, use_bias=False)
    layer.build((None, 4, 4, 3))
    grown = layer.channel_map(ChannelMap.identity(3), (None, 4, 4, 3))
    np.testing.assert_array_equal(grown.index, [[0, 1], [2, 3], [4, 5]])
    again = layer.channel_map(grown, (None, 4, 4, 6))
    np.testing.assert_array_equal(again.index[1], [4, 5, 6, 7])
    assert (again.units, again.blocks, again.size) == (3, 4, 12)


def test_prelu_shared_over_channels_has_nothing_to_widen():
    inputs = keras.Input((4, 3))
    x = layers.PReLU(shared_axes=(1, 2), alpha_initializer="ones", name="slope")(
        layers.Conv1D(3, 2, name="conv")(inputs)
    )
    out = layers.Dense(2)(layers.GlobalAveragePooling1D()(x))
    model = tfgrow.convert(keras.Model(inputs, out))
    x = inputs_of(model, 3)
    before = model(x).numpy()
    tfgrow.widen(model, "conv", 2)
    assert tuple(model.get_layer("slope").alpha.shape) == (1, 1)
    np.testing.assert_allclose(model(x), before, atol=1e-6)


@pytest.mark.parametrize("growable", GROWABLE_CLASSES, ids=lambda c: c.__name__)
def test_growable_classes_are_registered_twins_of_stock_classes(growable):
    stock = growable.stock_class
    assert issubclass(growable, stock)
    name = growable.__name__.replace("Channelwise", "")
    assert stock is getattr(layers, name, _keras.LayerScale)
    assert getattr(tfgrow.layers, growable.__name__) is growable
    name = f"tfgrow>{growable.__name__}"
    assert keras.saving.get_registered_object(name) is growable
    arguments = {
        "Dense": (3,),
        "DepthwiseConv1D": (2,),
        "DepthwiseConv2D": (2,),
        "EinsumDense": ("ab,bc->ac", 3),
        "Embedding": (4, 3),
        "GroupQueryAttention": (2, 4, 2),
        "LayerScale": (0.5, 3),
        "MultiHeadAttention": (3, 2),
    }.get(growable.__name__, (3, 2) if growable.__name__.startswith("Conv") else ())
    if growable.__name__.startswith("Channelwise"):
        layer = stock(6, 2, groups=3)
        layer.build((None, *[5] * layer.rank, 3))
    else:
        layer = stock(*arguments)
    assert growable_class(layer) is growable
    twin = growable.from_config(layer.get_config())
    assert twin.get_config() == layer.get_config()
    restored = keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(twin))
    assert type(restored) is growable


@pytest.mark.parametrize("kind", [layers.Dropout, layers.AlphaDropout])
@pytest.mark.parametrize(
    ("shape", "open_"), [(None, True), ((None, 1, 1, None), True), ((None, 1, 1, 3), False)]
)
def test_noise_of_a_fixed_number_of_channels_blocks(kind, shape, open_):
    parts = [layers.Conv2D(3, 3, name="conv"), kind(0.3, noise_shape=shape), layers.Flatten()]
    model = keras.Sequential([keras.Input((6, 6, 2)), *parts, layers.Dense(3)])
    model = tfgrow.convert(model)
    (site,) = (site for site in tfgrow.find_sites(model) if site.name == "conv")
    if not open_:
        assert "noise_shape=(None, 1, 1, 3), for 3 channels" in site.blocked
        return
    tfgrow.widen(model, "conv", 2)
    assert model(np.ones((2, 6, 6, 2)), training=True).shape == (2, 3)


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (lambda: layers.Conv2D(6, 3, groups=3, name="conv"), "of one group or of as many groups"),
        (lambda: layers.Conv2D(6, 3, (1, 2), groups=6, name="conv"), "strides"),
        (lambda: layers.Conv2D(6, 3, groups=6, activation="softmax", name="conv"), "softmax"),
    ],
)
def test_grouped_convolutions_that_cannot_grow_say_why(build, reason):
    inputs = keras.Input((6, 6, 2))
    x = build()(layers.Conv2D(6, 1, name="before")(inputs))
    model = tfgrow.convert(keras.Model(inputs, layers.Dense(2)(layers.Flatten()(x))))
    site = next(site for site in tfgrow.find_sites(model) if site.name == "before")
    assert reason in site.blocked


def test_growable_models_save_and_load(tmp_path):
    inputs = keras.Input((6, 6, 2))
    x = tfgrow.layers.Conv2D(3, 3)(inputs)
    x = tfgrow.layers.DepthwiseConv2D(2)(tfgrow.layers.PReLU()(x))
    x = layers.Flatten()(tfgrow.layers.BatchNormalization()(x))
    model = keras.Model(inputs, tfgrow.layers.Dense(2)(x))
    model.save(tmp_path / "growable.keras")
    loaded = keras.models.load_model(tmp_path / "growable.keras")
    assert [type(layer) for layer in loaded.layers] == [type(layer) for layer in model.layers]
    x = inputs_of(model, 3)
    np.testing.assert_array_equal(loaded(x), model(x))
    assert len([s for s in tfgrow.find_sites(loaded) if not s.blocked]) == 1


RANDOM = {
    "RandomBrightness": (0.5,),
    "RandomContrast": (0.5,),
    "RandomElasticTransform": (),
    "RandomErasing": (),
    "RandomFlip": (),
    "RandomGaussianBlur": (),
    "RandomPerspective": (),
    "RandomRotation": (0.5,),
    "RandomShear": (0.5,),
    "RandomTranslation": (0.5, 0.5),
    "RandomZoom": (0.5,),
}


def test_registered_stock_layers_run_in_inference_mode():
    """Also those that train unless told not to."""
    assert len(_REGISTRY) > 50
    trains = {kind.__name__ for kind in _REGISTRY if _trains(kind) and "Random" in kind.__name__}
    assert trains <= set(RANDOM)
    x = np.random.default_rng(0).standard_normal((2, 4, 4, 3)).astype("float32")
    for name in trains:
        view = channelwise_view(getattr(layers, name)(*RANDOM[name]))
        np.testing.assert_allclose(view.apply_channels(tf.constant(x), {}), x, err_msg=name)


def test_a_user_can_register_layers():
    class Negate(layers.Layer):
        def call(self, inputs):
            return -inputs

    layer = Negate(name="negate")
    assert channelwise_view(layer) is None
    tfgrow.layers.register_channelwise(Negate, lambda layer: "not today" if layer.built else None)
    assert blocked_reason(layer) is None
    layer.build((None, 3))
    assert blocked_reason(layer) == "not today"
    np.testing.assert_array_equal(channelwise_view(layer).apply_channels(tf.ones(2), {}), -1.0)


class Mixed(Mixing, layers.Layer):
    """A user's own mixing layer, without a bias."""

    variable_axes = {"kernel": Axes(fan_in=-2, fan_out=-1)}

    def __init__(self, units, **kwargs):
        super().__init__(**kwargs)
        self.units = units
        self.activation = keras.activations.tanh

    def build(self, input_shape):
        self.kernel = self.add_weight(shape=(input_shape[-1], self.units), name="kernel")
        self.built = True

    def linear(self, inputs, kernel, bias=None):
        return ops.matmul(inputs, kernel)

    def unfold(self, inputs):
        return ops.reshape(inputs, (-1, inputs.shape[-1], 1, 1))

    def call(self, inputs):
        return self.activate(self.linear(inputs, self.kernel))

    def compute_output_shape(self, input_shape):
        return (*input_shape[:-1], self.units)

    def get_config(self):
        return {**super().get_config(), "units": self.units}


def test_a_users_own_mixing_layer_grows():
    stock = keras.Sequential([keras.Input((4,)), Mixed(3, name="own"), layers.Dense(2)])
    model = tfgrow.convert(stock)
    assert producer_blocked(model.get_layer("own")) is None
    x = inputs_of(model, 5)
    before = model(x).numpy()
    data = x, np.ones((5, 2), "float32")
    estimator = tfgrow.GaussNewtonEstimator(model, loss="mse")
    learned = estimator.learn(tfgrow.candidates(model, new_units=1), data, steps=1)
    change = estimator.joint_change(learned[-1:], data)
    assert change == pytest.approx(
        tfgrow.measure_change(model, learned[-1:], data, "mse"), rel=1e-3
    )
    tfgrow.widen(model, "own", 2)
    assert model.get_layer("own").units == 5
    np.testing.assert_allclose(model(x), before, atol=1e-6)
    assert type(tfgrow.strip(model).get_layer("own")) is Mixed
