"""The estimate against the truth: where it is exact, how it errs elsewhere, and what it refuses."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

import tfgrow
from tests.cases import by_name, class_data, randomize, regression_data
from tfgrow.morphisms.registry import get


def one_hidden_layer(activation="relu", outputs=2, last=None, units=4):
    """Input of 3 -> 'hidden' -> 'out', growable, with biases that are not zero."""
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.Input((3,)),
            layers.Dense(units, activation=activation, name="hidden"),
            layers.Dense(outputs, activation=last, name="out"),
        ]
    )
    randomize(model)
    return tfgrow.convert(model)


def estimator_of(model, loss="mse", **kwargs):
    return tfgrow.GaussNewtonEstimator(model, loss=loss, **{"curvature": "exact", **kwargs})


def scaled(candidates, alpha):
    return [get(c.morphism).scaled(c, alpha) for c in candidates]


def with_random_phi(candidates, size=0.5, seed=0):
    """Candidates whose outgoing weights are not the estimate's own choice."""
    rng = np.random.default_rng(seed)
    return [
        c.replace(
            theta={
                k: size * rng.standard_normal(v.shape).astype("float32") if "phi" in k else v
                for k, v in c.theta.items()
            }
        )
        for c in candidates
    ]


# ---- where it is exact ----------------------------------------------------------------------


@pytest.mark.parametrize("activation", ["linear", "relu", "tanh"])
def test_estimate_is_the_truth_for_squared_error_after_the_consumer(activation):
    """Whatever the activation: it lies on the path, which the perturbation goes through exactly."""
    model = one_hidden_layer(activation)
    data = regression_data(model, 20)
    estimator = estimator_of(model)
    candidates = with_random_phi(tfgrow.candidates(model, new_units=2))
    interaction = estimator.interaction(candidates, data)
    truths = [tfgrow.measure_change(model, [candidate], data, "mse") for candidate in candidates]
    np.testing.assert_allclose(interaction.scores, truths, atol=1e-5)
    splits = [abs(t) for t, c in zip(truths, candidates, strict=True) if c.morphism == "split"]
    assert activation == "linear" or max(splits) > 1e-3  # linear units can be split to no effect
    together = tfgrow.measure_change(model, candidates, data, "mse")
    assert abs(interaction.change() - together) <= 1e-5 * max(1, abs(together))
    assert abs(estimator.joint_change(candidates, data) - together) <= 1e-5 * max(1, abs(together))


def test_estimate_is_the_truth_in_a_linear_convolutional_net():
    """Conv -> pool -> conv -> flatten -> dense, no activation: adds anywhere, one at a time."""
    keras.utils.set_random_seed(0)
    inputs = keras.Input((6, 6, 2))
    x = layers.Conv2D(2, 3, padding="same", name="conv1")(inputs)
    x = layers.BatchNormalization(name="bn")(x)
    x = layers.AveragePooling2D(2, name="pool")(x)
    x = layers.Conv2D(2, 2, name="conv2")(x)
    x = layers.Flatten(name="flatten")(x)
    stock = keras.Model(inputs, layers.Dense(2, name="out")(x))
    randomize(stock)
    model = tfgrow.convert(stock)
    data = regression_data(model, 10)
    candidates = with_random_phi(tfgrow.candidates(model, "add", new_units=1), size=0.1)
    scores = estimator_of(model).score(candidates, data)
    for score, candidate in zip(scores, candidates, strict=True):
        truth = tfgrow.measure_change(model, [candidate], data, "mse")
        assert abs(truth) > 1e-3
        assert abs(score - truth) <= 1e-5 * max(1, abs(truth))


# ---- how it errs elsewhere ------------------------------------------------------------------


