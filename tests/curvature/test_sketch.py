"""A sketch stands for the matrix it is of: on average, in sums, and in what is solved with it."""

import numpy as np
import pytest
import tensorflow as tf

from tests.curvature.test_normal import DAMPINGS, SIZES, UNITS, batch, known, tensors
from tfgrow.curvature import normal
from tfgrow.curvature.normal import (
    add_sums,
    kronecker_sums,
    outputs_trace,
    quadratic,
    scale_sums,
    solve_factored,
    solve_sums,
    zero_sums,
)
from tfgrow.curvature.sketch import SKETCH, sketch


def test_it_is_the_gram_matrix_on_average():
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((50, 3)).astype("float32")
    total = np.zeros((3, 3))
    draws = 400
    for draw in range(draws):
        order = rng.permutation(50)  # of equal sums, up to rounding: seeds of their own
        scale = np.float32(1.0 + draw / draws)
        y = sketch(tf.constant(scale * rows[order])).numpy()
        assert y.shape == (SKETCH, 3)
        total += y.T @ y / scale**2
    exact = rows.T @ rows
    np.testing.assert_allclose(total / draws, exact, atol=0.02 * exact.max())


def test_equal_rows_have_equal_sketches():
    rows = tf.constant(np.random.default_rng(0).standard_normal((9, 4)).astype("float32"))
    np.testing.assert_array_equal(sketch(rows), tf.function(sketch)(rows))


def test_a_row_is_there_whole():
    """One row alone has nothing to be mixed with."""
    row = tf.constant([[1.0, -2.0, 3.0]])
    y = sketch(row).numpy()
    np.testing.assert_allclose(y.T @ y, tf.matmul(row, row, transpose_a=True))


@pytest.fixture
def sketched(monkeypatch):
    """Sums of two batches with sketches, and with the matrices that the sketches stand for."""
    monkeypatch.setattr(normal, "SKETCHED", 0)
    found = zero_sums(UNITS, [(a, o) for _, a, o in SIZES], dense=False)
    for seed in (1, 2):
        seen, cotangents = batch(seed)
        sums = known(kronecker_sums(tensors(seen), tensors(cotangents)))
        found = add_sums(scale_sums(found, 0.9), sums)
    whole = {name: value for name, value in found.items() if not name.startswith("y/")}
    for index in range(len(SIZES)):
        y = found[f"y/{index}"]
        whole[f"s/{index}"] = tf.matmul(y, y, transpose_a=True)
    return found, whole


@pytest.mark.parametrize("damping", [0.3, DAMPINGS])
def test_solutions_are_those_of_the_matrix_it_stands_for(sketched, damping):
    found, whole = sketched
    several = np.asarray(damping)[:, None] if np.ndim(damping) else damping
    by_sketch, by_matrix = solve_sums(found, several), solve_sums(whole, several)
    assert by_sketch.shape == by_matrix.shape
    np.testing.assert_allclose(by_sketch, by_matrix, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(quadratic(found, by_matrix), quadratic(whole, by_matrix), rtol=1e-5)
    for index in range(len(SIZES)):
        trace = tf.linalg.trace(whole[f"s/{index}"]) / whole[f"rows/{index}"]
        np.testing.assert_allclose(outputs_trace(found, index), trace, rtol=1e-5)


def test_factored_damping_with_a_sketch(monkeypatch):
    monkeypatch.setattr(normal, "SKETCHED", 0)
    seen, cotangents = batch(1, SIZES[:1])
    found = known(kronecker_sums(tensors(seen), tensors(cotangents)))
    y = found["y/0"]
    whole = {**found, "s/0": tf.matmul(y, y, transpose_a=True)}
    del whole["y/0"]
    several = np.asarray(DAMPINGS)[:, None]
    np.testing.assert_allclose(
        solve_factored(found, several), solve_factored(whole, several), rtol=1e-4, atol=1e-6
    )


def test_scaled_sums_stand_for_scaled_matrices(sketched):
    found, _ = sketched
    half = scale_sums(found, 0.5)
    ratio = tf.reduce_sum(half["y/0"] ** 2) / tf.reduce_sum(found["y/0"] ** 2)
    np.testing.assert_allclose(ratio, 0.5, rtol=1e-5)
