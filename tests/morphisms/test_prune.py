"""Prune: what stands in for a unit, in the estimate and in the model."""

import tracemalloc

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

import tfgrow
from tests.cases import CASES, by_name, inputs_of, randomize, regression_data
from tests.morphisms.effects import (
    applied,
    capture_of,
    outputs,
    predicted,
    responses,
    responses_after,
    scalars,
)
from tfgrow.capture.capture import consumer_taps, find_head
from tfgrow.capture.execute import execute
from tfgrow.curvature import stand_in
from tfgrow.morphisms.base import perturb_all
from tfgrow.morphisms.prune import takes_constant
from tfgrow.morphisms.registry import get, group_candidates
from tfgrow.surgery.weights import inherited, layer_changes


def candidates_of(model, seed=0):
    """The second unit of every site, with shares (and a constant, where it fits) at random."""
    rng = np.random.default_rng(seed)
    found = []
    for candidate in tfgrow.candidates(model, "prune"):
        if candidate.unit != 1:
            continue
        constant = takes_constant(candidate.site)
        share = 0.5 * rng.standard_normal(candidate.site.units).astype("float32")
        offset = np.float32(0.7 * constant)
        found.append(candidate.replace(theta={"share": share, "offset": offset}))
    return found


@pytest.fixture(scope="module", params=CASES, ids=lambda case: case.name)
def model(request):
    return request.param.model()


def test_perturbation_is_the_real_change_at_the_consumers(model):
    x = inputs_of(model, 4, seed=7)
    found = candidates_of(model)
    assert len(found) == sum(
        site.units > 1 for site in tfgrow.find_sites(model) if not site.blocked
    )
    for candidate in found:
        site = candidate.site
        before, after = responses(model, x, site), responses_after(model, x, [candidate])
        for claimed, old, new in zip(predicted(model, x, [candidate]), before, after, strict=True):
            stays = np.isfinite(new).all(axis=tuple(range(new.ndim - 1)))
            real = (new - old)[..., stays]
            assert np.abs(real).max() > 1e-4, f"{site.name}: nothing happened"
            scale = max(1.0, np.abs(new[..., stays]).max())
            np.testing.assert_allclose(claimed[..., stays], real, atol=2e-5 * scale)


def constants_model(activation=None, **settings):
    """Padded convolutions with a border that matters, on the way to a linear end."""
    inputs = keras.Input((4, 4, 2))
    x = keras.layers.Conv2D(3, 3, padding="same", activation="relu", name="conv1")(inputs)
    x = keras.layers.Conv2D(
        4, 3, padding="same", use_bias=False, activation=activation, name="conv2"
    )(x)
    x = keras.layers.BatchNormalization(name="bn", **settings)(x)
    x = keras.layers.Conv2D(3, 3, padding="same", name="conv3")(x)
    x = keras.layers.Flatten(name="flatten")(x)
    model = tfgrow.convert(keras.Model(inputs, keras.layers.Dense(2, name="out")(x)))
    randomize(model, seed=4)
    return model


@pytest.mark.parametrize("settings", [{}, {"scale": False, "center": False}])
def test_a_constant_goes_to_the_moving_mean_behind_a_convolution_without_bias(settings):
    """Everything behind conv2 is linear: what is estimated there is what the outputs do."""
    model = constants_model(**settings)
    x = inputs_of(model, 5)
    site = tfgrow.find_sites(model)[0]
    kernel, mean = model.get_layer("conv2").kernel.numpy(), model.get_layer("bn").moving_mean
    (candidate,) = (c for c in candidates_of(model) if c.site.name == "conv1")
    assert candidate.theta["offset"] != 0
    grown = applied(model, [candidate])
    expected = mean.numpy() - candidate.theta["offset"] * kernel[:, :, 1].sum(axis=(0, 1))
    np.testing.assert_allclose(grown.get_layer("bn").moving_mean.numpy(), expected, rtol=1e-5)
    (change,) = predicted(model, x, [candidate.replace(site=site)])
    graph = tfgrow.graph.nodes.trace(model)
    (tap,) = consumer_taps(site)
    shifted = execute(graph, [x], lambda at, value: value + change if at == tap else value)
    claimed = shifted[find_head(graph).tap].numpy()
    assert np.abs(claimed - outputs(model, x)).max() > 1e-2
    np.testing.assert_allclose(outputs(grown, x), claimed, atol=1e-4)


