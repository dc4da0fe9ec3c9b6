"""Forward mode: what perturbations anywhere in a model do to its logits, to first order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import tensorflow as tf

from tfgrow.capture.capture import Capture, Head, observe
from tfgrow.capture.execute import Tap
from tfgrow.capture.tracing import traced_anew
from tfgrow.graph.nodes import Graph

STEP = 0.01
"""How far central differences go: the root mean square of what is added, over that of the values.

In float32 a tenth of it is rounded too much, and with ten times it too many ReLUs change sides.
"""

SILENT = frozenset({"ResizeBilinear", "FakeQuantWithMinMaxArgs", "FakeQuantWithMinMaxVars"})
"""TensorFlow operations whose gradient counts as a constant: forward mode takes them for one too.

Of others without a second derivative (LSTM loops, bicubic resizing, softsign) it says so.
"""

REFUSALS = (LookupError, TypeError, ValueError, NotImplementedError)
"""What TensorFlow raises where it has no forward mode."""


def push_forward(
    graph: Graph, heads: Sequence[Head], x, tangents: Mapping[Tap, Any]
) -> tuple[list, list]:
    """The forward-mode twin of `capture`: all tangents pushed to the logits of all heads at once.

    By forward accumulators; where TensorFlow has none for some operation of the network, by central
    differences.

    Args:
      graph: the traced model.
      heads: where its logits are.
      x: the batch's inputs.
      tangents: what is added, by tap.

    Returns:
      The logits by head, and J times the sum of the tangents, shaped like them.
    """
    if tf.executing_eagerly():  # which operations there are only a trace says
        return traced_anew(lambda: push_forward(graph, heads, x, tangents))()
    pushed = {tap: tf.stop_gradient(tangent) for tap, tangent in tangents.items()}
    found = _accumulated(graph, heads, x, pushed)
    return _differences(graph, heads, x, pushed) if found is None else found


def _accumulated(graph, heads, x, tangents) -> tuple[list, list] | None:
    """None where TensorFlow has no forward mode for what is in the network."""
    probes = {tap: tf.zeros_like(tangent) for tap, tangent in tangents.items()}
    try:
        with tf.autodiff.ForwardAccumulator(
            list(probes.values()), list(tangents.values())
        ) as accumulator:
            logits = _logits(observe(graph, x, probes), heads)
    except REFUSALS:  # of the network itself, if it is at fault: it will be raised again
        return None
    if SILENT & _operations():
        return None
    return logits, accumulator.jvp(logits, unconnected_gradients=tf.UnconnectedGradients.ZERO)


def _differences(graph, heads, x, tangents) -> tuple[list, list]:
    here = observe(graph, x)
    step = _step(here.values, tangents)
    ahead, behind = (
        _logits(observe(graph, x, {tap: way * step * t for tap, t in tangents.items()}), heads)
        for way in (1.0, -1.0)
    )
    slopes = [(a - b) / (2.0 * step) for a, b in zip(ahead, behind, strict=True)]
    return _logits(here, heads), slopes


def _step(values: Mapping[Tap, Any], tangents: Mapping[Tap, Any]):
    """The longest step that is small at every tap; 1 where nothing is there to go by."""
    sizes = [(_size(values[tap]), _size(tangent)) for tap, tangent in tangents.items()]
    steps = [
        tf.where((value > 0.0) & (tangent > 0.0), STEP * tf.math.divide_no_nan(value, tangent), 1e9)
        for value, tangent in sizes
    ]
    shortest = tf.reduce_min(tf.stack(steps)) if steps else tf.constant(1.0)
    return tf.where(shortest < 1e9, shortest, 1.0)


def _size(tensor):
    """Root mean square."""
    return tf.sqrt(tf.reduce_mean(tf.cast(tensor, tf.float32) ** 2))


def _logits(captured: Capture, heads: Sequence[Head]) -> list:
    return [captured.values[head.tap] for head in heads]


def _operations() -> set[str]:
    """The kinds of all operations in what is being traced, and in what that calls."""
    traced = tf.compat.v1.get_default_graph().as_graph_def()
    called = [node for function in traced.library.function for node in function.node_def]
    return {node.op for node in (*traced.node, *called)}