def errors(model, data, loss, candidates, alphas):
    """Mean absolute error of the quadratic when the candidates are scaled by each alpha."""
    estimator = estimator_of(model, loss)
    means = []
    for alpha in alphas:
        smaller = scaled(candidates, alpha)
        estimates = estimator.interaction(smaller, data).scores
        truths = [tfgrow.measure_change(model, [c], data, loss) for c in smaller]
        means.append(np.mean(np.abs(estimates - truths)))
    return np.array(means)


def test_error_falls_with_the_cube_where_only_the_loss_is_curved():
    """Adds at the last layer: the logits are linear in phi, the quadratic errs in third order."""
    model = one_hidden_layer("tanh", outputs=3)
    data = class_data(model, 30)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    candidates = with_random_phi(tfgrow.candidates(model, "add", new_units=3), size=1.0)
    error = errors(model, data, loss, candidates, (1.0, 0.5))
    assert 6.5 < error[0] / error[1] < 9.5


def test_error_falls_with_the_square_in_a_deep_piecewise_linear_net():
    """Gauss-Newton leaves out what the later kinks do, which is of second order at least."""
    keras.utils.set_random_seed(0)
    stock = keras.Sequential(
        [
            keras.Input((4,)),
            layers.Dense(6, activation="relu", name="a"),
            layers.Dense(6, activation="relu", name="b"),
            layers.Dense(2, name="out"),
        ]
    )
    randomize(stock)
    model = tfgrow.convert(stock)
    data = regression_data(model, 400)
    candidates = with_random_phi(
        tfgrow.candidates(model, "add", sites=["a"], new_units=3), size=1.0
    )
    error = errors(model, data, "mse", candidates, (0.5, 0.125))
    order = np.log(error[0] / error[1]) / np.log(4)
    assert order > 1.6
    # A split is exact up to the kinks of the layer after next: its error fades too.
    splits = tfgrow.candidates(model, "split", sites=["a"])[:3]
    error = errors(model, data, "mse", splits, (0.5, 0.125))
    assert error[1] < error[0] / 4


# ---- consistency ----------------------------------------------------------------------------


def test_score_interaction_and_joint_change_say_the_same():
    model = by_name("perceptron").model()
    data = regression_data(model, 16)
    estimator = estimator_of(model)
    candidates = with_random_phi(tfgrow.candidates(model, new_units=2))
    shuffled = [candidates[i] for i in np.random.default_rng(0).permutation(len(candidates))]
    interaction = estimator.interaction(shuffled, data)
    np.testing.assert_allclose(estimator.score(shuffled, data), interaction.scores, atol=1e-6)
    for subset in ([0], [1, 3], [5, 2, 0, 4]):
        chosen = [shuffled[i] for i in subset]
        assert interaction.change(subset) == pytest.approx(
            estimator.interaction(chosen, data).change(), abs=1e-5
        )
        assert interaction.change(subset) == pytest.approx(
            estimator.joint_change(chosen, data), abs=1e-4
        )
        if len(subset) == 1:
            assert interaction.scores[subset[0]] == pytest.approx(interaction.change(subset))
    assert interaction.change([]) == 0.0


def of_hidden(units, copies=1, seed=0):
    """Dense 4 -> units, each of them `copies` times -> 2, in squared error."""
    rng = np.random.default_rng(seed)
    kernel, out = rng.normal(size=(4, units)), rng.normal(size=(units, 2))
    model = tfgrow.convert(
        keras.Sequential(
            [
                keras.Input((4,)),
                keras.layers.Dense(units * copies, "tanh", name="hidden"),
                keras.layers.Dense(2, name="out"),
            ]
        )
    )
    bias = np.zeros(units * copies)
    model.get_layer("hidden").set_weights([np.repeat(kernel, copies, axis=1), bias])
    model.get_layer("out").set_weights([np.repeat(out, copies, axis=0) / copies, np.zeros(2)])
    return model


