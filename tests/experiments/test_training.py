"""Networks of final shapes, with fresh weights."""

import numpy as np
import pytest

import tfgrow
from experiments import datasets, models, training

WIDER = {"conv1": 5, "conv2": 3, "conv3": 9, "conv4": 8}
"""Than 4, 4, 8, 8, but for what was pruned."""


@pytest.fixture(scope="module")
def data():
    return datasets.load("digits", max_train=100)


@pytest.mark.parametrize("augment", [False, True])
def test_a_final_shape_begins_as_a_network_that_is_built_so_wide(data, augment):
    found = training.final_shape("vgg", data, [4, 4, 8, 8], WIDER, seed=3, augment=augment)
    built = models.build("vgg", data.input_shape, 10, [*WIDER.values()], seed=3, augment=augment)
    assert training.open_widths(found) == WIDER
    for mine, theirs in zip(found.get_weights(), built.get_weights(), strict=True):
        np.testing.assert_array_equal(mine, theirs)


def test_residual_streams_have_their_final_widths_too(data):
    grown = training.seed_network("resnet", data, [2, 2, 2], seed=0)
    for site, units in (("stem_conv", 3), ("block2_shortcut", 1), ("block1_conv1", 2)):
        tfgrow.widen(grown, site, units)
    widths = training.open_widths(grown)
    found = training.final_shape(
        "resnet", data, [2, 2, 2], widths, seed=0, params=grown.count_params()
    )
    assert training.open_widths(found) == widths
    again = training.final_shape("resnet", data, [2, 2, 2], widths, seed=0)
    for mine, theirs in zip(found.get_weights(), again.get_weights(), strict=True):
        np.testing.assert_array_equal(mine, theirs)
    new = found.get_layer("block1_conv2").kernel.numpy()
    assert np.abs(new).min() > 0, "new units of a grown network start with zeros, a fresh one's not"


@pytest.mark.parametrize(
    ("widths", "params", "message"),
    [
        ({**WIDER, "conv3": 0}, None, "can't have"),
        ({"conv1": 5}, None, "can't have"),
        (WIDER, 7, "the grown network 7: not only its widths have grown"),
    ],
)
def test_what_widths_do_not_tell_is_refused(data, widths, params, message):
    with pytest.raises(ValueError, match=message):
        training.final_shape("vgg", data, [4, 4, 8, 8], widths, seed=0, params=params)
