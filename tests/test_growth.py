"""apply, widen and measure_change: a grown model is a model like any other."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfgrow
from tests.cases import CASES, by_name, inputs_of, prepare, randomize, regression_data

BATCH_NORM = by_name("conv_bn_relu")


def outputs(model, x, training=False):
    return np.asarray(model(x, training=training))


def rebuilt(model):
    """The model as Keras makes it from its config, with its weights."""
    clone = type(model).from_config(model.get_config())
    clone.set_weights(model.get_weights())
    return clone


def summary(model):
    lines = []
    model.summary(print_fn=lambda line, **_: lines.append(line))
    return "\n".join(lines)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_grown_model_is_what_keras_would_build(case):
    """Splits and adds of all sites at once, neighbours included."""
    net = prepare(case)
    model, x = net.model, inputs_of(net.model, 3)
    truth = tfgrow.measure_change(model, net.candidates, net.data, "mse")
    before = {site.name: site.units for site in tfgrow.find_sites(model) if not site.blocked}
    loss = float(np.mean((outputs(model, net.data[0]) - net.data[1]) ** 2))
    event = tfgrow.apply(model, net.candidates)
    after = {site.name: site.units for site in tfgrow.find_sites(model) if not site.blocked}
    assert after == {name: 2 * units + 2 for name, units in before.items()}
    assert event.widths == {name: (units, after[name]) for name, units in before.items()}
    assert event.newborn == {name: units + 2 for name, units in before.items()}
    assert event.params_after == model.count_params() > event.params_before
    assert event.flops_after > event.flops_before
    fresh = rebuilt(model)
    assert summary(model) == summary(fresh)
    assert model.output_shape == fresh.output_shape
    for layer, other in zip(model.layers, fresh.layers, strict=True):
        assert layer.output.shape == other.output.shape
    np.testing.assert_allclose(outputs(model, x), outputs(fresh, x), atol=1e-5)
    grown = float(np.mean((outputs(model, net.data[0]) - net.data[1]) ** 2))
    assert grown - loss == pytest.approx(truth, abs=1e-4 * max(1.0, abs(truth)))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_widening_by_hand_preserves_the_function(case):
    model = case.model()
    x = inputs_of(model, 4)
    before = outputs(model, x)
    for number, name in enumerate(case.sites):
        event = tfgrow.widen(model, name, 1 + number)
        assert event.applied == (
            {"site": name, "morphism": "add", "units": list(range(1 + number))},
        )
    np.testing.assert_allclose(outputs(model, x), before, atol=1e-5)


KINDS = [
    "depthwise_1d", "einsum_dense", "embedding", "instance_normalization", "operations",
    "reshaped", "resized_and_repeated", "separable", "time_distributed", "transposed_1d",
    "transposed_2d", "transposed_3d",
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_layer_trains_on_and_leaves_no_trace(name, tmp_path):
    """Slots, files, strip and export after growth of all sites at once."""
    net = prepare(by_name(name))
    model, (x, y) = net.model, net.data
    model.compile(keras.optimizers.Adam(0.01), "mse")
    model.train_on_batch(x, y)
    tfgrow.apply(model, net.candidates)
    model.train_on_batch(x, y)
    assert int(model.optimizer.iterations) == 2
    by_path = {variable.path: variable for variable in model.optimizer.variables}
    for variable in model.trainable_variables:
        slot = by_path[f"adam/{variable.path.replace('/', '_')}_velocity"]
        assert slot.shape == variable.shape
        assert np.any(slot), f"{variable.path} starts dead"
    expected = outputs(model, x)
    model.save(tmp_path / "grown.keras")
    loaded = keras.models.load_model(tmp_path / "grown.keras")
    np.testing.assert_allclose(outputs(loaded, x), expected, atol=1e-6)
    for mine, theirs in zip(loaded.optimizer.variables, model.optimizer.variables, strict=True):
        np.testing.assert_array_equal(mine, theirs)
    loaded.train_on_batch(x, y)
    plain = tfgrow.strip(model)
    np.testing.assert_allclose(outputs(plain, x), expected, atol=1e-6)
    assert all(type(layer).__module__.startswith("keras.") for layer in plain.layers)
    tfgrow.export(model, tmp_path / "served", verbose=False)
    served = tf.saved_model.load(str(tmp_path / "served"))  # functions don't keep it alive
    np.testing.assert_allclose(served.serve(x), expected, atol=1e-5)


def compiled(optimizer=None):
    model = BATCH_NORM.model()
    model.compile(optimizer or keras.optimizers.Adam(0.01), "mse")
    return model


def learned_on(model, data, **kwargs):
    estimator = tfgrow.GaussNewtonEstimator(model)
    return estimator.learn(tfgrow.candidates(model, **kwargs), data, steps=1)


def test_optimizer_and_file_follow_and_training_goes_on(tmp_path):
    model = compiled()
    x, y = regression_data(model, 32)
    model.fit(x, y, epochs=1, batch_size=16, verbose=0)
    optimizer, function = model.optimizer, model.train_function
    old = {v.path: v.numpy() for v in optimizer.variables}
    tfgrow.apply(model, learned_on(model, (x, y), new_units=1)[::3])
    assert model.optimizer is optimizer
    assert int(optimizer.iterations) == 2
    assert model.train_function is not function
    slots = {v.path: v.numpy() for v in optimizer.variables}
    assert slots.keys() == old.keys()
    kept = [name for name in slots if slots[name].shape == old[name].shape]
    widened = [name for name in slots if slots[name].shape != old[name].shape]
    assert any("out_bias" in name for name in kept)
    for name in kept:
        np.testing.assert_array_equal(slots[name], old[name])
    for name in widened:
        assert np.any(slots[name]), f"{name} starts dead"
    path = tmp_path / "grown.keras"
    model.save(path)
    loaded = keras.models.load_model(path)
    for mine, theirs in zip(optimizer.variables, loaded.optimizer.variables, strict=True):
        np.testing.assert_array_equal(mine, theirs)
    np.testing.assert_allclose(outputs(loaded, x), outputs(model, x), atol=1e-6)
    for _ in range(2):
        one, two = model.train_on_batch(x, y), loaded.train_on_batch(x, y)
        assert one == pytest.approx(two, rel=1e-4)
    assert model.fit(x, y, verbose=0).history["loss"][0] < 10
    tfgrow.widen(loaded, "conv1", 1)
    assert np.isfinite(loaded.train_on_batch(x, y))


def test_batchnorm_children_agree_in_training_mode_up_to_batch_noise():
    """With measured statistics, batch statistics give nearly what moving ones do."""
    keras.utils.set_random_seed(0)
    model = compiled()
    x, y = regression_data(model, 256)
    for name in ("bn1", "bn2"):
        model.get_layer(name).momentum = 0.0
    model(x, training=True)  # the moving statistics are those of the data
    model(x, training=True)
    gap = np.abs(outputs(model, x, training=True) - outputs(model, x)).mean()
    learned = learned_on(model, (x, y), morphisms="split", sites=["conv1"])
    tfgrow.apply(model, learned)
    assert model.get_layer("bn1").moving_mean.shape[0] == 6
    before = model.get_weights()
    grown_gap = np.abs(outputs(model, x, training=True) - outputs(model, x)).mean()
    model.set_weights(before)
    assert grown_gap < max(10 * gap, 0.02 * np.abs(outputs(model, x)).mean())


def test_measuring_leaves_the_model_alone():
    model = compiled()
    data = regression_data(model)
    weights, version = model.get_weights(), tfgrow.find_sites(model)[0].version
    candidates = tfgrow.candidates(model, "split")
    change = tfgrow.measure_change(model, candidates, data)
    assert change != 0.0
    for old, new in zip(weights, model.get_weights(), strict=True):
        np.testing.assert_array_equal(old, new)
    assert tfgrow.find_sites(model)[0].version == version
    tfgrow.apply(model, candidates)  # still current


def test_measuring_a_model_compiled_with_an_own_function():
    model = BATCH_NORM.model()

    def own(y_true, y_pred):
        return keras.ops.mean(keras.ops.abs(y_true - y_pred) ** 1.5, axis=-1)

    model.compile("sgd", own)
    data = regression_data(model)
    candidates = tfgrow.candidates(model, "add", new_units=1)
    assert tfgrow.measure_change(model, candidates, data) == pytest.approx(0.0, abs=1e-6)


def test_neighbours_split_at_once_keep_what_they_compute():
    """A unit's split meets the split of the channels it reads, in one kernel."""
    keras.utils.set_random_seed(0)
    stock = keras.Sequential(
        [
            keras.Input((3,)),
            keras.layers.Dense(2, activation="tanh", name="a"),
            keras.layers.Dense(2, activation="tanh", name="b"),
            keras.layers.Dense(1, name="out"),
        ]
    )
    randomize(stock)
    model = tfgrow.convert(stock)
    x = inputs_of(model, 5)
    kernel = model.get_layer("b").kernel.numpy()
    splits = tfgrow.candidates(model, "split")
    theta = {c.key: c.theta for c in splits}
    event = tfgrow.apply(model, [c for c in splits if c.unit == 0])
    assert event.widths == {"a": (2, 3), "b": (2, 3)}
    grown = model.get_layer("b").kernel.numpy()
    step = theta[("b", "split", 0)]["kernel"]
    for column, sign in ((0, 1), (2, -1)):
        weights = kernel[:, 0] + sign * step
        np.testing.assert_allclose(
            grown[:, column], [weights[0] / 2, weights[1], weights[0] / 2], rtol=1e-5
        )
    assert np.isfinite(outputs(model, x)).all()