def test_a_units_worth_is_what_least_squares_can_not_make_up_for():
    """For squared error behind the consumer the estimate is exact, and the gradient left out."""
    model = of_hidden(3)
    x = np.random.default_rng(1).normal(size=(400, 4)).astype("float32")
    targets = model.predict(x, verbose=0) + 5.0  # a gradient as large as one likes
    worth = estimator_of(model).worth((x, targets), (x, targets))["hidden"]
    values = np.tanh(x @ np.asarray(model.get_layer("hidden").kernel))
    out = np.asarray(model.get_layer("out").kernel)
    for unit in range(3):
        others = np.column_stack([np.delete(values, unit, axis=1), np.ones(len(x))])
        rest = values[:, unit] - others @ np.linalg.lstsq(others, values[:, unit])[0]
        missed = np.mean(np.outer(rest, out[unit]) ** 2)
        assert worth[unit] == pytest.approx(missed, rel=0.05)


def test_some_of_a_sites_units_are_worth_what_they_are_among_all():
    x = np.random.default_rng(1).normal(size=(400, 4)).astype("float32")
    data = x, x[:, :2]
    every = estimator_of(of_hidden(9)).worth(data, data)["hidden"]
    some = estimator_of(of_hidden(9)).worth(data, data, units=4)["hidden"]
    assert some.shape == (4,)
    places = [int(np.argmin(np.abs(every - one))) for one in some]
    assert places == sorted(set(places))
    np.testing.assert_allclose(some, every[places], rtol=1e-4)


def test_worth_of_one_site_and_of_an_unknown_one():
    model = one_hidden_layer()
    data = regression_data(model, 20)
    estimator = estimator_of(model)
    assert list(estimator.worth(data, data, "hidden")) == ["hidden"]
    with pytest.raises(ValueError, match=r"no site named 'nope'; its sites are \['hidden'"):
        estimator.worth(data, data, ["nope"])


def test_copies_are_worth_nothing():
    x = np.random.default_rng(1).normal(size=(400, 4)).astype("float32")
    data = x, x[:, :2]
    single, doubled = (estimator_of(of_hidden(3, n)).worth(data, data)["hidden"] for n in (1, 2))
    assert len(doubled) == 6
    assert doubled.max() < 0.02 * single.min()


def test_worth_where_the_loss_has_no_curvature_and_where_it_is_not_finite():
    model = of_hidden(3)
    x = np.random.default_rng(1).normal(size=(64, 4)).astype("float32")
    data = x, x[:, :2]
    flat = estimator_of(model, loss="mae", curvature="sampled").worth(data, data)["hidden"]
    assert flat.min() > 1e-4
    assert estimator_of(model).worth(data, data, sites=[]) == {}
    with pytest.raises(ValueError, match="have no closed form"):
        estimator_of(model, curvature="none").worth(data, data)
    before = estimator_of(model)
    change = before.score(tfgrow.candidates(model, "split", seed=1), data)
    before.worth(data, data)
    again = before.score(tfgrow.candidates(model, "split", seed=1), data)
    np.testing.assert_allclose(again, change, rtol=1e-6)


def test_batches_do_not_matter():
    """Sums over batches of any size are those of the whole, and of the mean per sample."""
    model = one_hidden_layer()
    x, y = regression_data(model, 20)
    estimator = estimator_of(model)
    candidates = with_random_phi(tfgrow.candidates(model, new_units=1))
    whole = estimator.interaction(candidates, (x, y))
    ragged = tf.data.Dataset.from_tensor_slices((x, y)).batch(7)
    parts = estimator.interaction(candidates, ragged)
    np.testing.assert_allclose(parts.linear, whole.linear, atol=1e-6)
    np.testing.assert_allclose(parts.gram, whole.gram, atol=1e-5)
    assert estimator.loss(ragged) == pytest.approx(estimator.loss((x, y)), rel=1e-6)


