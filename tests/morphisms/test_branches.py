"""deepen and skip: what a branch promises is what the really inserted layers do."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

import tfgrow
from tests.cases import by_name, inputs_of, regression_data
from tests.morphisms.effects import (
    applied,
    assert_reverse_mode_is_forward_mode,
    capture_of,
    outputs,
)
from tfgrow.capture.capture import observe
from tfgrow.curvature.normal import quadratic
from tfgrow.graph.nodes import trace
from tfgrow.graph.sites import find_sites
from tfgrow.morphisms import branch, skip
from tfgrow.morphisms.base import perturb_all
from tfgrow.morphisms.registry import get, group_candidates
from tfgrow.passes import objective

KINDS = ("deepen", "skip")
PAIRS = [
    *(("deepen", name) for name in ("conv_bn_relu", "conv1d_causal", "conv3d", "two_inputs")),
    *(("deepen", name) for name in ("dense_on_sequences", "squeeze_and_excite")),
    *((kind, "residual_stream") for kind in KINDS),
    *((kind, "dense_block") for kind in KINDS),
    ("skip", "several_consumers"),
]


class Net:
    """A model of the table, and candidates of a kind with weights as if they were learned."""

    def __init__(self, kind, name):
        self.kind = get(kind)
        self.model = by_name(name).model()
        self.graph = trace(self.model)
        self.data = regression_data(self.model, 6)
        rng = np.random.default_rng(2)
        self.candidates = [
            c.replace(
                theta={
                    **c.theta,
                    "last": 0.3 * rng.standard_normal(c.theta["last"].shape).astype("float32"),
                }
            )
            for c in tfgrow.candidates(self.model, kind, seed=3)
        ]

    def effects(self):
        for candidate in self.candidates:
            (group,), _ = group_candidates(self.model, [candidate])
            captured = capture_of(self, self.kind.taps(group.site))
            (perturbed,) = perturb_all(captured, [group], [group.theta], fresh=False)
            yield candidate, group, captured, perturbed


@pytest.fixture(scope="module", params=PAIRS, ids=lambda pair: "-".join(pair))
def net(request):
    return Net(*request.param)


def test_the_target_changes_as_promised(net):
    x = net.data[0]
    for candidate, group, _, perturbed in net.effects():
        ((tap, claimed),) = net.kind.tangents(group, group.theta, perturbed).items()
        grown = applied(net.model, [candidate])
        (place,) = {b.target.name for b in [net.kind.branchings(candidate.site)[candidate.unit]]}
        joined = grown.get_layer(f"skip_{place}").output
        after = keras.Model(grown.inputs, joined)(x)
        before = observe(net.graph, x).values[tap]
        assert np.abs(claimed).max() > 1e-3
        np.testing.assert_allclose(claimed, after - before, atol=2e-5 * np.abs(after).max())


def test_at_rest_the_function_is_preserved_and_costs_are_real(net):
    x = net.data[0]
    before, params = outputs(net.model, x), net.model.count_params()
    for candidate in net.candidates:
        grown = applied(net.model, [net.kind.scaled(candidate, 0.0)])
        np.testing.assert_allclose(outputs(grown, x), before, atol=1e-5)
        assert grown.count_params() - params == candidate.cost.params > 0
        assert candidate.cost.flops > 0


def test_halving_alpha_goes_half_way(net):
    x = net.data[0]
    now = outputs(net.model, x)
    for candidate in net.candidates[:2]:
        distances = [
            np.abs(outputs(applied(net.model, [net.kind.scaled(candidate, alpha)]), x) - now).max()
            for alpha in (0.1, 0.05, 0.0)
        ]
        assert distances[0] > distances[1] > 10 * distances[2]


def test_scalars_are_tangents_contracted_with_gradient_and_columns(net):
    for _, group, captured, perturbed in net.effects():
        covectors = net.kind.covectors(captured, group, group.theta, perturbed)
        found = net.kind.scalars(group, covectors, perturbed).numpy()
        ((tap, tangent),) = net.kind.tangents(group, group.theta, perturbed).items()
        products = captured.cotangents[tap].numpy() * np.asarray(tangent)
        expected = products.reshape(*products.shape[:2], -1).sum(axis=2)
        np.testing.assert_allclose(found[..., 0], expected, atol=2e-5 * np.abs(expected).max())
        sums = {**net.kind.equations(captured, group, perturbed), "loss": tf.zeros(())}
        last = group.theta["last"].reshape(1, -1)
        change = expected[0].sum() + 0.5 * (expected[1:] ** 2).sum()
        np.testing.assert_allclose(quadratic(sums, last), [change], rtol=1e-3, atol=1e-5)
        best = tf.reshape(net.kind.solve(group, sums, 1e-3)["last"], (1, -1))
        assert quadratic(sums, best) < min(0.0, quadratic(sums, last))


def test_reverse_mode_is_forward_mode(net):
    assert_reverse_mode_is_forward_mode(net)


def test_the_gradient_written_out_is_that_of_automatic_differentiation(net):
    for _, group, captured, _ in net.effects():
        if not group.learned:
            return
        kernel = tf.constant(group.theta["kernel"])
        with tf.GradientTape(persistent=True) as tape:
            tape.watch(kernel)
            theta = {**group.theta, "kernel": kernel}
            (perturbed,) = perturb_all(captured, [group], [theta], fresh=False)
            covectors = net.kind.covectors(captured, group, theta, perturbed)
            found = net.kind.scalars(group, covectors, perturbed)
            expected = tf.reduce_sum(found[0]) + 0.5 * tf.reduce_sum(found[1:] ** 2)
        total, slopes = objective([group], [covectors], [perturbed])
        gradient = tape.gradient(perturbed.values, kernel, output_gradients=slopes[0])
        by_tape = tape.gradient(expected, kernel).numpy()
        np.testing.assert_allclose(gradient, by_tape, atol=1e-4 * np.abs(by_tape).max())
        np.testing.assert_allclose(total, expected, rtol=1e-4)


def interacting():
    """A net whose target is a product of its inputs: one hidden layer of 3 units is too little."""
    keras.utils.set_random_seed(0)
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2048, 4)).astype("float32")
    y = (x[:, :1] * x[:, 1:2] * np.sign(x[:, 2:3])).astype("float32")
    inputs = keras.Input((4,))
    hidden = layers.Dense(8, activation="relu", name="hidden")(inputs)
    model = tfgrow.convert(keras.Model(inputs, layers.Dense(1, name="out")(hidden)))
    model.compile(keras.optimizers.Adam(0.01), "mse")
    data = tf.data.Dataset.from_tensor_slices((x, y)).batch(64)
    model.fit(data, epochs=5, verbose=0)
    return model, data


def test_learned_blocks_lower_the_loss_as_estimated():
    model, data = interacting()
    estimator = tfgrow.GaussNewtonEstimator(model, curvature="exact")
    learned = estimator.learn(tfgrow.candidates(model, "deepen"), data.take(20), steps=20)
    held_out = data.skip(20)
    estimate = estimator.score(learned, held_out)[0]
    measured = tfgrow.measure_change(model, learned, held_out)
    assert measured < -0.01
    np.testing.assert_allclose(estimate, measured, rtol=1e-3)  # what follows is linear


def test_an_oracle_deepens_inside_fit_and_training_goes_on(tmp_path):
    model, data = interacting()
    oracle = tfgrow.GaussNewtonOracle(
        objective="loss", morphisms=("deepen",), growth_per_step=1, directory=tmp_path
    )
    growth = tfgrow.callbacks.Growth(oracle, data=data, every=1)
    stopping = keras.callbacks.EarlyStopping(
        "loss", patience=9, restore_best_weights=True, start_from_epoch=0
    )
    model.fit(data, epochs=3, verbose=0, callbacks=[stopping, growth])
    event = growth.events[0]
    assert event.status == "applied"
    assert event.measured_change < 0
    assert event.applied == ({"site": "hidden", "morphism": "deepen", "units": [0]},)
    assert event.widths == {"deepen_hidden": (0, 4)}
    assert event.params_after - event.params_before == 8 * 4 + 4 + 4 * 8 + 8
    model.save(tmp_path / "deep.keras")
    loaded = keras.models.load_model(tmp_path / "deep.keras")
    x = np.ones((3, 4), "float32")
    np.testing.assert_allclose(loaded(x), model(x), atol=1e-6)
    sites = {site.name: site for site in find_sites(model)}
    assert sites["deepen_hidden"].blocked is None, "the new block can grow in its turn"
    assert sites["hidden"].blocked is None


def test_a_missing_skip_is_found():
    """The target is linear in the first features; saturated layers in between lose them."""
    keras.utils.set_random_seed(3)
    x = np.random.default_rng(0).standard_normal((2048, 3)).astype("float32")
    y = x @ np.array([[1.0], [-2.0], [0.5]], "float32")
    inputs = keras.Input((3,))
    first = layers.Dense(6, name="first")(inputs)
    z = layers.Dense(4, activation="tanh", name="second")(first)
    z = layers.Dense(4, activation="sigmoid", name="third")(z)
    model = tfgrow.convert(keras.Model(inputs, layers.Dense(1, name="out")(z)))
    model.compile("sgd", "mse")
    data = tf.data.Dataset.from_tensor_slices((x, y)).batch(64)
    estimator = tfgrow.GaussNewtonEstimator(model, curvature="exact")
    skips = tfgrow.candidates(model, "skip", sites=["third"])
    places = [get("skip").branchings(c.site)[c.unit] for c in skips]
    assert [(b.source.name, b.target.name) for b in places] == [
        ("second", "third"),
        ("first", "third"),
    ]
    learned = estimator.learn(skips, data.take(16))
    held_out = data.skip(16)
    scores = estimator.score(learned, held_out)
    # what reads all that the target is made of beats what the tanh has bent
    assert scores[1] < scores[0] < 0
    for candidate, score in zip(learned, scores, strict=True):  # what follows is linear
        measured = tfgrow.measure_change(model, candidate, held_out)
        np.testing.assert_allclose(score, measured, rtol=1e-3)


def test_a_sequential_says_why_not():
    model = by_name("perceptron").model()
    with pytest.raises(ValueError, match="is a Sequential, in which no branch"):
        tfgrow.candidates(model, "deepen")


def test_what_a_branch_is_made_for_can_not_widen_with_it():
    model = by_name("residual_stream").model()
    deepen = [c for c in tfgrow.candidates(model, "deepen") if c.site.name == "bottleneck"]
    split = tfgrow.candidates(model, "split", sites=["bottleneck"])
    before = model.get_config()
    with pytest.raises(ValueError, match="can't be applied at once: a new branch"):
        tfgrow.apply(model, [*deepen[:1], split[0]])
    assert model.get_config() == before
    elsewhere = tfgrow.candidates(model, "split", sites=["project"])
    x = inputs_of(model, 3)
    rest = [get(c.morphism).scaled(c, 0.0) for c in (*deepen[:1], elsewhere[0])]
    now = outputs(model, x)
    tfgrow.apply(model, rest)
    np.testing.assert_allclose(outputs(model, x), now, atol=1e-5)


def test_wide_branches_need_no_eigenvalues(monkeypatch):
    """And their last layer is still learned: the estimate is what applying it brings."""
    monkeypatch.setattr(branch, "DENSE_LIMIT", 0)
    monkeypatch.setattr(branch, "WIDE", 1)
    monkeypatch.setattr(branch, "solve_sums", None)
    model = by_name("residual_stream").model()
    model.compile("sgd", "mse")
    data = regression_data(model, 64)
    estimator = tfgrow.GaussNewtonEstimator(model, curvature="exact")
    learned = estimator.learn(tfgrow.candidates(model, ("deepen", "skip")), data, steps=8, settle=8)
    best = min(learned, key=lambda candidate: estimator.score([candidate], data)[0])
    small = get(best.morphism).scaled(best, 0.01)
    estimated = estimator.score([small], data)[0]
    assert estimated < 0
    assert tfgrow.measure_change(model, small, data) == pytest.approx(estimated, rel=0.1)


def test_tensors_of_very_many_channels_are_no_sources(monkeypatch):
    model = by_name("residual_stream").model()
    every = {(c.site.name, c.unit) for c in tfgrow.candidates(model, "skip")}
    monkeypatch.setattr(skip, "MOST_CHANNELS", 2)
    model = by_name("residual_stream").model()
    few = tfgrow.candidates(model, "skip")
    assert 0 < len(few) < len(every)
    assert all(get("skip").branchings(c.site)[c.unit].channels <= 2 for c in few)
