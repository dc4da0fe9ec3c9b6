"""Every morphism at every site of the table: what it says it changes is what it really changes."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfgrow
from tests.cases import CASES, by_name, inputs_of, prepare, regression_data
from tests.morphisms.effects import (
    applied,
    assert_reverse_mode_is_forward_mode,
    capture_of,
    outputs,
    predicted,
    responses,
    responses_after,
    scalars,
)
from tfgrow.curvature.normal import quadratic
from tfgrow.morphisms.base import perturb_all
from tfgrow.morphisms.registry import get, group_candidates
from tfgrow.passes import objective


@pytest.fixture(scope="module", params=CASES, ids=lambda case: case.name)
def net(request):
    return prepare(request.param, kinds=("split", "add", "add_group"))


def growable_sites(net):
    return list(dict.fromkeys(candidate.site.name for candidate in net.candidates))


def test_perturbation_is_the_real_change_at_the_consumers(net):
    """Splits and adds of a site together: each channel goes its own way, so they just add up."""
    x = inputs_of(net.model, 4, seed=7)
    for site_name in growable_sites(net):
        mine = [c for c in net.candidates if c.site.name == site_name]
        site = mine[0].site
        before = responses(net.model, x, site)
        after = responses_after(net.model, x, mine)
        for found, old, new in zip(predicted(net.model, x, mine), before, after, strict=True):
            real = new - old
            assert np.abs(real).max() > 1e-4, f"{site_name}: nothing happened"
            np.testing.assert_allclose(found, real, atol=2e-5 * max(1.0, np.abs(new).max()))


def test_function_is_preserved_without_theta_or_phi(net):
    x = inputs_of(net.model, 6, seed=8)
    at_rest = [get(c.morphism).scaled(c, 0.0) for c in net.candidates]
    before = outputs(net.model, x)
    after = outputs(applied(net.model, at_rest), x)
    np.testing.assert_allclose(after, before, atol=1e-5 * max(1.0, np.abs(before).max()))


def test_reverse_mode_is_forward_mode(net):
    assert_reverse_mode_is_forward_mode(net)


def test_scalars_are_tangents_contracted_with_gradient_and_columns(net):
    """Candidate by candidate and sample by sample."""
    largest = 0.0
    for candidate in (net.candidates[0], net.candidates[1], net.candidates[-1]):
        (group,), _ = group_candidates(net.model, [candidate])
        captured = capture_of(net, group.morphism.taps(group.site))
        perturbed = perturb_all(captured, [group], [group.theta], fresh=False)[0]
        found = scalars(captured, group, perturbed)
        expected = 0.0
        for tap, tangent in group.morphism.tangents(group, group.theta, perturbed).items():
            products = captured.cotangents[tap].numpy() * np.asarray(tangent)
            expected = expected + products.reshape(*products.shape[:2], -1).sum(axis=2)
        scale = np.abs(expected).max()
        np.testing.assert_allclose(found[..., 0], expected, atol=1e-5 * scale)
        largest = max(largest, scale)
    assert largest > 1e-4


def test_the_gradient_written_out_is_that_of_automatic_differentiation(net):
    for candidate in (net.candidates[0], net.candidates[-1]):
        (group,), _ = group_candidates(net.model, [candidate])
        captured = capture_of(net, group.morphism.taps(group.site))
        name = group.site.producer.kernel_name
        kernel = tf.constant(group.theta[name])
        with tf.GradientTape(persistent=True) as tape:
            tape.watch(kernel)
            theta = {**group.theta, name: kernel}
            (perturbed,) = perturb_all(captured, [group], [theta], fresh=False)
            found = scalars(captured, group, perturbed)
            expected = tf.reduce_sum(found[0]) + 0.5 * tf.reduce_sum(found[1:] ** 2)
        covectors = group.morphism.covectors(captured, group, group.theta, perturbed)
        total, slopes = objective([group], [covectors], [perturbed])
        gradient = tape.gradient(perturbed.values, kernel, output_gradients=slopes[0])
        by_tape = tape.gradient(expected, kernel).numpy()
        size = np.abs(by_tape).max()
        assert size > 1e-6
        np.testing.assert_allclose(gradient, by_tape, atol=1e-4 * size)
        np.testing.assert_allclose(total, expected, rtol=1e-4)


def test_normal_equations_are_the_quadratic_of_the_scalars(net):
    """What the closed form minimises is what candidates are scored by, as a function of phi."""
    groups, _ = group_candidates(net.model, net.candidates)
    for group in (group for group in groups if group.morphism.solved):
        captured = capture_of(net, group.morphism.taps(group.site))
        perturbed = perturb_all(captured, [group], [group.theta], fresh=False)[0]
        found = scalars(captured, group, perturbed).numpy()
        expected = found[0].sum(axis=0) + 0.5 * (found[1:] ** 2).sum(axis=(0, 1))
        sums = {**group.morphism.equations(captured, group, perturbed), "loss": tf.zeros(())}
        names = sorted(name for name in group.theta if name.startswith("phi/"))
        phi = np.concatenate([group.theta[n].reshape(len(expected), -1) for n in names], axis=1)
        scale = np.abs(found[0]).sum(axis=0)
        np.testing.assert_allclose(quadratic(sums, phi), expected, atol=1e-4 * scale.max())
        best = group.morphism.solve(group, sums, 1e-6)
        assert {name: np.shape(value) for name, value in best.items()} == {
            name: np.shape(group.theta[name]) for name in names
        }


@pytest.mark.parametrize("morphism", ["add", "split"])
def test_halving_alpha_goes_half_way(morphism):
    """The guard's scales lead from the function as it is to the edit as it was learned."""
    net = prepare(by_name("bn_after_activation"))
    x = inputs_of(net.model, 5, seed=9)
    chosen = [c for c in net.candidates if c.morphism == morphism][:3]
    now = outputs(net.model, x)
    distances = []
    for alpha in (1.0, 0.5, 0.25, 0.0):
        scaled = [get(morphism).scaled(candidate, alpha) for candidate in chosen]
        distances.append(np.abs(outputs(applied(net.model, scaled), x) - now).max())
    assert distances[0] > distances[1] > distances[2] > 10 * distances[3]


