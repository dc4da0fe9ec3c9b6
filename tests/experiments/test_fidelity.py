"""The fidelity experiment: its truth against `measure_change`, its readings against others."""

import json
import re

import keras
import numpy as np
import pytest
from absl import flags

import tfgrow
from experiments import datasets, expanded, fidelity, measures, models


@pytest.fixture(scope="module")
def digits():
    return datasets.load("digits", max_train=400)


@pytest.fixture(scope="module")
def network(digits):
    """A small growable network with BatchNormalization, trained for an epoch."""
    keras.utils.set_random_seed(0)
    model = models.build("mlp", digits.input_shape, 10, widths=(4, 3), batch_norm=True)
    model.compile("adam", "sparse_categorical_crossentropy")
    model.fit(digits.as_dataset("train", 32), epochs=1, shuffle=False, verbose=0)
    return tfgrow.convert(model)


@pytest.fixture(scope="module")
def learned(network, digits):
    found = tfgrow.candidates(network, ("split", "add"), new_units=2)
    estimator = tfgrow.GaussNewtonEstimator(network)
    return estimator.learn(found, (digits.x_train, digits.y_train), steps=2)


def test_true_changes_are_those_of_measure_change(network, learned, digits):
    """Both kinds of both sites, so that a network takes over the weights of another kind's."""
    by_kind = {(candidate.site.name, candidate.morphism): candidate for candidate in learned}
    learned = list(by_kind.values())
    assert len(learned) == 4
    data = digits.x_val, digits.y_val
    before = network.get_weights()
    calls = []
    changes = expanded.true_changes(network, learned, data, lambda *at: calls.append(at))
    slow = [tfgrow.measure_change(network, [candidate], data) for candidate in learned]
    np.testing.assert_allclose(changes, slow, atol=2e-6)
    assert np.std(slow) > 1e-3, "the candidates must differ for this to tell anything"
    assert calls == [(number + 1, len(learned)) for number in range(len(learned))]
    for value, old in zip(network.get_weights(), before, strict=True):
        np.testing.assert_array_equal(value, old)


def test_true_changes_of_heads(digits):
    keras.utils.set_random_seed(0)
    model = models.build("vit", digits.input_shape, 10, widths=(2, 2))
    model.compile("adam", "sparse_categorical_crossentropy")
    model.fit(digits.as_dataset("train", 32), epochs=1, shuffle=False, verbose=0)
    model = tfgrow.convert(model)
    found = tfgrow.candidates(model, ("heads", "add_heads", "prune_heads"), new_units=1)
    estimator = tfgrow.GaussNewtonEstimator(model)
    learned = estimator.learn(found, (digits.x_train, digits.y_train), steps=1, settle=2)
    data = digits.x_val, digits.y_val
    changes = expanded.true_changes(model, learned, data)
    slow = [tfgrow.measure_change(model, [candidate], data) for candidate in learned]
    np.testing.assert_allclose(changes, slow, atol=2e-6)
    assert np.std(slow) > 1e-3, "the candidates must differ for this to tell anything"


def test_true_changes_of_branches_that_only_differ_in_their_source():
    inputs = keras.Input((4,))
    x = inputs
    for number in range(3):
        x = keras.layers.Dense(4, "tanh", name=f"hidden{number}")(x)
    outputs = keras.layers.Dense(2, "softmax", name="out")(x)
    model = tfgrow.convert(keras.Model(inputs, outputs))
    model.compile("adam", "sparse_categorical_crossentropy")
    rng = np.random.default_rng(0)
    data = rng.standard_normal((16, 4)).astype("f"), rng.integers(0, 2, 16)
    found = [
        c.replace(theta={"last": rng.standard_normal((4, 4)).astype("f")})
        for c in tfgrow.candidates(model, "skip")
    ]
    sites = [candidate.site.name for candidate in found]
    assert len(set(sites)) < len(sites)
    slow = [tfgrow.measure_change(model, [candidate], data) for candidate in found]
    assert np.std(slow) > 1e-3
    np.testing.assert_allclose(expanded.true_changes(model, found, data), slow, atol=2e-6)


def test_expand_applies_to_an_uncompiled_copy(network, learned):
    grown = expanded.expand(network, [learned[0], learned[-1]])
    assert not grown.compiled
    widths = {site.name: site.units for site in tfgrow.find_sites(grown) if not site.blocked}
    assert widths == {"dense1": 5, "dense2": 4}
    assert network.count_params() < grown.count_params()


def test_loss_is_the_one_keras_reports(network, digits):
    ours = expanded.Loss(network, (digits.x_val, digits.y_val))()
    assert ours == pytest.approx(network.evaluate(digits.x_val, digits.y_val, verbose=0), rel=1e-5)


def test_samples_to_learn_and_to_judge_on_are_disjoint():
    x = np.arange(10)
    (learn, labels), (judge, _) = fidelity.disjoint(x, x, samples=4, seed=1)
    assert sorted([*learn, *judge]) == list(range(10))
    assert len(judge) == 4
    np.testing.assert_array_equal(learn, labels)
    (learn, _), (judge, _) = fidelity.disjoint(x, x, samples=100, seed=1)
    assert (len(learn), len(judge)) == (5, 5)


