"""How the data of a growth step are shared out, and put together again."""

import numpy as np
import tensorflow as tf

from tfgrow.oracle.data import GrowthData, larger_batches, split_data


def batches(*sizes, features=2):
    numbers = iter(range(1000))
    found = []
    for size in sizes:
        x = np.array([[next(numbers)] * features for _ in range(size)], "float32")
        found.append((tf.constant(x), tf.constant(x[:, 0]), tf.ones(size)))
    return found


def test_small_batches_become_large_enough_and_nothing_is_lost():
    found = larger_batches(batches(3, 3, 3, 3, 2), least=5)
    assert [len(x) for x, _, _ in found] == [6, 8]
    np.testing.assert_array_equal(np.concatenate([y for _, y, _ in found]), np.arange(14))
    assert [len(x) for x, _, _ in larger_batches(batches(2, 1), least=5)] == [3]
    large = batches(5, 6)
    assert all(a is b for a, b in zip(larger_batches(large, least=5), large, strict=True))


def test_samples_of_other_shapes_stay_apart():
    some = [*batches(2, 2), *batches(2, features=3), *batches(2)]
    assert [tuple(x.shape) for x, _, _ in larger_batches(some, least=9)] == [(4, 2), (2, 3), (2, 2)]


def test_enough_is_held_out_to_see_which_units_are_alive():
    x = np.zeros((80, 2), "float32")
    parts = split_data((x, x[:, 0]), 16, 16, 48)
    assert sum(len(batch[0]) for batch in parts.few_held_out) == len(parts.held_out) == 48
    assert len(GrowthData([], [], batches(64, 64, 64)).few_held_out) == 2
