"""Random graphs of branches, joins, gates and streams: whatever the graph, promises are kept."""

import tempfile
from pathlib import Path

import keras
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tfgrow
from tests.cases import inputs_of, regression_data
from tests.morphisms.effects import predicted, responses, responses_after
from tests.properties.graphs import build, recipes
from tfgrow.capture.capture import prepare_inputs
from tfgrow.capture.execute import execute, tensor_tap
from tfgrow.graph.cost import CostModel, model_flops
from tfgrow.graph.nodes import trace
from tfgrow.graph.sites import sites_of
from tfgrow.morphisms.registry import get
from tfgrow.surgery import optimizer as slots
from tfgrow.surgery import rebuild, shapes

FEW, MANY = 4, 14
SLOWNESS = {"estimate": 2}  # what is traced takes its time

WIDENINGS = st.lists(st.tuples(st.integers(0, 9), st.integers(1, 2)), min_size=1, max_size=3)


def outputs(model, x):
    return [np.asarray(value) for value in keras.tree.flatten(model(x, training=False))]


def close(found, expected, tolerance=1e-5):
    for one, other in zip(found, expected, strict=True):
        scale = max(1, np.abs(other).max())
        np.testing.assert_allclose(one, other, atol=tolerance * scale)


def growable_sites(model):
    return [site for site in tfgrow.find_sites(model) if not site.blocked]


def at_scale(candidates, alpha):
    return [get(candidate.morphism).scaled(candidate, alpha) for candidate in candidates]


# ---- what is there --------------------------------------------------------------------------


def check_conversion(recipe):
    stock = build(recipe)
    x = inputs_of(stock, 3)
    expected = outputs(stock, x)
    model = tfgrow.convert(stock)
    close(outputs(model, x), expected, 1e-6)
    close(outputs(tfgrow.strip(model), x), expected, 1e-6)
    graph = trace(model)
    values = execute(graph, prepare_inputs(graph, x))
    close([values[tensor_tap(tensor)].numpy() for tensor in graph.outputs], expected, 1e-6)


def check_sites(recipe):
    """Every mixing layer makes the channels of one site, or is blocked by what has a name."""
    model = tfgrow.convert(build(recipe))
    graph = trace(model)
    sites = tfgrow.find_sites(model)
    names = {node.name for node in graph.nodes}
    made = [node.operation for site in sites if site.widens for node in site.producers]
    blocked = [site.producer for site in sites if not site.widens]
    with_kernels = {node.name for node in graph.nodes if node.weighs}
    assert sorted(layer.name for layer in made + blocked) == sorted(with_kernels)
    for site in sites:
        if site.blocked:
            assert any(f"'{name}'" in site.blocked for name in names), site.blocked
        else:
            assert {node.operation.growth_units for node in site.producers} == {site.units}
            assert site.consumers


# ---- edits ----------------------------------------------------------------------------------


def check_rest(recipe, seed):
    stock = build(recipe)
    model = tfgrow.convert(stock)
    x = inputs_of(model, 3)
    before = outputs(model, x)
    graph = trace(model)
    sites = sites_of(model, graph)
    free = {site.name: site.units for site in sites if not site.blocked}
    doubling = {site.name: site.units for site in sites if site.doubles}
    if not free and not doubling:
        return
    wider = {name: units + 1 for name, units in free.items()}
    costs = CostModel(graph, sites).extra({**wider, **doubling})
    params, flops = model.count_params(), model_flops(graph)
    shapes = [layer.output.shape for layer in stock.layers if called_once(layer)]
    kinds = [*(("split", "add") if free else ()), *(("double",) if doubling else ())]
    candidates = tfgrow.candidates(model, kinds, new_units=1, seed=seed)
    event = tfgrow.apply(model, at_scale(candidates, 0.0))
    close(outputs(model, x), before)
    expected = {name: (units, 2 * units + 1) for name, units in free.items()}
    expected |= {name: (units, 2 * units) for name, units in doubling.items()}
    assert event.widths == expected
    assert model.count_params() - params == costs.params
    assert model_flops(trace(model)) - flops == costs.flops
    close(outputs(tfgrow.strip(model), x), before)
    close(outputs(stock, x), before)
    assert [layer.output.shape for layer in stock.layers if called_once(layer)] == shapes


def called_once(layer):
    return len(layer._inbound_nodes) == 1


def check_widening(recipe, steps):
    model = tfgrow.convert(build(recipe))
    x = inputs_of(model, 3)
    before = outputs(model, x)
    names = [name for site in growable_sites(model) for name in site.names]
    for seed, (which, units) in enumerate(steps if names else []):
        tfgrow.widen(model, names[which % len(names)], units, seed=seed)
    close(outputs(model, x), before)
    assert [name for site in growable_sites(model) for name in site.names] == names
    rebuilt = keras.Model.from_config(model.get_config())
    rebuilt.set_weights(model.get_weights())
    close(outputs(rebuilt, x), before)


