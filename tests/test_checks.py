"""Scores corrected by checks: what is really carried through the network, and what comes of it."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfgrow
from tests.cases import by_name, prepare, regression_data
from tests.morphisms.effects import applied
from tfgrow.capture.batches import batches_of
from tfgrow.capture.capture import observe
from tfgrow.curvature.correction import corrections
from tfgrow.curvature.total_loss import make_total_loss
from tfgrow.morphisms.base import perturb_all
from tfgrow.morphisms.registry import group_candidates
from tfgrow.passes import Passes, _draw

KINDS = {
    "conv_bn_relu": ("split", "add", "add_group", "prune", "enlarge_kernel", "deepen"),
    "bn_after_flatten": ("split", "add", "prune"),
    "several_consumers": ("split", "add", "prune"),
    "transformer_block": ("split", "add", "prune", "heads", "add_heads", "prune_heads"),
}


def moved(candidates):
    """Candidates with parameters that do something, whatever their kind."""
    rng = np.random.default_rng(0)
    return [
        c.replace(
            theta={
                name: value + 0.2 * rng.standard_normal(np.shape(value)).astype("float32")
                for name, value in c.theta.items()
            }
        )
        for c in candidates
    ]


@pytest.mark.parametrize("case", sorted(KINDS))
def test_what_is_carried_through_is_the_really_edited_network(case):
    """Another candidate on every sample, of all kinds and sites at once."""
    net = prepare(by_name(case), kinds=KINDS[case])
    candidates = moved(net.candidates)
    groups, positions = group_candidates(net.model, candidates)
    order = np.concatenate(positions)
    x, y = regression_data(net.model, len(candidates))
    loss = make_total_loss(net.graph, "mse")
    passes = Passes(net.graph, loss, draws=1)
    (batch,) = (loss.arranged(batch) for batch in batches_of((x, y)))
    thetas = [group.theta for group in groups]
    perturbed = perturb_all(observe(net.graph, x), groups, thetas, fresh=False)
    chosen = tf.eye(len(candidates))
    found = passes.carried(batch, groups, thetas, perturbed, chosen).numpy()
    before = passes.carried(batch, groups, thetas, perturbed, tf.zeros_like(chosen)).numpy()
    for row, position in enumerate(order):
        edited = applied(net.model, [candidates[position]])
        output = edited(x[row : row + 1], training=False).numpy()
        truth = ((output - y[row]) ** 2).mean()
        assert found[row] == pytest.approx(truth, rel=2e-4, abs=2e-5), candidates[position]
    assert np.mean(np.abs(found - before) > 1e-4) > 0.5


def removals():
    """A small deep net and unlearned removals of it, which its estimates are wrong about."""
    keras.utils.set_random_seed(1)
    layers = [keras.layers.Dense(8, "relu", name=f"dense{number}") for number in range(3)]
    model = tfgrow.convert(keras.Sequential([keras.Input((6,)), *layers, keras.layers.Dense(3)]))
    rng = np.random.default_rng(0)
    data = rng.standard_normal((2, 200, 6)).astype("float32")
    y = rng.integers(3, size=400)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(1e-2), loss)
    x = data.reshape(400, 6)
    model.fit(x, y, epochs=30, verbose=0)
    return model, tfgrow.candidates(model, "prune"), (x, y)


def test_many_checks_bring_the_scores_near_the_truth():
    model, candidates, data = removals()
    truths = np.array([tfgrow.measure_change(model, [c], data) for c in candidates])
    estimator = tfgrow.GaussNewtonEstimator(model, curvature="exact", seed=2)
    error, checked, thoroughly = (
        np.abs(estimator.score(candidates, data, checks=checks) - truths).mean()
        for checks in (0, 16, 400)
    )
    assert error > 0.01
    assert checked < 0.7 * error
    assert thoroughly < 0.15 * error


def test_checks_repeat_by_seed_and_keep_the_order():
    model, candidates, data = removals()
    shuffled = [candidates[i] for i in np.random.default_rng(0).permutation(len(candidates))]

    def scores(some, seed):
        return tfgrow.GaussNewtonEstimator(model, seed=seed).score(some, data, checks=4)

    first = scores(shuffled, 1)
    np.testing.assert_array_equal(first, scores(shuffled, 1))
    assert np.abs(first - scores(shuffled, 2)).max() > 1e-4
    truths = [tfgrow.measure_change(model, [c], data) for c in shuffled]
    many = tfgrow.GaussNewtonEstimator(model, seed=1).score(shuffled, data, checks=100)
    assert np.corrcoef(many, truths)[0, 1] > 0.95
    with pytest.raises(ValueError, match="checks must be a whole number >= 0"):
        tfgrow.GaussNewtonEstimator(model).score(candidates, data, checks=-1)


def test_candidates_are_drawn_in_proportion_to_their_weights():
    weights = tf.constant([0.0, 1.0, 5.0, 0.0, 2.0])
    found = np.bincount(_draw(weights, 100, tf.constant([1, 2])), minlength=5)
    np.testing.assert_allclose(found, 100 * weights / 8.0, atol=1.0)
    assert found.sum() == 100
    mixed = _draw(weights, 100, tf.constant([1, 2])).numpy()
    assert (mixed != np.sort(mixed)).any()  # no sample is bound to a candidate
    nothing = _draw(tf.zeros(3), 4, tf.constant([1, 2])).numpy()
    assert set(nothing) <= {0, 1, 2}


@pytest.mark.parametrize(("size", "samples"), [(0.0, 20), (0.1, 20), (0.3, 100), (3.0, 100)])
def test_corrections_are_nearer_the_truth_than_none_or_all_of_what_was_found(size, samples):
    rng = np.random.default_rng(0)
    scales = rng.uniform(0.1, 2.0, 400)
    true = size * scales * rng.standard_normal(400)
    seen = true[:, None] + scales[:, None] * rng.standard_normal((400, samples))
    drawn = np.full(400, float(samples))
    found = corrections(np.zeros(400), scales**2, drawn, seen.sum(1), (seen**2).sum(1))
    error = np.mean((found - true) ** 2)
    assert error <= 1.02 * np.mean((seen.mean(1) - true) ** 2)
    assert error <= 1.02 * np.mean(true**2) + 1e-3


def test_nothing_drawn_and_nothing_estimated_correct_nothing():
    zeros = np.zeros(3)
    np.testing.assert_array_equal(corrections(zeros, zeros, zeros, zeros, zeros), zeros)
    drawn = np.array([4.0, 0.0, 4.0])
    found = corrections(zeros, np.ones(3), drawn, np.array([8.0, 0, 8]), np.array([24.0, 0, 24]))
    assert found[1] == 0
    assert 0 < found[0] < 2