def test_neighbouring_sites_edited_at_once_keep_the_constant_on_its_channels():
    """conv2 loses filters and its BatchNormalization channels while it takes over a constant."""
    model = constants_model()
    first, second = (c for c in candidates_of(model) if c.site.name in ("conv1", "conv2"))
    bare = first.replace(theta={**first.theta, "offset": np.float32(0)})
    means = [
        applied(model, pair).get_layer("bn").moving_mean.numpy()
        for pair in ([first, second], [second, first], [bare, second])
    ]
    kernel = model.get_layer("conv2").kernel.numpy()[:, :, 1].sum(axis=(0, 1))
    np.testing.assert_array_equal(means[0], means[1])
    np.testing.assert_allclose(means[2] - means[0], 0.7 * kernel[[0, 2, 3]], rtol=1e-4)


def test_where_nothing_can_take_over_a_constant_there_is_none():
    model = constants_model(activation="relu")
    candidate, *_ = tfgrow.candidates(model, "prune", sites=["conv1"])
    assert not takes_constant(candidate.site)
    model.compile("adam", "mse")
    estimator = tfgrow.GaussNewtonEstimator(model)
    (learned,) = estimator.learn([candidate], regression_data(model, 16), settle=2)
    assert learned.theta["offset"] == 0
    assert np.abs(learned.theta["share"]).max() > 0
    by_hand = candidate.replace(theta={**candidate.theta, "offset": np.float32(0.5)})
    with pytest.raises(ValueError, match="Layer 'conv2' has no bias, and no BatchNormalization"):
        tfgrow.apply(model, [by_hand])


def test_what_kept_weights_make_of_a_constant_is_what_the_model_does():
    """EarlyStopping's best weights get the same constant, where the model got it."""
    model = constants_model()
    (candidate,) = (c for c in candidates_of(model) if c.site.name == "conv1")
    changes = layer_changes([get("prune").edit(candidate)])
    bn = model.get_layer("bn")
    (change,) = (c.variables["moving_mean"] for c in changes if c.layer is bn)
    old = bn.moving_mean.numpy()
    assert np.abs(change.value - old).max() > 1e-2
    np.testing.assert_allclose(inherited(change, old), change.value, rtol=1e-6)
    np.testing.assert_allclose(inherited(change, old + 1), change.value + 1, rtol=1e-6)


def test_the_closed_form_minimises_the_quadratic_of_the_scalars(model):
    """For random shares the sums give what the scalars do; the solution lies under all of them."""

    class Net:
        graph = tfgrow.graph.nodes.trace(model)
        data = regression_data(model, 8)

    for candidate in candidates_of(model, seed=3):
        (group,), _ = group_candidates(model, [candidate])
        captured = capture_of(Net, group.morphism.taps(group.site))
        (perturbed,) = perturb_all(captured, [group], [group.theta], fresh=False)
        found = scalars(captured, group, perturbed).numpy()
        expected = found[0].sum(axis=0) + 0.5 * (found[1:] ** 2).sum(axis=(0, 1))
        sums = group.morphism.equations(captured, group, perturbed)
        share, offset = candidate.theta["share"].copy(), candidate.theta["offset"]
        share[candidate.unit] = -1.0
        v = np.append(share, offset)[None].astype("float64")
        alone = np.zeros_like(v)
        alone[0, candidate.unit] = -1.0
        at_zero = estimate(sums, alone)
        scale = np.abs(found[0]).sum() + 1e-3
        np.testing.assert_allclose(estimate(sums, v), expected, atol=2e-4 * scale)
        np.testing.assert_allclose(
            stand_in.change(sums, group.units, v), expected - at_zero, atol=2e-4 * scale
        )
        best = group.morphism.solve(group, sums, 1e-9)
        solved = np.append(best["share"], best["offset"])[None].astype("float64")
        assert solved[0, candidate.unit] == 0.0
        solved[0, candidate.unit] = -1.0
        goal = minimised(sums)
        least = min(estimate(goal, v), estimate(goal, alone))
        assert estimate(goal, solved) <= least + 1e-5 * scale


