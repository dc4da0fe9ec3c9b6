"""ConvNeXt's LayerScale, growable."""

import keras

from tfgrow import _keras
from tfgrow.layers.growable import Axes, GrowableChannelwise


@keras.saving.register_keras_serializable(package="tfgrow")
class LayerScale(GrowableChannelwise, _keras.LayerScale):
    """The scale per channel of `keras.applications.convnext`, which grows with its producer."""

    stock_class = _keras.LayerScale
    variable_axes = {"gamma": Axes(channel=-1)}

    def resized_attributes(self, channels):
        return {"projection_dim": channels}

    def apply_channels(self, inputs, variables):
        return inputs * variables["gamma"]
