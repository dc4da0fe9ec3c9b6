"""Seed models: stock layers, stated sizes, seeded weights, the settings that were asked for."""

import keras
import numpy as np
import pytest

import tfgrow
from experiments import models

SHAPES = [(8, 8, 1), (28, 28, 1), (32, 32, 3)]


def kinds(model):
    return [type(layer).__name__ for layer in model.layers]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", models.variants())
def test_every_variant_gives_probabilities(name, shape):
    model = models.build(name, shape, 7)
    x = np.random.default_rng(0).integers(0, 256, (3, *shape)).astype(np.uint8)
    y = model.predict_on_batch(x)
    assert y.shape == (3, 7)
    np.testing.assert_allclose(y.sum(-1), 1, atol=1e-5)
    assert y.std() > 1e-4, "a seed network must tell images apart"
    assert model.inputs[0].name == "image"
    assert not model.compiled
    assert all(type(layer).__module__.startswith("keras.") for layer in model.layers)


@pytest.mark.parametrize("name", models.variants())
def test_weights_follow_the_seed(name):
    first, again, other = (models.build(name, (8, 8, 1), 10, seed=seed) for seed in (4, 4, 5))
    for a, b in zip(first.get_weights(), again.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)
    kernels = [v for v in first.variables if v.name == "kernel"]
    others = [v for v in other.variables if v.name == "kernel"]
    for a, b in zip(kernels, others, strict=True):
        assert not np.allclose(a, b)
    # No two layers start alike either: equal kernels of equal shape would be a seeding fault.
    flat = [np.ravel(v)[:8] for v in kernels]
    assert len({row.tobytes() for row in flat}) == len(flat)


def test_vgg_sizes():
    assert models.build("vgg", (32, 32, 3), 10).count_params() == 4966
    wide = models.build("vgg", (32, 32, 3), 10, widths=(20, 20, 18, 18, 24, 24))
    assert wide.count_params() == 20_114
    assert [wide.get_layer(f"conv{i}").filters for i in range(1, 7)] == [20, 20, 18, 18, 24, 24]


@pytest.mark.parametrize(("shape", "last_map"), list(zip(SHAPES, [4, 3, 4], strict=True)))
def test_vgg_keeps_at_least_three_positions(shape, last_map):
    model = models.build("vgg", shape, 10)
    assert model.get_layer("gap").input.shape[1:] == (last_map, last_map, 16)


def test_resnet_widths_are_inside_the_blocks():
    model = models.build("resnet", (32, 32, 3), 10, widths=(3, 5, 7, 9))
    assert [model.get_layer(f"block{i}_conv1").filters for i in range(1, 5)] == [3, 5, 7, 9]
    assert [model.get_layer(f"block{i}_conv2").filters for i in range(1, 5)] == [8, 8, 12, 16]
    assert model.get_layer("block4_act2").output.shape == (None, 8, 8, 16)
    assert kinds(model).count("Add") == 4
    small = models.build("resnet", (8, 8, 1), 10)
    assert small.get_layer("gap").input.shape == (None, 4, 4, 16)


def test_vit_widths_are_heads_and_feed_forward_units():
    model = models.build("vit", (32, 32, 3), 10, widths=(3, 10, 2, 6))
    assert [model.get_layer(f"attention{i}").num_heads for i in (1, 2)] == [3, 2]
    assert [model.get_layer(f"feed_forward{i}").units for i in (1, 2)] == [10, 6]
    assert model.get_layer("tokens").output.shape == (None, 64, 32)
    assert models.build("vit", (8, 8, 1), 10).get_layer("tokens").output.shape == (None, 16, 32)
    with pytest.raises(ValueError, match=r"two widths per block.*Found: \(3, 10, 2\)"):
        models.build("vit", (8, 8, 1), 10, widths=(3, 10, 2))


def test_vit_sees_where_a_patch_lies():
    model = models.build("vit", (8, 8, 1), 10)
    x = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 1))
    moved = np.roll(x, 2, axis=1)  # the same patches, each in another place
    assert np.abs(model(x) - model(moved)).max() > 1e-2


def test_heads_and_feed_forward_units_of_a_vit_grow():
    model = tfgrow.convert(models.build("vit", (8, 8, 1), 10))
    sites = {site.name: site.units for site in tfgrow.find_sites(model) if site.resizable}
    assert sites == {"attention1": 4, "feed_forward1": 16, "attention2": 4, "feed_forward2": 16}


def test_variants_differ_as_they_say():
    built = {name: models.build(name, (8, 8, 1), 10) for name in models.variants()}
    assert "BatchNormalization" in kinds(built["vgg"])
    assert "BatchNormalization" not in kinds(built["vgg_no_bn"])
    assert built["vgg_no_bn"].get_layer("conv1").use_bias
    assert not built["vgg"].get_layer("conv1").use_bias
    assert built["vgg_gelu"].get_layer("act3").activation is keras.activations.gelu
    assert built["vgg"].get_layer("act3").activation is keras.activations.relu
    assert kinds(built["vgg_flatten"])[-4:] == ["Flatten", "Dense", "Activation", "Dense"]
    assert kinds(built["mlp"]).count("Dense") == 3
    assert "Conv2D" not in kinds(built["mlp"])


def test_settings_override_the_variant():
    model = models.build(
        "mlp", (8, 8, 1), 3, widths=(5, 6, 7), batch_norm=True, activation="gelu", softmax=False
    )
    assert [layer.units for layer in model.layers if hasattr(layer, "units")] == [5, 6, 7, 3]
    assert kinds(model).count("BatchNormalization") == 3
    assert model.layers[-1].name == "logits"
    assert model.layers[-1].activation is keras.activations.linear


def test_augmentation_acts_in_training_only():
    model = models.build("vgg", (8, 8, 3), 4, augment=True)
    x = np.random.default_rng(0).integers(0, 256, (16, 8, 8, 3)).astype(np.float32)
    images = keras.Model(model.input, model.get_layer("shift").output)
    np.testing.assert_allclose(images(x, training=False), x / 255, atol=1e-6)
    assert np.abs(images(x, training=True) - x / 255).max() > 0.1
    shifted = images(x, training=True).numpy() * 255
    assert np.all(np.isclose(shifted, np.round(shifted), atol=1e-3)), "pixels are mixed"
    grey = models.build("vgg", (8, 8, 1), 4, augment=True)
    assert "RandomFlip" in kinds(model)
    assert "RandomFlip" not in kinds(grey)


def test_probabilities_stay_float32_under_mixed_precision():
    keras.config.set_dtype_policy("mixed_float16")
    try:
        model = models.build("vgg", (8, 8, 1), 10)
    finally:
        keras.config.set_dtype_policy("float32")
    assert model.get_layer("conv1").compute_dtype == "float16"
    assert model.output.dtype == "float32"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "vgg19"}, "Unknown model 'vgg19'; expected one of vgg, vgg_uneven"),
        ({"widths": ()}, "needs positive widths"),
        ({"widths": (4, 0)}, r"needs positive widths, found \(4, 0\)"),
        ({"input_shape": (8, 8)}, "Expected input_shape"),
        ({"num_classes": 1}, "num_classes must be at least 2"),
        ({"head": "max"}, "Unknown head 'max'"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        models.build(**{"name": "vgg", "input_shape": (8, 8, 1), "num_classes": 10, **arguments})
