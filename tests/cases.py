"""The table of tiny models: one row per kind of layer and topology that can grow.

The tests cross it with properties. A new layer type or topology is one new row here, and every
property runs on it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import keras
import numpy as np
from keras import layers, ops

import tfgrow
from tfgrow import _keras
from tfgrow.capture.capture import observe
from tfgrow.graph.nodes import Graph, trace
from tfgrow.morphisms.base import perturb_all
from tfgrow.morphisms.registry import group_candidates


@dataclasses.dataclass(frozen=True)
class Case:
    """A tiny stock model.

    Attributes:
      name: of the case.
      build: makes the stock model.
      sites: names of the sites that can grow, in order.
      smooth: whether the model has no kinks, so that finite differences are exact.
      expanded: whether convert takes layers apart, so that strip leaves other ones than there were.
    """

    name: str
    build: Callable[[], keras.Model]
    sites: tuple[str, ...]
    smooth: bool = False
    expanded: bool = False

    def stock(self, seed: int = 0) -> keras.Model:
        """The stock model, with weights and statistics as if it had been trained."""
        keras.utils.set_random_seed(seed)
        model = self.build()
        randomize(model, seed)
        return model

    def model(self, seed: int = 0) -> keras.Model:
        """The growable model."""
        return tfgrow.convert(self.stock(seed))


CASES: list[Case] = []


def case(*sites: str, smooth: bool = False, expanded: bool = False):
    """Puts a function that builds a model into the table."""

    def enter(build):
        CASES.append(Case(build.__name__, build, sites, smooth, expanded))
        return build

    return enter


def by_name(name: str) -> Case:
    return next(entry for entry in CASES if entry.name == name)


def randomize(model: keras.Model, seed: int = 0) -> None:
    """Gives biases, slopes and statistics values that a trained model could have."""
    rng = np.random.default_rng(seed)
    for variable in model.variables:
        if not variable.dtype.startswith("float"):
            continue
        shape, name = variable.shape, variable.name
        if name in ("bias", "beta", "moving_mean"):
            variable.assign(0.3 * rng.standard_normal(shape))
        elif name in ("gamma", "moving_variance"):
            variable.assign(rng.uniform(0.5, 1.5, shape))
        elif name == "alpha":
            variable.assign(rng.uniform(0.1, 0.4, shape))


def inputs_of(model: keras.Model, samples: int, seed: int = 0):
    """Random inputs: one array, or a list for a model of several inputs. Ids are under 5."""
    rng = np.random.default_rng(seed)
    arrays = [
        rng.integers(5, size=(samples, *tensor.shape[1:])).astype(tensor.dtype)
        if "int" in tensor.dtype
        else rng.standard_normal((samples, *tensor.shape[1:])).astype("float32")
        for tensor in model.inputs
    ]
    return arrays[0] if len(arrays) == 1 else arrays


def regression_data(model: keras.Model, samples: int = 12, seed: int = 0):
    """`(x, y)` for the squared error."""
    rng = np.random.default_rng([seed, 1])
    targets = rng.standard_normal((samples, *model.output_shape[1:])).astype("float32")
    return inputs_of(model, samples, seed), targets


def class_data(model: keras.Model, samples: int = 12, seed: int = 0):
    """`(x, labels)` for sparse cross-entropy."""
    rng = np.random.default_rng([seed, 2])
    labels = rng.integers(model.output_shape[-1], size=(samples, *model.output_shape[1:-1]))
    return inputs_of(model, samples, seed), labels


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A case's model and data with candidates as if they had been learned."""

    model: keras.Model
    graph: Graph
    candidates: list[tfgrow.Candidate]
    data: tuple