def compiled(model, x, seed=0):
    """Compiled with Adam and trained for a step, so that there are slots."""
    rng = np.random.default_rng(seed)
    y = [rng.standard_normal(value.shape).astype("float32") for value in outputs(model, x)]
    model.compile(keras.optimizers.Adam(0.01), "mse", run_eagerly=True)
    y = y[0] if len(y) == 1 else y
    model.train_on_batch(x, y)
    return y


def check_training(recipe, steps):
    model = tfgrow.convert(build(recipe))
    x = inputs_of(model, 3)
    y = compiled(model, x)
    before = outputs(model, x)
    names = [name for site in growable_sites(model) for name in site.names]
    for seed, (which, units) in enumerate(steps if names else []):
        tfgrow.widen(model, names[which % len(names)], units, seed=seed)
    close(outputs(model, x), before)
    assert_slots_fit(model)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.keras"
        model.save(path)
        loaded = keras.models.load_model(path)
    close(outputs(loaded, x), outputs(model, x), 1e-6)
    for mine, theirs in zip(model.optimizer.variables, loaded.optimizer.variables, strict=True):
        np.testing.assert_array_equal(mine, theirs)
    model.train_on_batch(x, y)
    loaded.train_on_batch(x, y)
    assert_slots_fit(model)
    close(outputs(loaded, x), outputs(model, x), 1e-5)


def assert_slots_fit(model):
    weights = [tuple(weight.shape) for weight in model.trainable_variables]
    adam = model.optimizer
    for kept in (adam._momentums, adam._velocities):
        assert [tuple(slot.shape) for slot in kept] == weights


def check_copies_go(recipe, which):
    """Units that a split doubled go again, and nothing is lost."""
    model = tfgrow.convert(build(recipe))
    x = inputs_of(model, 3)
    before = outputs(model, x)
    sites = growable_sites(model)
    if not sites:
        return
    site = sites[which % len(sites)]
    units = site.units
    split = tfgrow.candidates(model, "split", sites=[site.name])
    tfgrow.apply(model, at_scale(split, 0.0))
    tfgrow.prune(model, site.names[-1], range(units))
    close(outputs(model, x), before)


def check_pruning(recipe, which):
    """A removed unit leaves what its zeroed outgoing weights would."""
    model = tfgrow.convert(build(recipe))
    x = inputs_of(model, 3)
    wide = [site for site in growable_sites(model) if site.units > 1]
    if not wide:
        return
    site = wide[which % len(wide)]
    unit = which % site.units
    silent = tfgrow.convert(model)
    for leaf in site.leaves:
        for node in leaf.consumers:
            kernel = silent.get_layer(node.name).kernel
            value = kernel.numpy()
            value[..., leaf.channels.index[unit], :] = 0.0
            kernel.assign(value)
    tfgrow.prune(model, site.name, [unit])
    close(outputs(model, x), outputs(silent, x))
    close(outputs(tfgrow.strip(model), x), outputs(silent, x))
    after = next(found for found in tfgrow.find_sites(model) if found.name == site.name)
    assert after.units == site.units - 1


# ---- the estimate ---------------------------------------------------------------------------


def random_candidates(model, seed):
    """Half of all candidates, with outgoing weights at random."""
    rng = np.random.default_rng(seed)
    found = []
    for candidate in tfgrow.candidates(model, new_units=1, seed=seed):
        if rng.integers(2) or not found:
            found.append(with_random_outgoing(candidate, rng))
    return found


def check_effects(recipe, seed):
    """What candidates of a site say they change at its consumers is what they really change."""
    model = tfgrow.convert(build(recipe))
    sites = growable_sites(model)
    if not sites:
        return
    name = sites[seed % len(sites)].name
    kind = ("split", "add", "prune")[seed % 3]
    rng = np.random.default_rng(seed)
    candidates = tfgrow.candidates(model, kind, sites=[name], new_units=2, seed=seed)
    candidates = [with_random_outgoing(candidate, rng) for candidate in candidates]
    candidates = candidates[:1] if kind == "prune" else candidates
    if not candidates:
        return
    x, site = inputs_of(model, 3), candidates[0].site
    before, after = responses(model, x, site), responses_after(model, x, candidates)
    for claimed, old, new in zip(predicted(model, x, candidates), before, after, strict=True):
        stays = np.isfinite(new).all(axis=tuple(range(new.ndim - 1)))
        scale = max(1.0, np.abs(new[..., stays]).max(initial=0), np.abs(old).max())
        np.testing.assert_allclose(claimed[..., stays], (new - old)[..., stays], atol=3e-5 * scale)


