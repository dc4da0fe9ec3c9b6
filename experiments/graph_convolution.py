r"""A layer of your own that grows: a graph convolution finds who started a rumour in a karate club.

    python -m experiments.graph_convolution
    python -m experiments.graph_convolution --max_params=600 --epochs=30

The graph is Zachary's karate club, which ships with networkx: 34 members and their friendships. A
rumour starts with one of them and is passed on for three days; from who knows it then, the network
says who started it. The folder <output_dir>/<run>/ gets a SavedModel (1/), the network as a Keras
file (model.keras) and the journal of the growth (journal.json).
"""

from __future__ import annotations

import keras
import networkx as nx
import numpy as np
from absl import app, flags
from keras import ops

import tfgrow
from experiments import example


# docs/examples.md shows this class.
@keras.saving.register_keras_serializable(package="example")
class GraphConv(tfgrow.layers.Mixing, keras.layers.Layer):
    """The graph convolution of Kipf and Welling: a Dense layer on weighted sums over neighbours."""

    variable_axes = {
        "kernel": tfgrow.layers.Axes(fan_in=-2, fan_out=-1),
        "bias": tfgrow.layers.Axes(fan_out=-1),
    }

    def __init__(self, units, adjacency, activation=None, **kwargs):
        super().__init__(**kwargs)
        self.units = units
        self.adjacency = np.asarray(adjacency, "float32")  # [nodes, nodes], normalised
        self.activation = keras.activations.get(activation)

    def build(self, input_shape):
        self.kernel = self.add_weight(shape=(input_shape[-1], self.units), name="kernel")
        self.bias = self.add_weight(shape=(self.units,), initializer="zeros", name="bias")

    def call(self, inputs):  # [N, nodes, channels] -> [N, nodes, units]
        return self.activate(self.linear(inputs, self.kernel, self.bias))

    def linear(self, inputs, kernel, bias=None):
        outputs = ops.matmul(self.adjacency, ops.matmul(inputs, kernel))
        return outputs if bias is None else outputs + bias

    def unfold(self, inputs):  # what the kernel is multiplied with, as [N, channels, nodes, 1]
        return ops.transpose(ops.matmul(self.adjacency, inputs), (0, 2, 1))[..., None]

    def get_config(self):
        config = {"units": self.units, "adjacency": self.adjacency.tolist()}
        activation = keras.activations.serialize(self.activation)
        return {**super().get_config(), **config, "activation": activation}


def normalised(adjacency: np.ndarray) -> np.ndarray:
    """D^-1/2 (A + I) D^-1/2: all are friends of themselves, and many friends count less each."""
    linked = adjacency + np.eye(len(adjacency))
    degree = np.sqrt(linked.sum(axis=0))
    return linked / np.outer(degree, degree)


def rumours(
    adjacency: np.ndarray, count: int, seed: int, days: int = 3, chance: float = 0.3
) -> tuple[np.ndarray, np.ndarray]:
    """Who knows a rumour, float `[count, nodes, 1]`, and who started it, `[count]`.

    Args:
      adjacency: 1 between friends.
      count: how many rumours.
      seed: of chance.
      days: on each, everyone who knows it meets all friends.
      chance: that it is passed on when two friends meet.
    """
    rng = np.random.default_rng(seed)
    source = rng.integers(len(adjacency), size=count)
    knows = np.eye(len(adjacency), dtype=bool)[source]
    for _ in range(days):
        told = 1 - (1 - chance) ** (knows @ adjacency)
        knows |= rng.random(knows.shape) < told
    return knows[..., None].astype("float32"), source


def build(adjacency: np.ndarray, widths: list[int]) -> keras.Model:
    """Graph convolutions that end in a probability per member."""
    adjacency = normalised(adjacency)
    knows = keras.Input((len(adjacency), 1), name="knows")
    x = knows
    for number, units in enumerate(widths, start=1):
        x = GraphConv(units, adjacency, "gelu", name=f"graph_conv{number}")(x)
    scores = GraphConv(1, adjacency, name="scores")(x)
    scores = keras.layers.Flatten(name="flatten")(scores)
    return keras.Model(knows, keras.layers.Softmax(name="source")(scores), name="rumours")


def define_flags(values: flags.FlagValues = flags.FLAGS) -> None:
    """Defines the settings of this binary."""
    example.define_flags(
        values,
        run="karate-club",
        max_params=400,
        growth_per_step=1.0,
        epochs=24,
        every=3,
        learning_rate=0.01,
        morphisms=["split", "add"],
    )
    flags.DEFINE_integer(
        "rumours", 4000, "Rumours to learn from.", lower_bound=64, flag_values=values
    )
    flags.DEFINE_integer(
        "units", 2, "Units per layer at the start.", lower_bound=1, flag_values=values
    )


def run(values: flags.FlagValues) -> tuple[example.Fitted, example.Fitted]:
    """Trains the network without growing it, then growing."""
    adjacency = nx.to_numpy_array(nx.karate_club_graph(), weight=None)
    splits = {"train": values.rumours, "validation": 1000, "test": 4000}
    data = {
        split: rumours(adjacency, count, seed=3 * values.seed + number)
        for number, (split, count) in enumerate(splits.items())
    }
    return example.run(values, lambda: build(adjacency, [values.units] * 2), data)


if __name__ == "__main__":
    define_flags()
    app.run(example.main_of("experiments.graph_convolution", run))
