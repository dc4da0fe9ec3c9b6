"""What candidates promise while a set is picked: against brute force, at fixed and free lengths."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tfgrow.oracle.quadratics import FixedLengths, FreeLengths
from tfgrow.types import Interaction, damping_of


def random_interaction(seed, count=7, samples=30):
    rng = np.random.default_rng(seed)
    columns = rng.normal(size=(samples, count)) + rng.normal(size=(samples, 1))
    return Interaction(rng.normal(size=count), columns.T @ columns / samples)


def at_free_lengths(interaction):
    return FreeLengths(interaction.linear, interaction.gram, np.zeros(len(interaction.linear)))


def least(interaction, rows):
    """The damped quadratic of some candidates at its minimum."""
    part = interaction.of(rows)
    gram = part.gram + np.diag(damping_of(interaction.gram)[rows])
    lengths = -np.linalg.solve(gram, part.linear)
    return part.linear @ lengths + 0.5 * lengths @ gram @ lengths


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_each_view_tells_what_one_more_pick_changes(seed):
    interaction = random_interaction(seed)
    fixed = FixedLengths(interaction.linear, interaction.gram)
    turnable = np.arange(7) % 2 == 0
    free = FreeLengths(interaction.linear, interaction.gram, np.where(turnable, -1.0, 0.0))
    picked = []
    for pick in np.random.default_rng(seed).permutation(7)[:4].tolist():
        picked.append(pick)
        change = interaction.change(picked) - interaction.change(picked[:-1])
        assert fixed.changes(pick) == pytest.approx(change, abs=1e-9)
        if free.slope[pick] < 0 or turnable[pick]:
            best = least(interaction, picked) - least(interaction, picked[:-1])
            assert free.changes(pick) == pytest.approx(best, abs=1e-9)
        else:
            assert free.changes(pick) == 0.0
        fixed.take(pick)
        free.take(pick)


def test_a_copy_of_what_was_picked_overshoots_at_fixed_length_and_promises_little_at_a_free_one():
    twins = Interaction(np.array([-1.0, -1.0]), np.ones((2, 2)))
    fixed, free = FixedLengths(twins.linear, twins.gram), at_free_lengths(twins)
    assert free.changes(1) == pytest.approx(-0.5 / 1.1)
    fixed.take(0)
    free.take(0)
    assert fixed.changes(1) > 0.4
    assert -0.03 < free.changes(1) <= 0.0
    np.testing.assert_allclose(free.lengths([0, 1], twins), 1 / 2.1, rtol=1e-6)


def test_a_part_is_the_same_quadratic():
    interaction = random_interaction(3)
    whole = at_free_lengths(interaction)
    whole.take(2)
    rows = np.array([5, 0, 6])
    part = whole.of(rows)
    np.testing.assert_allclose(part.changes(), whole.changes()[rows])
    whole.take(0)
    part.take(1)
    np.testing.assert_allclose(part.changes([0, 2]), whole.changes()[[5, 6]])


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_best_lengths_are_the_minimum(seed):
    interaction = random_interaction(seed)
    lengths = interaction.best_lengths(ridge=1e-9)
    change = interaction.at(lengths).change()
    rng = np.random.default_rng(seed)
    for _ in range(5):
        other = lengths + 0.1 * rng.normal(size=len(lengths))
        assert interaction.at(other).change() > change
    assert 0.0 < np.linalg.norm(interaction.best_lengths(ridge=10.0)) < np.linalg.norm(lengths)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_best_lengths_within_bounds_are_the_minimum_there(seed):
    interaction = random_interaction(seed)
    rng = np.random.default_rng(seed)
    free = interaction.best_lengths(ridge=0.0)
    most = free - 0.2 * rng.uniform(-1, 1, len(free)) ** 2
    least = most - rng.uniform(0, 1, len(free))
    lengths = interaction.best_lengths(ridge=0.0, least=least, most=most)
    assert (least <= lengths).all()
    assert (lengths <= most).all()
    slope = interaction.linear + interaction.gram @ lengths
    size = 1e-3 * np.abs(interaction.gram).sum(1)
    assert (slope[lengths > least] < size[lengths > least]).all(), "down is no better"
    assert (slope[lengths < most] > -size[lengths < most]).all(), "nor is up"


def test_candidates_that_change_nothing_get_no_length():
    nothing = Interaction(np.zeros(3), np.zeros((3, 3)))
    np.testing.assert_array_equal(nothing.best_lengths(), np.zeros(3))
    np.testing.assert_array_equal(at_free_lengths(nothing).changes(), np.zeros(3))
