"""All or nothing, whatever goes wrong and wherever; and nothing is left in memory."""

import gc
import weakref

import keras
import numpy as np
import pytest
import tensorflow as tf

from tests.surgery.hand_made import (
    assert_as_on,
    assert_same_bits,
    batch,
    convolutional_net,
    live_variables,
    narrow,
    photograph,
    values,
    widen,
)
from tfgrow.surgery import optimizer as slots
from tfgrow.surgery import rebuild, shapes
from tfgrow.surgery.transaction import edit, transaction


@pytest.fixture
def trained():
    """A compiled net with Adam's slots, trained, evaluated and used for prediction."""
    optimizer = keras.optimizers.AdamW(0.01, weight_decay=0.1, use_ema=True)
    model = convolutional_net(optimizer=optimizer, metrics=["mae"])
    model.fit(*batch(), verbose=0)
    model.evaluate(*batch(), verbose=0)
    model.predict(batch()[0], verbose=0)
    return model


def trained_eagerly(name="adam"):
    model = convolutional_net(optimizer=name, run_eagerly=True)
    model.train_on_batch(*batch())
    return model


def test_rollback_restores_everything_and_can_be_repeated(trained):
    picture = photograph(trained)
    with transaction(trained) as block:
        for _ in range(2):
            before = trained.evaluate(*batch(), verbose=0, return_dict=True)["loss"]
            slots.grow_optimizer(trained, rebuild.apply_changes(trained, widen(trained)))
            assert trained.get_layer("conv1").kernel.shape[-1] == 5
            after = trained.evaluate(*batch(), verbose=0, return_dict=True)["loss"]
            np.testing.assert_allclose(after, before, rtol=1e-4)
            block.rollback()
            assert_as_on(picture, trained)
    assert_as_on(picture, trained)
    trained.fit(*batch(), verbose=0)


@pytest.mark.parametrize("jit_compile", [False, True])
def test_training_inside_the_block_is_undone(jit_compile):
    model = convolutional_net(optimizer="adam", jit_compile=jit_compile)
    model.fit(*batch(), verbose=0)
    picture = photograph(model)
    with transaction(model) as block:
        model.fit(*batch(), verbose=0)  # the very buffers that the snapshot shares
        slots.grow_optimizer(model, rebuild.apply_changes(model, widen(model)))
        model.fit(*batch(), verbose=0)
        model.predict(batch()[0], verbose=0)
        block.rollback()
        assert_as_on(picture, model)


def test_an_optimizer_built_inside_the_block_is_unbuilt_and_checkpoints(tmp_path):
    # Named optimizers keep their lists in TensorFlow's wrappers, whose checkpoints are particular.
    model = convolutional_net(optimizer="adam", run_eagerly=True)
    picture = photograph(model)
    with transaction(model) as block:
        model.train_on_batch(*batch())
        edit(model, widen(model))
        block.rollback()
        assert_as_on(picture, model)
    assert not model.optimizer.built
    model.train_on_batch(*batch())
    edit(model, widen(model))
    expected = values(model.optimizer.variables)
    checkpoint = tf.train.Checkpoint(model=model, optimizer=model.optimizer)
    path = checkpoint.save(str(tmp_path / "checkpoint"))
    model.train_on_batch(*batch())
    checkpoint.restore(path).assert_existing_objects_matched()
    assert_same_bits(values(model.optimizer.variables), expected)


def test_training_goes_on_as_if_nothing_had_been(trained):
    twin = keras.models.clone_model(trained)
    twin.compile(
        keras.optimizers.AdamW(0.01, weight_decay=0.1, use_ema=True), "mse", metrics=["mae"]
    )
    twin.optimizer.build(twin.trainable_variables)
    twin.set_weights(trained.get_weights())
    twin.optimizer.set_weights(values(trained.optimizer.variables))
    with transaction(trained) as block:
        slots.grow_optimizer(trained, rebuild.apply_changes(trained, widen(trained)))
        trained.train_on_batch(*batch(1))
        block.rollback()
    for model in (trained, twin):
        model.train_on_batch(*batch(2))
    assert_same_bits(values(trained.weights), values(twin.weights))
    assert_same_bits(values(trained.optimizer.variables), values(twin.optimizer.variables))


def test_commit_keeps_the_edit_and_ends_the_transaction():
    model = trained_eagerly()
    with transaction(model) as block:
        slots.grow_optimizer(model, rebuild.apply_changes(model, widen(model)))
    assert model.get_layer("conv1").filters == 5
    with pytest.raises(RuntimeError, match="over"):
        block.rollback()


STAGES = [
    (rebuild, "_set_attributes", 1),
    (rebuild, "_set_attributes", 3),
    (rebuild, "set_value", 1),
    (rebuild, "set_value", 5),
    (rebuild, "set_value", 14),  # an optimizer slot
    (rebuild, "set_value", 23),  # the last one
    (rebuild, "refresh_graph", 1),
    (shapes, "_refresh_metadata", 2),
    (shapes, "_set_shapes", 3),
    (shapes, "_refresh_elsewhere", 1),
    (rebuild, "renew_functions", 1),
    (slots, "map_slot", 2),
    (rebuild, "rekey_optimizer", 1),
]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, MemoryError])
@pytest.mark.parametrize("when", ["before", "after"])
def test_an_error_at_any_stage_leaves_no_trace(monkeypatch, when, error):
    model = trained_eagerly()
    picture = photograph(model)
    for module, name, call in STAGES:
        original, calls = getattr(module, name), []

        def failing(*args, original=original, calls=calls, call=call, **kwargs):
            calls.append(None)
            if len(calls) == call and when == "before":
                raise error("injected")
            result = original(*args, **kwargs)
            if len(calls) == call:
                raise error("injected")
            return result

        with monkeypatch.context() as patch:
            patch.setattr(module, name, failing)
            with pytest.raises(error, match="injected"):
                edit(model, widen(model))
        assert_as_on(picture, model)
    edit(model, widen(model))  # and it still can be done
    model.train_on_batch(*batch())


