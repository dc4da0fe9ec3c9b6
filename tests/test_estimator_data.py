"""Data in every form that `fit` takes: the estimate sees what Keras sees, or says why not."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

import tfgrow
from tests.cases import randomize

LOSS = "sparse_categorical_crossentropy"


def classifier(*tail, features=6, activation="relu"):
    """Dense 4 - Dense 3 with softmax, then `tail`; compiled."""
    keras.utils.set_random_seed(0)
    hidden = layers.Dense(4, activation, name="hidden")
    stock = keras.Sequential(
        [keras.Input((features,)), hidden, layers.Dense(3, "softmax", name="out"), *tail]
    )
    return compiled(stock)


def compiled(stock, loss=LOSS):
    randomize(stock)
    model = tfgrow.convert(stock)
    model.compile("sgd", loss, weighted_metrics=[])
    return model


def points(samples=24, features=6, classes=3):
    """The same ones in every test, whichever ran before."""
    rng = np.random.default_rng(1)
    x = rng.normal(size=(samples, features)).astype("float32")
    return x, rng.integers(0, classes, samples)


def small(candidates, scale=0.1):
    """The candidates with so little theta that the estimate must be the truth."""
    return [tfgrow.Candidate.replace(c, theta=_times(c.theta, scale)) for c in candidates]


def _times(theta, scale):
    return {name: value * np.float32(scale) for name, value in theta.items()}


def assert_as_keras_has_it(model, data, curvature="exact"):
    """Loss as by `evaluate`, small edits as they really are, forward mode as reverse mode."""
    x, y, *weights = data
    estimator = tfgrow.GaussNewtonEstimator(model, curvature=curvature)
    expected = model.evaluate(x, y, sample_weight=weights[0] if weights else None, verbose=0)
    np.testing.assert_allclose(estimator.loss(data), expected, rtol=1e-5)
    splits = small(tfgrow.candidates(model, "split"))
    scores = estimator.score(splits, data)
    truths = [tfgrow.measure_change(model, [split], data) for split in splits]
    np.testing.assert_allclose(scores, truths, atol=0.05 * np.abs(truths).max() + 2e-7)
    if curvature == "exact":
        joint = estimator.interaction(splits, data).change()
        np.testing.assert_allclose(estimator.joint_change(splits, data), joint, rtol=1e-3)


@pytest.mark.parametrize("shape", [(24,), (24, 1)])
def test_weights_of_samples(shape, rng):
    data = (*points(), rng.uniform(0.1, 2.0, shape))
    assert_as_keras_has_it(classifier(), data)


@pytest.mark.parametrize("steps", [7, 24])
@pytest.mark.parametrize("curvature", ["exact", "empirical"])
def test_weights_of_time_steps(steps, curvature, rng):
    """Also where there are as many steps as samples, which could be taken for each other."""
    keras.utils.set_random_seed(0)
    model = compiled(
        keras.Sequential(
            [
                keras.Input((steps, 2)),
                layers.Conv1D(4, 3, padding="same", activation="tanh", name="hidden"),
                layers.Conv1D(3, 3, padding="same", activation="softmax", name="out"),
            ]
        )
    )
    x = rng.normal(size=(24, steps, 2)).astype("float32")
    y, weights = rng.integers(0, 3, (24, steps)), rng.uniform(0.1, 2.0, (24, steps))
    assert_as_keras_has_it(model, (x, y, weights), curvature)
    estimator = tfgrow.GaussNewtonEstimator(model)
    with pytest.raises(ValueError, match=r"Sample weights of shape .*5.* don't fit"):
        estimator.loss((x, y, weights[:, :5]))


@pytest.mark.parametrize(
    "tail",
    [
        layers.Activation("linear", dtype="float32"),
        layers.Dropout(0.5),
        layers.Reshape((3,)),
        layers.Identity(),
    ],
    ids=lambda layer: layer.name,
)
def test_what_changes_nothing_behind_a_softmax_is_looked_through(tail):
    plain, data = classifier(), points()
    tailed = classifier(type(tail).from_config(tail.get_config()))
    gram = [
        tfgrow.GaussNewtonEstimator(model, curvature="exact")
        .interaction(tfgrow.candidates(model, "split"), data)
        .gram
        for model in (plain, tailed)
    ]
    np.testing.assert_allclose(gram[1], gram[0], rtol=1e-4, atol=1e-7)


def tagger(masking):
    """A loss per time step, of sequences whose ends are padded; and another output without."""
    keras.utils.set_random_seed(0)
    if masking:
        inputs = keras.Input((6, 3))
        x = layers.Masking()(inputs)
    else:
        inputs = keras.Input((6,), dtype="int32")
        x = layers.Embedding(9, 3, mask_zero=True, name="embedded")(inputs)
    x = layers.Dense(4, "relu", name="hidden")(x)
    tags = layers.Dense(2, "softmax", name="tags")(x)
    kind = layers.Dense(1, name="kind")(layers.GlobalMaxPooling1D()(x))
    return compiled(keras.Model(inputs, [tags, kind]), [LOSS, "mse"])


@pytest.mark.parametrize("masking", [True, False])
@pytest.mark.parametrize("weighted", [False, True])
def test_masked_positions_count_as_in_fit(masking, weighted):
    model, rng = tagger(masking), np.random.default_rng(1)
    padded = np.arange(6) > rng.integers(1, 6, size=(24, 1))
    x = rng.normal(size=(24, 6, 3)).astype("float32") if masking else rng.integers(1, 9, (24, 6))
    x[padded] = 0
    y = rng.integers(0, 2, size=(24, 6)), rng.normal(size=(24, 1)).astype("float32")
    weights = rng.uniform(0.5, 2, size=(24, 6)).astype("float32"), np.ones(24, "float32")
    data = (x, y, weights) if weighted else (x, y)

    def of_keras():
        return model.evaluate(*data[:2], 24, 0, *data[2:])[0]

    before = of_keras()
    estimator = tfgrow.GaussNewtonEstimator(model, curvature="exact")
    assert estimator.loss(data) == pytest.approx(before, rel=1e-5)
    learned = estimator.learn(tfgrow.candidates(model, "add", new_units=2), data, steps=2)
    learned = small(learned)
    true = [tfgrow.measure_change(model, one, data) for one in learned]
    np.testing.assert_allclose(estimator.score(learned, data), true, rtol=0.02, atol=1e-6)
    tfgrow.apply(model, learned[0])
    assert of_keras() - before == pytest.approx(true[0], rel=0.01, abs=1e-6)


def test_inputs_of_a_dict_are_read_by_name(rng):
    second, first = keras.Input((2,), name="b"), keras.Input((2,), name="a")
    x = layers.Concatenate()([layers.Dense(2)(second), first])
    model = compiled(keras.Model([second, first], layers.Dense(1)(layers.Dense(3)(x))), "mse")
    values = {name: rng.normal(size=(8, 2)).astype("float32") for name in ("a", "b", "unused")}
    y = rng.normal(size=(8, 1))
    estimator = tfgrow.GaussNewtonEstimator(model)
    expected = model.evaluate([values["b"], values["a"]], y, verbose=0)
    np.testing.assert_allclose(estimator.loss((values, y)), expected, rtol=1e-5)


def test_a_single_output_may_have_a_name(rng):
    inputs = keras.Input((6,))
    outputs = {"score": layers.Dense(1)(layers.Dense(3, "tanh")(inputs))}
    model = compiled(keras.Model(inputs, outputs), {"score": "mse"})
    x, y = points()[0], rng.normal(size=(24, 1))
    assert_as_keras_has_it(model, (x, {"score": y}))
    assert tfgrow.GaussNewtonEstimator(model).loss((x, y)) > 0


def test_maps_of_one_position_before_a_global_maximum(rng):
    keras.utils.set_random_seed(0)
    parts = [layers.Conv2D(3, 3), layers.MaxPooling2D(2), layers.Conv2D(4, 3)]
    parts += [layers.GlobalMaxPooling2D(), layers.Dense(3, "softmax")]
    model = compiled(keras.Sequential([keras.Input((8, 8, 3)), *parts]))
    data = rng.normal(size=(24, 8, 8, 3)).astype("float32"), points()[1]
    estimator = tfgrow.GaussNewtonEstimator(model)
    learned = estimator.learn(tfgrow.candidates(model, "add", new_units=1), data, steps=1)
    assert (estimator.score(learned, data) < 0).all()


def test_images_of_several_sizes_in_one_dataset(rng):
    keras.utils.set_random_seed(0)
    parts = [layers.Conv2D(3, 3, activation="relu"), layers.MaxPooling2D(2), layers.Conv2D(4, 3)]
    parts += [layers.GlobalAveragePooling2D(), layers.Dense(3, "softmax")]
    model = compiled(keras.Sequential([keras.Input((None, None, 3)), *parts]))
    data = [
        (rng.normal(size=(n, height, 9, 3)).astype("float32"), rng.integers(0, 3, n))
        for n, height in ((4, 8), (4, 10), (3, 12))
    ]
    estimator = tfgrow.GaussNewtonEstimator(model)
    learned = estimator.learn(tfgrow.candidates(model, new_units=1), data, steps=2)
    scores = estimator.score(small(learned, 0.3), data)
    truths = [tfgrow.measure_change(model, [c], data) for c in small(learned, 0.3)]
    np.testing.assert_allclose(scores, truths, atol=0.1 * np.abs(truths).max())


def test_sequences_are_as_long_as_the_longest_of_their_batch(rng):
    """Scores over batches of several lengths are the mean of those over each length."""
    keras.utils.set_random_seed(0)
    tokens = keras.Input((None,), dtype="int32")
    x = layers.Conv1D(4, 3, padding="same", activation="tanh")(layers.Embedding(9, 3)(tokens))
    x = layers.Dense(3, "softmax")(layers.GlobalAveragePooling1D()(x))
    model = compiled(keras.Model(tokens, x))
    data = [(rng.integers(0, 9, (n, length)), rng.integers(0, 3, n))
            for n, length in ((4, 5), (4, 7), (2, 6))]  # fmt: skip
    estimator = tfgrow.GaussNewtonEstimator(model, curvature="exact")
    learned = small(estimator.learn(tfgrow.candidates(model, new_units=1), data, steps=2), 0.1)
    scores = estimator.score(learned, data)
    apart = [estimator.score(learned, batch) for batch in data]
    mean = np.average(apart, axis=0, weights=[4, 4, 2])
    np.testing.assert_allclose(scores, mean, rtol=1e-3, atol=1e-7)
    truths = [tfgrow.measure_change(model, [c], data) for c in learned]
    np.testing.assert_allclose(scores, truths, atol=0.1 * np.abs(truths).max())


@pytest.mark.parametrize("everything", [True, False], ids=["floatx", "input"])
def test_inputs_of_float64(everything):
    x, y = points()
    expected = tfgrow.GaussNewtonEstimator(classifier()).loss((x, y))
    before = keras.config.floatx()
    try:
        if everything:
            keras.config.set_floatx("float64")
        inputs = keras.Input((6,), dtype="float64")
        hidden = layers.Dense(4, "relu", name="hidden")(inputs)
        model = compiled(keras.Model(inputs, layers.Dense(3, "softmax", name="out")(hidden)))
        model.set_weights(classifier().get_weights())
        data = x.astype("float64"), y
        np.testing.assert_allclose(tfgrow.GaussNewtonEstimator(model).loss(data), expected, 1e-5)
        assert_as_keras_has_it(model, data)
    finally:
        keras.config.set_floatx(before)


def test_labels_of_bool():
    x, _ = points()
    y = x[:, 0] > 0
    model = classifier()
    assert_as_keras_has_it(model, (x, y))
    as_numbers = tfgrow.GaussNewtonEstimator(model).loss((x, y.astype(int)))
    assert tfgrow.GaussNewtonEstimator(model).loss((x, y)) == as_numbers


class Endless(keras.utils.PyDataset):
    num_batches = None

    def __getitem__(self, index):
        return points()


def test_endless_datasets_are_learned_on_and_never_summed():
    model = classifier()
    estimator = tfgrow.GaussNewtonEstimator(model)
    assert len(estimator.learn(tfgrow.candidates(model), Endless(), steps=1)) == 8
    with pytest.raises(ValueError, match="repeats for ever"):
        estimator.loss(Endless())


def test_truth_is_measured_in_float32_under_mixed_precision():
    keras.config.set_dtype_policy("mixed_bfloat16")
    model, data = classifier(), points()
    nothing = small(tfgrow.candidates(model, "split"), 0.0)
    assert abs(tfgrow.measure_change(model, nothing[:1], data)) < 1e-6
    assert model.layers[0].compute_dtype == "bfloat16"


# ---- what makes no sense --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (lambda x, y: (x, y, -np.ones(24)), ValueError, "Sample weights must be >= 0; found -1"),
        (lambda x, y: (x, y + 1), ValueError, "labels 1 to 3, .*outputs for the classes 0 to 2"),
        (lambda x, y: (x * np.nan, y), ValueError, "loss on the estimation data is not finite"),
        (lambda x, y: (x[:, :3], y), ValueError, r"samples have shape \(3,\)"),
        (lambda x, y: (x.tolist(), y), TypeError, "Expected .x, y. as arrays"),
    ],
    ids=["weights", "labels", "nan", "shape", "lists"],
)
def test_bad_data_is_refused_by_estimate_and_truth(spoil, error, message):
    x, _ = points()
    data = spoil(x, np.arange(24) % 3)
    model = classifier(activation="tanh")  # TensorFlow's ReLU swallows NaN
    split = tfgrow.candidates(model, "split")[:1]
    with pytest.raises(error, match=message):
        tfgrow.GaussNewtonEstimator(model).score(split, data)
    with pytest.raises(error, match=message):
        tfgrow.measure_change(model, split, data)


@pytest.mark.parametrize("steps", [-1, 1.5])
def test_numbers_of_steps(steps):
    model = classifier()
    with pytest.raises(ValueError, match="steps must be a whole number >= 0"):
        tfgrow.GaussNewtonEstimator(model).learn(tfgrow.candidates(model), points(), steps=steps)


def test_a_stock_model_has_no_candidates_and_the_way_out_is_named():
    stock = keras.Sequential([keras.Input((6,)), layers.Dense(3), layers.Dense(1)])
    with pytest.raises(ValueError, match=r"Nothing in model .* can grow.*tfgrow.convert\(model\)"):
        tfgrow.candidates(stock)


# ---- steps that stay bounded ----------------------------------------------------------------


@pytest.mark.parametrize(
    "loss", [keras.losses.Huber(1.0), lambda y, z: tf.reduce_mean(tf.abs(y - z), axis=-1)]
)
def test_losses_without_curvature_on_the_data(loss):
    """Far from the target they are linear: no minimum, but no step beyond what there is to gain."""
    keras.utils.set_random_seed(0)
    parts = [layers.Dense(4, "relu"), layers.Dense(1)]
    model = tfgrow.convert(keras.Sequential([keras.Input((6,)), *parts]))
    model.compile("sgd", loss)
    x, _ = points(200)
    data = x, 50 + 10 * np.sin(x[:, :1])
    estimator = tfgrow.GaussNewtonEstimator(model)
    learned = estimator.learn(tfgrow.candidates(model, "add", new_units=2), data, steps=3)
    before = estimator.loss(data)
    assert (estimator.score(learned, data) > -0.6 * before).all()
    assert min(tfgrow.measure_change(model, [c], data) for c in learned) < -0.05 * before


@pytest.mark.parametrize("loss", ["mae", "mse", "huber_of_the_unit"])
@pytest.mark.parametrize("outputs", [1, 3])
def test_estimates_do_not_depend_on_the_unit_of_the_targets(loss, outputs, rng):
    """Prices in cents or in thousands: new units bring the same share of the loss."""
    x = rng.normal(size=(256, 6)).astype("float32")
    y = np.stack([np.sin(x[:, n] + x[:, n + 1]) for n in range(outputs)], 1).astype("float32")
    shares, lengths = [], []
    for unit in (0.01, 1.0, 100.0):
        keras.utils.set_random_seed(0)
        parts = [layers.Dense(4, "tanh", name="grows"), layers.Dense(outputs, name="last")]
        model = tfgrow.convert(keras.Sequential([keras.Input((6,)), *parts]))
        last = model.get_layer("last").kernel
        last.assign(unit * last)
        model.compile("sgd", keras.losses.Huber(0.1 * unit) if "huber" in loss else loss)
        estimator = tfgrow.GaussNewtonEstimator(model)
        learned = estimator.learn(tfgrow.candidates(model, "add", new_units=1), (x, unit * y), 4)
        before = estimator.loss((x, unit * y))
        scores = estimator.score(learned, (x, unit * y))
        joint = estimator.joint_change(learned, (x, unit * y))
        interaction = estimator.interaction(learned, (x, unit * y))
        assert joint == pytest.approx(interaction.change(), rel=1e-3)
        shares.append([*scores / before, joint / before])
        lengths.append(np.abs(learned[0].theta["phi/0"]).max() / unit)
    np.testing.assert_allclose(shares, shares[1:2] * 3, rtol=0.02)
    np.testing.assert_allclose(lengths, lengths[1:2] * 3, rtol=0.02)
    assert min(shares[0]) < -0.005


def test_a_unit_that_hardly_fires_gets_no_wild_weights(rng):
    """It fires on one sample of 200, which its outgoing weights alone could fit perfectly."""
    model = classifier(features=2)
    x = rng.normal(size=(200, 2)).astype("float32")
    x[0] = (40.0, 0.0)
    y = np.zeros(200, int)
    y[0] = 1
    add = tfgrow.candidates(model, "add", new_units=1)[0]
    rare = {**add.theta, "kernel": np.float32([1.0, 0.0]), "bias": np.float32(-39.9)}
    estimator = tfgrow.GaussNewtonEstimator(model, curvature="exact")
    learned = estimator.learn([add.replace(theta=rare)], (x, y), steps=0)
    assert np.abs(learned[0].theta["phi/0"]).max() < 20
