"""Tiny nets and data, and strategies without an estimator, to test what surrounds growth in fit."""

import os
import subprocess
import sys

import keras
import numpy as np
import tensorflow as tf

import tfgrow
from tfgrow.graph.cost import CostModel
from tfgrow.graph.nodes import trace
from tfgrow.graph.sites import sites_of
from tfgrow.oracle.base import GrowthOracle
from tfgrow.types import Plan

CLASSES = 3
SAMPLES = 96
BATCH = 16


def mlp(seed=0, units=3, **options):
    """Dense 4 -> units -> 3, which is 8 * units + 3 parameters."""
    keras.utils.set_random_seed(seed)
    layers = [
        keras.Input((4,), name="x"),
        keras.layers.Dense(units, "tanh", name="hidden", **options),
        keras.layers.Dense(CLASSES, name="out", dtype="float32"),
    ]
    return tfgrow.convert(keras.Sequential(layers, name="mlp"))


def convnet(seed=0):
    """Conv - bn - relu - conv - flatten - dense on 4x4 images."""
    keras.utils.set_random_seed(seed)
    layers = [
        keras.Input((4, 4, 1), name="x"),
        keras.layers.Conv2D(2, 3, padding="same", name="conv1"),
        keras.layers.BatchNormalization(name="bn"),
        keras.layers.ReLU(name="relu"),
        keras.layers.Conv2D(2, 3, strides=2, padding="same", activation="relu", name="conv2"),
        keras.layers.Flatten(name="flatten"),
        keras.layers.Dense(CLASSES, name="out"),
    ]
    return tfgrow.convert(keras.Sequential(layers, name="convnet"))


def logits_loss():
    return keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def compiled(model, optimizer="adam", **options):
    model.compile(optimizer, **{"loss": logits_loss(), "metrics": ["accuracy"], **options})
    return model


def arrays(model=None, samples=SAMPLES, seed=0):
    """Inputs that fit the model (the MLP by default), and labels that depend on them."""
    shape = (4,) if model is None else model.input_shape[1:]
    x = np.random.default_rng(seed).normal(size=(samples, *shape)).astype("float32")
    return x, np.abs(x.reshape(samples, -1)[:, :CLASSES]).argmax(axis=1)


def batches(model=None, seed=0):
    return tf.data.Dataset.from_tensor_slices(arrays(model, seed=seed)).batch(BATCH)


class Blind(GrowthOracle):
    """Grows without asking what it brings: one unlearned edit per site and step."""

    def __init__(self, morphism="split", **kwargs):
        self.morphism = morphism
        super().__init__(**kwargs)

    def propose_plan(self, model, data, *, epoch=0, progress=None):
        del data, epoch
        sites = [site for site in sites_of(model, trace(model)) if site.blocked is None]
        every = tfgrow.candidates(model, self.morphism, new_units=1, seed=self.next_seed())
        chosen = tuple(next(c for c in every if c.site.name == site.name) for site in sites)
        if progress is not None:
            progress(1, 1)
        return Plan(
            candidates=chosen,
            estimated_change=-0.01,
            cost=CostModel(trace(model), sites).extra({site.name: 1 for site in sites}),
            widths={site.name: (site.units, site.units + 1) for site in sites},
            seconds={},
        )


def blind_growth(data=None, every=1, tolerance=100.0, verbose=0, morphism="split", **options):
    """A `Growth` that grows every time, at no cost for estimates."""
    oracle = Blind(morphism, seed=0, **options.pop("oracle", {}))
    return tfgrow.callbacks.Growth(
        oracle,
        data=arrays() if data is None else data,
        every=None if "when" in options else every,
        tolerance=tolerance,
        verbose=verbose,
        **options,
    )


def quick_oracle(**options):
    """A `GaussNewtonOracle` that does as little as it can."""
    settings = {"learn_steps": 2, "score_batches": 2, "held_out_batches": 2, "new_units": 1}
    return tfgrow.GaussNewtonOracle(**{"seed": 0, "growth_per_step": 0.5, **settings, **options})


def fit(model, callbacks, data=None, epochs=3, **options):
    """`model.fit` on arrays, silent and unshuffled unless told otherwise."""
    x, y = arrays(model) if data is None else data
    settings = {"batch_size": BATCH, "verbose": 0, "shuffle": False, "epochs": epochs}
    return model.fit(x, y, callbacks=callbacks, **{**settings, **options})


def in_another_process(code, *arguments):
    """Runs a script that imports from here; what it wrote and how it ended."""
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env={**os.environ, "PYTHONPATH": os.getcwd()},
    )


def state(model):
    """Copies of all that trains: weights, then the optimizer's variables."""
    variables = [*model.weights, *model.optimizer.variables]
    return [np.array(variable.numpy()) for variable in variables]


def assert_same_bits(found, expected):
    assert [a.shape for a in found] == [b.shape for b in expected]
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype
        assert a.tobytes() == b.tobytes()
