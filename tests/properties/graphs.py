"""Random Functional graphs: branches, joins, gates, residual streams, dense blocks, shared layers.

A recipe is plain data (what hypothesis draws and shrinks); `build` reads it as a list of moves on a
pool of tensors. A move takes tensors by how long ago they were made, so that a short recipe of
zeros is a chain; what does not fit (images grown too small, unlike shapes) is made to fit.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import keras
from hypothesis import strategies as st
from keras import layers, ops

from tests.cases import randomize

SMOOTH = [None, "tanh", "softplus", "gelu"]
KINKED = [*SMOOTH, "relu", "leaky_relu"]

_KINKED_MOVES = {"max_pool", "maximum", "relu", "prelu"}


@dataclasses.dataclass
class _Pool:
    """The tensors so far, each with the inputs it depends on."""

    inputs: list
    smooth: bool
    made: list = dataclasses.field(default_factory=list)
    shared: dict = dataclasses.field(default_factory=dict)

    def put(self, tensor):
        self.made.append(tensor)

    def back(self, ago: int):
        return self.made[-1 - ago % len(self.made)]

    def like(self, x, ago: int):
        """Another tensor of the same shape, or one made so by a layer of its own; or the same."""
        other = self.back(ago)
        if tuple(other.shape) == tuple(x.shape):
            return other
        if len(other.shape) == len(x.shape) and other.shape[1:-1] == x.shape[1:-1]:
            return mixing(other, x.shape[-1])
        return mixing(x, x.shape[-1])


def is_image(x) -> bool:
    return len(x.shape) == 4


def small(x) -> bool:
    return min(x.shape[1:3]) < 3


def mixing(x, units, activation=None, **settings):
    """A 1x1 convolution of an image, a dense layer of a vector."""
    if not is_image(x):
        return layers.Dense(units, activation=activation)(x)
    return layers.Conv2D(units, 1, activation=activation, **settings)(x)


def as_vector(x, flat: bool):
    if not is_image(x):
        return x
    return (layers.Flatten if flat else layers.GlobalAveragePooling2D)()(x)


def _activation(pool, choice: int):
    names = SMOOTH if pool.smooth else KINKED
    return names[choice % len(names)]


def _conv(pool, x, a, b, c):
    if not is_image(x):
        return layers.Dense(1 + b % 3, activation=_activation(pool, c), use_bias=a != 1)(x)
    fits = not small(x)
    return layers.Conv2D(
        1 + b % 3,
        (1 + a % 2, 1 + b % 2),
        strides=2 if fits and a == 3 else 1,
        padding="valid" if fits and c == 3 else "same",
        use_bias=a != 1,
        activation=_activation(pool, c),
    )(x)


def _dense_anywhere(pool, x, a, b, c):
    return layers.Dense(1 + b % 3, activation=_activation(pool, c))(x)


def _norm(pool, x, a, b, c):
    return layers.BatchNormalization(center=a != 1, scale=b != 1)(x)


def _over_channels(pool, x, a, b, c):
    """Channels behind this can only be doubled."""
    if b % 2:
        return layers.RMSNormalization(epsilon=0.1)(x)
    return layers.LayerNormalization(epsilon=0.1, center=a != 1, scale=c != 1)(x)


def _act(pool, x, a, b, c):
    return layers.Activation(_activation(pool, 1 + c))(x)


def _handed_on(pool, x, a, b, c):
    """The very same tensor, at inference."""
    makers = [lambda: layers.Dropout(0.0), layers.Identity, lambda: layers.Activation("linear")]
    return makers[a % 3]()(x)


def _depthwise(pool, x, a, b, c):
    if not is_image(x):
        return layers.Activation("tanh")(x)
    # A single weight makes oneDNN (TensorFlow 2.21) fail to differentiate the gradient.
    size = 2 if x.shape[-1] == 1 else 1 + a % 2
    return layers.DepthwiseConv2D(
        size, depth_multiplier=1 + b % 2, padding="same", activation=_activation(pool, c)
    )(x)


def _average_pool(pool, x, a, b, c):
    return layers.AveragePooling2D(2)(x) if is_image(x) and not small(x) else x


def _max_pool(pool, x, a, b, c):
    return layers.MaxPooling2D(2, strides=1, padding="same")(x) if is_image(x) else x


def _join(layer: type, operation: Callable):
    def move(pool, x, a, b, c):
        y = pool.like(x, a)
        if b % 2:
            return operation(x, y)
        several = [x, y, pool.like(x, c)] if layer is not layers.Subtract and c else [x, y]
        return layer()(several)

    return move


def _concatenate(pool, x, a, b, c):
    y = pool.back(a)
    if len(y.shape) != len(x.shape) or y.shape[1:-1] != x.shape[1:-1]:
        y = x
    parts = [[x, y], [y, x], [x, y, x]][c % 3]
    if b % 2:
        return ops.concatenate(parts, axis=-1)
    return layers.Concatenate()(parts)


def _above(pool, x, a, b, c):
    """A concatenation of positions, whose channels are tied."""
    if not is_image(x):
        return _concatenate(pool, x, a, b, c)
    return layers.Concatenate(axis=1 + b % 2)([x, pool.like(x, a)])


def _excite(pool, x, a, b, c):
    """Squeeze-and-excitation; of a vector, a gate."""
    gate = layers.GlobalAveragePooling2D(keepdims=True)(x) if is_image(x) else x
    if a % 2:
        gate = mixing(gate, 1 + b % 2, _activation(pool, c))
    gate = mixing(gate, x.shape[-1], "sigmoid")
    return layers.Multiply()([x, gate]) if c % 2 else x * gate


def _mask(pool, x, a, b, c):
    """A spatial gate of one channel, made of the same or of another tensor."""
    other = pool.back(a)
    alike = len(other.shape) == len(x.shape) and other.shape[1:-1] == x.shape[1:-1]
    mask = mixing(other if alike else x, 1, "sigmoid")
    return layers.Multiply()([x, mask]) if c % 2 else mask * x


def _residual(pool, x, a, b, c):
    """A block that reads the stream and adds to it."""
    y = layers.BatchNormalization()(x) if a % 2 else x
    y = layers.Activation(_activation(pool, 1 + c))(y)
    if b:
        y = mixing(y, b, _activation(pool, c))
    y = mixing(y, x.shape[-1])
    return x + y if a > 1 else layers.Add()([x, y])


def _dense_block(pool, x, a, b, c):
    y = layers.BatchNormalization()(x) if a % 2 else x
    y = mixing(y, 1 + b % 2, _activation(pool, c))
    return layers.Concatenate()([x, y] if c % 2 else [y, x])


def _shared(pool, x, a, b, c):
    """The same layer on two tensors: one with weights, or without."""
    y = pool.like(x, 1 + a)
    makers = [
        lambda: layers.Conv2D(2, 1) if is_image(x) else layers.Dense(2),
        lambda: layers.Activation("tanh"),
        lambda: layers.BatchNormalization(),
        lambda: layers.Dropout(0.0),  # Keras does not save the state of its random numbers
    ]
    layer = makers[b % len(makers)]()
    first, second = layer(x), layer(y)
    return layers.Add()([first, second]) if c % 2 else layers.Concatenate()([first, second])


def _reuse_join(pool, x, a, b, c):
    """One join layer called twice."""
    join = [layers.Add, layers.Multiply, layers.Concatenate][b % 3]()
    y = pool.like(x, 1 + a)
    first = join([x, y])
    return join([first, first]) if c % 2 else join([first, pool.like(first, 0)])


def _passed_on(pool, x, a, b, c):
    """A consumer reads the tensor, and what it makes is joined to what comes behind it."""
    y = mixing(x, x.shape[-1], _activation(pool, c))
    behind = layers.BatchNormalization()(x) if a % 2 else layers.Activation("tanh")(x)
    return [layers.Add, layers.Multiply, layers.Average, layers.Concatenate][b % 4]()([y, behind])


def _nested(pool, x, a, b, c):
    """A model in the model, called once or twice."""
    inputs = keras.Input(x.shape[1:])
    inner = mixing(inputs, 1 + b % 3, _activation(pool, c))
    inner = layers.Activation("tanh")(inner) + inner if a % 2 else inner * inner
    model = keras.Model(inputs, mixing(inner, x.shape[-1]))
    y = model(x)
    return model(y) if c == 3 else layers.Add()([x, y])


def _to_vector(pool, x, a, b, c):
    return as_vector(x, bool(a % 2))


def _pad(pool, x, a, b, c):
    return layers.ZeroPadding2D((a % 2, 1))(x) if is_image(x) and small(x) else x


def _twice(pool, x, a, b, c):
    """The same tensor twice in one join."""
    return [
        lambda: x + x,
        lambda: x * x,
        lambda: layers.Add()([x, x]),
        lambda: layers.Concatenate()([x, x]),
        lambda: layers.Average()([x, x, pool.like(x, c)]),
    ][b % 5]()


def _other_input(pool, x, a, b, c):
    """Another of the model's inputs, as it is or behind a layer."""
    if len(pool.inputs) < 2:
        return mixing(x, 2)
    other = pool.inputs[1 + a % (len(pool.inputs) - 1)]
    return other if b % 2 else mixing(other, 1 + c % 3, _activation(pool, c))


