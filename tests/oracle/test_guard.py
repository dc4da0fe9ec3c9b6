"""The guard commits a set at the largest scale that does not raise the loss, or not at all."""

import math

import keras
import numpy as np
import pytest

import tfgrow
from tests.integration.fitting import arrays, assert_same_bits, compiled, convnet, fit, mlp, state
from tests.surgery.hand_made import summary
from tfgrow.measure import real_loss
from tfgrow.oracle.guard import ALPHAS, commit


@pytest.fixture
def trained():
    model = compiled(convnet())
    fit(model, [], epochs=1)
    return model


def candidates_of(model, morphism="split"):
    """One per site, with every learned and solved parameter far from zero."""
    found = {}
    for candidate in tfgrow.candidates(model, morphism, new_units=1):
        found.setdefault(candidate.site.name, candidate)
    rng = np.random.default_rng(1)
    return [
        candidate.replace(
            theta={
                name: value + rng.normal(size=value.shape).astype("float32")
                for name, value in candidate.theta.items()
            }
        )
        for candidate in found.values()
    ]


class Losses:
    """Hands out losses in turn, and notes how wide the model was each time."""

    def __init__(self, *values):
        self.values = list(values)
        self.widths = []

    def __call__(self, model):
        self.widths.append(model.get_layer("conv1").filters)
        return self.values.pop(0)


@pytest.mark.parametrize(
    ("losses", "tolerance", "alpha"),
    [
        ((1.0, 0.9), 0.0, 1.0),
        ((1.0, 1.0), 0.0, 1.0),  # no worse is good enough
        ((1.0, 1.1, 0.9), 0.0, 0.5),
        ((1.0, 1.1, 1.1, 1.1, 0.9), 0.0, 0.125),
        ((1.0, 1.1), 0.2, 1.0),
        ((1.0, math.nan, math.inf, 0.9), 0.0, 0.25),
        ((1.0, math.nan, 1.0), math.inf, 0.5),
    ],
)
def test_the_largest_scale_that_does_not_raise_the_loss(trained, losses, tolerance, alpha):
    loss = Losses(*losses)
    outcome = commit(trained, candidates_of(trained), loss, tolerance)
    assert (outcome.alpha, outcome.loss_before, outcome.loss_after) == (
        alpha,
        losses[0],
        losses[-1],
    )
    assert loss.widths == [2] + [3] * (len(losses) - 1)
    assert trained.get_layer("conv1").filters == 3
    assert len(outcome.candidates) == 2
    assert {change.layer.name for change in outcome.changes} == {"conv1", "bn", "conv2", "out"}


@pytest.mark.parametrize("worse", [1.1, math.nan, math.inf])
def test_a_rejection_leaves_no_trace(trained, worse):
    before = state(trained), summary(trained)
    every = candidates_of(trained) + candidates_of(trained, "add")
    outcome = commit(trained, every, Losses(1.0, *[worse] * len(ALPHAS)))
    assert (outcome.alpha, outcome.candidates, outcome.changes) == (0.0, (), ())
    assert_same_bits(state(trained), before[0])
    assert summary(trained) == before[1]
    # The candidates still fit: the model's version is as before, too.
    assert commit(trained, every, Losses(1.0, 0.5)).alpha == 1.0


def test_what_is_measured_is_within_the_constraints_of_kernels():
    """As the next step of training would leave it."""
    limit = keras.constraints.MaxNorm(0.3)
    dense = keras.layers.Dense(4, "tanh", kernel_constraint=limit, name="a")
    last = keras.layers.Dense(3, kernel_constraint=limit, name="b")
    model = compiled(tfgrow.convert(keras.Sequential([keras.Input((4,)), dense, last])))
    fit(model, [], epochs=1)
    seen = []

    def norms(model):
        seen.append(np.linalg.norm(model.get_layer("b").kernel.numpy(), axis=0))
        return -1.0 * len(seen)

    assert commit(model, candidates_of(model, "add"), norms).alpha == 1.0
    before, after = seen
    assert before.max() <= 0.3 + 1e-5
    assert after.max() <= 0.3 + 1e-5
    assert model.get_layer("b").kernel.shape == (5, 3)
    tfgrow.apply(model, candidates_of(model, "add"))
    free = np.linalg.norm(model.get_layer("b").kernel.numpy(), axis=0)
    assert free.max() > 0.5, "the edits stayed within the constraint by themselves"


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
@pytest.mark.parametrize("calls", [1, 2])
def test_an_error_leaves_no_trace(trained, error, calls):
    before = state(trained)

    class Failing(Losses):
        def __call__(self, model):
            value = super().__call__(model)
            if len(self.widths) > calls:
                raise error
            return value

    with pytest.raises(error):
        commit(trained, candidates_of(trained), Failing(1.0, 2.0, 0.1))
    assert_same_bits(state(trained), before)