@pytest.mark.parametrize("curvature", ["exact", "empirical"])
def test_sample_weights_are_copies_of_samples(curvature):
    """A sample of weight 2 counts as two, one of weight 0 not at all (the mean stays over all)."""
    model = one_hidden_layer()
    x, y = regression_data(model, 6)
    weight = np.array([2.0, 1.0, 0.0, 1.0, 3.0, 1.0], "float32")
    rows = np.repeat(np.arange(6), weight.astype(int))
    estimator = estimator_of(model, curvature=curvature)
    candidates = with_random_phi(tfgrow.candidates(model, new_units=1))
    weighted = estimator.interaction(candidates, (x, y, weight))
    copied = estimator.interaction(candidates, (x[rows], y[rows]))
    ratio = len(rows) / 6
    np.testing.assert_allclose(weighted.linear, ratio * copied.linear, atol=1e-5)
    np.testing.assert_allclose(weighted.gram, ratio * copied.gram, atol=1e-5)
    if curvature == "exact":
        joint = estimator.joint_change(candidates, (x, y, weight))
        assert joint == pytest.approx(weighted.change(), abs=1e-4)
        truth = tfgrow.measure_change(model, candidates, (x, y, weight), "mse")
        assert joint == pytest.approx(truth, abs=1e-4)


def test_sampled_curvature_is_the_exact_one_on_average():
    model = one_hidden_layer(outputs=5, last="softmax")
    data = class_data(model, 30)
    loss = "sparse_categorical_crossentropy"
    candidates = with_random_phi(tfgrow.candidates(model, "add", new_units=2))
    exact = estimator_of(model, loss).interaction(candidates, data)
    sampled = estimator_of(model, loss, curvature="sampled", draws=200, seed=1)
    found = sampled.interaction(candidates, data)
    np.testing.assert_allclose(found.linear, exact.linear, atol=1e-6)
    np.testing.assert_allclose(np.diag(found.gram), np.diag(exact.gram), rtol=0.2)


@pytest.mark.parametrize("loss", ["mse", "sparse_categorical_crossentropy"])
def test_without_curvature_the_estimate_is_of_first_order(loss):
    classes = loss != "mse"
    model = one_hidden_layer(outputs=3, last="softmax" if classes else None)
    data = (class_data if classes else regression_data)(model, 30)
    candidates = with_random_phi(tfgrow.candidates(model, new_units=2))
    exact = estimator_of(model, loss).interaction(candidates, data)
    estimator = estimator_of(model, loss, curvature="none")
    found = estimator.interaction(candidates, data)
    np.testing.assert_allclose(found.linear, exact.linear, atol=1e-6)
    assert not found.gram.any()
    np.testing.assert_allclose(estimator.score(candidates, data), exact.linear, atol=1e-6)
    assert estimator.joint_change(candidates, data) == pytest.approx(exact.linear.sum(), abs=1e-5)
    splits = [candidate for candidate in candidates if candidate.morphism == "split"]
    learned = estimator.learn(splits, data, steps=20)
    assert estimator.score(learned, data).sum() < estimator.score(splits, data).sum() - 1e-3
    with pytest.raises(ValueError, match=r"the weights of \['add'\] have no closed form"):
        estimator.learn(candidates, data)


# ---- all losses -----------------------------------------------------------------------------

CROSSENTROPY = keras.losses.CategoricalCrossentropy
LOSSES = {
    "mse": ("mse", None, "values"),
    "huber": ("huber", None, "values"),
    "binary on sigmoid": ("binary_crossentropy", "sigmoid", "bits"),
    "binary from logits": (keras.losses.BinaryCrossentropy(from_logits=True), None, "bits"),
    "sparse on softmax": ("sparse_categorical_crossentropy", "softmax", "labels"),
    "sparse from logits": (
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        None,
        "labels",
    ),
    "categorical on softmax": ("categorical_crossentropy", "softmax", "one-hot"),
    "smoothed from logits": (
        CROSSENTROPY(from_logits=True, label_smoothing=0.1),
        None,
        "one-hot",
    ),
    "poisson on softplus": ("poisson", "softplus", "bits"),
    "own function": (lambda y, p: keras.ops.mean((p - y) ** 4, axis=-1), None, "values"),
}