MOVES: dict[str, Callable] = {
    "conv": _conv,
    "dense": _dense_anywhere,
    "norm": _norm,
    "over_channels": _over_channels,
    "act": _act,
    "relu": lambda pool, x, a, b, c: layers.ReLU()(x),
    "prelu": lambda pool, x, a, b, c: layers.PReLU()(x),
    "handed_on": _handed_on,
    "depthwise": _depthwise,
    "average_pool": _average_pool,
    "max_pool": _max_pool,
    "add": _join(layers.Add, lambda x, y: x + y),
    "subtract": _join(layers.Subtract, lambda x, y: x - y),
    "multiply": _join(layers.Multiply, lambda x, y: x * y),
    "average": _join(layers.Average, lambda x, y: y + x),
    "maximum": _join(layers.Maximum, ops.maximum),
    "concatenate": _concatenate,
    "above": _above,
    "excite": _excite,
    "mask": _mask,
    "residual": _residual,
    "dense_block": _dense_block,
    "shared": _shared,
    "reuse_join": _reuse_join,
    "passed_on": _passed_on,
    "nested": _nested,
    "to_vector": _to_vector,
    "pad": _pad,
    "twice": _twice,
    "other_input": _other_input,
}


def recipes(smooth: bool = False, outputs: int = 2, longest: int = 8):
    """Recipes of random graphs.

    Args:
      smooth: whether the net has no kinks.
      outputs: at most so many.
      longest: most moves; each makes one to four layers.
    """
    kinds = [kind for kind in MOVES if not (smooth and kind in _KINKED_MOVES)]
    number = st.integers(0, 3)
    move = st.tuples(st.sampled_from(kinds), number, number, number, number)
    return st.fixed_dictionaries(
        {
            "seed": st.integers(0, 1000),
            "smooth": st.just(smooth),
            "channels": st.sampled_from([2, 1, 3]),
            "images": st.integers(1, 2),
            "vector": st.booleans(),
            "start": st.tuples(number, number, number),
            "moves": st.lists(move, min_size=1, max_size=longest),
            "heads": st.integers(1, 3),
            "flat": st.booleans(),
            "outputs": st.integers(1, outputs),
        }
    )


