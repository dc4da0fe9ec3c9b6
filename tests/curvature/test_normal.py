"""Normal equations of outgoing weights against sums written out sample by sample."""

import numpy as np
import pytest
import tensorflow as tf

from tfgrow.curvature import normal
from tfgrow.curvature.normal import (
    DAMPINGS,
    GENEROUS,
    add_sums,
    cross_damping,
    dense_sums,
    kronecker_sums,
    quadratic,
    scale_sums,
    solve_factored,
    solve_sums,
    zero_sums,
)

UNITS, SAMPLES, COLUMNS = 2, 30, 3
SIZES = ((4, 3, 2), (1, 2, 3))  # per consumer: positions, inputs, outputs


def batch(seed=0, sizes=SIZES, samples=SAMPLES):
    """What consumers see, and the cotangents of what they compute."""
    rng = np.random.default_rng(seed)
    seen = [rng.standard_normal((samples, UNITS, p, a)).astype("float32") for p, a, _ in sizes]
    cotangents = [
        rng.standard_normal((1 + COLUMNS, samples, p, o)).astype("float32") for p, _, o in sizes
    ]
    return seen, cotangents


def tensors(arrays):
    return [tf.constant(array) for array in arrays]


def sums_of(make, *args, **kwargs):
    seen, cotangents = batch(*args, **kwargs)
    return known(make(tensors(seen), tensors(cotangents)))


def known(sums, energy=1.0, usual=1.0, loss=0.0):
    """The sums with those that say how far a solution may go; nothing holds it by default."""
    energies = tf.fill((UNITS,), energy)
    return {**sums, "energy": energies, "usual": tf.constant(usual), "loss": tf.constant(loss)}


def written_out(seen, cotangents):
    """G `[n, W]` and Q `[n, W, W]`, one sample, column and unit at a time."""
    linear, curvature = [], []
    for unit in range(UNITS):
        slopes = []  # [1 + K, N, W]
        for which in range(1 + COLUMNS):
            per_sample = []
            for i in range(len(seen[0])):
                parts = [
                    (u[i, unit].T @ c[which, i]).ravel()
                    for u, c in zip(seen, cotangents, strict=True)
                ]
                per_sample.append(np.concatenate(parts))
            slopes.append(per_sample)
        slopes = np.array(slopes, dtype="float64")
        linear.append(slopes[0].sum(axis=0))
        curvature.append(np.einsum("kia,kib->ab", slopes[1:], slopes[1:]))
    return np.array(linear), np.array(curvature)