CROSSENTROPIES = [name for name in sorted(LOSSES) if LOSSES[name][2] != "values"]
CROSSENTROPIES.remove("poisson on softplus")


def data_of(kind):
    rng = np.random.default_rng(1)
    x = rng.standard_normal((40, 3))
    y = {
        "values": rng.standard_normal((40, 3)),
        "bits": rng.integers(2, size=(40, 3)),
        "labels": rng.integers(3, size=40),
        "one-hot": np.eye(3)[rng.integers(3, size=40)],
    }[kind]
    return x.astype("float32"), y.astype("float32")


@pytest.mark.parametrize("name", CROSSENTROPIES)
def test_the_score_is_the_truth_for_crossentropies_where_the_logits_are_linear(name):
    """However large the edit: exact columns tell what the logits do, and the loss is known."""
    loss, last, kind = LOSSES[name]
    model = one_hidden_layer("tanh", outputs=3, last=last)
    data = (*data_of(kind), np.linspace(0.0, 2.0, 40).astype("float32"))
    adds = with_random_phi(tfgrow.candidates(model, "add", new_units=2), size=10.0)
    removals = tfgrow.candidates(model, "prune")
    estimator = estimator_of(model, loss)
    scores = estimator.score([*adds, *removals], data)
    truths = [tfgrow.measure_change(model, [c], data, loss) for c in (*adds, *removals)]
    assert np.abs(truths).max() > 0.1
    np.testing.assert_allclose(scores, truths, atol=1e-5 * max(1.0, np.abs(truths).max()))
    quadratic = estimator.interaction([*adds, *removals], data).scores
    assert np.abs(quadratic - truths).max() > 0.01
    few = scaled(adds, 0.003)
    np.testing.assert_allclose(
        estimator.score(few, data), estimator.interaction(few, data).scores, rtol=0.03
    )


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_every_loss_is_estimated_to_third_order(name):
    loss, last, kind = LOSSES[name]
    model = one_hidden_layer("tanh", outputs=3, last=last)
    x, y = data_of(kind)
    candidates = with_random_phi(tfgrow.candidates(model, "add", new_units=2), size=0.2)
    estimator = estimator_of(model, loss)
    change = estimator.joint_change(candidates, (x, y))
    truth = tfgrow.measure_change(model, candidates, (x, y), loss)
    assert estimator.interaction(candidates, (x, y)).change() == pytest.approx(change, abs=1e-5)
    assert abs(truth) > 1e-3
    assert change == pytest.approx(truth, rel=0.15)
    model.compile("sgd", loss)
    assert estimator.loss((x, y)) == pytest.approx(model.evaluate(x, y, verbose=0), rel=1e-4)


def test_the_compiled_loss_is_the_default():
    model = one_hidden_layer()
    data = regression_data(model)
    model.compile("sgd", "mse")
    candidates = with_random_phi(tfgrow.candidates(model))
    by_default = tfgrow.GaussNewtonEstimator(model).score(candidates, data)
    np.testing.assert_array_equal(by_default, estimator_of(model).score(candidates, data))


# ---- learning -------------------------------------------------------------------------------


def test_learning_lowers_the_estimate_and_the_true_loss():
    model = by_name("perceptron").model()
    data = regression_data(model, 64)
    estimator = estimator_of(model)
    start = tfgrow.candidates(model, new_units=1)
    few, many = (estimator.learn(start, data, steps=steps) for steps in (0, 40))
    splits = [i for i, c in enumerate(start) if c.morphism == "split"]
    adds = [i for i, c in enumerate(start) if c.morphism == "add"]
    before, after = estimator.score(few, data), estimator.score(many, data)
    assert (after[splits] < estimator.score(start, data)[splits]).all()
    assert after[splits].mean() < before[splits].mean() - 1e-3
    assert (before[adds] < -1e-3).all()  # phi has a closed form: it needs no steps
    assert (after < 1e-3).all()
    best = int(np.argmin(after))
    assert tfgrow.measure_change(model, [many[best]], data, "mse") < 0.5 * after[best]