def test_an_interrupt_during_rollback_still_restores(monkeypatch):
    model = trained_eagerly()
    picture, interrupts = photograph(model), [KeyboardInterrupt()]
    with transaction(model) as block:
        rebuild.apply_changes(model, widen(model))
        restore = block._restore

        def interrupted():
            if interrupts:
                raise interrupts.pop()
            restore()

        monkeypatch.setattr(block, "_restore", interrupted)
        with pytest.raises(KeyboardInterrupt):
            block.rollback()
        assert_as_on(picture, model)


def edit_and_interrupt(model):
    with transaction(model):
        edit(model, widen(model))
        raise KeyboardInterrupt


def test_transactions_nest():
    model = trained_eagerly()
    outside = photograph(model)
    with transaction(model) as outer:
        model.train_on_batch(*batch(1))
        inside = photograph(model)
        with pytest.raises(KeyboardInterrupt):
            edit_and_interrupt(model)
        assert_as_on(inside, model)
        edit(model, widen(model))
        outer.rollback()
        assert_as_on(outside, model)


def nested_model():
    """Growable layers behind the border of a nested Sequential, and dropout with its seed."""
    inner = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3), keras.layers.Dropout(0.5)])
    inputs = keras.Input((4,))
    return keras.Model(inputs, keras.layers.Dense(2)(inner(inputs))), inner


def test_nested_models_seeds_and_uncompiled_models_are_restored():
    model, inner = nested_model()
    picture, inner_picture = photograph(model), photograph(inner)
    with transaction(model) as block:
        model(np.ones((2, 4)), training=True)
        inner.layers[0].units = 7
        inner.layers[0].kernel.assign(np.ones((4, 3)))
        inner.add(keras.layers.Dense(5))
        block.rollback()
    assert_as_on(picture, model)
    assert_as_on(inner_picture, inner)


def test_rollback_inside_fit():
    class Rejecting(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            picture = photograph(self.model)
            with transaction(self.model) as block:
                slots.grow_optimizer(
                    self.model, rebuild.apply_changes(self.model, widen(self.model))
                )
                self.model.evaluate(*batch(), verbose=0)
                block.rollback()
            assert_as_on(picture, self.model)

    histories = []
    for callbacks in ([], [Rejecting()]):
        keras.utils.set_random_seed(5)
        model = convolutional_net(optimizer="adam")
        history = model.fit(
            *batch(),
            epochs=3,
            shuffle=False,
            validation_data=batch(1),
            callbacks=callbacks,
            verbose=0,
        )
        histories.append(history.history)
    for name, reference in histories[0].items():
        assert histories[1][name] == reference


def test_a_snapshot_copies_no_weights():
    model = keras.Sequential([keras.Input((64,)), keras.layers.Dense(64)])
    kernel = model.layers[0].kernel

    def address(tensor):
        return np.asarray(memoryview(tensor)).__array_interface__["data"][0]

    with transaction(model) as block:
        held = next(value for variable, value in block._values if variable is kernel.value)
        assert address(held) == address(kernel.value.read_value())
        before = held.numpy().copy()
        kernel.value.assign_add(tf.ones((64, 64)))
        np.testing.assert_array_equal(held, before)
        assert address(held) != address(kernel.value.read_value())
        block.rollback()
        np.testing.assert_array_equal(kernel, before)


def cycle(model, commit):
    """One growth event that is kept (and pruned away again), or rejected by a rollback."""
    with transaction(model) as block:
        slots.grow_optimizer(model, rebuild.apply_changes(model, widen(model)))
        if not commit:
            block.rollback()
    if commit:
        edit(model, narrow(model))


@pytest.mark.parametrize("commit", [True, False])
def test_memory_does_not_creep_up(commit):
    model = convolutional_net(optimizer="adam")
    counts, objects = [], []
    for event in range(30):
        if event % 10 == 0:
            model.fit(*batch(), validation_data=batch(), verbose=0)
            counts.append(live_variables())
            objects.append(len(gc.get_objects()))
        cycle(model, commit)
        if event % 10 == 9:
            counts.append(live_variables())
            objects.append(len(gc.get_objects()))
    # Variables: none more, over all. Other objects: TensorFlow itself keeps a little of every
    # trace (its registry of gradients), so that they are counted from after `fit` to before it.
    assert len(set(counts)) == 1
    assert max(np.subtract(objects[1::2], objects[::2])[1:]) < 200


def test_replaced_variables_and_functions_are_let_go():
    model = convolutional_net(optimizer="adam")
    model.fit(*batch(), verbose=0)
    old = [
        weakref.ref(model.get_layer("conv1").kernel.value),
        weakref.ref(model.optimizer._velocities[0].value),
        weakref.ref(model.train_function),
    ]
    edit(model, widen(model))
    gc.collect()
    assert [reference() for reference in old] == [None] * 3