# ---- bad input: the model is untouched ------------------------------------------------------


def test_bad_candidates_are_refused_and_leave_the_model_alone():
    model = compiled()
    weights = model.get_weights()
    splits = tfgrow.candidates(model, "split")
    uses = [
        ([], ValueError, "No candidates to apply"),
        (["conv1"], TypeError, "Expected Candidates, found str"),
        ([splits[0], splits[0]], ValueError, "split of unit 0 of site 'conv1' is given twice"),
    ]
    for candidates, error, message in uses:
        for use in (
            lambda c: tfgrow.apply(model, c),
            lambda c: tfgrow.measure_change(model, c, regression_data(model)),
        ):
            with pytest.raises(error, match=message):
                use(candidates)
    misfit = splits[0].replace(theta={**splits[0].theta, "kernel": np.zeros(5)})
    with pytest.raises(ValueError, match="shape"):
        tfgrow.apply(model, [misfit])
    for old, new in zip(weights, model.get_weights(), strict=True):
        np.testing.assert_array_equal(old, new)
    tfgrow.apply(model, splits[:1])  # nothing of the failures has stuck


@pytest.mark.parametrize("units", [0, -1, 1.5, "2", True, None])
def test_widening_by_nonsense(units):
    with pytest.raises(ValueError, match="units must be a whole number >= 1"):
        tfgrow.widen(BATCH_NORM.model(), "conv1", units)


