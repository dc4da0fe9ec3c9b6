"""The cost experiment: what the rival learns, what the stopwatch counts, how readings are made."""

import json
import math

import keras
import numpy as np
import pytest
from absl import flags

import tfgrow
from experiments import cost, expanded, rival
from experiments._messages import in_words
from experiments.rival import RivalTimes


def parse(*arguments):
    """The values of the binary's flags, as its main would see them."""
    values = flags.FlagValues()
    cost.define_flags(values)
    values(["program", *arguments])
    return values


@pytest.fixture(scope="module")
def images():
    """Two batches of images and labels."""
    rng = np.random.default_rng(0)
    return [
        (rng.normal(size=(16, 4, 4, 2)).astype("float32"), rng.integers(0, 3, 16)) for _ in range(2)
    ]


@pytest.fixture(scope="module")
def network():
    """Convolution -> Flatten -> Dense: a channel of the first feeds several inputs of the last."""
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.Input((4, 4, 2)),
            keras.layers.Conv2D(3, 3, strides=2, activation="relu", name="conv"),
            keras.layers.UpSampling2D(2),
            keras.layers.Flatten(),
            keras.layers.Dense(3, activation="softmax", name="out"),
        ]
    )
    return tfgrow.convert(model)


def learned_by_rival(network, images, morphism):
    """The expanded network's kernels and biases before and after three steps, and its losses."""
    candidate = tfgrow.candidates(network, morphism, new_units=1)[0]
    grown = expanded.expand(network, [candidate])
    learner = rival.ThetaLearner(grown, candidate)
    before = [value.copy() for value in grown.get_weights()]
    losses = [float(np.mean(learner.losses(*images[0])))]
    for _ in range(3):
        learner.step(*images[0])
        losses.append(float(np.mean(learner.losses(*images[0]))))
    return before, grown.get_weights(), losses


def test_rival_learns_the_difference_of_a_split(network, images):
    before, after, losses = learned_by_rival(network, images, "split")
    for old, new in zip(before[:2], after[:2], strict=True):  # the convolution's kernel and bias
        moved = new - old
        assert np.abs(moved[..., 0]).max() > 1e-3
        np.testing.assert_allclose(moved[..., 0], -moved[..., -1], atol=1e-7)
        np.testing.assert_array_equal(moved[..., 1:-1], 0)
    for old, new in zip(before[2:], after[2:], strict=True):
        np.testing.assert_array_equal(new, old)
    assert losses == sorted(losses, reverse=True)


def test_rival_learns_incoming_and_outgoing_weights_of_an_added_unit(network, images):
    before, after, losses = learned_by_rival(network, images, "add")
    kernel = after[0] - before[0]
    np.testing.assert_array_equal(kernel[..., :-1], 0)
    outgoing = (after[2] - before[2]).reshape(4, 4, 3)  # positions, channels, outputs
    np.testing.assert_array_equal(outgoing[:, :3], 0)
    assert np.abs(outgoing[:, 3]).min() > 1e-3
    np.testing.assert_array_equal(after[3], before[3])
    assert losses == sorted(losses, reverse=True)


def test_rival_times_and_evaluates(network, images):
    candidate = tfgrow.candidates(network, "add", new_units=1)[0]
    times = rival.time_rival(network, candidate, images[:1], images[1:], steps=3)
    parts = (times.build, times.trace, times.learn, times.evaluate)
    assert min(parts) > 0
    assert times.seconds == pytest.approx(sum(parts))
    assert abs(times.change) > 1e-6


def test_extrapolation_weighs_each_kind_by_its_count():
    def times(seconds):
        return RivalTimes(build=seconds, trace=0.0, learn=2 * seconds, evaluate=0.5, change=0.0)

    timed = [("a", "split", times(1.0)), ("a", "split", times(3.0)), ("b", "add", times(10.0))]
    total = cost.extrapolate(timed, {("a", "split"): 8, ("b", "add"): 2})
    assert total == {
        "seconds": 8 * 6.5 + 2 * 30.5, "build": 36.0, "trace": 0.0, "learn": 72.0, "evaluate": 5.0
    }  # fmt: skip


def test_extra_seconds_of_the_first_steps():
    steps = [1.0, 1.0, 5.0, 1.0, 1.0, 1.0, 3.0]
    assert cost.extra_seconds(steps, [2, 6]) == pytest.approx(6.0)
    assert cost.extra_seconds(steps, [2, 2]) == pytest.approx(4.0), "two events before one step"
    assert cost.extra_seconds(steps, [7]) == 0, "no step came after the last event"
    assert cost.extra_seconds([], []) == 0