def estimate(sums, v):
    g, q = (np.asarray(sums[name], "float64") for name in ("g", "q"))
    return (g * v).sum(-1) + 0.5 * np.einsum("ni,nij,nj->n", v, q, v)


def minimised(sums):
    """The quadratic that the shares minimise: shorter steps, and some of the factored curvature."""
    parts = {name: np.asarray(value, "float64") for name, value in sums.items()}
    factored = (parts["s"] / parts["rows"])[:, None, None] * parts["a"]
    whole = parts.get("q", factored)
    return {"g": stand_in.PULL * parts["g"], "q": whole + stand_in.BLEND * factored}


def random_sums(units=6, rows=40, seed=0):
    """Factored sums of correlated values, the last of them the constant 1."""
    rng = np.random.default_rng(seed)
    values = rng.standard_normal((rows, units)) @ rng.standard_normal((units, units)) + 0.5
    values = np.concatenate([values, np.ones((rows, 1))], axis=1)
    return {
        "g": rng.standard_normal((units, units + 1)),
        "a": values.T @ values,
        "s": rng.uniform(1, 9, units),
        "rows": float(rows),
    }


@pytest.mark.parametrize("free", ["1111111", "1111110", "1010111", "0000010"])
def test_one_factorisation_gives_what_a_system_per_unit_gives(free):
    """Each unit's own system written out and solved; the damping is relative to its diagonal."""
    sums, own = random_sums(), np.arange(6)
    free = np.array([digit == "1" for digit in free])
    goal, dampings = minimised(sums), np.array([0.01, 0.1, 0.1, 0.3, 1.0, 3.0])
    found = stand_in.solve(sums, free, own, dampings)
    for unit in own:
        mine = np.flatnonzero(free & (np.arange(7) != unit))
        expected = -np.eye(7)[unit]
        if len(mine):
            q = goal["q"][unit]
            inner = q[np.ix_(mine, mine)]
            damped = inner + dampings[unit] * np.mean(np.diag(inner)) * np.eye(len(mine))
            expected[mine] = np.linalg.solve(damped, q[mine, unit] - goal["g"][unit, mine])
        np.testing.assert_allclose(found[unit], expected, rtol=1e-8, atol=1e-9)
    several = stand_in.solve(sums, free, own, np.array([[0.1], [1.0]]))
    assert several.shape == (2, 6, 7)
    np.testing.assert_allclose(several[0][[1, 2]], found[[1, 2]], rtol=1e-10)
    whole = {**sums, "q": goal["q"] / (1 + stand_in.BLEND)}
    np.testing.assert_allclose(stand_in.solve(whole, free, own, dampings), found, atol=1e-8)
    np.testing.assert_allclose(
        stand_in.change(sums, own, found), stand_in.change(whole, own, found), rtol=1e-8
    )