def prepare(case: Case, seed: int = 1, kinds: tuple[str, ...] = ("split", "add")) -> Prepared:
    """Candidates of every site with random theta and phi, and the statistics of one batch."""
    model = case.model()
    graph = trace(model)
    data = regression_data(model, 8)
    candidates = tfgrow.candidates(model, kinds, new_units=2, seed=seed)
    captured = observe(graph, data[0])
    rng = np.random.default_rng(seed)
    groups, positions = group_candidates(model, candidates)
    for group, where in zip(groups, positions, strict=True):
        moments = perturb_all(captured, [group], [group.theta], fresh=True)[0].moments
        for row, position in enumerate(where):
            old = candidates[position]
            measured = {name: value.numpy()[row] for name, value in moments.items()}
            theta = {
                name: 0.3 * rng.standard_normal(value.shape).astype("float32")
                if name.startswith("phi/")
                else value
                for name, value in old.theta.items()
            }
            candidates[position] = old.replace(theta=theta, state={**old.state, **measured})
    return Prepared(model, graph, candidates, data)


# ---- the table ------------------------------------------------------------------------------


@case("conv1", "conv2")
def conv_bn_relu():
    inputs = keras.Input((6, 6, 2))
    x = layers.Conv2D(3, 3, padding="same", use_bias=False, name="conv1")(inputs)
    x = layers.BatchNormalization(name="bn1")(x)
    x = layers.ReLU(name="relu1")(x)
    x = layers.Conv2D(4, 3, padding="same", name="conv2")(x)
    x = layers.BatchNormalization(name="bn2")(x)
    x = layers.Activation("relu", name="relu2")(x)
    x = layers.MaxPooling2D(2, name="pool")(x)
    x = layers.GlobalAveragePooling2D(name="gap")(x)
    return keras.Model(inputs, layers.Dense(3, name="out")(x))


@case("conv1", "conv2")
def strides_valid_flatten():
    inputs = keras.Input((7, 6, 2))
    x = layers.Conv2D(3, (3, 2), strides=(2, 1), padding="valid", name="conv1")(inputs)
    x = layers.LeakyReLU(name="leaky")(x)
    x = layers.Conv2D(2, 2, strides=2, padding="same", name="conv2")(x)
    x = layers.ELU(name="elu")(x)
    x = layers.Flatten(name="flatten")(x)
    return keras.Model(inputs, layers.Dense(3, name="out")(x))


@case("conv1", "conv2", smooth=True)
def dilated_no_bias():
    inputs = keras.Input((7, 7, 2))
    x = layers.Conv2D(3, 2, dilation_rate=2, use_bias=False, activation="gelu", name="conv1")(
        inputs
    )
    x = layers.Conv2D(
        2, 2, dilation_rate=2, padding="same", use_bias=False, activation="tanh", name="conv2"
    )(x)
    x = layers.AveragePooling2D(2, name="pool")(x)
    x = layers.Flatten(name="flatten")(x)
    return keras.Model(inputs, layers.Dense(2, use_bias=False, name="out")(x))


@case("conv1", "conv2", "conv3")
def conv1d_causal():
    inputs = keras.Input((7, 2))
    x = layers.Conv1D(3, 3, padding="causal", activation="relu", name="conv1")(inputs)
    x = layers.ZeroPadding1D(1, name="pad")(x)
    x = layers.Conv1D(3, 2, padding="causal", dilation_rate=2, name="conv2")(x)
    x = layers.BatchNormalization(name="bn")(x)
    x = layers.ReLU(name="relu")(x)
    x = layers.MaxPooling1D(2, name="pool")(x)
    x = layers.Conv1D(2, 2, strides=2, activation="relu", name="conv3")(x)
    x = layers.Flatten(name="flatten")(x)
    return keras.Model(inputs, layers.Dense(2, name="out")(x))


@case("conv1", "conv2")
def conv3d():
    inputs = keras.Input((4, 4, 4, 1))
    x = layers.Conv3D(3, 2, activation="relu", name="conv1")(inputs)
    x = layers.SpatialDropout3D(0.5, name="drop")(x)
    x = layers.Conv3D(2, 2, padding="same", strides=(1, 2, 1), activation="relu", name="conv2")(x)
    x = layers.GlobalMaxPooling3D(name="pool")(x)
    return keras.Model(inputs, layers.Dense(2, name="out")(x))