def build(recipe) -> keras.Model:
    """The stock model of a recipe, with weights and statistics as if it had been trained."""
    keras.utils.clear_session(free_memory=False)
    keras.utils.set_random_seed(recipe["seed"])
    images = [keras.Input((4, 3, recipe["channels"])) for _ in range(recipe["images"])]
    inputs = images + ([keras.Input((3,))] if recipe["vector"] else [])
    pool = _Pool(inputs, recipe["smooth"])
    pool.put(_conv(pool, inputs[0], *recipe["start"]))
    for kind, ago, a, b, c in recipe["moves"]:
        x = pool.back(ago)
        if x.shape[-1] > 12 or (is_image(x) and max(x.shape[1:3]) > 9):
            x = mixing(x, 2)
        pool.put(MOVES[kind](pool, x, a, b, c))
    ends = [pool.back(ago) for ago in range(min(recipe["heads"], len(pool.made)))]
    vectors = [as_vector(end, recipe["flat"]) for end in ends]
    model = keras.Model(*_reachable(inputs, _heads(recipe, vectors)))
    randomize(model, recipe["seed"])
    return model


def _heads(recipe, vectors) -> list:
    outputs = recipe["outputs"]
    if outputs > 1:
        return [layers.Dense(2)(vector) for vector in vectors]
    if len(vectors) == 1:
        return [layers.Dense(2)(vectors[0])]
    if recipe["seed"] % 2:
        return [layers.Dense(2)(layers.Concatenate()(vectors))]
    return [layers.Add()([layers.Dense(2)(vector) for vector in vectors])]


def _reachable(inputs, outputs):
    """The inputs that the outputs depend on, and the outputs; single ones bare."""
    seen, stack = set(), list(outputs)
    while stack:
        tensor = stack.pop()
        if id(tensor) not in seen:
            seen.add(id(tensor))
            operation, node, _ = tensor._keras_history
            stack.extend(operation._inbound_nodes[node].input_tensors)
    used = [tensor for tensor in inputs if id(tensor) in seen]
    return (
        used[0] if len(used) == 1 else used,
        outputs[0] if len(outputs) == 1 else outputs,
    )
