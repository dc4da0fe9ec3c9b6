"""What candidates say they change, and what they really change: shared by the tests here."""

import numpy as np

from tfgrow.capture.batches import batches_of
from tfgrow.capture.capture import (
    capture,
    consumer_taps,
    find_head,
    observe,
    prepare_inputs,
    taps_of_leaf,
)
from tfgrow.capture.execute import execute, input_tap, weights_of
from tfgrow.curvature.loss_head import make_loss_head
from tfgrow.curvature.total_loss import make_total_loss
from tfgrow.graph.constants import absorber_of
from tfgrow.graph.convert import copy_model
from tfgrow.graph.nodes import trace
from tfgrow.graph.sites import find_sites, parameter_name
from tfgrow.morphisms.base import perturb_all
from tfgrow.morphisms.registry import get, group_candidates
from tfgrow.passes import Passes
from tfgrow.surgery.apply import apply_edits
from tfgrow.surgery.weights import merge_edits
from tfgrow.types import NEWBORN


def outputs(model, x):
    return np.asarray(model(x, training=False))


def applied(model, candidates):
    """A copy of the model with the candidates really applied."""
    copy = copy_model(model, compiled=False)
    sites = {site.name: site for site in find_sites(copy)}
    moved = [candidate.replace(site=sites[candidate.site.name]) for candidate in candidates]
    apply_edits(copy, [get(candidate.morphism).edit(candidate) for candidate in moved])
    return copy


def responses(model, x, site):
    """What the site's consumers compute before their activations."""
    graph = trace(model)
    values = execute(graph, prepare_inputs(graph, x))
    return [values[tap].numpy() for tap in consumer_taps(site)]


def responses_after(model, x, candidates):
    """The same after candidates of one site were really applied.

    What the consumers pass on is held as it was, for it may come round to the site again: that
    their responses change is where the estimate linearises. Of a consumer that makes some of the
    units too, the old ones: as the mean of those that descend from it, and NaN where none does.
    """
    site = candidates[0].site
    (edit,) = merge_edits([get(candidate.morphism).edit(candidate) for candidate in candidates])
    graph, grown = trace(model), trace(applied(model, candidates))
    before = execute(graph, prepare_inputs(graph, x))
    read = {node.index for leaf in site.leaves for node in leaf.consumers}
    made = {node.index: number for number, node in enumerate(site.producers)}
    after = {}

    def hold(tap, value):
        kind, index = tap
        if kind == "input" and index in read:
            layer = grown.nodes[index].operation
            after[index] = layer.linear(value, **weights_of(layer)).numpy()
        if kind == "linear" and index in read:
            return _held(before, graph.nodes[index], edit, made.get(index))
        return value

    execute(grown, prepare_inputs(grown, x), hold)
    found = []
    for _, index in consumer_taps(site):
        response = _by_old_unit(edit, after[index]) if index in made else after[index]
        found.append(response + _constant_behind(graph, grown, index))
    return found


def _constant_behind(graph, grown, index):
    """What the layer behind a consumer subtracts less than before, and so adds to its response."""
    old, new = (absorber_of(each, each.nodes[index]) for each in (graph, grown))
    if old is None or old.layer is graph.nodes[index].operation:
        return 0.0
    before, after = (getattr(one.layer, one.variable).numpy() for one in (old, new))
    return old.sign * (after - before) if before.shape == after.shape else 0.0


def _by_old_unit(edit, response):
    source = np.array([u if isinstance(u, int) else u.source for u in _units(edit)])
    old = np.full((*response.shape[:-1], edit.site.units), np.nan, "float32")
    for unit in set(source) - {NEWBORN}:
        old[..., unit] = response[..., source == unit].mean(axis=-1)
    return old


def _units(edit):
    kept = [unit for unit in range(edit.site.units) if unit not in edit.removed]
    return [edit.replaced.get(unit, unit) for unit in kept] + list(edit.appended)


def _held(before, node, edit, producer):
    """A consumer's response to what it read before; with the new units, if it makes some."""
    response = before["linear", node.index]
    if producer is None:
        return response
    parts = []
    for unit in _units(edit):
        if isinstance(unit, int):
            parts.append(response[..., unit : unit + 1])
            continue
        weights = {
            name: np.asarray(unit.fan_in[parameter_name(name, producer)])[..., None]
            for name in node.operation.growable_variables()
        }
        parts.append(node.operation.linear(before["input", node.index], **weights))
    return np.concatenate(parts, axis=-1)


def predicted(model, x, candidates):
    """The change of the consumers' responses that the candidates (of one site) promise."""
    captured = observe(trace(model), x)
    groups, _ = group_candidates(model, candidates)
    site = candidates[0].site
    total = [0.0 for _ in consumer_taps(site)]
    for group in groups:
        perturbed = perturb_all(captured, [group], [group.theta], fresh=False)[0]
        tangents = group.morphism.tangents(group, group.theta, perturbed)
        reads = [(leaf, node) for leaf in site.leaves for node in leaf.consumers]
        for index, (leaf, node) in enumerate(reads):
            tap = consumer_taps(site)[index]
            if tap in tangents:  # at the response
                total[index] = total[index] + tangents[tap]
            tap = input_tap(node.index) if leaf.passed_on else taps_of_leaf(leaf)[0]
            if tap in tangents:  # at what the consumer reads
                consumer = node.operation
                kernel = consumer.growable_variables()["kernel"]
                total[index] = total[index] + consumer.linear(tangents[tap], kernel)
    return [np.asarray(part) for part in total]


def capture_of(net, taps):
    head, loss = find_head(net.graph), make_loss_head("mse")
    x, y = net.data
    return capture(
        net.graph,
        [head],
        x,
        taps,
        lambda z: {0: loss.gradient(y, *z)},
        lambda z: [{0: column} for column in loss.factors(y, *z, "exact")],
    )


def scalars(captured, group, perturbed):
    covectors = group.morphism.covectors(captured, group, group.theta, perturbed)
    return group.morphism.scalars(group, covectors, perturbed)


def assert_reverse_mode_is_forward_mode(net):
    """Scalars against all columns, and all tangents pushed to the logits at once, agree."""
    loss = make_total_loss(net.graph, "mse", curvature="exact")
    passes = Passes(net.graph, loss, draws=1)
    batch = loss.arranged(*batches_of(net.data))
    groups, _ = group_candidates(net.model, net.candidates)
    thetas = [group.theta for group in groups]
    _, linear, gram, _ = passes.scalars(batch, None, groups, thetas)
    joint, _ = passes.joint(batch, groups, thetas)
    linear, gram = np.asarray(linear, "float64"), np.asarray(gram, "float64")
    size = abs(linear.sum()) + 0.5 * abs(gram.sum())
    assert size > 1e-4
    assert abs(linear.sum() + 0.5 * gram.sum() - float(joint)) <= 1e-4 * size