@pytest.mark.parametrize(("rows", "in_full"), [(12, 0), (12.9, 0), (2, 1), (40, 1)])
def test_few_rows_make_a_small_factorisation_with_the_same_result(monkeypatch, rows, in_full):
    """12 rows have rank 12; said to be 2, they don't fit in, and the whole is taken apart."""
    sums, own = random_sums(64, rows=40 if rows == 40 else 12), np.arange(64)
    free = np.ones(65, bool)
    sums["a"] = sums["a"].astype("float32")
    calls, eigh = [], np.linalg.eigh
    monkeypatch.setattr(np.linalg, "eigh", lambda a: calls.append(len(a)) or eigh(a))
    found = stand_in.solve({**sums, "rows": rows}, free, own, np.array([[0.01], [1.0]]))
    assert calls.count(65) == in_full
    monkeypatch.setattr(stand_in, "_eigen", lambda a, rank: eigh(a))
    expected = stand_in.solve({**sums, "rows": rows}, free, own, np.array([[0.01], [1.0]]))
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_memory_is_bounded_where_the_curvature_is_factored():
    """512 units: no array as large as a curvature per unit (1 GB) is ever made."""
    units, sums = 512, random_sums(512, rows=1024)
    tracemalloc.start()
    try:
        free = stand_in.spread_out(sums, np.ones(units + 1, bool), np.arange(units), 0.1, 128)
        stand_in.solve(sums, free, np.arange(units), 0.1)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert 0 < (~free).sum() <= 128
    assert peak < 20 * 8 * (units + 1) ** 2