@case("conv1", "dense1", smooth=True)
def bn_after_activation():
    inputs = keras.Input((5, 5, 2))
    x = layers.Conv2D(3, 3, activation="tanh", name="conv1")(inputs)
    x = layers.BatchNormalization(name="bn1")(x)
    x = layers.Flatten(name="flatten")(x)
    x = layers.Dense(3, activation="softplus", name="dense1")(x)
    x = layers.BatchNormalization(scale=False, name="bn2")(x)
    return keras.Model(inputs, layers.Dense(3, name="out")(x))


@case("conv1", "conv2")
def bn_after_flatten():
    inputs = keras.Input((4, 4, 2))
    x = layers.Conv2D(3, 2, name="conv1")(inputs)
    x = layers.BatchNormalization(center=False, name="bn1")(x)
    x = layers.ReLU(max_value=2.0, negative_slope=0.1, name="relu1")(x)
    x = layers.Conv2D(2, 2, name="conv2")(x)
    x = layers.Flatten(name="flatten")(x)
    x = layers.BatchNormalization(name="bn2")(x)
    x = layers.ReLU(name="relu2")(x)
    return keras.Model(inputs, layers.Dense(3, name="out")(x))


@case("conv1", "conv2", "dense1")
def prelu():
    inputs = keras.Input((4, 4, 2))
    x = layers.Conv2D(3, 3, padding="same", name="conv1")(inputs)
    x = layers.PReLU(shared_axes=(1, 2), name="prelu1")(x)
    x = layers.Conv2D(3, 3, padding="same", name="conv2")(x)
    x = layers.PReLU(name="prelu2")(x)
    x = layers.GlobalAveragePooling2D(name="gap")(x)
    x = layers.Dense(3, name="dense1")(x)
    x = layers.PReLU(shared_axes=(1,), name="prelu3")(x)
    return keras.Model(inputs, layers.Dense(2, name="out")(x))


@case("conv1", "dense1")
def layer_scale():
    inputs = keras.Input((4, 4, 2))
    x = layers.Conv2D(3, 3, padding="same", activation="relu", name="conv1")(inputs)
    x = _keras.LayerScale(0.5, 3, name="scale1")(x)
    x = layers.GlobalAveragePooling2D(name="gap")(x)
    x = layers.Dense(3, activation="tanh", name="dense1")(x)
    x = _keras.LayerScale(0.7, 3, name="scale2")(x)
    return keras.Model(inputs, layers.Dense(2, name="out")(x))


@case("conv1", "conv2")
def depthwise():
    inputs = keras.Input((5, 5, 2))
    x = layers.Conv2D(3, 1, name="conv1")(inputs)
    x = layers.DepthwiseConv2D(3, padding="same", activation="relu", name="dw1")(x)
    x = layers.BatchNormalization(name="bn")(x)
    x = layers.Conv2D(2, 1, name="conv2")(x)
    x = layers.DepthwiseConv2D(2, depth_multiplier=2, use_bias=False, strides=2, name="dw2")(x)
    x = layers.ReLU(name="relu")(x)
    x = layers.Flatten(name="flatten")(x)
    return keras.Model(inputs, layers.Dense(2, name="out")(x))


@case("conv1", "conv2")
def multiplied_depthwise_with_statistics():
    inputs = keras.Input((4, 4, 2))
    x = layers.Conv2D(2, 1, activation="relu", name="conv1")(inputs)
    x = layers.DepthwiseConv2D(2, depth_multiplier=2, activation="relu", name="dw1")(x)
    x = layers.DepthwiseConv2D(2, depth_multiplier=2, use_bias=False, name="dw2")(x)
    x = layers.BatchNormalization(name="bn")(x)
    x = layers.ReLU(name="relu")(x)
    x = layers.Conv2D(2, 2, activation="relu", name="conv2")(x)
    x = layers.Flatten(name="flatten")(x)
    return keras.Model(inputs, layers.Dense(2, name="out")(x))


