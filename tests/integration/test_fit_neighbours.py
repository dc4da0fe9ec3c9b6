"""Growth beside the stock callbacks, before and after them in the list."""

import csv
import types

import keras
import numpy as np
import pytest
import tensorflow as tf

from tests.integration.fitting import (
    arrays,
    blind_growth,
    compiled,
    convnet,
    fit,
    mlp,
)

COLUMNS = {f"tfgrow_{n}" for n in ("params", "flops", "events")} | {
    "tfgrow_estimated_change",
    "tfgrow_measured_change",
}


def ordered(growth, others, first):
    return [growth, *others] if first else [*others, growth]


class Recorder(keras.callbacks.Callback):
    """Keeps what the model computes at the end of every epoch."""

    def __init__(self, x):
        super().__init__()
        self.x = x
        self.outputs = []

    def on_epoch_end(self, epoch, logs=None):
        self.outputs.append(np.array(self.model(self.x, training=False)))


@pytest.mark.parametrize("first", [True, False], ids=["growth_first", "growth_last"])
def test_a_crowd_of_stock_callbacks(first, tmp_path):
    """One fit beside them all, because fits are what takes the time."""
    crowd = fit_in_a_crowd(first, tmp_path)
    assert_columns_from_the_first_epoch_on(crowd)
    assert_tensorboard_has_the_scalars(crowd)
    assert_checkpoints_hold_every_width(crowd)
    # Reduced at the third epoch, which ran at half the rate, and at its end.
    np.testing.assert_allclose(crowd.history["learning_rate"], [0.1, 0.1, 0.05], rtol=1e-6)
    np.testing.assert_allclose(float(crowd.model.optimizer.learning_rate), 0.025, rtol=1e-6)


def fit_in_a_crowd(first, folder):
    """Grows an MLP from 3 to 5 units in 3 epochs."""
    model, (x, _) = compiled(mlp(), keras.optimizers.Adam(0.1)), arrays()
    recorder = Recorder(x)
    others = [
        keras.callbacks.CSVLogger(folder / "log.csv"),
        keras.callbacks.TensorBoard(folder / "board", histogram_freq=1),
        keras.callbacks.ModelCheckpoint(folder / "{epoch}.keras"),
        keras.callbacks.ModelCheckpoint(folder / "{epoch}.weights.h5", save_weights_only=True),
        # What it watches only rises, so that it acts at the third epoch.
        keras.callbacks.ReduceLROnPlateau("tfgrow_params", mode="min", patience=1, factor=0.5),
        keras.callbacks.TerminateOnNaN(),
        keras.callbacks.BackupAndRestore(folder / "backup"),
        recorder,
    ]
    given = ordered(blind_growth(), others, first)
    as_given = list(given)
    history = fit(model, given).history
    assert given == as_given  # Keras's list was reordered, not the user's
    return types.SimpleNamespace(
        folder=folder, model=model, history=history, x=x, outputs=recorder.outputs
    )


def assert_columns_from_the_first_epoch_on(crowd):
    rows = list(csv.DictReader((crowd.folder / "log.csv").open()))
    assert set(rows[0]) >= COLUMNS
    assert [int(row["tfgrow_params"]) for row in rows] == [27, 35, 43]
    assert crowd.history["tfgrow_params"] == [27, 35, 43]
    assert crowd.history["tfgrow_events"] == [0, 1, 2]
    assert crowd.history["tfgrow_flops"] == [42, 56, 70]
    assert {len(crowd.history[name]) for name in COLUMNS} == {3}


def assert_tensorboard_has_the_scalars(crowd):
    found = {}
    for path in (crowd.folder / "board" / "train").glob("*.tfevents.*"):
        for event in tf.compat.v1.train.summary_iterator(str(path)):
            for value in event.summary.value:
                if value.tag.startswith("epoch_tfgrow"):
                    number = float(tf.make_ndarray(value.tensor))
                    found.setdefault(value.tag.removeprefix("epoch_"), []).append(number)
    assert set(found) == COLUMNS
    for name, values in found.items():
        np.testing.assert_allclose(values, crowd.history[name], rtol=1e-6)


