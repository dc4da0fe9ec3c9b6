"""What may be spent, and what gains are compared by."""

import math

import pytest

from tfgrow.oracle.limits import Limits


@pytest.mark.parametrize(
    ("fields", "unit"),
    [
        ({}, "params"),
        ({"flops": 1}, "flops"),
        ({"flops": 1, "params": 1}, "params"),
        ({"flops": 1, "params": 1, "prices": (0.0, 1.0)}, "flops"),
        ({"flops": 1, "params": 1, "prices": (1.0, 2.0)}, "params"),
    ],
)
def test_what_the_least_gain_is_per(fields, unit):
    assert Limits(**fields).unit == unit


@pytest.mark.parametrize(
    "fields",
    [
        {"params": -1},
        {"flops": 1.5},
        {"prices": (0.0, 0.0)},
        {"prices": (1.0, -1.0)},
        {"prices": (1.0, math.nan)},
        {"edits": True},
        {"round_to": 0},
        {"min_gain_per_param": -1.0},
        {"min_gain_per_param": math.nan},
        {"min_gain_per_param": "1"},
    ],
)
def test_limits_refuse(fields):
    with pytest.raises(ValueError, match=f"{next(iter(fields))} must be"):
        Limits(**fields)


@pytest.mark.parametrize("power", [-0.1, 1.1, "half", math.nan])
def test_a_cost_exponent_out_of_range_is_refused(power):
    with pytest.raises(ValueError, match="cost_exponent must be a number from 0 to 1"):
        Limits(cost_exponent=power)
