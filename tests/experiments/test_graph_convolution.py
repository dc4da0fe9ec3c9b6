"""The layer of the examples: its interface, its estimates, and the whole run at a small scale."""

import json
import pathlib
import re

import keras
import networkx as nx
import numpy as np
import pytest
import tensorflow as tf
from absl import flags

import tfgrow
from experiments import expanded, graph_convolution
from tfgrow.morphisms.registry import MORPHISMS

EXAMPLES = ("graph_convolution", "text_classifier")
ROOT = pathlib.Path(__file__).parents[2]
ADJACENCY = nx.to_numpy_array(nx.karate_club_graph(), weight=None)


@pytest.fixture(scope="module")
def network():
    """A small network trained for a few steps, and rumours it has not seen."""
    keras.utils.set_random_seed(0)
    model = graph_convolution.build(ADJACENCY, [3, 4])
    model.compile(keras.optimizers.Adam(0.01), "sparse_categorical_crossentropy")
    model.fit(*graph_convolution.rumours(ADJACENCY, 1500, seed=0), epochs=4, verbose=0)
    return model


def test_rumours_start_somewhere_and_go_along_friendships():
    knows, source = graph_convolution.rumours(ADJACENCY, 300, seed=1, days=1)
    assert knows.shape == (300, 34, 1)
    assert set(np.unique(source)) == set(range(34))
    for who, start in zip(knows[..., 0] > 0, source, strict=True):
        assert who[start]
        friends = np.flatnonzero(ADJACENCY[start])
        assert set(np.flatnonzero(who)) <= {start, *friends}
    # On the first day, each friend of the one who starts hears it with the chance given.
    heard = (knows[..., 0].sum(1) - 1).sum() / ADJACENCY[source].sum()
    assert heard == pytest.approx(0.3, abs=0.04)


def test_unfold_and_kernel_make_linear():
    layer = graph_convolution.GraphConv(5, graph_convolution.normalised(ADJACENCY), "tanh")
    x = np.random.default_rng(0).standard_normal((2, 34, 3)).astype("float32")
    outputs = layer(x)
    response = np.einsum("ncpt,tco->npo", layer.unfold(x), layer.kernel[None])
    np.testing.assert_allclose(np.tanh(response), outputs, atol=1e-5)
    # A sum over each member's friends, spelled out.
    degree = ADJACENCY.sum(1) + 1
    friends = [*np.flatnonzero(ADJACENCY[4]), 4]
    total = sum(x[:, other] / np.sqrt(degree[4] * degree[other]) for other in friends)
    np.testing.assert_allclose(np.tanh(total @ layer.kernel), outputs[:, 4], atol=1e-5)


def test_the_layer_can_be_written_out():
    layer = graph_convolution.GraphConv(2, np.eye(3), "gelu", name="mine")
    written = json.loads(json.dumps(keras.saving.serialize_keras_object(layer)))
    again = keras.saving.deserialize_keras_object(written)
    assert type(again) is type(layer)
    assert again.get_config() == layer.get_config()


def test_sites_and_widening(network):
    sites = {site.name: site for site in tfgrow.find_sites(network)}
    assert [name for name, site in sites.items() if site.blocked is None] == [
        "graph_conv1",
        "graph_conv2",
    ]
    grown = tfgrow.convert(keras.models.clone_model(network))
    grown.set_weights(network.get_weights())
    x = graph_convolution.rumours(ADJACENCY, 20, seed=2)[0]
    before = grown(x)
    tfgrow.widen(grown, "graph_conv1", 2)
    assert grown.get_layer("graph_conv1").kernel.shape == (1, 5)
    assert grown.get_layer("graph_conv2").kernel.shape == (5, 4)
    np.testing.assert_allclose(grown(x), before, atol=1e-6)


@pytest.mark.slow
def test_estimates_are_what_really_happens():
    """Edits of the second convolution at their full length; all edits as steps become short.

    Long additions to the first one leave the quadratic's reach (docs/examples.md): what their
    estimates miss must vanish with the step, or the layer would be described wrongly.
    """
    keras.utils.set_random_seed(0)
    model = graph_convolution.build(ADJACENCY, [3, 4])
    model.compile(keras.optimizers.Adam(0.01), "sparse_categorical_crossentropy")
    train, learn, judge = (graph_convolution.rumours(ADJACENCY, 1500, seed=s) for s in range(3))
    model.fit(*train, epochs=4, verbose=0)
    estimator = tfgrow.GaussNewtonEstimator(model, curvature="exact", seed=0)
    found = tfgrow.candidates(model, ("split", "add"), new_units=3)
    learned = estimator.learn(found, learn, steps=6)
    missed = []
    for scale in (1.0, 0.25, 0.0625):
        scaled = [MORPHISMS[one.morphism].scaled(one, scale) for one in learned]
        estimated = estimator.score(scaled, judge)
        measured = expanded.true_changes(model, scaled, judge)
        missed.append(np.abs(estimated - measured).sum() / np.abs(measured).sum())
        second = [one.site.name == "graph_conv2" for one in learned]
        assert np.abs(measured[second]).max() > 1e-4, "the candidates must do something"
        np.testing.assert_allclose(estimated[second], measured[second], rtol=0.05, atol=1e-5)
    assert missed[0] > missed[1] > missed[2]
    assert missed[2] < 0.1
    assert np.corrcoef(estimated, measured)[0, 1] > 0.999


@pytest.mark.slow
def test_a_small_run(tmp_path):
    values = flags.FlagValues()
    graph_convolution.define_flags(values)
    values(["program", f"--output_dir={tmp_path}", "--epochs=4", "--every=2", "--rumours=1000"])
    seed, grown = graph_convolution.run(values)
    run = tmp_path / "karate-club"
    assert {path.name for path in run.iterdir()} == {
        "1", "config.json", "journal.json", "model.keras"
    }  # fmt: skip
    events = tfgrow.Journal.load(run / "journal.json")
    assert [event.status for event in events] == ["applied"]
    assert events[0].measured_change < 0
    assert seed.model.count_params() < grown.model.count_params() == events[0].params_after

    x, y = graph_convolution.rumours(ADJACENCY, 4000, seed=2)
    scores = grown.model.predict(x, verbose=0)
    assert np.mean(scores.argmax(-1) == y) == pytest.approx(grown.accuracy)
    loaded = keras.models.load_model(run / "model.keras")
    np.testing.assert_allclose(loaded.predict(x, verbose=0), scores, atol=1e-6)
    served = tf.saved_model.load(str(run / "1"))
    np.testing.assert_allclose(served.serve(x), scores, atol=1e-5)
    # What was loaded is as growable as before.
    tfgrow.widen(loaded, "graph_conv2", 1)
    np.testing.assert_allclose(loaded.predict(x, verbose=0), scores, atol=1e-6)


def test_the_docs_show_the_code_as_it_is():
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs/examples.md").read_text(), re.DOTALL)
    sources = [(ROOT / f"experiments/{name}.py").read_text() for name in EXAMPLES]
    assert len(blocks) >= len(EXAMPLES)
    for block in blocks:
        assert any(block in source for source in sources), block
    assert len(blocks[0].splitlines()) <= 45
