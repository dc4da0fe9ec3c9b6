"""Growing and pruning in one plan: a network of bad widths reshapes itself within its budget."""

import numpy as np
import pytest

import tfgrow
from tests.integration.test_selection_example import data, student


@pytest.mark.slow
def test_a_starved_layer_takes_from_a_bloated_one():
    train, held_out = data(4096, 1), data(1024, 2)
    model, plain = student(2, 16, "tanh"), student(2, 16, "tanh")
    budget = model.count_params()
    oracle = tfgrow.GaussNewtonOracle(
        "loss", ("split", "add", "prune"), max_params=budget, growth_per_step=None, seed=0
    )
    growth = tfgrow.callbacks.Growth(oracle, data=train, every=2, verbose=0)
    history = model.fit(*train, epochs=12, batch_size=64, callbacks=[growth], verbose=0)
    plain.fit(*train, epochs=12, batch_size=64, verbose=0)
    assert model.count_params() <= budget
    hidden, bottleneck = (model.get_layer(name).units for name in ("hidden", "bottleneck"))
    assert hidden >= 5, (hidden, bottleneck)
    assert bottleneck < 16, (hidden, bottleneck)
    losses = [net.evaluate(*held_out, verbose=0) for net in (model, plain)]
    assert losses[0] < 0.5 * losses[1], losses
    for event in growth.events:
        assert event.params_after <= budget
        assert all(count > 0 for count in event.newborn.values())
        if event.status == "applied":
            assert event.measured_change <= 0
    assert np.isfinite(history.history["loss"]).all()
    kinds = {entry["morphism"] for event in growth.events for entry in event.applied}
    assert "prune" in kinds
