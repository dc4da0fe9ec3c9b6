"""What a layer must say about itself to take part in growth.

Two kinds of layers exist for tfgrow:

* a **mixing** layer (Dense, Conv...) combines input channels into new output channels: it is the
  producer of the channels it makes and a consumer of the channels it reads;
* a **channelwise** layer (BatchNormalization, an activation, pooling, Flatten...) treats every
  channel by itself: it lies on the path between a producer and its consumers.

A layer takes part by subclassing `Mixing` or `Channelwise`, the two faces of `Growable`. Nothing
else in tfgrow asks for a layer's type.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import keras
import numpy as np
from keras import ops

from tfgrow.types import ChannelMap

if TYPE_CHECKING:  # the mixins below are only ever used beside a Keras layer class
    from keras.layers import Layer as _Base
else:
    _Base = object


@dataclasses.dataclass(frozen=True)
class Axes:
    """Which axes of a variable are channels.

    Attributes:
      fan_in: axis of the input channels (mixing layers), or None.
      fan_out: axis of the output channels (mixing layers), or None.
      channel: axis of the channels that pass through (channelwise layers), or None.
    """

    fan_in: int | None = None
    fan_out: int | None = None
    channel: int | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class Moments:
    """Mean and variance `[n]` of the values that reach a channelwise layer, per unit."""

    mean: Any
    variance: Any


@dataclasses.dataclass(frozen=True)
class Enlargement:
    """A larger kernel of a convolution.

    Attributes:
      kernel_size: its size.
      offset: per spatial axis, where the old kernel begins in it.
      attributes: config attributes that change.
    """

    kernel_size: tuple[int, ...]
    offset: tuple[int, ...]
    attributes: Mapping[str, Any]


class Growable(_Base):
    """Interface of a layer that can grow. Subclass `Mixing` or `Channelwise`, not this.

    Attributes:
      stock_class: the plain Keras layer that `strip` turns this layer into and `convert` makes it
        from; None for a user's own layer, which is left as it is.
      variable_axes: channel axes by variable attribute, e.g. `{"kernel": Axes(fan_in=-2,
        fan_out=-1), "bias": Axes(fan_out=-1)}`. Attributes that are None on the layer are ignored.
      kernel_name: which of them is multiplied with the inputs; the others are biases and the like.

    Example, a channelwise layer with a slope per channel:

    >>> import keras, tfgrow
    >>> class Scale(tfgrow.layers.GrowableChannelwise, keras.layers.Layer):
    ...     variable_axes = {"slope": tfgrow.layers.Axes(channel=-1)}
    ...     def build(self, input_shape):
    ...         self.slope = self.add_weight(shape=input_shape[-1:], initializer="ones")
    ...     def call(self, inputs):
    ...         return self.apply_channels(inputs, self.growable_variables())
    ...     def apply_channels(self, inputs, variables):
    ...         return inputs * variables["slope"]
    >>> model = tfgrow.convert(keras.Sequential([keras.Input((4,)),
    ...     keras.layers.Dense(3, name="hidden"), Scale(name="scale"), keras.layers.Dense(2)]))
    >>> tfgrow.widen(model, "hidden", 2).widths
    {'hidden': (3, 5)}
    >>> tuple(model.get_layer("scale").slope.shape)
    (5,)
    """

    stock_class: ClassVar[type | None] = None
    variable_axes: ClassVar[Mapping[str, Axes]] = {}
    kernel_name: ClassVar[str] = "kernel"

    @classmethod
    def takes(cls, layer: keras.Layer) -> bool:
        """Whether a layer of `stock_class` is of the kind that this class is the twin of."""
        del layer
        return True

    def growth_blocked(self) -> str | None:
        """Why this layer, as it is configured, can't take part; None if it can."""
        return None

    def growable_variables(self) -> dict[str, Any]:
        """The layer's variables that have a channel axis, by attribute name."""
        named = {name: getattr(self, name, None) for name in self.variable_axes}
        return {name: variable for name, variable in named.items() if variable is not None}


class KernelLayer(Growable):
    """A layer whose response is linear in its kernel: a mixing one, or a depthwise convolution."""

    def linear(self, inputs, kernel, bias=None):
        """The layer's response before its activation, with the given weights.

        Args:
          inputs: `[N, ..., in]`.
          kernel: shaped like the layer's kernel, except that channel axes may have any size.
          bias: `[out]` or None.

        Returns:
          `[N, ..., out]`.
        """
        raise NotImplementedError

    def activate(self, outputs):
        """The layer's own activation; identity when it has none."""
        activation = getattr(self, "activation", None)
        return outputs if activation is None else activation(outputs)

    def enlargement(self, input_shape) -> Enlargement | str:
        """The next larger kernel that leaves the output's shape alone, or why there is none."""
        del input_shape
        return f"layer '{self.name}' ({type(self).__name__}) has no kernel that can become larger"

    def linear_enlarged(self, inputs, kernel):
        """The response to a kernel of the larger size, without bias."""
        raise NotImplementedError