def test_new_units_are_not_too_long_where_all_positions_say_the_same(monkeypatch):
    """What factored curvature leaves out is nearly all of it before an average over positions."""
    monkeypatch.setattr(get("add"), "dense_limit", 0)
    keras.utils.set_random_seed(0)
    model = tfgrow.convert(
        keras.Sequential(
            [
                keras.Input((8, 8, 2)),
                layers.Conv2D(4, 3, padding="same", activation="relu", name="conv1"),
                layers.Conv2D(6, 3, padding="same", activation="relu", name="conv2"),
                layers.GlobalAveragePooling2D(),
                layers.Dense(3, name="out"),
            ]
        )
    )
    rng = np.random.default_rng(0)
    x = (rng.normal(size=(768, 8, 8, 2)) + rng.normal(size=(768, 1, 1, 2))).astype("float32")
    y = np.maximum(x[..., :1] * x[..., 1:], 0).mean((1, 2)) * np.ones(3, "float32")
    first, second = (x[:512], y[:512]), (x[512:], y[512:])
    model.compile(keras.optimizers.Adam(0.01), "mse")
    model.fit(*first, epochs=10, verbose=0)
    estimator = estimator_of(model)
    new = tfgrow.candidates(model, "add", sites="conv1", new_units=4)
    learned = estimator.learn(new, first, steps=4)
    found = estimator.interaction(learned, second)
    lengths = -found.linear / np.diag(found.gram)
    assert np.all((lengths > 0.5) & (lengths < 2.0))
    assert np.all(found.scores < 0)
    true = [tfgrow.measure_change(model, one, second) for one in learned]
    np.testing.assert_allclose(found.scores, true, rtol=0.35)


def test_learning_repeats_bit_for_bit_by_seed():
    data = class_data(by_name("bn_after_activation").model(), 40)

    def learn(seed):
        model = by_name("bn_after_activation").model()
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        estimator = estimator_of(model, loss, curvature="sampled", seed=seed)
        start = tfgrow.candidates(model, sites=["dense1"], new_units=1, seed=5)
        learned = estimator.learn(start, data, steps=3)
        return learned, estimator.score(learned, data)

    (one, first), (two, second), (three, _) = learn(1), learn(1), learn(2)
    np.testing.assert_array_equal(first, second)
    for mine, same, other in zip(one, two, three, strict=True):
        for part in ("theta", "state"):
            for name, value in getattr(mine, part).items():
                np.testing.assert_array_equal(value, getattr(same, part)[name])
        assert not np.array_equal(mine.theta["kernel"], other.theta["kernel"])


def test_learning_keeps_the_order_and_reports_its_progress():
    model = one_hidden_layer()
    data = regression_data(model)
    mixed = tfgrow.candidates(model, ("add", "split"), new_units=2)[::-1]
    seen = []
    learned = estimator_of(model).learn(
        mixed, data, steps=2, progress=lambda done, total: seen.append((done, total))
    )
    assert [c.key for c in learned] == [c.key for c in mixed]
    assert [done for done, _ in seen] == list(range(1, seen[-1][1] + 1))
    assert all(not np.any(c.theta["phi/0"]) for c in mixed if c.morphism == "add")
    assert all(np.any(c.theta["phi/0"]) for c in learned if c.morphism == "add")


def test_learned_and_new_candidates_can_be_scored_together():
    model = by_name("perceptron").model()
    data = regression_data(model, 24)
    estimator = estimator_of(model)
    start = tfgrow.candidates(model, sites=["dense2"], new_units=2)
    mixed = estimator.learn(start[:-1], data, steps=1) + with_random_phi(start[-1:])
    for score, candidate in zip(estimator.score(mixed, data), mixed, strict=True):
        assert score == pytest.approx(estimator.score([candidate], data)[0], abs=1e-5)


