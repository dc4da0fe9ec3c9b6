"""A site's path, run on its own units, gives what really arrives at its consumers."""

import numpy as np
import pytest
import tensorflow as tf

from tests.cases import CASES, inputs_of
from tfgrow.capture.capture import observe, outside_of, producer_responses
from tfgrow.capture.execute import tensor_tap
from tfgrow.capture.path import Path, batch_moments
from tfgrow.graph.nodes import trace
from tfgrow.graph.sites import sites_of


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_path_of_some_units_is_the_models(case):
    model = case.model()
    graph = trace(model)
    captured = observe(graph, inputs_of(model, 3))
    for site in sites_of(model, graph):
        if site.blocked:
            continue
        units = np.arange(site.units)[::-1][:2]  # some, and not in order
        path = Path(site, len(units))
        responses = [np.asarray(u)[..., units] for u in producer_responses(captured, site)]
        arriving = path.run(responses, path.live_variables(units), outside_of(captured))
        assert set(arriving) == {leaf.tensor for leaf in site.leaves}
        for leaf in site.leaves:
            where = path.positions(leaf.tensor, leaf.channels, units)
            expected = captured.values[tensor_tap(leaf.tensor)].numpy()[..., where]
            np.testing.assert_allclose(arriving[leaf.tensor], expected, atol=1e-6)
            apart = np.asarray(path.by_unit(leaf.tensor, expected))
            for row, unit in enumerate(units):
                mine = captured.values[tensor_tap(leaf.tensor)].numpy()
                np.testing.assert_allclose(
                    apart[..., row, :], mine[..., leaf.channels.index[unit]], atol=1e-6
                )
            stacked = np.stack([expected, 2 * expected])
            axes = (*range(2, stacked.ndim - 1), stacked.ndim)
            np.testing.assert_allclose(
                path.per_unit(leaf.tensor, stacked),
                np.stack([apart, 2 * apart]).sum(axis=axes),
                rtol=1e-4,
                atol=1e-5,
            )
            weights = tf.constant(np.arange(4.0).reshape(2, 1, 2), "float32")
            expected = np.broadcast_to(np.asarray(weights)[..., None], (2, 1, *apart.shape[-2:]))
            spread = path.spread(leaf.tensor, weights, stacked.ndim)
            assert spread.shape.rank == stacked.ndim
            np.testing.assert_array_equal(
                np.reshape(path.by_unit(leaf.tensor, spread), expected.shape), expected
            )


def test_batch_moments():
    values = np.random.default_rng(0).normal(2.0, 3.0, (4, 5, 6, 2)).astype("float32")
    moments = batch_moments(values)
    np.testing.assert_allclose(moments.mean, values.mean(axis=(0, 1, 2)), rtol=1e-5)
    np.testing.assert_allclose(moments.variance, values.var(axis=(0, 1, 2)), rtol=1e-5)