def test_goals():
    assert fidelity.Goal(0.99, at_least=True).met(0.99)
    assert not fidelity.Goal(0.99, at_least=True).met(0.9899)
    assert not fidelity.Goal(0.99, at_least=True).met(float("nan"))
    assert fidelity.Goal(0.04, at_least=False).met(0.01)
    assert str(fidelity.Goal(1e-4, at_least=False)) == "<= 0.0001"
    rows = fidelity.table({"split exact, Pearson": 0.5, "split exact, Spearman": 1.0, "other": 2.0})
    assert [row[1:] for row in rows] == [
        (">= 0.99", 0.5, "not met"), (">= 0.99", 1.0, "met"), ("", 2.0, "")
    ]  # fmt: skip


def test_readings_by_hand():
    result = {
        "splits": {"estimated": {"exact": [1.0, 2.0], "sampled": [2.0, 1.0]}, "true": [1.0, 2.0]},
        "adds": {"estimated": {"exact": [-1.0, -3.0]}, "true": [-2.0, -3.0]},
        "sets": {
            "split": {
                "size": 3, "true": -0.5, "estimated": -0.4, "estimated by forward mode": -0.42
            },
            "add": {"size": 0, "reason": "nothing pays"},
        },
    }  # fmt: skip
    found = fidelity.readings(result)
    assert found["split exact, Pearson"] == pytest.approx(1)
    assert found["split sampled, Spearman"] == pytest.approx(-1)
    assert found["add exact, median relative error"] == pytest.approx(0.25)
    assert found["set of split, relative error"] == pytest.approx(0.2)
    assert found["forward against reverse mode, relative difference"] == pytest.approx(0.05)
    assert "set of add, relative error" not in found


def parse(module, *arguments):
    """The values of a binary's flags, as its main would see them."""
    values = flags.FlagValues()
    module.define_flags(values)
    values(["program", *arguments])
    return values


def test_an_earlier_run_is_not_overwritten(tmp_path):
    (tmp_path / "fidelity.json").write_text("{}")
    with pytest.raises(ValueError, match="holds an earlier run"):
        fidelity.prepare(parse(fidelity, f"--output_dir={tmp_path}"))
    fidelity.prepare(parse(fidelity, f"--output_dir={tmp_path}", "--overwrite"))


def test_run_on_a_tiny_network(tmp_path):
    """One test, for the run takes seconds: every channel read, and all of it written."""
    seed = tmp_path / "seed.keras"
    options = parse(
        fidelity,
        "--nets=mlp", "--widths=4,3", "--epochs=2", "--samples=256", "--steps=3", "--new_units=1",
        f"--output_dir={tmp_path}", f"--model_file={seed}",
    )  # fmt: skip
    result = fidelity.run(options, fidelity.prepare(options))["mlp"]

    splits, adds = result["splits"], result["adds"]
    assert splits["sites"] == ["dense1"] * 4 + ["dense2"] * 3
    assert splits["units"] == [0, 1, 2, 3, 0, 1, 2]
    assert adds["sites"] == ["dense1", "dense2"]
    assert set(splits["estimated"]) == {"exact", "sampled", "empirical"}

    readings = result["readings"]
    assert set(fidelity.GOALS) <= set(readings)
    expected = measures.pearson(splits["estimated"]["exact"], splits["true"])
    assert readings["split exact, Pearson"] == expected
    # Looser than the goals, but a wrong sign, factor or set of samples breaks them.
    assert readings["split exact, Pearson"] > 0.9
    assert readings["forward against reverse mode, relative difference"] < 1e-4
    assert max(adds["true"] + adds["estimated"]["exact"]) < 0

    saved = json.loads((tmp_path / "fidelity.json").read_text())
    assert saved["nets"]["mlp"] == result
    assert (saved["samples"], saved["dataset"]) == (256, "digits")
    for part in ("splits", "adds"):
        assert (tmp_path / f"mlp_{part}.png").read_bytes()[:4] == b"\x89PNG"
    assert keras.models.load_model(seed).get_layer("dense1").units == 4


def test_one_morphism_alone(tmp_path, capsys):
    options = parse(
        fidelity,
        "--morphism=prune", "--nets=mlp", "--widths=6,5", "--epochs=3", "--samples=256",
        f"--output_dir={tmp_path}",
    )  # fmt: skip
    result = fidelity.run(options, fidelity.prepare(options))["mlp"]
    assert set(result) == {"prune", "samples", "readings"}
    assert result["prune"]["sites"] == ["dense1"] * 6 + ["dense2"] * 5
    assert set(result["prune"]["estimated"]) == {"exact", "sampled", "checked"}
    assert result["readings"]["prune exact, Pearson"] > 0.9  # a wrong sign or factor breaks it
    assert result["readings"]["prune checked, Pearson"] > 0.9
    out = capsys.readouterr().out
    for way in ("exact", "checked"):
        assert re.search(rf"prune {way}, median relative error +<= 0.1 ", out), out
    assert (tmp_path / "mlp_prune.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--nets=vgg,alexnet"], "nets=.*expected some of vgg"),
        (["--nets=vgg,mlp", "--model_file=seed.keras"], "--model_file holds one network"),
        (["--samples=0"], "samples"),
    ],
)
def test_bad_flags(arguments, message):
    with pytest.raises(flags.IllegalFlagValueError, match=message):
        parse(fidelity, *arguments)