def assert_checkpoints_hold_every_width(crowd):
    for epoch, units in ((1, 3), (2, 4), (3, 5)):
        expected = crowd.outputs[epoch - 1]
        loaded = keras.models.load_model(crowd.folder / f"{epoch}.keras")
        assert loaded.get_layer("hidden").units == units
        np.testing.assert_array_equal(loaded(crowd.x, training=False), expected)
        assert int(loaded.optimizer.iterations.numpy()) == 6 * epoch
        fresh = mlp(seed=7, units=units)
        fresh.load_weights(crowd.folder / f"{epoch}.weights.h5")
        np.testing.assert_array_equal(fresh(crowd.x, training=False), expected)


@pytest.mark.parametrize(("first", "morphism"), [(True, "split"), (False, "add")])
def test_early_stopping_restores_what_the_best_epoch_computed(first, morphism):
    """The best epoch is the first one, when no layer had grown: weights of other shapes."""
    model = compiled(convnet(), keras.optimizers.Adam(0.02))
    x, _ = data = arrays(model)
    growth, recorder = blind_growth(data, morphism=morphism), Recorder(x)
    # The monitored figure only rises: the first epoch stays the best.
    stopping = keras.callbacks.EarlyStopping(
        "tfgrow_params", mode="min", patience=2, restore_best_weights=True
    )
    fit(model, [*ordered(growth, [stopping], first), recorder], data)
    assert model.get_layer("conv1").filters == model.get_layer("conv2").filters == 4
    assert stopping.best_epoch == 0
    restored = np.array(model(x, training=False))
    np.testing.assert_allclose(restored, recorder.outputs[0], atol=2e-6)
    assert np.abs(recorder.outputs[-1] - recorder.outputs[0]).max() > 1e-2


class Shadow(keras.callbacks.Callback):
    """Averages weights as Keras does, for itself, and follows growth by `add` as it happens."""

    def __init__(self, momentum):
        super().__init__()
        self.momentum = momentum
        self.average = None

    def on_train_batch_begin(self, batch, logs=None):
        now = [v.numpy() for v in self.model.trainable_variables]
        if self.average is None:
            return
        # An entry that the average does not know yet is newborn: its average is its value.
        self.average = [self._grown(old, new) for old, new in zip(self.average, now, strict=True)]

    def _grown(self, old, new):
        grown = new.copy()
        grown[tuple(slice(size) for size in old.shape)] = old
        return grown

    def on_train_batch_end(self, batch, logs=None):
        now = [v.numpy() for v in self.model.trainable_variables]
        m = 0.0 if self.average is None else self.momentum
        self.average = now if self.average is None else self.average
        self.average = [m * a + (1 - m) * v for a, v in zip(self.average, now, strict=True)]


@pytest.mark.parametrize(("swap_on_epoch", "first"), [(True, True), (True, False), (False, False)])
def test_averages_of_grown_weights_are_right(swap_on_epoch, first):
    adam = keras.optimizers.Adam(0.02, use_ema=True, ema_momentum=0.8)
    model = compiled(mlp(), adam)
    shadow, growth = Shadow(0.8), blind_growth(morphism="add")
    swap = keras.callbacks.SwapEMAWeights(swap_on_epoch=swap_on_epoch)
    fit(model, [*ordered(growth, [swap], first), shadow], validation_data=arrays())
    assert [event.status for event in growth.events] == ["applied"] * 2
    # At the end of training Keras leaves the averages in the model.
    for found, expected in zip(model.trainable_variables, shadow.average, strict=True):
        np.testing.assert_allclose(found.numpy(), expected, atol=1e-5)


def test_terminate_on_nan_ends_training_before_the_next_event():
    model, growth = compiled(mlp(), keras.optimizers.SGD(1.0)), blind_growth()
    x, y = arrays()
    x[-1] = np.nan
    history = fit(model, [growth, keras.callbacks.TerminateOnNaN()], (x, y)).history
    assert len(history["loss"]) == 1
    assert not growth.events


class Follower(keras.callbacks.Callback):
    """A user's own callback, which keeps weights and wants to know how they grow."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def on_model_grown(self, changes):
        self.seen.append(sorted(change.layer.name for change in changes))


def test_a_users_callback_is_told_and_schedules_go_on():
    model, follower = compiled(mlp()), Follower()
    scheduler = keras.callbacks.LearningRateScheduler(lambda epoch: 0.1 / (epoch + 1))
    history = fit(model, [scheduler, follower, blind_growth()]).history
    assert follower.seen == [["hidden", "out"]] * 2
    np.testing.assert_allclose(history["learning_rate"], [0.1, 0.05, 0.1 / 3], rtol=1e-6)