@case("conv1", "conv2")
def padding_cropping_upsampling():
    inputs = keras.Input((5, 5, 2))
    x = layers.Conv2D(2, 2, name="conv1")(inputs)
    x = layers.ZeroPadding2D(((1, 0), (0, 2)), name="pad")(x)
    x = layers.ReLU(name="relu1")(x)
    x = layers.UpSampling2D(2, name="up")(x)
    x = layers.Cropping2D(((1, 2), (3, 1)), name="crop")(x)
    x = layers.Conv2D(2, 3, strides=2, name="conv2")(x)
    x = layers.Rescaling(0.5, offset=0.1, name="rescale")(x)
    x = layers.AveragePooling2D(2, strides=1, padding="same", name="average")(x)
    x = layers.MaxPooling2D(2, strides=1, name="overlapping")(x)
    x = layers.Flatten(name="flatten")(x)
    return keras.Model(inputs, layers.Dense(2, name="out")(x))


@case("dense1", "dense2")
def perceptron():
    return keras.Sequential(
        [
            keras.Input((5,)),
            layers.Dense(4, activation="relu", name="dense1"),
            layers.Dropout(0.5, name="drop"),
            layers.Dense(3, name="dense2"),
            layers.BatchNormalization(name="bn"),
            layers.Activation("swish", name="swish"),
            layers.GaussianNoise(0.1, name="noise"),
            layers.Dense(3, name="out"),
        ]
    )


@case("dense1", "dense2", smooth=True)
def dense_on_sequences():
    inputs = keras.Input((4, 3))
    x = layers.Dense(3, activation="elu", name="dense1")(inputs)
    x = layers.SpatialDropout1D(0.2, name="drop")(x)
    x = layers.Dense(2, activation="silu", name="dense2")(x)
    x = layers.GlobalAveragePooling1D(name="gap")(x)
    return keras.Model(inputs, layers.Dense(2, name="out")(x))


@case("stem", "left")
def several_consumers():
    inputs = keras.Input((6, 6, 2))
    x = layers.Conv2D(3, 3, name="stem")(inputs)
    x = layers.BatchNormalization(name="bn")(x)
    x = layers.ReLU(name="relu")(x)
    left = layers.Conv2D(2, 3, padding="same", activation="relu", name="left")(x)
    left = layers.Conv2D(2, 1, name="left2")(left)
    right = layers.Conv2D(2, 1, name="right")(x)
    pooled = layers.GlobalAveragePooling2D(name="gap")(x)
    pooled = layers.Dense(2, name="pooled")(pooled)
    merged = layers.Add(name="merge")([left, right])
    merged = layers.GlobalMaxPooling2D(name="gmp")(merged)
    return keras.Model(inputs, layers.Add(name="sum")([merged, pooled]))


@case("stem", "inner", "deeper")
def residual():
    inputs = keras.Input((5, 5, 3))
    x = layers.Conv2D(3, 3, padding="same", name="stem")(inputs)
    y = layers.Conv2D(2, 3, padding="same", name="inner")(x)
    y = layers.BatchNormalization(name="bn1")(y)
    y = layers.ReLU(name="relu1")(y)
    y = layers.Conv2D(4, 1, activation="relu", name="deeper")(y)
    y = layers.Conv2D(3, 3, padding="same", name="back")(y)
    y = layers.BatchNormalization(name="bn2")(y)
    x = layers.Add(name="add")([x, y])
    x = layers.ReLU(name="relu2")(x)
    x = layers.GlobalAveragePooling2D(name="gap")(x)
    return keras.Model(inputs, layers.Dense(2, name="out")(x))


@case("conv1")
def augmented():
    inputs = keras.Input((6, 6, 2))
    x = layers.RandomFlip("horizontal", seed=3, name="flip")(inputs)
    x = layers.RandomTranslation(0.2, 0.2, seed=3, name="shift")(x)
    x = layers.Rescaling(0.7, offset=-0.1, name="rescale")(x)
    x = layers.Conv2D(3, 3, activation="relu", name="conv1")(x)
    x = layers.GlobalAveragePooling2D(name="gap")(x)
    x = layers.Dense(3, name="logits")(x)
    return keras.Model(inputs, layers.Softmax(name="softmax")(x))