def test_factored_curvature_is_the_whole_one_where_the_unit_is_equally_sensitive():
    """One position, and columns of one size: then apart and together are the same."""
    rng = np.random.default_rng(0)
    values = tf.constant(rng.standard_normal((50, 1, 4, 1)), tf.float32)
    covectors = tf.constant(rng.choice([-2.0, 2.0], (3, 50, 1, 4, 1)), tf.float32)
    constant = covectors[:, :, 0, :, 0]
    whole = stand_in.stand_in_sums([values], [covectors], constant)
    limit, stand_in.DENSE_LIMIT = stand_in.DENSE_LIMIT, 1
    try:
        factored = stand_in.stand_in_sums([values], [covectors], constant)
        zeros = stand_in.zero_sums(4, 4)
    finally:
        stand_in.DENSE_LIMIT = limit
    assert {k: np.shape(v) for k, v in factored.items()} == {
        k: np.shape(v) for k, v in zeros.items() if k != "loss"
    }
    np.testing.assert_allclose(factored["g"], whole["g"], rtol=1e-4, atol=1e-4)
    free = np.ones(5, dtype=bool)
    solutions = [stand_in.solve(s, free, np.arange(4), 0.1) for s in (factored, whole)]
    np.testing.assert_allclose(*solutions, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("positions", [(2, 1), (9, 4)], ids=["few", "many"])
def test_factored_curvature_is_as_large_as_the_whole(monkeypatch, positions):
    """Positions that say the same make the whole many times what they make one by one."""
    rng = np.random.default_rng(0)
    samples, units, blocks = stand_in.SAMPLES, 5, 2
    values, covectors = [], []
    for count in positions:
        alike = 3.0 + rng.standard_normal((samples, count, units, blocks))
        values.append(tf.constant(alike, tf.float32))
        same = rng.standard_normal((3, samples, 1, units, 1)) * np.ones((count, 1, blocks))
        covectors.append(tf.constant(same, tf.float32))
    whole = stand_in.stand_in_sums(values, covectors)
    monkeypatch.setattr(stand_in, "DENSE_LIMIT", 1)
    factored = stand_in.stand_in_sums(values, covectors)
    trace = np.einsum("nii->n", whole["q"][:, :-1, :-1])
    multiple = stand_in._sensitivity(factored) * np.trace(factored["a"][:-1, :-1])
    np.testing.assert_allclose(multiple, trace, rtol=1e-4)
    one_by_one = whole["s"] / whole["rows"] * np.trace(factored["a"][:-1, :-1])
    assert np.all(multiple > 1.5 * one_by_one)


@pytest.mark.parametrize("limit", [stand_in.DENSE_LIMIT, 1], ids=["whole", "factored"])
def test_removals_before_an_average_of_positions(monkeypatch, limit):
    """Standing in must not be worse than leaving the unit out, on other samples."""
    monkeypatch.setattr(stand_in, "DENSE_LIMIT", limit)
    inputs = keras.Input((32, 1))
    x = layers.Conv1D(12, 9, padding="same", activation="relu", name="studied")(inputs)
    x = layers.Conv1D(8, 9, padding="same", activation="relu")(x)
    x = layers.Dense(3, "softmax")(layers.GlobalAveragePooling1D()(x))
    model = tfgrow.convert(keras.Model(inputs, x))
    model.compile(keras.optimizers.Adam(0.01), "sparse_categorical_crossentropy")
    rng = np.random.default_rng(0)
    x = rng.normal(size=(768, 32, 1)).astype("float32")
    y = np.digitize(np.abs(x).mean(axis=(1, 2)), [0.75, 0.85])
    train, fresh = (x[:512], y[:512]), (x[512:], y[512:])
    model.fit(*train, epochs=3, verbose=0)
    estimator = tfgrow.GaussNewtonEstimator(model)
    removals = tfgrow.candidates(model, "prune", sites=["studied"])
    learned = estimator.learn(removals, train, steps=0)
    changes = [tfgrow.measure_change(model, [one], fresh) for one in learned]
    alone = [tfgrow.measure_change(model, [one], fresh) for one in removals]
    assert np.mean(changes) < np.mean(alone)
    assert np.max(changes) < 0.1


def test_a_copied_unit_goes_for_nothing():
    """Two equal units: the closed form hands the whole of one to the other."""
    model = by_name("conv_bn_relu").model()
    model.compile("sgd", "mse")
    x = inputs_of(model, 64)
    before = outputs(model, x)
    units = tfgrow.candidates(model, "prune", sites=["conv2"])
    effects = [np.abs(outputs(applied(model, [unit]), x) - before).max() for unit in units]
    original = int(np.argmax(effects))
    twin = (original + 1) % 4
    conv, bn = model.get_layer("conv2"), model.get_layer("bn2")
    for variable in (*conv.weights, *bn.weights):
        value = variable.numpy()
        value[..., twin] = value[..., original]
        variable.assign(value)
    before = outputs(model, x)  # the target too: there is no gradient to follow
    batches = [(x[i : i + 16], before[i : i + 16]) for i in range(0, 64, 16)]
    estimator = tfgrow.GaussNewtonEstimator(model)
    left_out = [units[original], units[twin]]
    learned = estimator.learn(left_out, batches, settle=4)
    going = int(np.argmin(estimator.score(learned, batches)))
    plain, folded = (
        np.abs(outputs(applied(model, [some[going]]), x) - before).max()
        for some in (left_out, learned)
    )
    assert folded < 0.1 * plain
    assert learned[going].theta["share"].argmax() == (twin, original)[going]
    # The other one can't lean on it: both may be chosen to go.
    assert abs(learned[1 - going].theta["share"][(original, twin)[going]]) == 0.0
    for unit in learned:
        truth = tfgrow.measure_change(model, unit, batches)
        assert estimator.score([unit], batches)[0] == pytest.approx(
            truth, abs=0.05 * abs(truth) + 1e-4
        )


def test_a_unit_goes_as_a_whole_or_not_at_all():
    model = by_name("perceptron").model()
    unit = tfgrow.candidates(model, "prune")[0]
    assert get("prune").scaled(unit, 1.0) is unit
    assert get("prune").scaled(unit, 0.5) is None


def test_units_that_go_together_hand_on_what_they_stand_for():
    model = by_name("perceptron").model()
    first, second = (c for c in tfgrow.candidates(model, "prune", sites=["dense1"])[:2])
    first = first.replace(theta={"share": np.float32([0, 0.5, 0.2, 0]), "offset": np.float32(0.1)})
    second = second.replace(theta={"share": np.float32([0, 0, 0.4, 1]), "offset": np.float32(0)})
    old = first.site.consumers[0].kernel.numpy()
    bias = first.site.consumers[0].bias.numpy()
    grown = applied(model, [first, second])
    (consumer,) = tfgrow.find_sites(grown)[0].consumers
    # a_0 = 0.5 a_1 + 0.2 a_2 + 0.1 = 0.4 a_2 + 0.5 a_3 + 0.1
    expected = old[2:] + np.outer([0.4, 0.5], old[0]) + np.outer([0.4, 1.0], old[1])
    np.testing.assert_allclose(consumer.kernel.numpy(), expected, rtol=1e-5)
    np.testing.assert_allclose(consumer.bias.numpy(), bias + 0.1 * old[0], rtol=1e-5)


def test_units_that_only_have_each_other_cannot_both_go():
    model = by_name("perceptron").model()
    mine = tfgrow.candidates(model, "prune", sites=["dense1"])[:2]
    each = [np.eye(4, dtype="float32")[1 - c.unit] for c in mine]
    pair = [c.replace(theta={**c.theta, "share": s}) for c, s in zip(mine, each, strict=True)]
    before = model.get_weights()
    with pytest.raises(ValueError, match=r"Units \[0, 1\] of site 'dense1' stand in for each"):
        tfgrow.apply(model, pair)
    for old, new in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(old, new)


def test_the_last_unit_stays():
    model = by_name("perceptron").model()
    every = tfgrow.candidates(model, "prune", sites=["dense1"])
    with pytest.raises(ValueError, match="All 4 units of site 'dense1' would be removed"):
        tfgrow.apply(model, every)
    tfgrow.apply(model, every[:3])
    assert model.get_layer("dense1").units == 1
    assert tfgrow.candidates(model, "prune", sites=["dense1"]) == []


@pytest.mark.parametrize("case", ["conv_bn_relu", "strides_valid_flatten"])
def test_pruning_copies_and_unused_units_by_hand_changes_nothing(case):
    model = by_name(case).model()
    x = inputs_of(model, 5)
    tfgrow.widen(model, "conv2", 2)  # new units that nothing uses yet
    site = next(site for site in tfgrow.find_sites(model) if site.name == "conv1")
    for layer in (site.producer, *(step.layer for step in site.steps)):
        for variable in layer.weights:  # unit 2 becomes unit 0
            value = variable.numpy()
            value[..., 2] = value[..., 0]
            variable.assign(value)
    before, units = outputs(model, x), model.get_layer("conv2").filters
    tfgrow.prune(model, "conv1", [2])
    event = tfgrow.prune(model, "conv2", units=[units - 1, units - 2])
    assert event.widths == {"conv2": (units, units - 2)}
    np.testing.assert_allclose(outputs(model, x), before, atol=1e-5)


def test_the_one_unit_that_is_left_beside_a_gate_of_one_channel():
    """It is as wide as the gate then, but has not been tied to it."""
    inputs = keras.Input((3, 3, 2))
    gate = keras.layers.Conv2D(1, 1, name="gate")(inputs)
    gate = keras.layers.Activation("sigmoid")(keras.layers.Activation("tanh")(gate))
    x = keras.layers.Conv2D(2, 1, name="x")(inputs)
    x = keras.layers.Concatenate()([keras.layers.Multiply()([x, gate]), gate, x])
    x = keras.layers.GlobalAveragePooling2D()(x)
    stock = keras.Model(inputs, keras.layers.Dense(2, name="out")(x))
    model = tfgrow.convert(stock)
    kernel = model.get_layer("out").kernel
    kernel.assign(kernel.numpy() * np.array([[0], [1], [1], [0], [1]]))  # x[0] is not used
    x = inputs_of(model, 4)
    before = outputs(model, x)
    assert tfgrow.prune(model, "x", [0]).widths == {"x": (2, 1)}
    np.testing.assert_allclose(outputs(model, x), before, atol=1e-6)


@pytest.mark.parametrize("units", [[4], [-1], [0, 0], [], [0.5]])
def test_units_that_are_not_there_cannot_be_pruned(units):
    model = by_name("perceptron").model()
    with pytest.raises(ValueError, match=r"units \[0, 1, 2, 3\] of layer 'dense1', each once"):
        tfgrow.prune(model, "dense1", units)
    with pytest.raises(ValueError, match="no site named 'dense9'"):
        tfgrow.prune(model, "dense9", [0])
    with pytest.raises(TypeError, match="name of a layer"):
        tfgrow.prune(model, 3, [0])


def test_the_last_unit_cannot_be_pruned():
    model = by_name("perceptron").model()
    units = model.get_layer("dense1").units
    tfgrow.prune(model, "dense1", range(1, units))
    with pytest.raises(ValueError, match="'dense1' has a single unit, which can't be removed"):
        tfgrow.prune(model, "dense1", [0])


def test_kept_weights_are_pruned_as_the_model_was():
    """What EarlyStopping keeps follows: the same units stand in, in the same shares."""
    model = by_name("perceptron").model()
    (candidate,) = (c for c in candidates_of(model) if c.site.name == "dense1")
    candidate = candidate.replace(theta={**candidate.theta, "offset": np.float32(0)})
    (consumer,) = candidate.site.consumers
    kernel = consumer.kernel.numpy()
    edit = get("prune").edit(candidate)
    change = next(c for c in layer_changes([edit]) if c.layer is consumer).variables["kernel"]
    np.testing.assert_allclose(inherited(change, kernel), change.value, rtol=1e-6)
    np.testing.assert_allclose(inherited(change, 3 * kernel), 3 * change.value, rtol=1e-5)


def test_apply_prunes_in_place_with_the_optimizer():
    model = by_name("conv_bn_relu").model()
    model.compile("adam", "mse")
    data = regression_data(model, 16)
    model.fit(*data, epochs=1, verbose=0)
    kernel = model.get_layer("conv1").kernel
    moments = model.optimizer._momentums[[w is kernel for w in model.trainable_weights].index(True)]
    before = moments.numpy()
    found = [c for c in tfgrow.candidates(model, "prune") if c.unit == 1]
    assert all(c.cost.params < 0 and c.cost.flops < 0 for c in found)
    params = model.count_params()
    event = tfgrow.apply(model, found)
    assert event.widths == {"conv1": (3, 2), "conv2": (4, 3)}
    assert event.newborn == {}
    assert event.params_after == model.count_params() < params
    np.testing.assert_array_equal(moments.numpy(), before[..., [0, 2]])
    model.fit(*data, epochs=1, verbose=0)
    assert model.predict(data[0], verbose=0).shape == (16, 3)


def test_estimates_hold_on_the_pruned_network():
    """Pearson correlation with the truth over all units of a small trained network."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((512, 8)).astype("float32")
    y = np.argmax(x[:, :4] * np.roll(x[:, 4:], 1, axis=1), axis=1)
    keras.utils.set_random_seed(0)
    model = tfgrow.convert(
        keras.Sequential(
            [
                keras.Input((8,)),
                keras.layers.Dense(16, "relu", name="a"),
                keras.layers.Dense(16, "relu", name="b"),
                keras.layers.Dense(4, "softmax"),
            ]
        )
    )
    model.compile(keras.optimizers.Adam(1e-2), "sparse_categorical_crossentropy")
    model.fit(x, y, epochs=10, verbose=0)
    estimator = tfgrow.GaussNewtonEstimator(model)
    parts = [(x[i : i + 64], y[i : i + 64]) for i in range(0, 512, 64)]
    learned = estimator.learn(tfgrow.candidates(model, "prune"), parts[:4], settle=4)
    scores = estimator.score(learned, parts[4:])
    truth = [tfgrow.measure_change(model, candidate, parts[4:]) for candidate in learned]
    plain = [
        tfgrow.measure_change(model, candidate, parts[4:])
        for candidate in tfgrow.candidates(model, "prune")
    ]
    assert np.corrcoef(scores, truth)[0, 1] > 0.98
    assert np.mean(truth) < np.mean(plain)
