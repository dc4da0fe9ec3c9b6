"""Layers that have weights in common: they stay as they are, and nothing unties them."""

import keras
import numpy as np
import pytest

import tfgrow
from tfgrow.surgery.rebuild import apply_changes
from tfgrow.types import LayerChange

TIE = "layer 'encoder' has the weight 'encoder/kernel' in common with 'decoder'"


@keras.saving.register_keras_serializable("tests")
class Transposed(keras.layers.Layer):
    """Reads the kernel of another layer the other way round."""

    def __init__(self, source, **kwargs):
        super().__init__(**kwargs)
        self.source = source

    def call(self, x):
        return keras.ops.matmul(x, keras.ops.transpose(self.source.kernel))

    def get_config(self):
        source = keras.saving.serialize_keras_object(self.source)
        return {**super().get_config(), "source": source}

    @classmethod
    def from_config(cls, config):
        source = keras.saving.deserialize_keras_object(config.pop("source"))
        return cls(source, **config)


def autoencoder(layers):
    """Encoder 5 -> 4, middle 4 -> 3 -> 4, and a decoder that is the encoder transposed."""
    inputs = keras.Input((5,))
    encoder = layers.Dense(4, "tanh", name="encoder")
    hidden = layers.Dense(3, "tanh", name="middle")(encoder(inputs))
    hidden = layers.Dense(4, name="wide")(hidden)
    outputs = Transposed(encoder, name="decoder")(hidden)
    model = keras.Model(inputs, outputs, name="tied")
    model.compile("adam", "mse")
    return model


@pytest.mark.parametrize("copied", [tfgrow.convert, tfgrow.strip])
def test_copies_would_untie_and_are_refused(copied):
    with pytest.raises(ValueError, match=f"Model 'tied': {TIE}"):
        copied(autoencoder(keras.layers))


def test_only_what_is_not_tied_grows(tmp_path, rng):
    x = rng.normal(size=(48, 5)).astype("float32")
    model = autoencoder(tfgrow.layers)
    blocked = {site.name: site.blocked for site in tfgrow.find_sites(model)}
    assert blocked["encoder"] == TIE
    assert blocked["middle"] is None
    with pytest.raises(ValueError, match="in common with 'decoder'"):
        tfgrow.widen(model, "encoder", 1)
    growth = tfgrow.callbacks.Growth(
        tfgrow.GaussNewtonOracle("loss", seed=0), (x, x), every=1, tolerance=10.0, verbose=0
    )
    model.fit(x, x, epochs=2, verbose=0, callbacks=[growth])
    (event,) = growth.events
    assert set(event.widths) == {"middle"}
    assert model.get_layer("decoder").source is model.get_layer("encoder")
    model.save(tmp_path / "tied.keras")
    loaded = keras.models.load_model(tmp_path / "tied.keras")
    assert loaded.count_params() == model.count_params() == event.params_after
    np.testing.assert_allclose(loaded(x), model(x), atol=1e-6)


def test_a_strategy_that_needs_a_copy_says_so_when_fit_begins():
    x, model = np.ones((16, 5), "float32"), autoencoder(tfgrow.layers)
    with pytest.raises(ValueError, match=TIE):
        model.fit(x, x, verbose=0, callbacks=[tfgrow.callbacks.Growth("tiny", (x, x), every=1)])
    assert int(model.optimizer.iterations.numpy()) == 0


def test_surgery_refuses_them_before_anything_changes():
    model = autoencoder(tfgrow.layers)
    encoder = model.get_layer("encoder")
    with pytest.raises(ValueError, match=TIE):
        apply_changes(model, [LayerChange(encoder, {}, {"units": 7})])
    assert encoder.units == 4


def test_a_layer_called_twice_is_tied_to_none():
    inputs = keras.Input((4,))
    layer = keras.layers.Dense(4, name="twice")
    model = tfgrow.convert(keras.Model(inputs, layer(layer(inputs))))
    (site,) = tfgrow.find_sites(model)
    assert "is called 2 times" in site.blocked
