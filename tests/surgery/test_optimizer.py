"""Optimizer slots after surgery: formula, order, files, continued training."""

import copy

import keras
import numpy as np
import pytest

from tests.surgery.hand_made import (
    OPTIMIZERS,
    SOURCE,
    assert_same_bits,
    assert_trains_on_like_its_file,
    batch,
    by_name,
    changed,
    consumed,
    convolutional_net,
    produced,
    slot_kind,
    trained_net,
    values,
    widen,
)
from tfgrow.surgery import optimizer as slots
from tfgrow.surgery import rebuild, transaction
from tfgrow.surgery.optimizer import SlotKind
from tfgrow.types import NEWBORN, AxisSource, LayerChange, VariableChange

# What each slot does, said a second time, by the name under which Keras files it: the power of
# the gradient's scale that it follows, and whether newborns get the mean.
RULES = {
    "momentum": (1, False),
    "velocity": (2, True),
    "velocity_hat": (2, True),
    "norm": (1, True),
    "accumulator": (2, True),
    "accumulated_grad": (2, True),
    "accumulated_delta_var": (0, True),
    "average_gradient": (1, False),
    "gradient_accumulator": (1, False),
}


def slow_twin(old, sources, power, calibrated):
    """The mapped slot, one axis and one entry at a time."""
    for source in sources:
        entries = np.moveaxis(old.astype(np.float64), source.axis, 0)
        kept = [
            entries[parent] * scale**power
            for parent, scale in zip(source.source, source.gradient_scale, strict=True)
            if parent != NEWBORN
        ]
        born = sum(kept) / len(kept) if calibrated else 0 * kept[0]
        inherited = iter(kept)
        grown = [born if parent == NEWBORN else next(inherited) for parent in source.source]
        old = np.moveaxis(np.stack(grown), 0, source.axis)
    return old


def slow_average(old, weight, change):
    """The mapped moving average of a weight: its distance from the weight is inherited."""
    distance = old.astype(np.float64) - weight
    for source in change.sources:
        entries = np.moveaxis(distance, source.axis, 0)
        grown = [
            0 * entries[0] if parent == NEWBORN else entries[parent] * scale
            for parent, scale in zip(source.source, source.value_scale, strict=True)
        ]
        distance = np.moveaxis(np.stack(grown), 0, source.axis)
    return change.value + distance


@pytest.mark.parametrize("name", list(OPTIMIZERS))
def test_slots_follow_the_formula_and_go_through_files(name, tmp_path):
    model = trained_net(OPTIMIZERS[name])
    optimizer = model.optimizer
    references, before = optimizer.variables, by_name(optimizer)
    weights = {v.path.replace("/", "_"): v.numpy() for v in model.trainable_variables}
    changes = widen(model)
    edited = {
        f"{change.layer.name}_{variable}": variable_change
        for change in changes
        for variable, variable_change in change.variables.items()
    }
    transaction.edit(model, changes)

    assert model.optimizer is optimizer
    assert all(a is b for a, b in zip(optimizer.variables, references, strict=True))
    mapped = 0
    for slot, value in by_name(optimizer).items():
        weight = next((w for w in edited if slot.startswith(w + "_")), None)
        if weight is None:
            np.testing.assert_array_equal(value, before[slot])
            continue
        kind = slot_kind(name, slot.removeprefix(weight + "_"))
        if kind == "average":
            expected = slow_average(before[slot], weights[weight], edited[weight])
        else:
            expected = slow_twin(before[slot], edited[weight].sources, *RULES[kind])
            if RULES[kind][1]:
                assert np.all(value[..., -1].any() or not before[slot].any())
        np.testing.assert_allclose(value, expected, rtol=1e-6, atol=1e-12)
        mapped += 1
    # Of the net's weights, all but the last bias changed shape.
    assert mapped == sum(
        value.ndim > 0 and not slot.startswith("dense_bias") for slot, value in before.items()
    )

    fresh = type(optimizer).from_config(optimizer.get_config())
    fresh.build(model.trainable_variables)
    for variable, other in zip(optimizer.variables, fresh.variables, strict=True):
        # Nadam's scalar has no name of its own, so that Keras counts it.
        assert (variable.name == other.name) or (name == "nadam" and variable.shape == ())
        assert (variable.shape, variable.dtype) == (other.shape, other.dtype)
    assert_trains_on_like_its_file(model, tmp_path / "grown.keras")


