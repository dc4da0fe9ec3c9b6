"""Growth in every kind of `fit`: its settings, its data, precision and optimizers."""

import keras
import numpy as np
import pytest

import tfgrow
from tests.integration.fitting import (
    BATCH,
    arrays,
    batches,
    blind_growth,
    compiled,
    fit,
    logits_loss,
    mlp,
    quick_oracle,
)
from tfgrow.callbacks import Growth


class Sequence(keras.utils.PyDataset):
    """The arrays, batch by batch."""

    def __init__(self):
        super().__init__()
        self.x, self.y = arrays()

    def __len__(self):
        return len(self.x) // BATCH

    def __getitem__(self, index):
        rows = slice(index * BATCH, (index + 1) * BATCH)
        return self.x[rows], self.y[rows]


def assert_grew(model, history, events=2):
    assert history["tfgrow_events"] == list(range(events + 1))
    assert model.get_layer("hidden").units == 3 + events
    assert np.isfinite(history["loss"]).all()
    x, _ = arrays()
    np.testing.assert_allclose(
        model.predict(x, verbose=0), np.array(model(x, training=False)), atol=1e-5
    )


@pytest.mark.parametrize(
    "options",
    [{"steps_per_execution": 3}, {"jit_compile": True}, {"run_eagerly": True}],
    ids=lambda options: next(iter(options)),
)
def test_compile_options(options):
    model = compiled(mlp(), **options)
    history = fit(
        model, [blind_growth()], class_weight={0: 1.0, 1: 2.0, 2: 0.5}, validation_data=arrays()
    ).history
    assert_grew(model, history)
    assert len(history["val_loss"]) == 3


@pytest.mark.parametrize("make", [batches, Sequence], ids=["tf.data", "PyDataset"])
def test_datasets(make):
    """The same stream trains, validates and teaches growth; and an estimator reads it."""
    data = make()
    model = compiled(mlp())
    growth = Growth(quick_oracle(), data=data, every=1, tolerance=1.0, verbose=0)
    history = model.fit(data, validation_data=data, epochs=2, verbose=0, callbacks=[growth]).history
    assert history["tfgrow_events"] == [0, 1]
    assert growth.events[0].status == "applied"


def test_endless_data_needs_its_steps():
    data = batches().repeat()
    model = compiled(mlp())
    growth = blind_growth(data)
    history = model.fit(data, steps_per_epoch=4, epochs=3, verbose=0, callbacks=[growth]).history
    assert_grew(model, history)


def test_on_a_plateau_without_validation_data():
    model = compiled(mlp(), keras.optimizers.SGD(0.0))
    growth = Growth(
        blind_growth().oracle,
        arrays(),
        when=tfgrow.schedules.OnPlateau("loss", patience=2),
        tolerance=100.0,
        verbose=0,
    )
    history = fit(model, [growth], epochs=5).history
    # The first epoch is the best one; two do not improve on it, and the next grows.
    assert history["tfgrow_events"] == [0, 0, 0, 1, 1]


def test_a_schedule_that_watches_what_is_not_there_says_so():
    growth = Growth(blind_growth().oracle, arrays(), when="on_plateau", verbose=0)
    with pytest.warns(UserWarning, match="'val_loss', which epoch 1 did not report"):
        fit(compiled(mlp()), [growth])
    assert not growth.events


def test_a_schedule_waits_for_the_epochs_that_validate():
    growth = blind_growth(when=tfgrow.schedules.OnPlateau("val_loss", patience=1, min_delta=9.0))
    with pytest.warns(UserWarning, match="passes over such epochs"):
        fit(
            compiled(mlp()),
            [growth],
            epochs=5,
            validation_data=arrays(seed=1),
            validation_freq=2,
        )
    assert [event.epoch for event in growth.events] == [4]


def test_mixed_precision_with_loss_scaling():
    keras.config.set_dtype_policy("mixed_float16")
    model = compiled(mlp(), keras.optimizers.Adam(0.01))
    assert isinstance(model.optimizer, keras.optimizers.LossScaleOptimizer)
    growth = Growth(quick_oracle(), arrays(), every=1, tolerance=1.0, verbose=0)
    history = fit(model, [growth], epochs=3).history
    assert growth.events[0].status == "applied"
    assert np.isfinite(history["loss"]).all()
    assert int(model.optimizer.inner_optimizer.iterations.numpy()) == 18
    hidden = model.get_layer("hidden")
    assert (hidden.compute_dtype, hidden.variable_dtype) == ("float16", "float32")
    assert all(v.dtype == "float32" for v in model.weights)
    estimate = growth.events[0].estimated_change
    assert estimate < 0
    assert estimate != float(np.float16(estimate))  # made in float32


@pytest.mark.parametrize("name", ["adamw", "sgd", "rmsprop", "adagrad", "lion"])
def test_optimizers_go_on(name):
    options = {"momentum": 0.9} if name == "sgd" else {}
    optimizer = keras.optimizers.get({"class_name": name, "config": options})
    model = compiled(mlp(), optimizer)
    history = fit(model, [blind_growth()], epochs=2).history
    assert_grew(model, history, events=1)
    assert model.optimizer is optimizer
    assert int(optimizer.iterations.numpy()) == 12


def test_an_optimizer_that_surgery_does_not_know_is_refused_before_training():
    model = compiled(mlp(), keras.optimizers.Ftrl())
    model.optimizer.build(model.trainable_variables)
    with pytest.raises(ValueError, match=r"Surgery does not know the slots.*Ftrl"):
        fit(model, [blind_growth()])


def test_metrics_of_every_kind_see_the_whole_epoch():
    """A growth at the start of an epoch neither resets nor doubles what is counted."""
    plain, grown = compiled(mlp(), keras.optimizers.SGD(0.0)), None
    expected = fit(plain, []).history["accuracy"]
    grown = compiled(mlp(), keras.optimizers.SGD(0.0), loss=logits_loss())
    found = fit(grown, [blind_growth(morphism="add")]).history["accuracy"]
    assert found == expected  # new units have no say yet, and nothing trains
