"""Reshape and Permute: where the channels stay traceable, and what follows the width."""

import keras
import numpy as np
import pytest
from keras import layers

import tfgrow
from tests.cases import by_name, inputs_of


def build(middle, shape=(4, 4, 2), tail=None):
    """convert(conv 'a' of 6 filters -> `middle` -> dense 'out')."""
    inputs = keras.Input(shape)
    x = middle(layers.Conv2D(6, 1, activation="relu", name="a")(inputs))
    out = (tail or layers.Dense(2, name="out"))(x)
    return tfgrow.convert(keras.Model(inputs, out))


@pytest.mark.parametrize(
    ("target", "grown", "blocks"),
    [
        ((16, 6), (16, 7), 1),
        ((-1, 6), (-1, 7), 1),
        ((2, 8, 6), (2, 8, 7), 1),
        ((4, 24), (4, 28), 4),
        ((2, 1, 48), (2, 1, 56), 8),
        ((96,), (112,), 16),
        ((-1,), (-1,), 16),
        ((4, -1), (4, -1), 4),
    ],
)
def test_the_target_follows_the_width(target, grown, blocks):
    model = build(layers.Reshape(target, name="reshape"))
    (site,) = [site for site in tfgrow.find_sites(model) if site.name == "a"]
    assert site.leaves[0].channels.blocks == blocks
    x = inputs_of(model, 3)
    before = np.asarray(model(x))
    tfgrow.widen(model, "a", 1)
    reshape = model.get_layer("reshape")
    assert reshape.target_shape == grown
    assert reshape.get_config()["target_shape"] == grown
    np.testing.assert_allclose(model(x), before, atol=1e-5)
    plain = tfgrow.strip(model)
    assert plain.get_layer("reshape").target_shape == grown
    np.testing.assert_allclose(plain(x), before, atol=1e-5)


@pytest.mark.parametrize("target", [(16, 2, 3), (4, 8, 3), (32, 3), (-1, 4)])
def test_targets_that_take_channels_apart_block(target):
    model = build(layers.Reshape(target, name="reshape"))
    reason = tfgrow.find_sites(model)[0].blocked
    assert "'reshape' (Reshape) makes" in reason
    assert "off the last axis" in reason


def test_reshape_of_images_of_any_size():
    model = build(layers.Reshape((-1, 6), name="reshape"), shape=(None, None, 2))
    assert tfgrow.find_sites(model)[0].blocked is None
    x = np.random.default_rng(0).standard_normal((2, 3, 5, 2)).astype("float32")
    before = np.asarray(model(x))
    data = x, np.ones((2, 15, 2), "float32")
    learned = tfgrow.GaussNewtonEstimator(model, loss="mse").learn(
        tfgrow.candidates(model, new_units=1), data, steps=1
    )
    assert all(np.isfinite(candidate.theta["kernel"]).all() for candidate in learned)
    tfgrow.widen(model, "a", 1)
    np.testing.assert_allclose(model(x), before, atol=1e-5)
    unknown = build(
        layers.Reshape((-1,), name="reshape"),
        shape=(None, None, 2),
        tail=layers.Activation("relu"),
    )
    assert "static shape" in tfgrow.find_sites(unknown)[0].blocked


def test_a_shared_reshape_blocks_where_it_must_follow():
    def model_with(target):
        inputs, shared = keras.Input((4, 4, 2)), layers.Reshape(target, name="shared")
        one = shared(layers.Conv2D(3, 1, name="a")(inputs))
        two = shared(layers.Conv2D(3, 1, name="b")(inputs))
        both = layers.Add()([layers.Dense(2, name="c")(one), layers.Dense(2, name="d")(two)])
        return tfgrow.convert(keras.Model(inputs, both))

    sites = {site.name: site.blocked for site in tfgrow.find_sites(model_with((16, 3)))}
    assert "'shared' is shared" in sites["a"]
    assert "'shared' is shared" in sites["b"]


def test_a_failed_edit_gives_the_target_back():
    model = build(layers.Reshape((16, 6), name="reshape"))
    bad = tfgrow.candidates(model, "split", sites=["a"])[0]
    bad = bad.replace(theta={**bad.theta, "kernel": np.zeros(5, "float32")})
    with pytest.raises(ValueError, match="shape"):
        tfgrow.apply(model, [bad])
    assert model.get_layer("reshape").target_shape == (16, 6)


def test_permute_must_leave_the_last_axis():
    fine = build(layers.Permute((2, 1, 3), name="permute"))
    assert tfgrow.find_sites(fine)[0].blocked is None
    moved = build(layers.Permute((3, 1, 2), name="permute"))
    assert "'permute' (Permute) has dims=(3, 1, 2)" in tfgrow.find_sites(moved)[0].blocked


def test_files_keep_the_grown_target(tmp_path):
    model = by_name("reshaped").model()
    tfgrow.widen(model, "conv1", 2)
    tfgrow.widen(model, "conv3", 1)
    model.save(tmp_path / "grown.keras")
    loaded = keras.models.load_model(tmp_path / "grown.keras")
    x = inputs_of(model, 3)
    np.testing.assert_array_equal(loaded(x), model(x))
    assert loaded.get_layer("to_image").target_shape == (2, 2, 4)