def test_means_of_squared_gradients_follow_and_go_through_files(tmp_path):
    """Adafactor keeps no second moments of kernels but their means over one axis or the other."""
    model = trained_net(lambda: keras.optimizers.Adafactor(0.01))
    optimizer = model.optimizer
    conv2 = [v.path for v in model.trainable_variables].index("conv2/kernel")
    rows, columns = optimizer._r[conv2].numpy(), optimizer._c[conv2].numpy()
    placeholders = [slot for slot in optimizer._r if slot.shape == ()]
    assert len(placeholders) == 5
    transaction.edit(model, widen(model))

    # `rows` belong to what the kernel reads, `columns` to what it makes: a half of a split gets
    # half the gradient there, and the newborn the mean.
    kept = np.where(np.bincount(SOURCE[:-1])[SOURCE[:-1]] > 1, 0.25, 1.0)
    made = columns[..., SOURCE[:-1]] * kept
    made = np.concatenate([made, made.mean(-1, keepdims=True)], axis=-1)
    np.testing.assert_allclose(optimizer._c[conv2].numpy(), made, rtol=1e-6)
    # The less of it reaches what is read, on average over all that is made.
    read = rows[..., SOURCE[:-1]]
    read = np.concatenate([read, read.mean(-1, keepdims=True)], axis=-1)
    np.testing.assert_allclose(optimizer._r[conv2].numpy(), read * kept.mean(), rtol=1e-6)
    assert all(slot.shape == () and slot.numpy() == 0 for slot in placeholders)
    fresh = type(optimizer).from_config(optimizer.get_config())
    fresh.build(model.trainable_variables)
    shapes = [variable.shape for variable in optimizer.variables]
    assert shapes == [variable.shape for variable in fresh.variables]
    assert_trains_on_like_its_file(model, tmp_path / "grown.keras")


def test_gradient_scales_are_those_of_the_real_gradients():
    model = trained_net(lambda: keras.optimizers.SGD(0.01, momentum=0.9))
    twin = keras.models.clone_model(model)
    twin.set_weights(model.get_weights())
    twin.compile(keras.optimizers.SGD(0.01, momentum=0.9), "mse", run_eagerly=True)
    twin.optimizer.build(twin.trainable_variables)
    twin.optimizer.set_weights(values(model.optimizer.variables))
    x, y = batch(9)
    before = model(x).numpy()
    changes = widen(model)
    transaction.edit(model, changes)
    np.testing.assert_allclose(model(x), before, atol=1e-6)
    # One real step of both: the momenta must still be each other's images, as before the step.
    model.train_on_batch(x, y)
    twin.train_on_batch(x, y)
    sources = {
        id(getattr(change.layer, name)): variable_change.sources
        for change in changes
        for name, variable_change in change.variables.items()
    }
    compared = 0
    momenta = zip(model.optimizer.momentums, twin.optimizer.momentums, strict=True)
    for variable, (found, old) in zip(model.trainable_variables, momenta, strict=True):
        expected = slow_twin(old.numpy(), sources.get(id(variable), ()), 1, False)
        inherited = np.ones(expected.shape, bool)
        for source in sources.get(id(variable), ()):
            shape = [1] * inherited.ndim
            shape[source.axis] = -1
            inherited &= (source.source != NEWBORN).reshape(shape)
        np.testing.assert_allclose(found.numpy()[inherited], expected[inherited], atol=2e-6)
        compared += inherited.sum()
    assert compared == sum(np.prod(shape) for shape in [(3, 3, 2, 4), (3, 3, 4, 4), (16, 2)]) + 18


def test_learning_rate_iterations_and_loss_scale_stay():
    keras.config.set_dtype_policy("mixed_float16")
    model = convolutional_net(optimizer=keras.optimizers.Adam(0.01), run_eagerly=True)
    assert isinstance(model.optimizer, keras.optimizers.LossScaleOptimizer)
    model.train_on_batch(*batch())
    model.optimizer.learning_rate = 0.007
    model.optimizer.dynamic_scale.assign(512.0)
    transaction.edit(model, widen(model))
    assert float(model.optimizer.learning_rate.numpy()) == pytest.approx(0.007)
    assert float(model.optimizer.dynamic_scale.numpy()) == 512.0
    assert int(model.optimizer.iterations.numpy()) == int(model.optimizer.step_counter.numpy()) == 1
    model.train_on_batch(*batch())
    assert int(model.optimizer.step_counter.numpy()) == 2


def one_weight(value, *sources):
    return rebuild.Replacement(None, np.zeros(3), VariableChange(np.asarray(value), sources))


def test_all_newborn_gets_the_mean_of_the_old_slot():
    everything = AxisSource(0, np.full(2, NEWBORN), np.ones(2), np.ones(2))
    replacement = one_weight([1.0, 2.0], everything)
    old = np.array([1.0, 2.0, 6.0])
    squared = slots.map_slot(old, SlotKind.SQUARED_GRADIENT, replacement)
    np.testing.assert_array_equal(squared, [3.0, 3.0])
    np.testing.assert_array_equal(slots.map_slot(old, SlotKind.GRADIENT, replacement), [0, 0])
    np.testing.assert_array_equal(slots.map_slot(old, SlotKind.WEIGHT, replacement), [1, 2])


