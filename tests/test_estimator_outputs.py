"""Models with several outputs: their loss is as Keras has it, estimates are what really happens."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

import tfgrow
from tests.cases import randomize
from tfgrow.capture.batches import batches_of
from tfgrow.curvature.by_output import losses_by_output
from tfgrow.curvature.reference import output_hessian
from tfgrow.curvature.total_loss import make_total_loss
from tfgrow.graph.nodes import trace
from tfgrow.oracle.data import split_data

SAMPLES = 24
LABEL = "sparse_categorical_crossentropy"


def two_headed(pack=lambda label, score: [label, score]):
    """Two inputs, two hidden sites; `score` reads the hidden units and what `label` gives."""
    keras.utils.set_random_seed(0)
    a, b = keras.Input((4,), name="a"), keras.Input((2,), name="b")
    x = layers.Concatenate()([layers.Dense(3, name="narrow")(a), b])
    first = layers.Dense(4, "tanh", name="first")(x)
    label = layers.Dense(3, "softmax", name="label")(first)
    second = layers.Dense(4, "tanh", name="second")(first)
    score = layers.Dense(2, name="score")(layers.Concatenate()([second, label]))
    return grown(keras.Model([a, b], pack(label, score)))


def grown(stock):
    randomize(stock)
    return tfgrow.convert(stock)


def named(label, score):
    return {"score": score, "label": label}


_rng = np.random.default_rng(0)
X = [_rng.normal(size=(SAMPLES, size)).astype("float32") for size in (4, 2)]
LABELS = _rng.integers(0, 3, SAMPLES)
SCORES = _rng.normal(size=(SAMPLES, 2)).astype("float32")
W1, W2 = _rng.uniform(0.1, 2.0, (2, SAMPLES)).astype("float32")


def small(candidates, scale=0.1):
    """The candidates with so little theta that the estimate must be the truth."""
    return [
        c.replace(theta={name: value * np.float32(scale) for name, value in c.theta.items()})
        for c in candidates
    ]


def assert_as_keras_has_it(model, data, curvature="exact", **given):
    """Loss as by `evaluate`, small edits as they really are, forward mode as reverse mode."""
    x, y, *weights = data
    estimator = tfgrow.GaussNewtonEstimator(model, curvature=curvature, **given)
    expected = model.evaluate(
        x,
        y,
        sample_weight=weights[0] if weights else None,
        batch_size=SAMPLES,
        verbose=0,
        return_dict=True,
    )
    np.testing.assert_allclose(estimator.loss(data), expected["loss"], rtol=1e-5)
    splits = small(tfgrow.candidates(model, "split"))
    quadratic = estimator.interaction(splits, data)
    some = slice(None, None, 3)  # of every site
    truths = [tfgrow.measure_change(model, [split], data, **given) for split in splits[some]]
    scores = quadratic.scores[some]
    np.testing.assert_allclose(scores, truths, atol=0.05 * np.abs(truths).max() + 2e-7)
    assert np.abs(truths).max() > 1e-5
    if curvature == "exact":
        joint = quadratic.change()
        size = abs(quadratic.linear.sum()) + 0.5 * abs(quadratic.gram.sum())
        assert abs(estimator.joint_change(splits, data) - joint) <= 1e-5 * size


FORMS = {
    "one loss for all": (list, "mse", None, [np.eye(3)[LABELS], SCORES]),
    "lists": (list, [LABEL, "mse"], [0.5, 2.0], [LABELS, SCORES]),
    "tuple of targets": (tuple, [LABEL, "huber"], [0.5, None], (LABELS, SCORES)),
    "dicts for a list": (
        list,
        {"score": "mse", "label": LABEL},
        {"score": 3.0, "label": 0.3},
        {"score": SCORES, "label": LABELS},
    ),
    "dict and list": (list, {"score": "mse", "label": LABEL}, [0.3, 3.0], [LABELS, SCORES]),
    "dicts for a dict": (
        dict,
        {"score": keras.losses.MeanSquaredError(), "label": LABEL},
        {"score": 3.0, "label": 0.3},
        {"score": SCORES, "label": LABELS},
    ),
    "lists for a dict": (dict, [LABEL, "mse"], [0.3, 3.0], {"score": SCORES, "label": LABELS}),
    "weights by another name": (list, [LABEL, "mse"], {"z": 3.0, "a": 0.3}, [LABELS, SCORES]),
    "one without a loss": (list, [LABEL, None], None, [LABELS, SCORES]),
    "one without a target": (list, [None, "mse"], [1.0, 0.25], SCORES),
    "one not named": (dict, {"score": "mse"}, {"score": 0.25}, {"score": SCORES}),
    "one weight for all": (list, "mse", 0.3, [np.eye(3)[LABELS], SCORES]),
}
PACKS = {
    list: lambda label, score: [label, score],
    tuple: lambda label, score: (label, score),
    dict: named,
}


@pytest.mark.parametrize("form", FORMS)
def test_losses_and_targets_in_all_forms(form):
    kind, loss, loss_weights, y = FORMS[form]
    model = two_headed(PACKS[kind])
    model.compile("sgd", loss, loss_weights=loss_weights)
    assert_as_keras_has_it(model, (X, y))


@pytest.mark.parametrize("curvature", ["exact", "empirical"])
@pytest.mark.parametrize(
    "weights",
    [W1, [W1, W2], {"score": W2[:, None], "label": W1}],
    ids=["one", "list", "dict"],
)
def test_sample_weights(weights, curvature):
    names = isinstance(weights, dict)
    model = two_headed(named if names else PACKS[list])
    losses = {"label": LABEL, "score": "mse"}
    model.compile("sgd", losses, {"label": 0.5, "score": 2.0}, weighted_metrics=[])
    y = {"label": LABELS, "score": SCORES} if names else [LABELS, SCORES]
    assert_as_keras_has_it(model, (X, y, weights), curvature)


def test_what_is_given_beside_the_compiled_loss():
    model = two_headed()
    model.compile("sgd", ["mse", "mse"], loss_weights=[1.0, 7.0])
    given = {"loss": [LABEL, "mse"], "loss_weights": [0.5, 2.0]}
    data = (X, [LABELS, SCORES])
    found = tfgrow.GaussNewtonEstimator(model, **given).loss(data)
    plain = tfgrow.GaussNewtonEstimator(model, loss=given["loss"]).loss(data)
    model.compile("sgd", **given)
    assert_as_keras_has_it(model, data, **given)
    np.testing.assert_allclose(found, tfgrow.GaussNewtonEstimator(model).loss(data), rtol=1e-6)
    assert abs(found - plain) > 0.1
    with pytest.raises(ValueError, match="loss_weights go with a loss"):
        tfgrow.GaussNewtonEstimator(model, loss_weights=[1.0, 2.0])
    with pytest.raises(ValueError, match="loss_weights go with a loss"):
        tfgrow.measure_change(model, tfgrow.candidates(model)[:1], data, loss_weights=[1.0, 2.0])


@pytest.mark.parametrize("curvature", ["exact", "empirical"])
def test_the_loss_weight_of_a_single_output(curvature):
    keras.utils.set_random_seed(0)
    parts = [layers.Dense(4, "tanh"), layers.Dense(3, "softmax")]
    model = grown(keras.Sequential([keras.Input((4,)), *parts]))
    model.compile("sgd", LABEL, loss_weights=0.25, weighted_metrics=[])
    data = X[0], LABELS, W1
    assert_as_keras_has_it(model, data, curvature)
    splits = tfgrow.candidates(model, "split")
    weighted = tfgrow.GaussNewtonEstimator(model, curvature=curvature).interaction(splits, data)
    plain = tfgrow.GaussNewtonEstimator(model, LABEL, curvature).interaction(splits, data)
    np.testing.assert_allclose(weighted.linear, 0.25 * plain.linear, rtol=1e-4, atol=1e-8)
    np.testing.assert_allclose(weighted.gram, 0.25 * plain.gram, rtol=1e-4, atol=1e-8)


def test_maps_beside_vectors(rng):
    """An output with positions, weighed by position, and one without."""
    keras.utils.set_random_seed(0)
    inputs = keras.Input((5, 5, 2))
    x = layers.Conv2D(3, 3, padding="same", activation="tanh", name="trunk")(inputs)
    mask = layers.Conv2D(2, 3, padding="same", activation="softmax", name="mask")(x)
    x = layers.GlobalAveragePooling2D()(x)
    kind = layers.Dense(1, "sigmoid", name="kind")(x)
    model = grown(keras.Model(inputs, [mask, kind]))
    model.compile("sgd", [LABEL, "binary_crossentropy"], [0.7, 0.2], weighted_metrics=[])
    x = rng.normal(size=(SAMPLES, 5, 5, 2)).astype("float32")
    y = [rng.integers(0, 2, (SAMPLES, 5, 5)), rng.integers(0, 2, (SAMPLES, 1))]
    weights = [rng.uniform(0.1, 2.0, (SAMPLES, 5, 5)), W1]
    assert_as_keras_has_it(model, (x, y, weights))


def test_estimate_is_the_truth_where_the_loss_is_quadratic():
    keras.utils.set_random_seed(0)
    inputs = keras.Input((4,))
    x = layers.Dense(3, name="first")(inputs)
    near = layers.Dense(2, name="near")(x)
    far = layers.Dense(1, name="far")(layers.Dense(3, name="second")(x))
    model = grown(keras.Model(inputs, [near, far]))
    model.compile("sgd", ["mse", "mse"], loss_weights=[0.5, 2.0])
    y = [SCORES, SCORES[:, :1] + 1.0]
    data = (X[0], y, [W1, W2])
    estimator = tfgrow.GaussNewtonEstimator(model, curvature="exact")
    learned = estimator.learn(tfgrow.candidates(model, "add", new_units=2), data, steps=2)
    assert {c.site.name for c in learned} == {"first", "second"}
    for size in (1.0, 3.0):
        moved = small(learned, size)
        scores = estimator.score(moved, data)
        truths = [tfgrow.measure_change(model, [c], data) for c in moved]
        assert np.abs(truths).max() > 0.01
        np.testing.assert_allclose(scores, truths, atol=1e-5 * max(1.0, np.abs(truths).max()))
    together = [c for c in learned if c.site.name == "first"]
    np.testing.assert_allclose(
        estimator.joint_change(together, data),
        tfgrow.measure_change(model, together, data),
        atol=1e-5,
    )


def test_scores_are_the_truth_where_one_loss_is_quadratic_and_the_other_a_crossentropy():
    """Columns of two outputs: each tells its own logits, and only the label's loss has more."""
    keras.utils.set_random_seed(0)
    inputs = keras.Input((4,))
    x = layers.Dense(3, activation="tanh", name="first")(inputs)
    score = layers.Dense(1, name="score")(x)
    label = layers.Dense(3, activation="softmax", name="label")(x)
    model = grown(keras.Model(inputs, [score, label]))
    model.compile("sgd", ["mse", "sparse_categorical_crossentropy"], loss_weights=[0.5, 2.0])
    rng = np.random.default_rng(0)
    data = (X[0], [SCORES[:, :1], rng.integers(3, size=SAMPLES)], [W1, W2])
    estimator = tfgrow.GaussNewtonEstimator(model, curvature="exact")
    removals = tfgrow.candidates(model, "prune", sites=["first"])
    truths = [tfgrow.measure_change(model, [c], data) for c in removals]
    found = estimator.score(removals, data)
    np.testing.assert_allclose(found, truths, atol=1e-5)
    assert np.abs(estimator.interaction(removals, data).scores - truths).max() > 1e-3


