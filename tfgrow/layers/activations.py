"""Which activation functions treat every channel by itself, and which belong to the loss."""

from keras import activations

_MIXING = ("softmax", "log_softmax", "sparsemax", "glu")
_ELEMENTWISE_NAMES = (
    "celu elu exponential gelu hard_shrink hard_sigmoid hard_silu hard_tanh leaky_relu linear "
    "log_sigmoid mish relu relu6 selu sigmoid silu soft_shrink softplus softsign sparse_plus "
    "sparse_sigmoid squareplus tanh tanh_shrink threshold"
).split()

_elementwise = {
    getattr(activations, name) for name in _ELEMENTWISE_NAMES if hasattr(activations, name)
}


def register_elementwise(function):
    """Declares that a user's activation treats every element by itself; usable as a decorator.

    Example:

    >>> import keras, tfgrow
    >>> @tfgrow.layers.register_elementwise
    ... def squared_relu(x):
    ...     return keras.ops.square(keras.ops.relu(x))
    >>> tfgrow.layers.activations.is_elementwise(squared_relu)
    True
    """
    _elementwise.add(function)
    return function


def is_elementwise(activation) -> bool:
    """Whether an activation (a function, an `Activation`-like layer's function or None) is."""
    return activation is None or activation in _elementwise
