"""PReLU, growable."""

import keras
from keras import ops

from tfgrow.layers.growable import Axes, GrowableChannelwise


@keras.saving.register_keras_serializable(package="tfgrow")
class PReLU(GrowableChannelwise, keras.layers.PReLU):
    """`keras.layers.PReLU` whose channels grow with those of its producer."""

    stock_class = keras.layers.PReLU
    variable_axes = {"alpha": Axes(channel=-1)}

    def growable_variables(self):
        shared = self.shared_axes or ()
        if -1 in shared or self.input_spec.ndim - 1 in shared:
            return {}  # one slope for all channels: nothing of it belongs to a channel
        return super().growable_variables()

    def apply_channels(self, inputs, variables):
        alpha = variables.get("alpha", self.alpha)
        return ops.relu(inputs) - alpha * ops.relu(-inputs)
