"""Which activation functions treat every channel by itself, and which belong to the loss."""

from keras import activations, layers

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
    """Whether an activation (a function, a layer given as one, or None) is."""
    if isinstance(activation, layers.Activation):
        return is_elementwise(activation.activation)
    if isinstance(activation, layers.Layer):
        return type(activation) in _ELEMENTWISE_LAYERS
    return activation is None or activation in _elementwise


_ELEMENTWISE_LAYERS = (layers.ReLU, layers.LeakyReLU, layers.ELU, layers.Identity)


def unknown_activation(layer) -> str:
    """Why a layer whose activation isn't known to be elementwise can't be part of a path."""
    activation = layer.activation
    if isinstance(activation, layers.Layer):
        return (
            f"layer '{layer.name}' has the layer '{activation.name}' ({type(activation).__name__}) "
            "as its activation, which mixes channels, has weights or is unknown to tfgrow; call it "
            "after the layer instead of passing it as activation="
        )
    return (
        f"layer '{layer.name}' has an activation that mixes channels or is unknown to tfgrow "
        f"({getattr(activation, '__name__', activation)}); if it is an elementwise function, "
        "declare it with tfgrow.layers.register_elementwise"
    )