def test_learning_lowers_the_loss_of_both():
    model = two_headed()
    model.compile("sgd", [LABEL, "mse"], loss_weights=[1.0, 0.5])
    data = (X, [LABELS, SCORES])
    estimator = tfgrow.GaussNewtonEstimator(model)
    learned = estimator.learn(tfgrow.candidates(model, ("split", "add", "prune")), data, steps=5)
    scores = estimator.score(learned, data)
    truths = np.array([tfgrow.measure_change(model, [c], data) for c in learned])
    added = np.array([c.morphism == "add" for c in learned])
    assert (scores[added] < -0.003).all()
    assert (truths[added] < 0).all()
    assert np.corrcoef(scores, truths)[0, 1] > 0.9


# ---- curvature ------------------------------------------------------------------------------


def total_of(curvature, loss=("mse", "mse"), sizes=(2, 2)):
    """The loss of a net of several heads, with targets, logits and weights to try it on."""
    inputs = keras.Input((3,))
    x = layers.Dense(2)(inputs)
    graph = trace(keras.Model(inputs, [layers.Dense(size)(x) for size in sizes]))
    weights = [0.5 + number for number in range(len(sizes))]
    total = make_total_loss(graph, list(loss), weights, curvature)
    rng = np.random.default_rng(1)
    z = [tf.constant(rng.normal(size=(3, size)).astype("float32")) for size in sizes]
    y = [rng.normal(size=(3, size)).astype("float32") for size in sizes]
    ((_, y, w),) = [total.arranged(b) for b in batches_of((np.ones((3, 3)), y))]
    return total, y, z, w