def test_candidates_are_one_per_unit_or_new_units_per_site():
    model = by_name("conv_bn_relu").model()
    splits = tfgrow.candidates(model, "split")
    assert [(c.site.name, c.unit) for c in splits] == [
        *(("conv1", unit) for unit in range(3)),
        *(("conv2", unit) for unit in range(4)),
    ]
    assert len(tfgrow.candidates(model, ("add",))) == 2 * 4
    assert len(tfgrow.candidates(model, "add", sites=["conv2"], new_units=3)) == 3
    by_site = tfgrow.candidates(model, "split", sites=tfgrow.find_sites(model)[:1])
    assert {c.site.name for c in by_site} == {"conv1"}
    assert len({c.key for c in tfgrow.candidates(model)}) == len(tfgrow.candidates(model))
    assert "split conv1[0]" in repr(splits[0])


def test_candidates_repeat_by_seed():
    model = by_name("perceptron").model()

    def thetas(seed):
        return [c.theta["kernel"] for c in tfgrow.candidates(model, seed=seed)]

    for mine, same, other in zip(thetas(3), thetas(3), thetas(4), strict=True):
        np.testing.assert_array_equal(mine, same)
        assert not np.allclose(mine, other)


def test_a_split_starts_at_half_the_size_of_its_unit():
    model = by_name("strides_valid_flatten").model()
    for candidate in tfgrow.candidates(model, "split"):
        kernel = candidate.site.producer.kernel.numpy()[..., candidate.unit]
        ratio = np.linalg.norm(candidate.theta["kernel"]) / np.linalg.norm(kernel)
        assert 0.1 < ratio < 1.0


def test_units_of_zero_weights_can_be_split():
    model = by_name("perceptron").model()
    layer = model.get_layer("dense1")
    layer.kernel.assign(layer.kernel * np.array([0.0, 1, 1, 1]))
    dead = tfgrow.candidates(model, "split", sites=["dense1"])[0]
    assert np.abs(dead.theta["kernel"]).max() > 0
    layer.kernel.assign(layer.kernel * 0.0)
    assert all(np.abs(c.theta["kernel"]).max() > 0 for c in tfgrow.candidates(model, "split"))