@pytest.mark.parametrize(
    ("change", "found"),
    [({"kernel": np.ones(7)}, r"shape \(7,\)"), ({"kernel": np.full((3, 3, 2), np.nan)}, ".*nan")],
)
def test_theta_of_another_shape_or_not_finite_is_refused(change, found):
    model = BATCH_NORM.model()
    split = tfgrow.candidates(model, "split")[0]
    with pytest.raises(ValueError, match=rf"theta\['kernel'\].*must be finite.*found {found}"):
        tfgrow.apply(model, [split.replace(theta={**split.theta, **change})])


def test_one_candidate_and_one_site_may_stand_alone():
    model = BATCH_NORM.model()
    new = tfgrow.candidates(model, "add", sites="conv1", new_units=1)
    assert new[0].key == tfgrow.candidates(model, "add", sites=["conv1"] * 2, new_units=1)[0].key
    before = model.get_layer("conv1").filters
    assert tfgrow.apply(model, new[0]).widths == {"conv1": (before, before + 1)}


def test_double_precision_is_kept():
    keras.config.set_floatx("float64")
    try:
        stock = keras.Sequential(
            [keras.Input((4,)), keras.layers.Dense(3, "tanh", name="a"), keras.layers.Dense(2)]
        )
        model, x = tfgrow.convert(stock), np.random.default_rng(0).normal(size=(5, 4))
        before = np.asarray(model(x))
        tfgrow.widen(model, "a", 2)
        np.testing.assert_allclose(model(x), before, atol=1e-15)
    finally:
        keras.config.set_floatx("float32")


def test_widening_what_is_not_there_or_cannot_grow():
    model = BATCH_NORM.model()
    with pytest.raises(ValueError, match="no site named 'conv7'"):
        tfgrow.widen(model, "conv7", 1)
    with pytest.raises(ValueError, match="'out' is an output layer"):
        tfgrow.widen(model, "out", 1)


@pytest.mark.parametrize("units", [0, [True], [np.True_]])
def test_units_to_prune_are_indices(units):
    model = by_name("perceptron").model()
    with pytest.raises(TypeError, match="units takes indices"):
        tfgrow.prune(model, tfgrow.find_sites(model)[0].name, units)


def test_nothing_is_no_candidate():
    with pytest.raises(TypeError, match="Expected Candidates, found NoneType"):
        tfgrow.apply(by_name("perceptron").model(), None)