@case("conv1", "conv2", "hidden")
def nested():
    features = keras.Sequential(
        [
            keras.Input((6, 6, 2)),
            layers.Conv2D(3, 3, activation="relu", name="conv1"),
            layers.Conv2D(2, 3, name="conv2"),
        ],
        name="features",
    )
    hidden = keras.Input((2, 2, 2))
    middle = layers.ReLU(name="relu")(hidden)
    classifier = keras.Model(
        hidden,
        layers.Dense(3, activation="tanh", name="hidden")(layers.Flatten(name="flatten")(middle)),
        name="classifier",
    )
    inputs = keras.Input((6, 6, 2))
    x = layers.ZeroPadding2D(1, name="pad")(inputs)
    x = layers.Cropping2D(1, name="crop")(x)
    x = classifier(features(x))
    return keras.Model(inputs, layers.Dense(2, name="out")(x))


@case("first", "hidden")
def two_inputs():
    one, two = keras.Input((3,), name="one"), keras.Input((2,), name="two")
    x = layers.Dense(3, activation="relu", name="first")(one)
    x = layers.Dense(2, name="project")(x)
    x = layers.Add(name="add")([x, two])
    x = layers.Dense(3, activation="relu", name="hidden")(x)
    return keras.Model([one, two], layers.Dense(2, name="out")(x))


@case("up1", "up2")
def transposed_1d():
    inputs = keras.Input((4, 2))
    x = layers.Conv1DTranspose(3, 3, strides=2, padding="same", name="up1")(inputs)
    x = layers.BatchNormalization(name="bn")(x)
    x = layers.Activation("gelu", name="gelu")(x)
    x = layers.Conv1DTranspose(2, 2, use_bias=False, activation="tanh", name="up2")(x)
    x = layers.Flatten(name="flatten")(x)
    return keras.Model(inputs, layers.Dense(2, name="out")(x))


@case("conv1", "up1", "up2")
def transposed_2d():
    inputs = keras.Input((4, 5, 2))
    x = layers.Conv2D(3, 2, activation="relu", name="conv1")(inputs)
    x = layers.Conv2DTranspose(3, (3, 2), strides=(2, 1), padding="same", name="up1")(x)
    x = layers.BatchNormalization(name="bn")(x)
    x = layers.LeakyReLU(name="leaky")(x)
    x = layers.Conv2DTranspose(
        2, 2, strides=2, output_padding=1, activation="relu", use_bias=False, name="up2"
    )(x)
    return keras.Model(inputs, layers.Conv2D(2, 1, name="out")(x))


@case("conv1", "up1")
def transposed_3d():
    inputs = keras.Input((2, 3, 2, 1))
    x = layers.Conv3D(2, 1, activation="relu", name="conv1")(inputs)
    x = layers.Conv3DTranspose(2, 2, strides=(1, 2, 1), activation="relu", name="up1")(x)
    x = layers.Conv3DTranspose(2, 1, name="up2")(x)
    x = layers.GlobalAveragePooling3D(name="gap")(x)
    return keras.Model(inputs, x)


@case("one", "two", "three", smooth=True)
def einsum_dense():
    inputs = keras.Input((4, 3))
    x = layers.EinsumDense("abc,cd->abd", (4, 3), bias_axes="d", activation="tanh", name="one")(
        inputs
    )
    x = layers.BatchNormalization(name="bn")(x)
    x = layers.EinsumDense("...x,xy->...y", 3, activation="softplus", name="two")(x)
    x = layers.Dense(2, activation="tanh", name="three")(x)
    x = layers.Flatten(name="flatten")(x)
    return keras.Model(inputs, layers.EinsumDense("ab,bc->ac", 2, bias_axes="c", name="out")(x))


@case("tokens", "users", "conv", "hidden")
def embedding():
    tokens = keras.Input((4,), dtype="int32", name="sentence")
    user = keras.Input((), dtype="int32", name="user")
    spread = keras.initializers.RandomNormal(stddev=1.0)
    x = layers.Embedding(6, 3, embeddings_initializer=spread, name="tokens")(tokens)
    x = layers.BatchNormalization(name="bn")(x)
    x = layers.Activation("tanh", name="tanh")(x)
    x = layers.Conv1D(2, 2, name="conv")(x)
    x = layers.GlobalMaxPooling1D(name="pool")(x)
    y = layers.Embedding(5, 2, embeddings_initializer=spread, name="users")(user)
    y = layers.Dropout(0.3, name="drop")(y)
    y = layers.ELU(name="elu")(y)
    y = layers.Dense(2, name="of_user")(y)
    x = layers.Add(name="add")([x, y])
    x = layers.Dense(3, activation="tanh", name="hidden")(x)
    return keras.Model([tokens, user], layers.Dense(2, name="out")(x))