def products(columns, z):
    """`sum_k h_k h_k'` over the logits of all heads: `[N, D, D]`."""
    rows = [
        tf.concat([column.get(number, tf.zeros_like(z)) for number, z in enumerate(z)], axis=1)
        for column in columns
    ]
    return np.einsum("kni,knj->nij", rows, rows)


def block_diagonal(total, y, z, w):
    blocks = [
        output_hessian(part.at_logits, target, logits) * weight[:, None, None]
        for part, target, logits, weight in zip(total.parts, y, z, w, strict=True)
    ]
    size = sum(block.shape[1] for block in blocks)
    whole, start = np.zeros((len(blocks[0]), size, size)), 0
    for block in blocks:
        stop = start + block.shape[1]
        whole[:, start:stop, start:stop] = block
        start = stop
    return whole


def test_exact_columns_belong_to_one_output_each():
    total, y, z, w = total_of("exact", ("mse", "log_cosh", "mse"), (2, 3, 1))
    columns = total.columns(y, z, w, draws=1, seed=None)
    assert [list(column) for column in columns] == [[0], [0], [1], [1], [1], [2]]
    np.testing.assert_allclose(products(columns, z), block_diagonal(total, y, z, w), atol=1e-5)


def test_drawn_columns_are_shared_and_exact_in_expectation():
    draws = 4000
    total, y, z, w = total_of("sampled")
    columns = total.columns(y, z, w, draws, tf.constant([0, 1]))
    assert len(columns) == draws
    assert all(list(column) == [0, 1] for column in columns)
    expected = block_diagonal(total, y, z, w)
    np.testing.assert_allclose(products(columns, z), expected, atol=0.1 * expected.max())


