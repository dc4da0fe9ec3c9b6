"""The removal experiment: the rivals' importances against real changes, and who removes better."""

import csv
import json

import keras
import numpy as np
import pytest
import tensorflow as tf
from absl import flags

import tfgrow
from experiments import datasets, importances, models, removal


def network(data, net="vgg_gelu", widths=(3, 4), **settings):
    keras.utils.set_random_seed(0)
    model = tfgrow.convert(models.build(net, data.input_shape, 10, widths, **settings))
    model.compile("sgd", "sparse_categorical_crossentropy")
    return model


@pytest.fixture(scope="module")
def digits():
    return datasets.load("digits", max_train=400)


def test_magnitude_and_gamma_by_hand(digits):
    model = network(digits, "vgg")
    first, second = (model.get_layer(name) for name in ("conv1", "conv2"))
    first.kernel.assign(0 * first.kernel)
    kernel = np.zeros(second.kernel.shape, "float32")
    kernel[0, 0, 0, 1], kernel[1, 1, 1, 1] = 3, -4
    second.kernel.assign(kernel)
    model.get_layer("bn2").gamma.assign([1, -2, 0, 3])
    found = importances.magnitude(model, (None, None))
    np.testing.assert_array_equal(found["conv1"], 0)
    np.testing.assert_allclose(found["conv2"], [0, 5, 0, 0])
    relative = importances.magnitude_relative(model, (None, None))
    np.testing.assert_allclose(relative["conv2"], [0, 4, 0, 0])
    np.testing.assert_array_equal(relative["conv1"], 0)
    np.testing.assert_allclose(importances.gamma(model, (None, None))["conv2"], [1, 2, 0, 3])
    with pytest.raises(ValueError, match="none behind 'dense1'"):
        importances.gamma(network(digits, "mlp"), (None, None))


@pytest.mark.parametrize("net", ["vgg", "vgg_flatten"])
def test_taylor_is_the_slope_of_the_loss_along_a_units_outgoing_weights(digits, net):
    """To scale what a unit hands on is to scale the weights that read it."""
    model = network(digits, net)
    x, y = digits.x_train[:3], digits.y_train[:3]
    squared = importances.taylor_squared(model, (x, y))
    absolute = importances.taylor_absolute(model, (x, y))
    for site in tfgrow.find_sites(model):
        if site.blocked:
            continue
        (consumer,), (leaf,) = site.consumers, site.leaves
        slopes = np.zeros((3, site.units))
        for sample in range(3):
            with tf.GradientTape() as tape:
                outputs = model(x[sample : sample + 1], training=False)
                loss = -tf.math.log(outputs[0, int(y[sample])])
            products = (tape.gradient(loss, consumer.kernel.value) * consumer.kernel).numpy()
            rows = products.reshape(-1, *products.shape[-2:]).sum(axis=(0, 2))
            slopes[sample] = rows[leaf.channels.index].sum(axis=1)
        assert np.abs(slopes).max() > 1e-3
        np.testing.assert_allclose(squared[site.name], (slopes**2).sum(0), rtol=1e-3, atol=1e-6)
        np.testing.assert_allclose(absolute[site.name], np.abs(slopes).sum(0), rtol=1e-3, atol=1e-5)


def test_least_important_units_go_until_the_target_is_reached(digits):
    model = network(digits)
    size = removal.sizes("vgg_gelu", digits.input_shape, 10)
    assert size({"conv1": 3, "conv2": 4}) == model.count_params()
    scores = {"conv1": np.array([5.0, 1.0, 0.5]), "conv2": np.array([0.1, 0.2, 0.3, 9.0])}
    kernel = model.get_layer("conv2").kernel.numpy()
    removal.remove_least(model, scores, size({"conv1": 3, "conv2": 2}), size)
    np.testing.assert_array_equal(model.get_layer("conv2").kernel, kernel[..., 2:])
    removal.remove_least(model, {**scores, "conv2": np.array([0.3, 9.0])}, 0, size)
    assert removal.training.open_widths(model) == {"conv1": 1, "conv2": 1}  # the last ones stay


def test_units_that_stand_in_for_each_other_do_not_go_together(digits):
    """Equal prices: the first goes, and the second only if it does not lean on it."""
    model = network(digits, "mlp", (4, 2))
    size = removal.sizes("mlp", digits.input_shape, 10)
    found = [c for c in tfgrow.candidates(model, "prune") if c.site.name == "dense1"]
    share = np.zeros(4, "float32")
    share[0] = 0.5
    found[1] = found[1].replace(theta={**found[1].theta, "share": share})
    interaction = tfgrow.Interaction(np.array([1.0, 1.1, 1.2, 9.0]), np.zeros((4, 4)))
    widths = {"dense1": 4, "dense2": 2}
    chosen = removal.choose(interaction, found, widths, size({"dense1": 2, "dense2": 2}), size)
    assert chosen == [0, 2]
    pulled = np.zeros((4, 4))
    pulled[0, 2] = pulled[2, 0] = 50.0  # together they hurt: it takes the dear one instead
    interaction = tfgrow.Interaction(interaction.linear, pulled)
    assert removal.choose(interaction, found, widths, size({"dense1": 2, "dense2": 2}), size) == [
        0,
        3,
    ]


def parse(*arguments):
    values = flags.FlagValues()
    removal.define_flags(values)
    values(["program", *arguments])
    return values


def test_prune_beats_the_usual_importances_on_a_tiny_network(tmp_path, capsys):
    """One test, for the run takes seconds: same size, less loss, and all of it written."""
    options = parse(
        "--net=mlp", "--widths=12,10", "--epochs=12", "--samples=1000", "--step=10",
        "--methods=prune,magnitude,taylor_squared", f"--output_dir={tmp_path}",
    )  # fmt: skip
    data = removal.prepare(options)
    rows = removal.run(options, data)
    full, *others = rows
    assert full["removed"] == 0
    by_key = {(row["method"], row["removed"]): row for row in others}
    assert len(by_key) == len(others) == 9
    unit = 64 + 1 + 10  # the most that one unit of dense1 has
    for percent in (10, 30, 50):
        target = int(full["params"] * (1 - percent / 100))
        mine = by_key["prune", percent]
        for method in ("prune", "magnitude", "taylor_squared"):
            row = by_key[method, percent]
            assert target - unit < row["params"] <= target
            assert method == "prune" or mine["loss"] < row["loss"], (percent, mine, row)
    with (tmp_path / "removal.csv").open() as file:
        read = list(csv.DictReader(file))
    assert [float(row["loss"]) for row in read] == [row["loss"] for row in rows]
    assert json.loads((tmp_path / "removal.json").read_text())["rows"] == rows
    assert (tmp_path / "removal.png").read_bytes()[:4] == b"\x89PNG"
    assert "taylor_squared" in capsys.readouterr().out
    with pytest.raises(ValueError, match="holds an earlier run"):
        removal.prepare(options)


@pytest.mark.parametrize(
    ("argument", "message"),
    [("--methods=prune,lucky", "expected some of prune"), ("--shares=0,50", "whole percents")],
)
def test_bad_flags(argument, message):
    with pytest.raises(flags.IllegalFlagValueError, match=message):
        parse(argument)
