"""Layers that channels can't grow through: each says which it is, why, and what one can do."""

import keras
import pytest
from keras import layers

import tfgrow
from tfgrow.layers.unsupported import _REASONS, unsupported

FOLLOWERS = {
    "LayerNormalization": (layers.LayerNormalization, "use BatchNormalization"),
    "RMSNormalization": (layers.RMSNormalization, "use BatchNormalization"),
    "UnitNormalization": (layers.UnitNormalization, "use BatchNormalization"),
    "GroupNormalization": (lambda **k: layers.GroupNormalization(2, **k), "in 2 groups"),
    "LSTM": (lambda **k: layers.LSTM(2, **k), "which is recurrent"),
    "GRU": (lambda **k: layers.GRU(2, **k), "which is recurrent"),
    "SimpleRNN": (lambda **k: layers.SimpleRNN(2, **k), "which is recurrent"),
    "RNN": (lambda **k: layers.RNN(layers.GRUCell(2), **k), "which is recurrent"),
    "Bidirectional": (lambda **k: layers.Bidirectional(layers.GRU(2), **k), "is recurrent"),
    "SpectralNormalization": (
        lambda **k: layers.SpectralNormalization(layers.Dense(2), **k),
        "call the inner layer by itself",
    ),
    "TimeDistributed": (
        lambda **k: layers.TimeDistributed(layers.LayerNormalization(), **k),
        "without TimeDistributed",
    ),
    "Masking": (layers.Masking, "hands on a mask"),
    "Softmax": (layers.Softmax, "use an elementwise activation"),
    "Normalization": (layers.Normalization, "use BatchNormalization"),
    "Lambda": (lambda **k: layers.Lambda(lambda x: x, **k), "layer of your own"),
}


@pytest.mark.parametrize("name", FOLLOWERS)
def test_a_path_that_meets_one_says_so(name):
    make, advice = FOLLOWERS[name]
    inputs = keras.Input((4, 3))
    x = make(name="x")(layers.Dense(4, name="a")(inputs))
    model = tfgrow.convert(keras.Model(inputs, layers.Dense(2, name="out")(x)))
    reason = {site.name: site.blocked for site in tfgrow.find_sites(model)}["a"]
    assert "'x'" in reason
    assert advice in reason
    with pytest.raises(ValueError, match="'x'"):
        tfgrow.widen(model, "a", 1)


def test_attention_blocks_as_reader_and_as_maker_of_channels():
    inputs = keras.Input((4, 3))
    x = layers.Dense(4, name="a")(inputs)
    x = layers.MultiHeadAttention(2, 3, name="attention")(x, x)
    x = layers.Dense(4, activation="relu", name="inside")(x)
    model = tfgrow.convert(keras.Model(inputs, layers.Dense(2, name="out")(x)))
    sites = {site.name: site.blocked for site in tfgrow.find_sites(model)}
    assert "'attention' (MultiHeadAttention), an attention layer, which reads all" in sites["a"]
    assert "heads" in sites["attention"]
    assert sites["inside"] is None


def test_recurrent_layers_as_sites_of_their_own():
    inputs = keras.Input((4, 3))
    x = layers.GRU(3, return_sequences=True, name="gru")(inputs)
    x = layers.ConvLSTM1D(2, 1, name="convlstm")(layers.Reshape((2, 2, 3))(x))
    model = tfgrow.convert(keras.Model(inputs, layers.Dense(2, name="out")(layers.Flatten()(x))))
    sites = {site.name: site.blocked for site in tfgrow.find_sites(model)}
    assert "layer 'gru' (GRU), which is recurrent" in sites["gru"]
    assert "layer 'convlstm' (ConvLSTM1D), which is recurrent" in sites["convlstm"]


def test_a_dense_layer_between_lets_the_one_before_it_grow():
    """The advice of the reasons."""
    inputs = keras.Input((4, 3))
    x = layers.Dense(4, activation="relu", name="a")(inputs)
    x = layers.Dense(4, name="between")(x)
    x = layers.LayerNormalization(name="x")(x)
    model = tfgrow.convert(keras.Model(inputs, layers.Dense(2, name="out")(x)))
    sites = {site.name: site.blocked for site in tfgrow.find_sites(model)}
    assert sites["a"] is None
    assert sites["between"]


def test_every_reason_goes_on_from_the_layer():
    assert len(_REASONS) > 15
    for kind, reason in _REASONS.items():
        assert reason.startswith(("which ", "whose ", "of which ", "a nested model")), kind
        assert not reason.endswith("."), kind


def test_subclasses_are_meant_and_users_can_add_reasons():
    class Mine(layers.LayerNormalization):
        pass

    class Whiten(layers.Layer):
        def call(self, inputs):
            return inputs

    assert unsupported(Mine()) == unsupported(layers.LayerNormalization())
    assert unsupported(Whiten()) is None
    tfgrow.layers.register_blocked(Whiten, "which decorrelates channels: leave them as many")
    inputs = keras.Input((3,))
    x = Whiten(name="whiten")(layers.Dense(4, name="a")(inputs))
    model = tfgrow.convert(keras.Model(inputs, layers.Dense(2)(x)))
    assert "'whiten' (Whiten), which decorrelates" in tfgrow.find_sites(model)[0].blocked


def test_embeddings_and_einsums_that_can_not_grow():
    ids = keras.Input((4,), dtype="int32")
    x = layers.Embedding(5, 3, mask_zero=True, name="masked")(ids)
    x = layers.EinsumDense("abc,cde->abde", (4, 2, 3), name="heads")(x)
    x = layers.EinsumDense("abde,def->abf", (4, 3), name="merge")(x)
    x = layers.EinsumDense("abc,dc->abd", (4, 3), name="turned")(x)
    x = layers.EinsumDense("abc,cd->abd", (4, 3), bias_axes="bd", name="positions")(x)
    model = tfgrow.convert(keras.Model(ids, layers.Dense(2, name="out")(x)))
    sites = {site.name: site.blocked for site in tfgrow.find_sites(model)}
    assert "mask_zero=False" in sites["masked"]
    assert "'abc,cde->abde'" in sites["heads"]
    assert "'abde,def->abf'" in sites["merge"]
    assert "'abc,dc->abd'" in sites["turned"]
    assert "bias_axes='d'" in sites["positions"]


def test_channels_read_as_ids_block():
    inputs = keras.Input((3,))
    x = layers.Dense(4, activation="relu", name="a")(inputs)
    x = layers.Flatten()(layers.Embedding(5, 2, name="embedding")(x))
    model = tfgrow.convert(keras.Model(inputs, layers.Dense(2, name="out")(x)))
    assert "'embedding' (Embedding) has no axis of input" in tfgrow.find_sites(model)[0].blocked