def with_random_outgoing(candidate, rng):
    theta = {
        name: 0.3 * rng.standard_normal(np.shape(value)).astype("float32")
        if name.startswith("phi/") or name == "share"
        else value
        for name, value in candidate.theta.items()
    }
    return candidate.replace(theta=theta)


def check_estimate(recipe, seed, learned):
    """Reverse mode is forward mode; what the estimate leaves out is of second order."""
    model = tfgrow.convert(build(recipe))
    if not growable_sites(model):
        return
    data = regression_data(model, 6, seed)
    estimator = tfgrow.GaussNewtonEstimator(model, loss="mse", curvature="exact")
    candidates = random_candidates(model, seed)
    if learned:
        candidates = estimator.learn(candidates, data, steps=1, settle=2)
    loss = estimator.loss(data)
    interaction = estimator.interaction(candidates, data)
    scale = np.abs(interaction.linear).sum() + np.abs(interaction.gram).sum() + 1e-2 * loss
    forward = estimator.joint_change(candidates, data)
    assert abs(interaction.change() - forward) <= 1e-4 * scale
    errors = []
    for alpha in (0.1, 0.025):
        some = at_scale(candidates, alpha)
        real = tfgrow.measure_change(model, some, data, "mse")
        errors.append(abs(real - estimator.interaction(some, data).change()))
    assert errors[1] <= max(errors[0], 1e-2 * scale) / 4 + 3e-6 * max(1, loss), (errors, scale)


# ---- all or nothing -------------------------------------------------------------------------

STEPS = [
    (rebuild, "_set_attributes"),
    (rebuild, "set_value"),
    (shapes, "_refresh_metadata"),
    (shapes, "_set_shapes"),
    (shapes, "_refresh_elsewhere"),
    (rebuild, "renew_functions"),
    (slots, "map_slot"),
    (rebuild, "rekey_optimizer"),
]


class InjectedError(Exception):
    """Raised in the middle of surgery."""


def check_failure(recipe, step, call):
    model = tfgrow.convert(build(recipe))
    if not growable_sites(model):
        return
    x = inputs_of(model, 3)
    compiled(model, x)
    candidates = at_scale(tfgrow.candidates(model, new_units=1), 1.0)
    before = photograph(model, x)
    module, name = STEPS[step % len(STEPS)]
    original, calls = getattr(module, name), []

    def failing(*args, **kwargs):
        calls.append(None)
        result = original(*args, **kwargs)
        if len(calls) == call:
            raise InjectedError
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, name, failing)
        try:
            tfgrow.apply(model, candidates)
            return  # there were fewer calls
        except InjectedError:
            pass
    now = photograph(model, x)
    assert now == before
    tfgrow.apply(model, candidates)  # and it still can be done


def photograph(model, x):
    variables = [*model.variables, *model.optimizer.variables]
    return {
        "config": model.get_config(),
        "values": [variable.numpy().tobytes() for variable in variables],
        "variables": [(id(variable), id(variable.value)) for variable in variables],
        "outputs": [value.tobytes() for value in outputs(model, x)],
        "shapes": [
            [t.shape for n in layer._inbound_nodes for t in n.outputs] for layer in model.operations
        ],
        "widths": [(site.names, site.units) for site in tfgrow.find_sites(model)],
    }


# ---- all of it, on few graphs by default ----------------------------------------------------

PROPERTIES = {
    "conversion": (check_conversion, recipes()),
    "sites": (check_sites, recipes()),
    "rest": (check_rest, recipes(), st.integers(0, 100)),
    "widening": (check_widening, recipes(), WIDENINGS),
    "training": (check_training, recipes(), WIDENINGS),
    "copies": (check_copies_go, recipes(), st.integers(0, 9)),
    "pruning": (check_pruning, recipes(), st.integers(0, 9)),
    "effects": (check_effects, recipes(), st.integers(0, 99)),
    "estimate": (
        check_estimate,
        recipes(smooth=True, outputs=1, longest=5),
        st.integers(0, 100),
        st.booleans(),
    ),
    "failure": (check_failure, recipes(), st.integers(0, 7), st.integers(1, 6)),
}


def hold(name, examples):
    check, *strategies = PROPERTIES[name]

    @settings(max_examples=examples // SLOWNESS.get(name, 1))
    @given(st.tuples(*strategies))
    def property_holds(drawn):
        check(*drawn)

    property_holds()


@pytest.mark.parametrize("name", PROPERTIES)
def test_on_few_random_graphs(name):
    hold(name, FEW)


@pytest.mark.slow
@pytest.mark.parametrize("name", PROPERTIES)
def test_on_many_random_graphs(name):
    hold(name, MANY)
