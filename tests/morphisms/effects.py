"""What candidates say they change, and what they really change: shared by the tests here."""

import numpy as np

from tfgrow.capture.capture import capture, consumer_taps, find_head, observe, prepare_inputs
from tfgrow.capture.execute import execute
from tfgrow.curvature.loss_head import make_loss_head
from tfgrow.graph.convert import copy_model
from tfgrow.graph.nodes import trace
from tfgrow.graph.sites import find_sites
from tfgrow.morphisms.base import perturb_all, scalars_of
from tfgrow.morphisms.registry import get, group_candidates
from tfgrow.surgery.apply import apply_edits


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
            else:  # at what the consumer reads
                consumer = node.operation
                kernel = consumer.growable_variables()["kernel"]
                total[index] = total[index] + consumer.linear(
                    tangents[("tensor", leaf.tensor)], kernel
                )
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
    return scalars_of(group, covectors, perturbed)
