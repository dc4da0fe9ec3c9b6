r"""A transformer that grows: it guesses which word is missing from a sentence.

    python -m experiments.text_classifier
    python -m experiments.text_classifier --heads=2 --max_params=12000

The sentences are those of Python's own reference (`pydoc_data.topics`, what `help()` shows), which
ships with Python. One word of eight ("the", "of", "if"...) is taken out; the network sees up to
four words on either side. The folder <output_dir>/<run>/ gets a SavedModel (1/), the network as a
plain Keras file (model.keras), its words in order (vocabulary.txt) and the journal of the growth
(journal.json).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pydoc_data.topics import topics
from typing import Any

import keras
import numpy as np
from absl import app, flags
from keras import layers, ops

from experiments import example

MISSING = ("the", "a", "of", "to", "is", "in", "and", "for")
REACH = 4
LENGTH = 2 * REACH + 1


def transformer(
    vocabulary: int, width: int, feed_forward: int, heads: int, key_dim: int, blocks: int
) -> keras.Model:
    """Stock layers only: word and position embeddings, pre-norm blocks, a mean, a Dense layer."""
    words = keras.Input((LENGTH,), dtype="int32", name="words")
    positions = ops.cumsum(ops.ones_like(words), axis=1) - 1
    x = layers.Add()(
        [
            layers.Embedding(vocabulary, width, name="words_embedded")(words),
            layers.Embedding(LENGTH, width, name="positions_embedded")(positions),
        ]
    )
    for number in range(1, blocks + 1):
        normed = layers.LayerNormalization(name=f"attention_norm{number}")(x)
        attention = layers.MultiHeadAttention(heads, key_dim, name=f"attention{number}")
        x = layers.Add()([x, attention(normed, normed)])
        normed = layers.LayerNormalization(name=f"feed_forward_norm{number}")(x)
        # The heads grow, and these units; `back` reads more of them, and its own width stays.
        hidden = layers.Dense(feed_forward, "gelu", name=f"feed_forward{number}")(normed)
        x = layers.Add()([x, layers.Dense(width, name=f"back{number}")(hidden)])
    x = layers.GlobalAveragePooling1D()(layers.LayerNormalization(name="norm")(x))
    missing = layers.Dense(len(MISSING), "softmax", name="missing")(x)
    return keras.Model(words, missing, name="missing_word")


def sentences() -> list[str]:
    """Those of Python's reference that have six words or more, in lower case, each once."""
    found = (part for text in topics.values() for part in re.split(r"[.:;]\s|\n\s*\n", text))
    words = (re.findall(r"[a-z_]+", sentence.lower()) for sentence in found)
    return sorted({" ".join(sentence) for sentence in words if len(sentence) >= 6})


def gaps(sentence: str) -> Iterator[tuple[str, int]]:
    """Each place where one of `MISSING` stood: the words around it, and which one it was."""
    words = ["-"] * REACH + sentence.split() + ["-"] * REACH
    for at, word in enumerate(words):
        if word in MISSING:
            around = [*words[at - REACH : at], "?", *words[at + 1 : at + REACH + 1]]
            yield " ".join(around), MISSING.index(word)


def load(vocabulary: int, seed: int) -> tuple[example.Data, list[str]]:
    """Word numbers `[N, LENGTH]` and missing words `[N]` by split, and the words by number.

    Sentences are shared out whole, so that no split sees what another asks for.
    """
    every = np.random.default_rng(seed).permutation(sentences())
    tenth = len(every) // 10
    cut = {"test": every[: 2 * tenth], "validation": every[2 * tenth : 3 * tenth]}
    cut["train"] = every[3 * tenth :]
    texts = {split: [gap for one in part for gap in gaps(one)] for split, part in cut.items()}
    number = layers.TextVectorization(
        vocabulary, standardize=None, output_sequence_length=LENGTH, name="number"
    )
    number.adapt([around for around, _ in texts["train"]])
    data = {
        split: (
            ops.convert_to_numpy(number([around for around, _ in part])).astype("int32"),
            np.array([word for _, word in part]),
        )
        for split, part in texts.items()
    }
    return data, number.get_vocabulary()


SIZES = {
    "width": (16, "Channels of the residual stream, which stay."),
    "feed_forward": (2, "Units of the feed-forward layer at the start."),
    "heads": (1, "Attention heads at the start."),
    "key_dim": (4, "Channels per head."),
    "blocks": (1, "Transformer blocks."),
}


def define_flags(values: flags.FlagValues = flags.FLAGS) -> None:
    """Defines the settings of this binary."""
    example.define_flags(
        values,
        run="missing-word",
        max_params=10_000,
        growth_per_step=0.5,
        epochs=12,
        every=2,
        learning_rate=5e-3,
        morphisms=["split", "add", "heads", "add_heads"],
    )
    flags.DEFINE_integer(
        "vocabulary", 400, "Words that are told apart.", lower_bound=10, flag_values=values
    )
    for name, (size, text) in SIZES.items():
        flags.DEFINE_integer(name, size, text, lower_bound=1, flag_values=values)


def run(values: flags.FlagValues) -> tuple[example.Fitted, example.Fitted]:
    """Trains the network without growing it, then growing."""
    data, words = load(values.vocabulary, values.seed)
    sizes: dict[str, Any] = {name: values[name].value for name in SIZES}
    texts = {"vocabulary.txt": "\n".join(words)}
    return example.run(values, lambda: transformer(len(words), **sizes), data, texts)


if __name__ == "__main__":
    define_flags()
    app.run(example.main_of("experiments.text_classifier", run))