@pytest.mark.parametrize("before", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_is_an_error(trained, before):
    kept = state(trained)
    with pytest.raises(ValueError, match=r"'convnet' on the held-out batches is (nan|inf)"):
        commit(trained, candidates_of(trained), Losses(before, 0.0))
    assert_same_bits(state(trained), kept)


def test_the_estimate_is_of_the_committed_scale_on_the_model_as_it_was(trained):
    seen = []

    def estimate(scaled):
        seen.append((trained.get_layer("conv1").filters, scaled))
        return -0.25

    outcome = commit(
        trained, candidates_of(trained), Losses(1.0, 1.1, 1.1, 0.9), estimate_of=estimate
    )
    assert (outcome.alpha, outcome.estimated_change) == (0.25, -0.25)
    ((width, scaled),) = seen  # once, however many scales were tried
    assert width == 2
    assert tuple(scaled) == outcome.candidates
    assert trained.get_layer("conv1").filters == 3
    plain = commit(trained, candidates_of(trained), Losses(1.0, 0.9), estimate_of=estimate)
    assert (plain.estimated_change, len(seen)) == (None, 1)


def test_estimating_changes_nothing_of_what_is_committed():
    committed = []
    for estimate_of in (None, lambda scaled: 0.0):
        model = compiled(convnet())
        fit(model, [], epochs=1)
        losses = Losses(1.0, 1.1, 0.9)
        commit(model, candidates_of(model), losses, estimate_of=estimate_of)
        committed.append(state(model))
    assert_same_bits(*committed)


@pytest.mark.parametrize("morphism", ["split", "add"])
def test_the_scale_scales_the_real_change(morphism):
    """The smaller the scale, the smaller the change of the loss; at 0 there is none."""
    model = compiled(mlp(), keras.optimizers.SGD(0.1))
    fit(model, [], epochs=1)
    data, changes = arrays(), []
    for alpha in (1.0, 0.1, 0.01, 0.0):
        copy = tfgrow.convert(keras.models.clone_model(tfgrow.strip(model)))
        copy.set_weights(model.get_weights())
        copy.compile(loss=model.loss)
        chosen = candidates_of(copy, morphism)
        outcome = commit(copy, chosen, lambda m: real_loss(m, data), math.inf, (alpha,))
        changes.append(outcome.loss_after - outcome.loss_before)
    assert abs(changes[-1]) < 1e-6  # at 0 the function is preserved
    assert abs(changes[0]) > 10 * abs(changes[2])
    assert abs(changes[1]) > abs(changes[2]) > abs(changes[3])


@pytest.mark.parametrize("limited", [False, True])
def test_removals_stay_where_they_make_room(trained, limited):
    """At a smaller scale they are left out, but not if the rest alone is more than the budget."""
    (larger, *_) = candidates_of(trained, "add")
    removal = next(
        c for c in tfgrow.candidates(trained, "prune") if c.site.name != larger.site.name
    )
    before = trained.count_params()
    budget = before + larger.cost.params // (2 if limited else 1)
    oracle = tfgrow.GaussNewtonOracle(max_params=budget, morphisms=("add", "prune"))
    assert oracle.fits(trained, [larger, removal])
    outcome = commit(
        trained,
        [larger, removal],
        Losses(1.0, 1.1, 0.9),
        fits=lambda scaled: oracle.fits(trained, scaled),
    )
    assert outcome.alpha == 0.5
    kinds = [candidate.morphism for candidate in outcome.candidates]
    assert kinds == (["add", "prune"] if limited else ["add"])
    assert trained.count_params() <= budget
    oracle.check_budget(trained)


@pytest.mark.parametrize("name", ["max_params", "max_flops"])
def test_whether_a_set_fits_is_told_by_its_real_size(trained, name):
    chosen = candidates_of(trained)
    grown = tfgrow.convert(trained)
    event = tfgrow.apply(grown, candidates_of(grown))
    after = event.params_after if name == "max_params" else event.flops_after
    for budget, fits in ((after, True), (after - 1, False)):
        oracle = tfgrow.GaussNewtonOracle(**{name: budget})
        assert oracle.fits(trained, chosen) is fits
    assert tfgrow.GaussNewtonOracle().fits(trained, chosen)
