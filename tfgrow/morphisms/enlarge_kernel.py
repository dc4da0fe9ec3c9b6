"""Enlarge a kernel: 1 -> 3, 3 -> 5..., with a learned ring around the weights it has.

At a ring of zeros the function is unchanged. The ring changes the convolution's response linearly,
by ring * x: with G the mean gradient there and Q the Gauss-Newton matrix with respect to the ring,
-(Q + damping)^-1 G is its direction in closed form. How far to go along it is learned per output by
gradient, with the perturbation D = path(u + ring * x) - path(u) carried exactly through the site's
path and linearised at the consumers: the activation in between makes long steps turn out otherwise.
Where the convolution's channels can't be followed, D is taken at its response.

Source: the kernel morphism of Wei et al. 2016 (arXiv 1603.01670), with the ring learned on the
estimate of Lawton et al., arXiv 2411.05855.

A depthwise convolution makes no channels of its own; where it stands is a site that is blocked,
and D is taken at its response.

Layouts: theta's `ring` is `[n, R, *channels]`, R the taps of the new kernel that the old one leaves
free and `channels` the last two axes of the kernel; its `length` is the logarithm of a factor per
output, `[n, O]` or, of a depthwise kernel, `[n, *channels]`. A group is one candidate, for
convolutions differ in shape.
"""

from __future__ import annotations

import numpy as np
import tensorflow as tf

from tfgrow.capture.capture import outside_of, producer_inputs, producer_responses
from tfgrow.capture.execute import linear_tap, tensor_tap
from tfgrow.capture.path import Path, take
from tfgrow.curvature.normal import LEARNING_DAMPING
from tfgrow.graph.channels import why_shared
from tfgrow.morphisms import rings
from tfgrow.morphisms.base import AtInputs, Candidate, OneByOne, Perturbed
from tfgrow.types import Cost, Demand, KernelEdit

START = 0.5
"""How far along the ring of the closed form a candidate starts."""

LENGTH_SCALE = 3.0
"""Natural size of the logarithm of a length: a learning step of 0.1 changes it by a third."""

MOST_INPUTS = 2304
"""Largest number of weights of one output in a ring: beyond, its correlations fill the memory."""


class EnlargeKernel(OneByOne, AtInputs):
    """Enlarges one convolution's kernel by two in every direction. See the module's docstring."""

    name = "enlarge_kernel"
    solved = ("ring",)
    perturbs_by_solved = True
    reads_producer = False
    edits_unit = False
    units = 0

    def reason(self, site):
        reasons = [_reason(site, number) for number in range(len(site.producers))]
        if not reasons:
            return site.blocked
        return None if None in reasons else reasons[0]

    def candidates(self, site, *, new_units, seed):
        del new_units, seed
        found = []
        for number in range(len(site.producers)):
            if _reason(site, number) is None:
                ring, outputs = rings.shapes(site, number)
                length = np.full(outputs, np.log(START), "float32")
                theta = {"ring": np.zeros(ring, "float32"), "length": length}
                found.append(Candidate(site, self.name, number, theta, {}, Cost()))
        return found

    def group_key(self, candidate):
        return candidate.unit

    def demand(self, candidate):
        layer = candidate.site.producers[candidate.unit].operation
        size = rings.enlargement(candidate.site, candidate.unit).kernel_size
        return Demand(kernels={layer.name: size})

    def taps(self, site):
        at_responses = [linear_tap(node.index) for node in site.producers]
        return [*at_responses, *super().taps(site)] if site.widens else at_responses

    def scale(self, site, units):
        del site
        return {"length": np.full(len(units), LENGTH_SCALE, "float32")}

    def perturb(self, capture, group, theta, responses, fresh):
        del responses, fresh
        site, number = group.site, rings.number_of(group)
        node = site.producers[number]
        read = producer_inputs(capture, site)[number]
        ring = theta["ring"][0] * tf.exp(theta["length"][0])
        change = node.operation.linear_enlarged(read, rings.kernel_with(site, number, ring))
        if not site.widens:
            return Perturbed({node.index: change}, {})
        now = producer_responses(capture, site)
        now[number] = now[number] + change
        path, every = Path(site, site.units), range(site.units)
        arriving = path.run(now, path.live_variables(every), outside_of(capture))
        return Perturbed(
            {
                leaf.tensor: arriving[leaf.tensor]
                - take(capture.values[tensor_tap(leaf.tensor)], self.order(group, leaf))
                for leaf in site.leaves
            },
            {},
        )

    def order(self, group, leaf):
        site = group.site
        path = Path(site, site.units)
        return path.positions(leaf.tensor, leaf.channels, range(site.units))

    def covectors(self, capture, group, theta, perturbed):
        if group.site.widens:
            return super().covectors(capture, group, theta, perturbed)
        index = group.site.producers[rings.number_of(group)].index
        return {index: capture.cotangents[linear_tap(index)]}

    def tangents(self, group, theta, perturbed):
        if group.site.widens:
            return super().tangents(group, theta, perturbed)
        return {linear_tap(place): value for place, value in perturbed.values.items()}

    def equations(self, capture, group, perturbed):
        del perturbed
        node = group.site.producers[rings.number_of(group)]
        read = producer_inputs(capture, group.site)[rings.number_of(group)]
        return rings.equations(group, read, capture.cotangents[linear_tap(node.index)])

    def no_equations(self, group):
        return rings.no_equations(group)

    def solve(self, group, sums, damping):
        return {"ring": rings.solve(group, sums, damping)}

    def choose_damping(self, group, first, second):
        del group, first, second
        return LEARNING_DAMPING  # that of the rings whose lengths were learned

    def edit(self, candidate):
        number = candidate.unit
        larger = rings.enlargement(candidate.site, number)
        ring = candidate.theta["ring"] * np.exp(candidate.theta["length"])
        kernel = np.asarray(rings.kernel_with(candidate.site, number, ring))
        return KernelEdit(candidate.site, number, larger.attributes, larger.offset, kernel)

    def scaled(self, candidate, alpha):
        return candidate.replace(theta={**candidate.theta, "ring": alpha * candidate.theta["ring"]})


def _reason(site, number: int) -> str | None:
    node = site.producers[number]
    if not node.weighs:
        return site.blocked
    shared = why_shared(site.graph, node.operation)
    if shared:
        return shared
    if not node.operation.trainable:
        return f"layer '{node.name}' is frozen (trainable=False)"
    shape = site.graph.tensors[node.inputs[0]].shape
    found = node.operation.enlargement(tuple(shape))
    if isinstance(found, str):
        return found
    (taps, channels, _), _ = rings.shapes(site, number)
    if node.mixing and taps * channels > MOST_INPUTS:
        return f"layer '{node.name}' reads too many channels for a larger kernel to be learned"
    return None