class Mixing(KernelLayer):
    """A layer that makes new channels out of all the channels it reads.

    One of your own has `variable_axes`, `linear`, `unfold`, and its width as an attribute that its
    config names; `docs/examples.md` shows a graph convolution.

    Attributes:
      units_attribute: name of the config attribute that holds the number of output channels.
    """

    units_attribute: ClassVar[str] = "units"

    @property
    def growth_units(self) -> int:
        """Number of output channels now."""
        return int(getattr(self, self.units_attribute))

    def width_attributes(self, units: int) -> dict[str, Any]:
        """The config attributes of the layer with another number of output channels."""
        return {self.units_attribute: units}

    @property
    def absorbs_constant(self) -> bool:
        """Whether the variable `bias` is added to the response as it is, at every position."""
        return False

    def unfold(self, inputs):
        """The inputs that each output position sees: `[N, ..., c] -> [N, c, P, T]`.

        With a kernel reshaped to `[T, c, O]`, `linear` is the contraction of both over `T` and `c`.
        """
        raise NotImplementedError

    def unfold_enlarged(self, inputs, kernel_size):
        """`unfold` for a kernel of the larger size."""
        raise NotImplementedError

    @property
    def kernel_spatial(self) -> tuple[int, ...]:
        """The kernel's shape without its channel axes; `T` is its product."""
        axes, shape = self.variable_axes[self.kernel_name], getattr(self, self.kernel_name).shape
        channels = {axis % len(shape) for axis in (axes.fan_in, axes.fan_out) if axis is not None}
        return tuple(size for axis, size in enumerate(shape) if axis not in channels)

    def kernel_from_rows(self, rows):
        """Weights `[T, c, O]`, in the order of `unfold`, in the layout of the layer's kernel."""
        axes = self.variable_axes[self.kernel_name]
        kernel = ops.reshape(rows, (*self.kernel_spatial, *rows.shape[-2:]))
        return ops.moveaxis(kernel, (-2, -1), (axes.fan_in, axes.fan_out))

    def flops_per_weight(self, output_shape) -> int:
        """Multiply-adds count as 2: FLOPs that one entry of the kernel costs per sample."""
        positions = [int(size) for size in output_shape[1:-1] if size is not None]
        return 2 * int(np.prod(positions, dtype=np.int64))


class Channelwise:
    """What tfgrow asks of a layer on the path between a producer and its consumers."""

    needs_moments: ClassVar[bool] = False
    """Whether the layer keeps statistics of its input that a new unit has to be given."""

    over_channels: ClassVar[bool] = False
    """Whether what it makes of a channel depends on all of them, and stays the same if each of them
    is there twice: they can only be doubled, all at once."""

    subtracted: ClassVar[str | None] = None
    """Name of a variable that is subtracted from the input in inference mode, if there is one."""

    def channel_map(self, incoming: ChannelMap, input_shape) -> ChannelMap:
        """Where the channels lie on the last axis of the output, given where they lie before."""
        del input_shape
        return incoming

    def variable_map(self, name: str, incoming: ChannelMap) -> ChannelMap:
        """Where the channels lie on the channel axis of a variable, as on the input by default."""
        del name
        return incoming

    def resized_attributes(self, channels: int) -> dict[str, Any]:
        """The config attributes that follow when `channels` is the inputs' new last size.

        Empty for most layers: what they say of themselves names no number of channels.
        """
        del channels
        return {}

    def apply_channels(self, inputs, variables: Mapping[str, Any]):
        """The layer in inference mode on any number of channels, whose variables are given."""
        raise NotImplementedError

    def child_variables(self, variables, moments: Moments | None):
        """Variables of units that must compute what their parents do, in inference mode.

        Args:
          variables: the parents' variables, channel axis last-but-given by `variable_axes`.
          moments: moments of the children's values here, None if unknown.
        """
        del moments
        return dict(variables)

    def newborn_variables(self, variables, moments: Moments | None):
        """Variables of units that descend from none; `variables` are those of some live units."""
        del moments
        return dict(variables)


class GrowableChannelwise(Growable, Channelwise):
    """A channelwise layer with variables of its own: BatchNormalization, PReLU..."""


def from_stock(growable_class: Any, layer: keras.Layer) -> keras.Layer:
    """An unbuilt growable layer with the configuration of a stock one."""
    return growable_class.from_config(live_config(layer))


def to_stock(layer: keras.Layer) -> keras.Layer:
    """An unbuilt stock layer with the configuration of a growable one."""
    return layer.stock_class.from_config(live_config(layer))


def live_config(layer) -> dict[str, Any]:
    """A layer's config for use within the process: activations that are lambdas as they are.

    Written out, a lambda is byte code that Keras doesn't take back as an activation.
    """
    config = layer.get_config()
    if getattr(getattr(layer, "activation", None), "__name__", "") == "<lambda>":
        config["activation"] = layer.activation
    return config


def channels_last_only(layer) -> str | None:
    """The reason a layer with `data_format="channels_first"` is blocked, or None."""
    if getattr(layer, "data_format", "channels_last") == "channels_last":
        return None
    return (
        f"layer '{layer.name}' has data_format='channels_first'; growth needs the channels on the "
        "last axis: build it with data_format='channels_last'"
    )