def test_magnitudes_stay_positive_under_a_negative_scale():
    flipped = AxisSource(0, np.arange(3), -np.ones(3), np.full(3, -0.5))
    old = np.array([1.0, 2.0, 6.0])
    replacement = one_weight(np.zeros(3), flipped)
    for kind, scale in [("magnitude", 0.5), ("squared_gradient", 0.25), ("gradient", -0.5)]:
        mapped = slots.map_slot(old, SlotKind(kind), replacement)
        np.testing.assert_array_equal(mapped, old * scale)


def test_pruned_channels_leave_with_their_slots():
    model = trained_net(OPTIMIZERS["adam"])
    before, keep = by_name(model.optimizer), np.array([2, 0])
    conv2, dense = model.get_layer("conv2"), model.get_layer("dense")
    changes = [
        LayerChange(
            conv2,
            {"filters": 2},
            {
                "kernel": changed(conv2.kernel, produced(3, keep)),
                "bias": changed(conv2.bias, produced(0, keep)),
            },
        ),
        LayerChange(dense, {}, {"kernel": changed(dense.kernel, consumed(0, keep, positions=4))}),
    ]
    transaction.edit(model, changes)
    after = by_name(model.optimizer)
    name = "conv2_kernel_velocity"
    np.testing.assert_array_equal(after[name], before[name][..., keep])
    name = "dense_kernel_momentum"
    rows = before[name].reshape(4, 3, 2)[:, keep].reshape(8, 2)
    np.testing.assert_array_equal(after[name], rows)


def test_unbuilt_optimizer_stays_unbuilt_and_no_optimizer_is_fine():
    model = convolutional_net(optimizer="adam", run_eagerly=True)
    transaction.edit(model, widen(model))
    assert not model.optimizer.built
    assert len(model.optimizer.variables) == 2
    model.train_on_batch(*batch())
    assert model.optimizer.built
    plain = convolutional_net()
    transaction.edit(plain, widen(plain))
    assert plain.count_params() == model.count_params()


class Signum(keras.optimizers.Optimizer):
    """An optimizer that surgery has never seen."""

    def build(self, variables):
        super().build(variables)
        self.memory = [self.add_variable_from_reference(v, name="memory") for v in variables]

    def update_step(self, gradient, variable, learning_rate):
        memory = self.memory[self._get_variable_index(variable)]
        self.assign(memory, 0.9 * memory + gradient)
        self.assign_sub(variable, learning_rate * keras.ops.sign(memory))


class Remembering(keras.optimizers.SGD):
    """A known optimizer with a slot of its own."""

    def build(self, variables):
        super().build(variables)
        self.extra = [self.add_variable_from_reference(v, name="extra") for v in variables]


@pytest.fixture
def registry(monkeypatch):
    monkeypatch.setattr(slots, "_SLOTS", copy.copy(slots._SLOTS))


@pytest.mark.parametrize("kind", [Signum, Remembering])
def test_unknown_slots_are_refused_before_anything_is_touched(kind, registry):
    model = trained_net(lambda: kind(0.001))
    before = values(model.variables + model.optimizer.variables)
    with pytest.raises(ValueError, match=rf"{kind.__name__}.*register_slots\({kind.__name__}"):
        transaction.edit(model, widen(model))
    assert_same_bits(values(model.variables + model.optimizer.variables), before)
    attribute = "memory" if kind is Signum else "extra"
    slots.register_slots(kind, {attribute: "gradient", "momentums": SlotKind.GRADIENT})
    transaction.edit(model, widen(model))
    assert getattr(model.optimizer, attribute)[0].shape == (3, 3, 2, len(SOURCE))
    model.train_on_batch(*batch())


def test_register_slots_refuses_what_it_cannot_use(registry):
    with pytest.raises(TypeError, match=r"subclass of keras\.optimizers\.Optimizer"):
        slots.register_slots(keras.layers.Dense, {})
    with pytest.raises(ValueError, match="'momentous' is not a valid SlotKind"):
        slots.register_slots(Signum, {"memory": "momentous"})


def test_slot_lists_of_another_length_are_refused(registry):
    model = trained_net(lambda: Signum(0.001))
    slots.register_slots(Signum, {"memory": "gradient"})
    model.optimizer.memory.pop()
    with pytest.raises(ValueError, match="expected one slot"):
        slots.check_optimizer(model)


def test_frozen_layers_have_no_slots_and_the_others_follow():
    model = convolutional_net()
    model.get_layer("conv1").trainable = False
    model.compile("adam", "mse", run_eagerly=True)
    model.train_on_batch(*batch())
    transaction.edit(model, widen(model))
    shapes = [tuple(slot.shape) for slot in model.optimizer._velocities]
    assert shapes == [tuple(v.shape) for v in model.trainable_variables]
    model.train_on_batch(*batch())
