"""The transformer of the examples: its data, what of it grows, and a small run."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from absl import flags

import tfgrow
from experiments import text_classifier, training

SIZES = {"width": 6, "feed_forward": 2, "heads": 1, "key_dim": 2, "blocks": 2}


def test_gaps_hide_one_word():
    found = dict(text_classifier.gaps("the list is a sequence of items in order"))
    words = {around: text_classifier.MISSING[word] for around, word in found.items()}
    assert words == {
        "- - - - ? list is a sequence": "the",
        "- - the list ? a sequence of items": "is",
        "- the list is ? sequence of items in": "a",
        "list is a sequence ? items in order -": "of",
        "a sequence of items ? order - - -": "in",
    }


def test_splits_share_no_sentence_and_every_word_is_asked_for():
    data, words = text_classifier.load(vocabulary=50, seed=0)
    assert set(data) == {"train", "validation", "test"}
    sizes = {split: len(x) for split, (x, _) in data.items()}
    assert sizes["train"] > 5_000
    assert 0.15 < sizes["test"] / sum(sizes.values()) < 0.25
    for x, y in data.values():
        assert x.shape == (len(y), text_classifier.LENGTH)
        assert x.max() < len(words) == 50
        assert set(np.unique(y)) == set(range(len(text_classifier.MISSING)))
    assert words[data["train"][0][0, text_classifier.REACH]] == "?"


def test_heads_and_feed_forward_widths_can_grow():
    model = tfgrow.convert(text_classifier.transformer(30, **SIZES))
    assert training.open_widths(model) == {
        "attention1": 1, "feed_forward1": 2, "attention2": 1, "feed_forward2": 2
    }  # fmt: skip


def test_feed_forward_widths_grow_and_nothing_changes():
    model = tfgrow.convert(text_classifier.transformer(30, **SIZES))
    words = np.random.default_rng(0).integers(0, 30, (8, text_classifier.LENGTH))
    before = model(words)
    tfgrow.widen(model, "feed_forward1", 3)
    assert model.get_layer("feed_forward1").units == 5
    np.testing.assert_allclose(model(words), before, atol=1e-6)


def test_the_order_of_words_matters():
    model = text_classifier.transformer(30, **SIZES)
    words = np.arange(text_classifier.LENGTH)[None]
    assert np.abs(model(words) - model(words[:, ::-1])).max() > 1e-4


def test_heads_are_considered_unless_told_otherwise():
    values = flags.FlagValues()
    text_classifier.define_flags(values)
    values(["program"])
    assert values.morphisms == ["split", "add", "heads", "add_heads"]


@pytest.mark.slow
def test_a_small_run(tmp_path):
    values = flags.FlagValues()
    text_classifier.define_flags(values)
    values(
        [
            "program",
            f"--output_dir={tmp_path}",
            "--epochs=2",
            "--every=1",
            "--morphisms=heads,add_heads",
        ]
    )
    seed, grown = text_classifier.run(values)
    run = tmp_path / "missing-word"
    assert {path.name for path in run.iterdir()} == {
        "1", "config.json", "journal.json", "model.keras", "vocabulary.txt"
    }  # fmt: skip
    (event,) = tfgrow.Journal.load(run / "journal.json")
    assert event.status == "applied"
    assert event.measured_change < 0
    assert {edit["morphism"] for edit in event.applied} <= {"heads", "add_heads"}
    assert event.widths == {"attention1": (1, grown.model.get_layer("attention1").num_heads)}
    assert seed.model.count_params() < grown.model.count_params() == event.params_after

    data, words = text_classifier.load(values.vocabulary, seed=0)
    assert (run / "vocabulary.txt").read_text().split("\n")[:-1] == words
    x, y = data["test"]
    assert grown.accuracy > 1.2 * np.bincount(y).max() / len(y), "better than the commonest word"
    scores = grown.model.predict(x, verbose=0)
    assert np.mean(scores.argmax(-1) == y) == pytest.approx(grown.accuracy)
    plain = keras.models.load_model(run / "model.keras")
    assert {type(layer).__module__.split(".")[0] for layer in plain.layers} == {"keras"}
    assert plain.get_layer("attention1").num_heads == grown.model.get_layer("attention1").num_heads
    np.testing.assert_allclose(plain.predict(x, verbose=0), scores, atol=1e-6)
    served = tf.saved_model.load(str(run / "1"))
    np.testing.assert_allclose(served.serve(x), scores, atol=1e-5)