@case("conv1", "conv2")
def depthwise_1d():
    inputs = keras.Input((7, 2))
    x = layers.Conv1D(2, 2, name="conv1")(inputs)
    x = layers.DepthwiseConv1D(3, padding="same", activation="relu", name="dw1")(x)
    x = layers.BatchNormalization(name="bn")(x)
    x = layers.Conv1D(2, 1, name="conv2")(x)
    x = layers.DepthwiseConv1D(2, strides=2, depth_multiplier=2, use_bias=False, name="dw2")(x)
    x = layers.ReLU(name="relu")(x)
    x = layers.Flatten(name="flatten")(x)
    return keras.Model(inputs, layers.Dense(2, name="out")(x))


@case("conv1", "conv2")
def as_many_groups_as_channels():
    inputs = keras.Input((6, 6, 2))
    x = layers.Conv2D(3, 1, name="conv1")(inputs)
    x = layers.Conv2D(3, 3, groups=3, padding="same", activation="relu", name="dw1")(x)
    x = layers.Conv2D(6, 2, groups=3, dilation_rate=2, padding="same", use_bias=False, name="dw2")(
        x
    )
    x = layers.BatchNormalization(name="bn")(x)
    x = layers.Conv2D(2, 1, activation="tanh", name="conv2")(x)
    x = layers.Reshape((36, 2), name="row")(x)
    x = layers.Conv1D(4, 3, groups=2, strides=4, padding="same", name="dw3")(x)
    x = layers.Flatten(name="flatten")(x)
    return keras.Model(inputs, layers.Dense(2, name="out")(x))


@case("conv1", "conv2")
def instance_normalization():
    inputs = keras.Input((4, 4, 2))
    x = layers.Conv2D(3, 2, name="conv1")(inputs)
    x = layers.GroupNormalization(groups=-1, name="norm1")(x)
    x = layers.ReLU(name="relu1")(x)
    x = layers.Conv2D(2, 2, padding="same", name="conv2")(x)
    x = layers.GroupNormalization(groups=2, scale=False, epsilon=0.1, name="norm2")(x)
    x = layers.Activation("tanh", name="tanh")(x)
    x = layers.Flatten(name="flatten")(x)
    return keras.Model(inputs, layers.Dense(2, name="out")(x))


@case("conv1", "conv2", "conv3", "conv4")
def reshaped():
    inputs = keras.Input((4, 4, 2))
    x = layers.Conv2D(3, 1, activation="tanh", name="conv1")(inputs)
    x = layers.Reshape((16, 3), name="to_sequence")(x)
    x = layers.BatchNormalization(name="bn")(x)
    x = layers.Conv1D(2, 2, strides=2, activation="relu", name="conv2")(x)
    x = layers.Reshape((-1, 4), name="in_pairs")(x)
    x = layers.Dense(3, name="conv3")(x)
    x = layers.Reshape((2, 2, 3), name="to_image")(x)
    x = layers.Permute((2, 1, 3), name="permute")(x)
    x = layers.PReLU(name="prelu")(x)
    x = layers.Conv2D(2, 1, activation="gelu", name="conv4")(x)
    x = layers.Reshape((-1,), name="to_vector")(x)
    return keras.Model(inputs, layers.Dense(2, name="out")(x))