def test_dense_sums():
    seen, cotangents = batch()
    linear, curvature = written_out(seen, cotangents)
    sums = dense_sums(tensors(seen), tensors(cotangents))
    np.testing.assert_allclose(sums["g"], linear, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(sums["q"], curvature, rtol=1e-4, atol=1e-3)


def test_sums_of_two_batches_add_up():
    one, two = batch(1), batch(2)
    both = [
        [np.concatenate(pair, axis=axis) for pair in zip(x, y, strict=True)]
        for axis, (x, y) in enumerate(zip(one, two, strict=True))
    ]
    for make in (dense_sums, kronecker_sums):
        added = add_sums(make(*map(tensors, one)), make(*map(tensors, two)))
        whole = make(*map(tensors, both))
        for name in whole:
            np.testing.assert_allclose(added[name], whole[name], rtol=1e-4, atol=1e-3)
        halved = scale_sums(whole, 0.5)
        np.testing.assert_allclose(halved["g"], 0.5 * whole["g"].numpy())


def test_no_data_has_the_same_names_and_shapes():
    weights = [(a, o) for _, a, o in SIZES]
    for make, dense in ((dense_sums, True), (kronecker_sums, False)):
        nothing, something = zero_sums(UNITS, weights, dense), sums_of(make)
        assert {k: v.shape for k, v in nothing.items()} == {
            k: v.shape for k, v in something.items()
        }
        assert not any(np.any(value) for value in nothing.values())


def test_silent_units_are_damped_as_if_they_fired():
    """A tenth of the usual energy takes no damping; a hundredth takes ten times as much."""
    sums = sums_of(dense_sums)
    np.testing.assert_array_equal(
        solve_sums(known(sums, energy=0.1), 0.3), solve_sums(known(sums, energy=1.0), 0.3)
    )
    np.testing.assert_allclose(
        solve_sums(known(sums, energy=0.01), 0.3), solve_sums(known(sums), 3.0), rtol=1e-5
    )


@pytest.mark.parametrize("make", [dense_sums, kronecker_sums])
def test_no_unit_promises_more_than_half_of_the_loss(make):
    free = sums_of(make)
    gain = -quadratic(free, solve_sums(free, 0.1))
    held = solve_sums({**free, "loss": tf.constant(float(gain.min()))}, 0.1).numpy()
    share = 0.5 * gain.min() / gain
    np.testing.assert_allclose(held, solve_sums(free, 0.1) * share[:, None], rtol=1e-4)


def test_where_the_loss_is_linear_the_step_is_bounded():
    flat = known(sums_of(dense_sums), loss=8.0)
    flat["q"] = tf.zeros_like(flat["q"])
    np.testing.assert_allclose(quadratic(flat, solve_sums(flat, 0.1)), -4.0, rtol=1e-4)


def test_kronecker_gradient_is_exact_and_its_curvature_is_for_independent_factors():
    """One position, inputs and cotangents independent: Q is the product of its factors."""
    sizes = ((1, 3, 2),)
    seen, cotangents = batch(3, sizes, samples=20_000)
    factored = known(kronecker_sums(tensors(seen), tensors(cotangents)))
    whole = known(dense_sums(tensors(seen), tensors(cotangents)))
    np.testing.assert_allclose(factored["g"], whole["g"], rtol=1e-3, atol=0.2)
    phi = np.random.default_rng(4).standard_normal((UNITS, 6)).astype("float32")
    curved = [quadratic(sums, phi) - quadratic(sums, 0 * phi) for sums in (factored, whole)]
    np.testing.assert_allclose(*curved, rtol=0.05)
    solved = [solve_sums(sums, 0.01).numpy() for sums in (factored, whole)]
    np.testing.assert_allclose(*solved, atol=0.1 * np.abs(solved[1]).max())


@pytest.mark.parametrize("make", [dense_sums, kronecker_sums])
def test_solution_minimises_the_damped_quadratic(make):
    sums = sums_of(make)
    best = solve_sums(sums, 1e-9).numpy()
    lowest = quadratic(sums, best)
    rng = np.random.default_rng(5)
    for _ in range(20):
        other = best + 0.1 * np.abs(best).max() * rng.standard_normal(best.shape)
        assert (quadratic(sums, other) > lowest).all()
    assert (lowest < 0).all()
    sizes = [np.linalg.norm(solve_sums(sums, damping), axis=1) for damping in (0.0, 0.1, 10.0)]
    assert (sizes[0] > sizes[1]).all()
    assert (sizes[1] > sizes[2]).all()


def test_quadratic_of_dense_sums():
    linear, curvature = written_out(*batch())
    phi = np.random.default_rng(6).standard_normal(linear.shape)
    expected = (linear * phi).sum(1) + 0.5 * np.einsum("na,nab,nb->n", phi, curvature, phi)
    np.testing.assert_allclose(quadratic(sums_of(dense_sums), phi), expected, rtol=1e-4)


@pytest.mark.parametrize("dense", [True, False])
def test_dead_units_solve_to_zero(dense):
    weights = [(a, o) for _, a, o in SIZES]
    sums = zero_sums(UNITS, weights, dense)
    if not dense:  # rows of data there were
        sums = {**sums, "rows/0": tf.ones(()), "rows/1": tf.ones(())}
    phi = solve_sums(sums, 0.1).numpy()
    np.testing.assert_array_equal(phi, np.zeros_like(phi))


def test_damping_is_per_unit():
    sums = sums_of(dense_sums)
    mixed = solve_sums(sums, np.array([0.1, 10.0])).numpy()
    np.testing.assert_allclose(mixed[0], solve_sums(sums, 0.1)[0], rtol=1e-6)
    np.testing.assert_allclose(mixed[1], solve_sums(sums, 10.0)[1], rtol=1e-6)


def test_crossed_halves_choose_the_damping():
    """The largest that keeps most of the best gain; halves of pure noise want the most."""
    same = sums_of(dense_sums, 1)
    gains = np.array([-quadratic(same, solve_sums(same, damping)) for damping in DAMPINGS])
    for unit, chosen in enumerate(cross_damping(same, same, solve_sums, quadratic)):
        index = DAMPINGS.index(chosen)
        assert gains[index, unit] >= GENEROUS * gains[:, unit].max()
        assert (gains[index + 1 :, unit] < GENEROUS * gains[:, unit].max()).all()
    few = {"samples": 4}
    one, two = sums_of(dense_sums, 1, **few), sums_of(dense_sums, 2, **few)
    crossed = cross_damping(one, two, solve_sums, quadratic)
    np.testing.assert_array_equal(crossed, [max(DAMPINGS)] * UNITS)
    least = cross_damping(same, same, solve_sums, quadratic, generous=1.0)
    assert (least <= cross_damping(same, same, solve_sums, quadratic)).all()


@pytest.mark.parametrize("damping", [0.3, DAMPINGS])
def test_wide_consumers_are_solved_alike_with_and_without_eigenvalues(monkeypatch, damping):
    sums = sums_of(kronecker_sums)
    several = np.asarray(damping)[:, None] if np.ndim(damping) else damping
    by_eigenvalues = solve_sums(sums, several)
    monkeypatch.setattr(normal, "WIDE", 0)
    monkeypatch.setattr(normal, "FEW_SYSTEMS", 1000)
    monkeypatch.setattr(normal, "_solve_by_eigenvalues", None)
    by_cholesky = solve_sums(sums, several)
    assert by_cholesky.shape == by_eigenvalues.shape
    np.testing.assert_allclose(by_cholesky, by_eigenvalues, rtol=1e-5, atol=1e-7)


def test_factored_damping_is_for_every_factor_and_for_many_at_once():
    """Of one consumer: (A + r mean A)^-1 G (S + r mean S)^-1, r the root of the damping."""
    sums = sums_of(kronecker_sums, sizes=SIZES[:1])
    many = solve_factored(sums, np.asarray(DAMPINGS)[:, None])
    assert many.shape[:2] == (len(DAMPINGS), UNITS)
    s = sums["s/0"].numpy().astype("float64") / float(sums["rows/0"])
    for damping, found in zip(DAMPINGS, many.numpy(), strict=True):
        np.testing.assert_array_equal(solve_factored(sums, damping), found)
        for unit in range(UNITS):
            a = sums["a/0"][unit].numpy().astype("float64")
            ridges = [m + np.sqrt(damping) * np.diag(m).mean() * np.eye(len(m)) for m in (a, s)]
            g = sums["g"][unit].numpy().reshape(len(a), len(s))
            expected = -np.linalg.inv(ridges[0]) @ g @ np.linalg.inv(ridges[1])
            np.testing.assert_allclose(found[unit], expected.ravel(), rtol=1e-4, atol=1e-6)
