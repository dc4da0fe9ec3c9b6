"""Width edits as new variable values: where every entry comes from, and what it becomes."""

import keras
import numpy as np
import pytest
from keras import layers

import tfgrow
from tests.cases import by_name, randomize
from tfgrow.morphisms.registry import get
from tfgrow.surgery.weights import inherited, layer_changes, merge_edits
from tfgrow.types import NEWBORN, NewUnit, WidthEdit


def flat_net():
    """Dense a (2 units) -> bn -> relu -> Dense b (3 units) -> Dense out."""
    stock = keras.Sequential(
        [
            keras.Input((3,)),
            layers.Dense(2, name="a"),
            layers.BatchNormalization(name="bn"),
            layers.ReLU(name="relu"),
            layers.Dense(3, activation="relu", name="b"),
            layers.Dense(2, name="out"),
        ]
    )
    randomize(stock)
    return tfgrow.convert(stock)


def edits_of(model, morphism, unit, site="a", **kwargs):
    chosen = [
        c for c in tfgrow.candidates(model, morphism, sites=[site], **kwargs) if c.unit == unit
    ]
    return [get(morphism).edit(candidate) for candidate in chosen]


def changes_by_layer(edits):
    return {change.layer.name: change for change in layer_changes(edits)}


def test_a_split_at_producer_path_and_consumer():
    model = flat_net()
    old = {name: model.get_layer(name) for name in ("a", "bn", "b")}
    (edit,) = edits_of(model, "split", 0)
    changes = changes_by_layer([edit])
    assert set(changes) == {"a", "bn", "b"}
    assert changes["a"].attributes == {"units": 3}
    assert changes["b"].attributes == {}
    theta = edit.appended[0].fan_in["kernel"] - old["a"].kernel.numpy()[:, 0]
    kernel = changes["a"].variables["kernel"].value
    np.testing.assert_allclose(kernel[:, 0], old["a"].kernel.numpy()[:, 0] - theta, rtol=1e-5)
    np.testing.assert_allclose(kernel[:, 1], old["a"].kernel.numpy()[:, 1])
    (source,) = changes["a"].variables["kernel"].sources
    assert source.axis == 1
    np.testing.assert_array_equal(source.source, [0, 1, 0])
    np.testing.assert_array_equal(source.gradient_scale, [0.5, 1, 0.5])
    gamma = changes["bn"].variables["gamma"]
    np.testing.assert_array_equal(gamma.value, old["bn"].gamma.numpy()[[0, 1, 0]])
    np.testing.assert_array_equal(gamma.sources[0].gradient_scale, [0.5, 1, 0.5])
    outgoing = changes["b"].variables["kernel"]
    np.testing.assert_allclose(
        outgoing.value, old["b"].kernel.numpy()[[0, 1, 0]] * [[0.5], [1], [0.5]]
    )
    np.testing.assert_array_equal(outgoing.sources[0].value_scale, [0.5, 1, 0.5])
    np.testing.assert_array_equal(outgoing.sources[0].gradient_scale, [1, 1, 1])
    assert "bias" not in changes["b"].variables


def test_a_new_unit_at_producer_path_and_consumer():
    model = flat_net()
    (edit,) = edits_of(model, "add", 0, new_units=1)
    changes = changes_by_layer([edit])
    np.testing.assert_array_equal(changes["a"].variables["bias"].sources[0].source, [0, 1, NEWBORN])
    outgoing = changes["b"].variables["kernel"]
    np.testing.assert_array_equal(outgoing.value[2], np.zeros(3))
    assert outgoing.sources[0].newborn_zero
    assert not changes["a"].variables["kernel"].sources[0].newborn_zero
    np.testing.assert_array_equal(changes["bn"].variables["gamma"].value[2], 1.0)


def test_flatten_spreads_a_unit_over_its_blocks():
    model = by_name("strides_valid_flatten").model()
    (edit,) = edits_of(model, "split", 1, site="conv2")
    change = changes_by_layer([edit])["out"].variables["kernel"]
    old = model.get_layer("out").kernel.numpy()
    positions = len(old) // 2
    source = change.sources[0].source.reshape(positions, 3)
    np.testing.assert_array_equal(
        source - 2 * np.arange(positions)[:, None], [[0, 1, 1]] * positions
    )
    value = change.value.reshape(positions, 3, -1)
    np.testing.assert_allclose(value[:, 0], old.reshape(positions, 2, -1)[:, 0])
    np.testing.assert_allclose(value[:, 1], 0.5 * old.reshape(positions, 2, -1)[:, 1])
    np.testing.assert_allclose(value[:, 2], value[:, 1])