@case("conv1", "conv2", "dense")
def resized_and_repeated():
    inputs = keras.Input((4, 4, 2))
    x = layers.Conv2D(3, 1, activation="relu", name="conv1")(inputs)
    x = layers.RandomFlip(seed=1, name="flip")(x)
    x = layers.RandomRotation(0.1, seed=1, name="rotate")(x)
    x = layers.CenterCrop(3, 3, name="crop")(x)
    x = layers.Resizing(4, 5, name="resize")(x)
    x = layers.Conv2D(2, 2, activation="relu", name="conv2")(x)
    x = layers.RandomContrast(0.1, seed=1, name="contrast")(x)
    x = layers.AdaptiveAveragePooling2D(2, name="adaptive")(x)
    x = layers.Flatten(name="flatten")(x)
    x = layers.Dense(3, activation="relu", name="dense")(x)
    x = layers.RepeatVector(3, name="repeat")(x)
    return keras.Model(inputs, layers.Dense(2, name="out")(x))


@case("conv1", "conv2", "dense")
def operations():
    inputs = keras.Input((4, 4, 2))
    x = layers.Conv2D(3, 2, name="conv1")(inputs)
    x = ops.relu6(3.0 - x * 5.0) / 6.0
    x = layers.BatchNormalization(name="bn")(x)
    x = ops.leaky_relu(x, negative_slope=0.1)
    x = layers.Conv2D(2, 1, name="conv2")(x)
    x = ops.gelu(ops.clip(x, -2.0, 2.0) + np.float32(0.1))
    x = layers.Flatten(name="flatten")(x)
    x = layers.Dense(3, name="dense")(-x)
    x = ops.sigmoid(ops.maximum(x, -1.0) ** 2)
    return keras.Model(inputs, layers.Dense(2, name="out")(ops.cast(x, "float32")))


@case("conv", "one", "two", expanded=True)
def separable():
    inputs = keras.Input((5, 5, 2))
    x = layers.Conv2D(2, 1, activation="relu", name="conv")(inputs)
    x = layers.SeparableConv2D(
        3, 3, padding="same", depth_multiplier=2, activation="relu", name="one"
    )(x)
    x = layers.SeparableConv2D(2, 2, strides=2, use_bias=False, name="two")(x)
    x = layers.BatchNormalization(name="bn")(x)
    x = layers.ReLU(name="relu")(x)
    x = layers.Flatten(name="flatten")(x)
    return keras.Model(inputs, layers.Dense(2, name="out")(x))


@case("inner", "separable", expanded=True)
def time_distributed():
    inputs = keras.Input((5, 3))
    dense = layers.Dense(3, activation="tanh", name="inner")
    x = layers.TimeDistributed(dense, name="outer")(inputs)
    x = layers.SeparableConv1D(2, 2, activation="relu", name="separable")(x)
    x = layers.TimeDistributed(layers.Dense(2, name="last"), name="outer2")(x)
    return keras.Model(inputs, x)


@case("stem", "bottleneck", "project", smooth=True)
def residual_stream():
    inputs = keras.Input((5, 5, 2))
    x = layers.Conv2D(3, 3, padding="same", name="stem")(inputs)
    for number in range(2):  # each reads the stream and adds to it, the first with one convolution
        y = layers.BatchNormalization(name=f"bn{number}")(x)
        y = layers.Activation("gelu", name=f"gelu{number}")(y)
        if number:
            y = layers.Conv2D(2, 1, activation="tanh", name="bottleneck")(y)
        y = layers.Conv2D(3, 3, padding="same", use_bias=number > 0, name=f"back{number}")(y)
        x = layers.Add(name=f"add{number}")([x, y])
    shortcut = layers.Conv2D(2, 1, strides=2, name="project")(x)
    y = layers.Conv2D(2, 2, strides=2, padding="same", name="down")(x)
    x = layers.Average(name="average")([shortcut, y])
    x = layers.Activation("softplus", name="softplus")(x)
    x = layers.GlobalAveragePooling2D(name="gap")(x)
    return keras.Model(inputs, layers.Dense(2, name="out")(x))