def test_unknown_names_are_refused():
    model = by_name("perceptron").model()
    with pytest.raises(ValueError, match=r"Unknown morphism 'grow'; expected one of .*'split'"):
        tfgrow.candidates(model, "grow")
    with pytest.raises(ValueError, match="No morphisms given"):
        tfgrow.candidates(model, ())
    with pytest.raises(ValueError, match=r"no site named 'dense9'; its sites are \['dense1'"):
        tfgrow.candidates(model, sites=["dense9"])
    with pytest.raises(ValueError, match=r"Site 'out' can't grow: layer 'out' is an output layer"):
        tfgrow.candidates(model, sites=["out"])


def test_stale_and_foreign_candidates_are_refused():
    model = by_name("perceptron").model()
    other = by_name("perceptron").model()
    data = regression_data(model)
    estimator = tfgrow.GaussNewtonEstimator(model, loss="mse")
    model.compile(loss="mse")
    foreign, stale = tfgrow.candidates(other, "split"), tfgrow.candidates(model, "split")
    uses = [
        lambda c: estimator.learn(c, data, steps=1),
        lambda c: estimator.score(c, data),
        lambda c: estimator.joint_change(c, data),
        lambda c: tfgrow.apply(model, c),
        lambda c: tfgrow.measure_change(model, c, data),
    ]
    for use in uses:
        with pytest.raises(ValueError, match=r"Site 'dense1' belongs to another model"):
            use(foreign)
    weights = model.get_weights()
    site = tfgrow.find_sites(model)[0]
    tfgrow.widen(model, "dense2", 1)
    for use in uses[3:]:
        with pytest.raises(ValueError, match=r"traced before model '.*' last grew"):
            use(stale)
    for use in uses[:3]:
        with pytest.raises(ValueError, match=r"has grown since this estimator was made"):
            use(stale)
    with pytest.raises(ValueError, match="traced before"):
        tfgrow.candidates(model, sites=[site])
    assert len(model.get_weights()) == len(weights)
    np.testing.assert_array_equal(model.get_weights()[0], weights[0])


def test_a_group_of_units_does_more_together_than_its_units_alone():
    """One closed form for four units promises at least what the best set of single ones does."""
    model = by_name("conv_bn_relu").model()
    model.compile("adam", "mse")
    data = regression_data(model, 256)
    estimator = tfgrow.GaussNewtonEstimator(model, curvature="exact")
    site = ["conv2"]
    alone = estimator.learn(
        tfgrow.candidates(model, "add", sites=site, new_units=4), data, steps=0, settle=8
    )
    group = estimator.learn(
        tfgrow.candidates(model, "add_group", sites=site), data, steps=0, settle=8
    )
    assert group[0].theta["kernel"].shape == (4, 3, 3, 3)
    for number, candidate in enumerate(alone):  # the same units, with other outgoing weights
        np.testing.assert_array_equal(group[0].theta["kernel"][number], candidate.theta["kernel"])
    together = estimator.score(group, data)[0]
    interaction = estimator.interaction(alone, data)
    assert together < interaction.scores.min() < 0
    assert together < interaction.change()
    event = tfgrow.apply(model, group)
    assert event.widths == {"conv2": (4, 8)}
    assert event.newborn == {"conv2": 4}
    assert event.params_after - event.params_before == group[0].cost.params


def test_groups_are_no_longer_than_they_should_be_before_a_global_pooling():
    """What units do at one position adds up with what they do at all the others."""
    keras.utils.set_random_seed(3)
    image = keras.Input((8, 8, 3))
    x = keras.layers.Conv2D(4, 3, padding="same", activation="relu", name="conv1")(image)
    x = keras.layers.Conv2D(40, 3, padding="same", activation="relu", name="conv2")(x)
    x = keras.layers.GlobalAveragePooling2D()(x)
    model = tfgrow.convert(keras.Model(image, keras.layers.Dense(3)(x)))
    model.compile("adam", "mse")
    data = regression_data(model, 256)
    estimator = tfgrow.GaussNewtonEstimator(model, curvature="exact")
    (group,) = estimator.learn(
        tfgrow.candidates(model, "add_group", sites=["conv1"]), data, steps=0, settle=8
    )
    assert group.theta["phi/0"].size == 4 * 9 * 40
    assert estimator.score([group], data)[0] < 0