def test_all_parts_in_one_run(tmp_path):
    """One test, for the run takes seconds: what is read follows from what was timed."""
    options = parse(
        "--model=mlp", "--widths=2,2", "--max_train=256", "--batch_size=32", "--epochs=2",
        "--every=1", "--repeats=1", f"--output_dir={tmp_path}",
    )  # fmt: skip
    result = cost.run(options, cost.prepare(options))
    assert json.loads((tmp_path / "cost.json").read_text()) == result
    readings, details = result["readings"], result["details"]
    assert set(cost.GOALS) <= set(readings)
    assert all(np.isfinite(value) and value > 0 for value in readings.values())

    fit = details["fit"]
    assert fit["events"] == 1
    assert sum(fit["phases"].values()) < fit["growth"] < fit["wall"]
    assert readings["growth work in the time of a growing fit"] == pytest.approx(
        (fit["growth"] + fit["tracing"]) / fit["wall"]
    )

    one_round, epoch = details["round"]["rounds"][0], details["round"]["epochs"][0]
    assert readings["a round over every channel, in epochs"] == one_round["seconds"] / epoch
    assert sum(one_round["phases"].values()) <= one_round["seconds"]
    assert 0 < one_round["learning_step"] * one_round["steps"] < one_round["seconds"]
    assert details["round"]["candidates"] == details["rival"]["candidates"] == 2 * (2 + 4)
    assert len(details["rival"]["timed"]) == 4

    total = details["rival"]["seconds for all"]["seconds"]
    name = "rival over round, for the same candidates"
    assert readings[name] == total / one_round["seconds"]
    wide = details["double"]["rounds"][0]["seconds"] / one_round["seconds"]
    assert readings["doubled widths: factor of a round"] == wide


def test_stopwatch_counts_the_traces_after_growth():
    """Without the guard growth is applied for sure: the next train and test step are traced."""
    options = parse("--batch_size=16", "--model=mlp", "--widths=2,2", "--morphisms=add")
    data = cost.datasets.load("digits", max_train=128)
    model = cost.network(data, 1.0, options)
    growth = cost.Stopwatch(
        cost.make_oracle(options, learn_steps=1, score_batches=1, held_out_batches=1),
        data=data.as_dataset("train", 16), every=1, guard=False, verbose=0,
    )  # fmt: skip
    model.fit(
        data.as_dataset("train", 16), validation_data=data.as_dataset("val"), epochs=2,
        callbacks=[growth], shuffle=False, verbose=0,
    )  # fmt: skip
    assert [event.status for event in growth.events] == ["applied"]
    steps = math.ceil(len(data.x_train) / 16)
    assert growth.first_steps == {"train": [steps], "test": [len(growth.test_steps) // 2]}
    assert growth.train_steps[steps] > 3 * np.median(growth.train_steps)
    assert 0 < growth.tracing < sum(growth.train_steps) + sum(growth.test_steps)


def test_table_says_what_is_met():
    rows = cost.table(
        {
            "a round over every channel, in epochs": 0.5,
            "rival over round, for the same candidates": 99.0,
            "something else": 1.0,
        }
    )
    assert [row[1:] for row in rows] == [
        ("<= 0.5", 0.5, "met"), (">= 100", 99.0, "not met"), ("", 1.0, "")
    ]  # fmt: skip
    fit = {"wall": 10.0, "growth": 3.0, "tracing": 1.0, "phases": {"learn": 2.0}}
    assert dict(row[:2] for row in cost.phase_table(fit)) == {
        "learn": 2.0, "tracing the grown model": 1.0, "other growth work": 1.0, "whole fit": 10.0
    }  # fmt: skip


@pytest.mark.parametrize("argument", ["--parts=fit,lunch", "--model=alexnet", "--repeats=0"])
def test_bad_flags(argument):
    with pytest.raises(flags.IllegalFlagValueError, match=argument[2:].split("=")[0]):
        parse(argument)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dataset=nowhere_at_all"], "nowhere_at_all"),
        (["--morphisms=split,ad"], "Unknown morphism 'ad'"),
        (["--widths=a,b"], "--widths takes whole numbers"),
    ],
)
def test_settings_that_cannot_be_are_said_in_words(tmp_path, arguments, message):
    options = parse(*arguments, f"--output_dir={tmp_path}/new")
    said = pytest.raises(SystemExit, match=f"experiments.cost: .*{message}")
    with said, in_words("experiments.cost"):
        cost.prepare(options)
    assert not (tmp_path / "new").exists()