def test_the_empirical_column_of_each_output_is_its_own_gradient():
    total, y, z, w = total_of("empirical")
    columns = total.columns(y, z, w, draws=1, seed=None)
    gradients = total.gradient(y, z, w)
    assert [list(column) for column in columns] == [[0], [1]]
    for number, column in enumerate(columns):
        root = np.sqrt(w[number])[:, None]
        np.testing.assert_allclose(root * column[number], gradients[number], rtol=1e-5)


def test_loss_weights_scale_the_empirical_column_of_weighed_positions(rng):
    inputs = keras.Input((5, 3))
    graph = trace(keras.Model(inputs, layers.Dense(2)(inputs)))
    z = [tf.constant(rng.normal(size=(4, 5, 2)).astype("float32"))]
    data = np.ones((4, 5, 3)), np.ones((4, 5, 2)), rng.uniform(0.1, 2.0, (4, 5))
    columns = []
    for weight in (1.0, 4.0):
        total = make_total_loss(graph, "mse", weight, "empirical")
        _, y, w = total.arranged(*batches_of(data))
        columns += [column[0] for column in total.columns(y, z, w, draws=1, seed=None)]
    np.testing.assert_allclose(columns[1], 2.0 * columns[0], rtol=1e-5)


@pytest.mark.parametrize(
    ("loss", "sizes", "chosen"),
    [
        (("mse", "mse"), (8, 8), "exact"),
        (("mse", "mse"), (8, 9), "sampled"),
        (("mse", "mae"), (8, 9), ("exact", "empirical")),
        (("mse", "mae", "mse"), (2, 2, 20), ("sampled", "empirical", "sampled")),
        (("mse", None), (16, 9), "exact"),
    ],
)
def test_auto_counts_the_columns_of_all_outputs(loss, sizes, chosen):
    inputs = keras.Input((3,))
    x = layers.Dense(2)(inputs)
    model = tfgrow.convert(keras.Model(inputs, [layers.Dense(size)(x) for size in sizes]))
    estimator = tfgrow.GaussNewtonEstimator(model, loss=list(loss))
    assert estimator.curvature == chosen
    y = [np.ones((6, size), "float32") for size in sizes]
    data = np.ones((6, 3), "float32"), y
    assert np.isfinite(estimator.score(tfgrow.candidates(model), data)).all()


# ---- growth ---------------------------------------------------------------------------------


def oracle(**options):
    settings = {"learn_steps": 2, "score_batches": 2, "held_out_batches": 2, "new_units": 1}
    return tfgrow.GaussNewtonOracle(seed=0, growth_per_step=0.5, **settings, **options)


def many(samples=96):
    rows = np.arange(samples) % SAMPLES
    x = [part[rows] for part in X]
    return x, {"label": LABELS[rows], "score": SCORES[rows]}, {"label": W1[rows], "score": W2[rows]}


def test_growth_inside_fit():
    model = two_headed(named)
    model.compile(
        "adam",
        {"label": LABEL, "score": "mse"},
        loss_weights={"label": 1.0, "score": 2.0},
        weighted_metrics=[],
    )
    x, y, w = many()
    growth = tfgrow.callbacks.Growth(oracle(), data=(x, y, w), every=1, verbose=0)
    history = model.fit(
        x, y, 16, 3, sample_weight=w, validation_data=(x, y, w), callbacks=[growth], verbose=0
    ).history
    assert [event.status for event in growth.events] == ["applied", "applied"]
    assert all(event.measured_change < 0 for event in growth.events)
    assert growth.events[-1].params_after == model.count_params() > 60
    best = growth.oracle.get_best_trials(1)[0]
    assert best.score == pytest.approx(min(history["val_loss"][1:]))
    np.testing.assert_allclose(
        tfgrow.GaussNewtonEstimator(model).loss((x, y, w)), history["val_loss"][-1], rtol=1e-4
    )


