"""BatchNormalization, growable."""

import keras
from keras import ops

from tfgrow.layers.growable import Axes, GrowableChannelwise


@keras.saving.register_keras_serializable(package="tfgrow")
class BatchNormalization(GrowableChannelwise, keras.layers.BatchNormalization):
    """`keras.layers.BatchNormalization` whose channels grow with those of its producer.

    A child of a split keeps what its parent computes in inference mode exactly, while its moving
    statistics are its own, so that training mode agrees up to batch noise: with the child's mean
    mu' and deviation s', gamma' = gamma s'/s and beta' = beta + gamma (mu' - mu)/s.
    """

    stock_class = keras.layers.BatchNormalization
    needs_moments = True
    subtracted = "moving_mean"
    variable_axes = {
        name: Axes(channel=-1) for name in ("gamma", "beta", "moving_mean", "moving_variance")
    }

    def growth_blocked(self):
        if self.axis not in (-1, self.input_spec.ndim - 1):
            return (
                f"layer '{self.name}' normalises axis {self.axis}; growth needs the channels on "
                "the last axis"
            )
        if getattr(self, "renorm", False):
            return f"layer '{self.name}' uses batch renormalisation, whose statistics can't grow"
        return None

    def apply_channels(self, inputs, variables):
        scale = ops.rsqrt(variables["moving_variance"] + self.epsilon) * variables.get("gamma", 1.0)
        offset = variables.get("beta", 0.0) - variables["moving_mean"] * scale
        return inputs * scale + offset

    def child_variables(self, variables, moments):
        child = dict(variables)
        if moments is None:
            return child
        mean, variance = variables["moving_mean"], variables["moving_variance"]
        # Without gamma (or beta) a change of deviation (or mean) could not be undone exactly.
        if "gamma" in variables:
            deviation = ops.sqrt(variance + self.epsilon)
            new_deviation = ops.sqrt(moments.variance + self.epsilon)
            child["moving_variance"] = moments.variance
            child["gamma"] = variables["gamma"] * new_deviation / deviation
        if "beta" in variables:
            gamma = variables.get("gamma", 1.0)
            shift = (moments.mean - mean) * ops.rsqrt(variance + self.epsilon)
            child["moving_mean"] = moments.mean
            child["beta"] = variables["beta"] + gamma * shift
        return child

    def newborn_variables(self, variables, moments):
        mean = variables["moving_mean"]
        newborn = {"moving_mean": ops.zeros_like(mean), "moving_variance": ops.ones_like(mean)}
        if moments is not None:
            newborn = {"moving_mean": moments.mean, "moving_variance": moments.variance}
        if "gamma" in variables:
            newborn["gamma"] = ops.ones_like(mean)
        if "beta" in variables:
            newborn["beta"] = ops.zeros_like(mean)
        return newborn