def test_new_outgoing_weights_follow_a_split_consumer():
    """The rows of a new unit know the old outputs; the halves of a split output take them over."""
    model = flat_net()
    rows = np.array([[[1.0, 2.0, 3.0]]], "float32")  # [T, B, O]
    (edit,) = edits_of(model, "add", 0, new_units=1)
    (unit,) = edit.appended
    unit = NewUnit(unit.source, unit.fan_in, unit.path, (rows,))
    split = edits_of(model, "split", 1, site="b")
    newborn = edits_of(model, "add", 0, site="b", new_units=1)
    edits = [WidthEdit(edit.site, {}, (unit,)), *split, *newborn]
    kernel = changes_by_layer(edits)["b"].variables["kernel"].value
    assert kernel.shape == (3, 5)
    np.testing.assert_array_equal(kernel[2], [1.0, 2.0, 3.0, 2.0, 0.0])


def test_edits_of_a_site_are_merged():
    model = flat_net()
    edits = edits_of(model, "split", 0) + edits_of(model, "split", 1)
    edits += edits_of(model, "add", 0, new_units=1)
    (merged,) = merge_edits(edits)
    assert merged.new_width == 2 + 3
    assert set(merged.replaced) == {0, 1}
    changed = changes_by_layer(edits)["a"].variables["kernel"].sources[0].source
    np.testing.assert_array_equal(changed, [0, 1, 0, 1, NEWBORN])
    with pytest.raises(ValueError, match="Unit 0 of site 'a' is edited twice"):
        merge_edits(edits_of(model, "split", 0) * 2)


def outputs(weights, x):
    """What `flat_net` computes with a list of weights."""
    model = flat_net()
    grow = len(weights["a/bias"]) - 2
    if grow:
        tfgrow.widen(model, "a", grow)
    grow = len(weights["b/bias"]) - 3
    if grow:
        tfgrow.widen(model, "b", grow)
    for layer in model.layers:
        for variable in layer.variables:
            variable.assign(weights[f"{layer.name}/{variable.name}"])
    return np.asarray(model(x, training=False))


def test_inherited_weights_compute_what_they_did():
    """The best weights so far, of an earlier epoch, carried over a growth."""
    model = flat_net()
    rng = np.random.default_rng(1)
    x = rng.standard_normal((6, 3)).astype("float32")
    best = {
        f"{layer.name}/{v.name}": rng.uniform(0.5, 1.5, v.shape).astype("float32")
        for layer in model.layers
        for v in layer.variables
    }
    edits = edits_of(model, "split", 0) + edits_of(model, "add", 0, new_units=1)
    edits += edits_of(model, "split", 2, site="b")
    changes = changes_by_layer(edits)
    carried = dict(best)
    for name, change in changes.items():
        for attribute, variable in change.variables.items():
            key = f"{name}/{attribute}"
            carried[key] = inherited(variable, best[key])
            assert carried[key].shape == variable.value.shape
            assert carried[key].dtype == best[key].dtype
    np.testing.assert_allclose(outputs(carried, x), outputs(best, x), rtol=1e-5)
    # New units keep the incoming weights they were given: they must not be born dead.
    np.testing.assert_array_equal(
        carried["a/kernel"][:, 3], changes["a"].variables["kernel"].value[:, 3]
    )


def test_candidates_of_several_calls_are_applied_at_once():
    """Each call traces the model anew: the layers where their edits meet are the same ones."""
    image = keras.Input((4, 4, 2))
    x = layers.Conv2D(3, 1, name="first")(image)
    x = layers.Concatenate(name="row")([x, layers.Conv2D(2, 1, name="second")(x)])
    x = layers.BatchNormalization(name="bn")(x)
    stock = keras.Model(image, layers.Conv2D(2, 1, name="out")(x))
    randomize(stock)
    model = tfgrow.convert(stock)
    x = np.random.default_rng(0).normal(size=(5, 4, 4, 2)).astype("float32")
    expected = model(x).numpy()
    halves = [
        get("split").scaled(tfgrow.candidates(model, "split", sites=site)[0], 0.0)
        for site in ("first", "second")
    ]
    tfgrow.apply(model, halves)
    assert (model.get_layer("first").filters, model.get_layer("second").filters) == (4, 3)
    np.testing.assert_allclose(model(x).numpy(), expected, rtol=1e-5, atol=1e-5)