@case("first", "second", "third")
def dense_block():
    inputs = keras.Input((6, 6, 2))
    x = layers.Conv2D(2, 3, name="first")(inputs)
    y = layers.BatchNormalization(name="bn1")(x)
    y = layers.ReLU(name="relu1")(y)
    y = layers.Conv2D(3, 3, padding="same", name="second")(y)
    x = layers.Concatenate(name="concat1")([x, y])
    y = layers.BatchNormalization(name="bn2")(x)
    y = layers.ReLU(name="relu2")(y)
    y = layers.Conv2D(2, 3, padding="same", use_bias=False, name="third")(y)
    x = layers.Concatenate(name="concat2")([y, x])
    x = layers.BatchNormalization(name="bn3")(x)
    x = layers.MaxPooling2D(2, name="pool")(x)
    x = layers.Flatten(name="flatten")(x)
    return keras.Model(inputs, layers.Dense(2, name="out")(x))


@case("conv", "reduce", smooth=True)
def squeeze_and_excite():
    inputs = keras.Input((5, 5, 2))
    x = layers.Conv2D(3, 3, use_bias=False, name="conv")(inputs)
    x = layers.BatchNormalization(name="bn")(x)
    x = layers.Activation("silu", name="silu")(x)
    gate = layers.GlobalAveragePooling2D(keepdims=True, name="gap")(x)
    gate = layers.Conv2D(2, 1, activation="silu", name="reduce")(gate)
    gate = layers.Conv2D(3, 1, activation="sigmoid", name="expand")(gate)
    x = layers.Multiply(name="excite")([x, gate])
    x = layers.Conv2D(2, 1, name="last")(x)
    return keras.Model(inputs, layers.GlobalAveragePooling2D(name="pool")(x))


@case("conv", "other", smooth=True)
def spatial_gate_and_operations():
    inputs = keras.Input((5, 4, 2))
    x = layers.Conv2D(3, 2, activation="softplus", name="conv")(inputs)
    mask = layers.Conv2D(1, 1, activation="sigmoid", name="mask")(x)
    x = x * mask
    y = layers.Conv2D(3, 2, activation="tanh", name="other")(inputs)
    x = keras.ops.concatenate([x, y, x], axis=-1)
    x = layers.DepthwiseConv2D(2, name="depthwise")(x)
    x = layers.GlobalAveragePooling2D(name="gap")(x)
    return keras.Model(inputs, layers.Dense(2, name="out")(x))


@case("feed", smooth=True)
def transformer_block():
    inputs = keras.Input((4, 3))
    x = layers.Dense(5, name="embed")(inputs)
    y = layers.LayerNormalization(name="norm1")(x)
    y = layers.MultiHeadAttention(3, 2, value_dim=3, dropout=0.1, name="attention")(
        y, y, use_causal_mask=True
    )
    x = layers.Add(name="add1")([x, y])
    y = layers.LayerNormalization(name="norm2")(x)
    y = layers.Dense(4, activation="gelu", name="feed")(y)
    x = layers.Add(name="add2")([x, layers.Dense(5, name="back")(y)])
    x = layers.GlobalAveragePooling1D(name="gap")(x)
    return keras.Model(inputs, layers.Dense(2, name="out")(x))


@case("hidden", smooth=True)
def grouped_cross_attention():
    inputs, memory = keras.Input((3, 4), name="queries"), keras.Input((5, 4), name="memory")
    x = layers.GroupQueryAttention(3, 4, 2, name="attention")(inputs, memory)
    x = layers.Dense(3, activation="tanh", name="hidden")(x)
    x = layers.Flatten(name="flatten")(x)
    return keras.Model([inputs, memory], layers.Dense(2, name="out")(x))


@case("left", "merged", smooth=True)
def branches_of_positions():
    inputs = keras.Input((4, 4, 2))
    left = layers.Conv2D(2, 2, activation="tanh", name="left")(inputs)
    right = layers.Conv2D(2, 2, name="right")(layers.ZeroPadding2D(((0, 1), 0))(inputs))
    x = layers.Concatenate(axis=1, name="above")([left, right])
    up = layers.Conv2D(3, 1, name="merged")(x)
    down = layers.Conv2D(3, 1, activation="softplus", name="deeper")(x)
    x = layers.Flatten(name="flatten")(layers.Subtract(name="subtract")([up, down]))
    return keras.Model(inputs, layers.Dense(2, name="out")(x))