# ---- cost -----------------------------------------------------------------------------------


def test_every_pass_is_traced_once_whatever_the_sizes_of_batches(monkeypatch):
    """Counted by how often Python code of a layer runs: as often for two batches as for nine."""
    calls = []
    linear = tfgrow.layers.Dense.linear

    def counted(self, *args, **kwargs):
        calls.append(self.name)
        return linear(self, *args, **kwargs)

    monkeypatch.setattr(tfgrow.layers.Dense, "linear", counted)

    def count(work):
        calls.clear()
        work()
        return len(calls)

    model = one_hidden_layer()
    x, y = regression_data(model, 50)
    few = [(x[:8], y[:8]), (x[8:9], y[8:9])]
    sizes = (3, 8, 1, 5, 8, 2, 7, 4, 6)
    many = [(x[i : i + size], y[i : i + size]) for i, size in enumerate(sizes)]
    candidates = tfgrow.candidates(model, new_units=1)
    estimator = estimator_of(model)
    for method in (estimator.interaction, estimator.joint_change):
        assert count(lambda: method(candidates, few)) == count(lambda: method(candidates, many))  # noqa: B023
    short = count(lambda: estimator.learn(candidates, few, steps=1))
    assert 0 < short == count(lambda: estimator.learn(candidates, many, steps=12))


# ---- precision ------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_half_precision_models_are_estimated_in_float32(policy):
    keras.config.set_dtype_policy(policy)
    half = by_name("perceptron").model()
    keras.config.set_dtype_policy("float32")
    full = by_name("perceptron").model()
    full.set_weights(half.get_weights())
    data = regression_data(full, 16)
    results = []
    for model in (half, full):
        estimator = estimator_of(model)
        learned = estimator.learn(tfgrow.candidates(model, new_units=1), data, steps=2)
        results.append((estimator.interaction(learned, data), learned))
    (mine, learned), (expected, _) = results
    np.testing.assert_allclose(mine.linear, expected.linear, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(mine.gram, expected.gram, rtol=1e-4, atol=1e-6)
    assert all(value.dtype == np.float32 for value in learned[0].theta.values())
    best = int(np.argmin(mine.scores))
    event = tfgrow.apply(half, [learned[best]])
    assert event.params_after > event.params_before
    assert {v.dtype for v in half.trainable_variables} == {"float32"}
    assert half.get_layer("dense1").compute_dtype in ("float16", "bfloat16")


# ---- bad input ------------------------------------------------------------------------------


def weights_of(model):
    return [weight.copy() for weight in model.get_weights()]


def test_missing_loss_unknown_curvature_and_unbuilt_model():
    model = one_hidden_layer()
    with pytest.raises(ValueError, match=r"is not compiled with a loss: pass loss=\.\.\."):
        tfgrow.GaussNewtonEstimator(model)
    with pytest.raises(ValueError, match=r"Unknown curvature 'best'; expected one of 'auto'"):
        tfgrow.GaussNewtonEstimator(model, loss="mse", curvature="best")
    with pytest.raises(ValueError, match="is not built"):
        tfgrow.GaussNewtonEstimator(keras.Sequential([layers.Dense(2)]), loss="mse")


def passes_over(model):
    estimator = estimator_of(model)
    candidates = tfgrow.candidates(model, new_units=1)
    return [
        lambda data: estimator.learn(candidates, data, steps=1),
        lambda data: estimator.score(candidates, data),
        lambda data: estimator.joint_change(candidates, data),
    ]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ((np.zeros((0, 3)), np.zeros((0, 2))), "dataset is empty"),
        ((np.zeros((4, 5)), np.zeros((4, 2))), r"shape \(5,\).*expects \(3,\)"),
        ((np.zeros((4, 3, 1)), np.zeros((4, 2))), r"shape \(3, 1\).*expects \(3,\)"),
        (([np.zeros((4, 3))] * 2, np.zeros((4, 2))), "gives 2 inputs.* takes 1"),
        (np.zeros((4, 3)), "Can't read a dataset of type ndarray"),
        ((np.full((4, 3), np.nan), np.zeros((4, 2))), "estimation data is not finite"),
    ],
)
def test_bad_data_is_refused_in_words(data, message):
    model = one_hidden_layer()
    before = weights_of(model)
    for work in passes_over(model):
        with pytest.raises((ValueError, TypeError), match=message):
            work(data)
    for old, new in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(old, new)