def test_growth_where_one_output_has_no_loss_and_its_target_is_none():
    model = two_headed()
    model.compile("adam", ["sparse_categorical_crossentropy", None])
    x, y, _ = many()
    data = x, [y["label"], None]
    growth = tfgrow.callbacks.Growth(oracle(), data=data, every=1, verbose=0)
    dataset = tf.data.Dataset.from_tensor_slices((tuple(x), y["label"])).batch(16)
    model.fit(dataset, epochs=2, callbacks=[growth], verbose=0)
    (event,) = growth.events
    assert event.status == "applied"
    assert set(event.widths) <= {"first", "narrow"}  # nothing else reaches the loss


def test_few_samples_are_shared_out_with_their_targets_and_weights():
    x, y, w = many(30)
    parts = split_data((x, y, w), 4, 4, 2)
    batches = [*parts.learn, *parts.score, *parts.held_out]
    assert len(batches) == 10
    for name in ("label", "score"):
        together = np.concatenate([targets[name] for _, targets, _ in batches])
        np.testing.assert_array_equal(together, y[name])
        together = np.concatenate([weights[name] for _, _, weights in batches])
        np.testing.assert_array_equal(together, w[name])


# ---- what makes no sense --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("loss", "loss_weights", "message"),
    [
        (["mse"], None, r"1 losses .* for the outputs \['label', 'score'\]"),
        (["mse"] * 3, None, "3 losses"),
        ({"label": "mse"}, None, r"losses for \['label'\], none for \['score'\]"),
        ({"label": "mse", "scores": "mse"}, None, r"none for \['score'\] and \['scores'\] too"),
        ([None, None], None, "Found no loss"),
        (["mse", "nonsense"], None, "Output 'score': .*nonsense"),
        (["mse", "mse"], [1.0], "one number per loss"),
        ("mse", [1.0, 2.0], "one number per loss"),
        (["mse", "mse"], 2.0, "one number per loss"),
        (
            {"label": "mse", "score": "mse"},
            {"label": 1.0},
            r"loss_weights for \['label'\], none for \['score'\]",
        ),
        (["mse", "mse"], [1.0, -1.0], "loss weight of output 'score' is -1"),
    ],
)
def test_losses_that_do_not_fit_the_outputs(loss, loss_weights, message):
    with pytest.raises(ValueError, match=message):
        tfgrow.GaussNewtonEstimator(two_headed(), loss=loss, loss_weights=loss_weights)


def test_a_loss_that_no_output_of_a_dict_has():
    with pytest.raises(ValueError, match=r"\['scores'\] too; expected the outputs"):
        losses_by_output({"scores": "mse"}, ("label", "score"), names_outputs=True)


@pytest.mark.parametrize(
    ("y", "weights", "message"),
    [
        (LABELS, None, r"gives 1 targets for the outputs \['label', 'score'\]"),
        ([LABELS, SCORES, SCORES], None, "gives 3 targets"),
        ({"label": LABELS}, None, r"no targets for the outputs \['score'\]"),
        ({"label": LABELS, "score": SCORES, "x": SCORES}, None, r"targets .*\['x'\] too"),
        ([LABELS, None], None, r"no targets for the outputs \['score'\]"),
        ([LABELS, SCORES], [W1, W1, W1], "gives 3 sample weights"),
        ([LABELS, SCORES], {"scores": W1}, r"sample weights .*\['scores'\] too"),
        ([LABELS, SCORES], [W1, -W1], "Sample weights must be >= 0"),
        ([LABELS + 1, SCORES], None, "targets of output 'label' hold the labels 1 to 3"),
        ([LABELS, SCORES[:, :1]], None, "Output 'score': The targets do not fit"),
    ],
)
def test_data_that_does_not_fit_the_outputs(y, weights, message):
    model = two_headed()
    model.compile("sgd", [LABEL, "mse"])
    split = tfgrow.candidates(model, "split")[:1]
    data = (X, y) if weights is None else (X, y, weights)
    with pytest.raises(ValueError, match=message):
        tfgrow.GaussNewtonEstimator(model).score(split, data)
    with pytest.raises(ValueError, match=message):
        tfgrow.measure_change(model, split, data)
