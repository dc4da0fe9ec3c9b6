"""Growth under `tf.distribute`, with two logical CPUs for devices.

In a process of their own: devices are set up before TensorFlow starts, and a second
`MirroredStrategy` in one process fails in TensorFlow where gradients have other shapes.
"""

import pytest

from tests.integration.fitting import in_another_process

TWO_DEVICES = """
import contextlib
import sys
import tensorflow as tf

[cpu] = tf.config.list_physical_devices("CPU")
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)

import keras
import numpy as np
import tfgrow
from tests.integration.fitting import arrays, convnet, logits_loss, mlp, quick_oracle
from tfgrow.callbacks import Growth

MORPHISMS = ("split", "add", "prune", "enlarge_kernel")
BATCH_NORM = ("bn/moving_mean", "bn/moving_variance")

def grown(make, scope, epochs):
    with scope:
        model = make()
        model.compile(keras.optimizers.Adam(1e-2, clipnorm=1.0), logits_loss())
    x, y = arrays(model)
    data = tf.data.Dataset.from_tensor_slices((x, y)).batch(16)
    growth = Growth(quick_oracle(morphisms=MORPHISMS), (x, y), every=1, verbose=0)
    model.fit(data, epochs=epochs, verbose=0, callbacks=[growth])
    return model, growth.journal

strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
mirrored, journal = grown(convnet, strategy.scope(), epochs=3)
assert [event.status for event in journal] == ["applied", "applied"]
for variable in (*mirrored.weights, *mirrored.optimizer.variables):
    if not variable.path.endswith(BATCH_NORM):  # each device has its own, as Keras trains them
        first, second = (np.array(replica) for replica in variable.value.values)
        np.testing.assert_array_equal(first, second, err_msg=variable.path)

x, _ = arrays(mirrored)
path = sys.argv[1] + "/model.keras"
mirrored.save(path)
loaded = keras.models.load_model(path)  # outside of the strategy
assert loaded.count_params() == journal[-1].params_after
outputs = tfgrow.strip(mirrored)(x, training=False)
np.testing.assert_allclose(loaded(x, training=False), outputs, atol=2e-3)

# what is trained on two devices grows as on one
(two, [on_two]), (one, [on_one]) = (
    grown(mlp, scope, epochs=2) for scope in (strategy.scope(), contextlib.nullcontext())
)
assert on_two.widths == on_one.widths
np.testing.assert_allclose(on_two.estimated_change, on_one.estimated_change, rtol=1e-3)
x, _ = arrays()
np.testing.assert_allclose(two(x), one(x), atol=1e-4)
"""


@pytest.mark.slow
def test_mirrored_models_grow(tmp_path):
    run = in_another_process(TWO_DEVICES, str(tmp_path))
    assert run.returncode == 0, run.stderr