def test_endless_data_is_refused_by_passes_but_learned_from():
    model = one_hidden_layer()
    endless = tf.data.Dataset.from_tensor_slices(regression_data(model)).batch(4).repeat()
    learn, *passes = passes_over(model)
    assert learn(endless)
    for work in passes:
        with pytest.raises(ValueError, match="repeats for ever"):
            work(endless)


@pytest.mark.parametrize(
    "settings", [{"draws": 0}, {"draws": 1.5}, {"seed": -3}], ids=lambda settings: str(settings)
)
def test_settings_that_make_no_sense_are_refused_at_once(settings):
    with pytest.raises(ValueError, match=f"{next(iter(settings))} must be a whole number"):
        estimator_of(one_hidden_layer(), **settings)


@pytest.mark.parametrize("rate", [-1.0, 0.0, np.nan])
def test_a_learning_rate_that_learns_nothing_is_refused(rate):
    model = one_hidden_layer()
    with pytest.raises(ValueError, match="learning_rate must be a positive number"):
        estimator_of(model).learn(
            tfgrow.candidates(model), regression_data(model, 8), learning_rate=rate
        )


def test_no_candidates_or_something_else_is_refused():
    model = one_hidden_layer()
    data = regression_data(model)
    with pytest.raises(ValueError, match=r"No candidates given.*tfgrow.candidates"):
        estimator_of(model).score([], data)
    with pytest.raises(TypeError, match="Expected a Candidate, found str"):
        estimator_of(model).score(["hidden"], data)
    single = tfgrow.candidates(model, "split")[0]
    with pytest.raises(TypeError, match="list of candidates, found a single <Candidate split"):
        estimator_of(model).score(single, data)


@pytest.mark.parametrize("kinds", [("split", "add"), ("add", "split")])
@pytest.mark.parametrize("size", [6, None], ids=["known_size", "free_size"])
def test_kinds_estimated_together_are_what_they_are_apart(kinds, size):
    """TensorFlow's graph optimizer takes one kind's responses for the other's if it is let.

    Where activations stand right before max-pooling; nothing fails where there are as many splits
    as adds.
    """
    model = tfgrow.convert(
        keras.Sequential(
            [
                keras.Input((size, size, 2)),
                keras.layers.Conv2D(4, 3, padding="same", activation="relu"),
                keras.layers.MaxPooling2D(2),
                keras.layers.Conv2D(4, 3, padding="same", activation="relu", use_bias=False),
                keras.layers.GlobalMaxPooling2D(),
                keras.layers.Dense(3),
            ]
        )
    )
    rng = np.random.default_rng(0)
    data = rng.normal(size=(16, 6, 6, 2)).astype("float32"), rng.normal(size=(16, 3))
    estimator = tfgrow.GaussNewtonEstimator(model, "mse")
    learned = estimator.learn(tfgrow.candidates(model, kinds), data, steps=2, settle=2)
    together = estimator.score(learned, data)
    for kind in kinds:
        mine = [row for row, candidate in enumerate(learned) if candidate.morphism == kind]
        apart = estimator.score([learned[row] for row in mine], data)
        assert np.abs(apart).max() > 1e-4
        np.testing.assert_allclose(together[mine], apart, rtol=1e-4, atol=1e-7)
