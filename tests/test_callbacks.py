"""Growth by itself: what it takes, what it says, what it keeps from one fit to the next."""

import copy
import dataclasses
import gc
import json
import re
import warnings
import weakref

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfgrow
from tests.integration.fitting import (
    Blind,
    arrays,
    assert_same_bits,
    blind_growth,
    compiled,
    fit,
    logits_loss,
    mlp,
    quick_oracle,
    state,
)
from tfgrow.callbacks import Growth, event_line
from tfgrow.liveness import alive_share
from tfgrow.types import GrowthEvent


def test_a_growing_fit():
    """What the events, the history and the model say agrees; and nothing is ever compiled."""
    model = compiled(mlp())
    growth = Growth(quick_oracle(max_params=50), data=arrays(), every=1, tolerance=1.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(keras.Model, "compile", None)
        history = fit(model, [growth], epochs=3).history
    assert [event.status for event in growth.events] == ["applied", "applied"]
    for number, event in enumerate(growth.events, start=1):
        units_before, units_after = event.widths["hidden"]
        assert (event.epoch, event.newborn) == (number, {"hidden": units_after - units_before})
        assert (event.params_before, event.params_after) == (
            8 * units_before + 3,
            8 * units_after + 3,
        )
        assert event.flops_after == 14 * units_after
        assert event.loss_before > 0
        assert event.measured_change <= 1.0
        assert {"learn", "score", "select", "commit"} <= set(event.seconds)
        assert sum(len(edit["units"]) for edit in event.applied) == units_after - units_before
        assert history["tfgrow_params"][number] == event.params_after
        assert history["tfgrow_estimated_change"][number] == event.estimated_change
        assert history["tfgrow_measured_change"][number] == event.measured_change
        assert 0 <= event.newborn_alive <= 1
    assert history["tfgrow_estimated_change"][0] == history["tfgrow_measured_change"][0] == 0
    assert model.get_layer("hidden").units == growth.events[-1].widths["hidden"][1]
    assert model.count_params() == history["tfgrow_params"][-1] <= 50


def test_several_events_at_a_time():
    """They follow each other at once, each on the network that the one before left."""
    model = compiled(mlp())
    growth = blind_growth(morphism="add", every=1, rounds=3)
    history = fit(model, [growth], epochs=2).history
    widths = [event.widths["hidden"] for event in growth.events]
    units = model.get_layer("hidden").units
    assert widths == [(units - 3 + n, units - 2 + n) for n in range(3)]
    assert [event.epoch for event in growth.events] == [1, 1, 1]
    assert history["tfgrow_events"] == [0, 3]
    assert history["tfgrow_measured_change"][1] == pytest.approx(
        sum(event.measured_change for event in growth.events)
    )
    (share,) = {event.newborn_alive for event in growth.events}
    assert share is not None
    assert 0 <= share <= 1


@pytest.mark.parametrize("ended", ["rejected", "finished"])
def test_no_further_event_where_one_brings_nothing(ended):
    model = compiled(mlp())
    options = {"tolerance": -100.0} if ended == "rejected" else {"oracle": {"max_trials": 2}}
    growth = blind_growth(every=1, rounds=5, **options)
    fit(model, [growth], epochs=2)
    if ended == "rejected":
        assert [event.status for event in growth.events] == ["rejected"]
    else:
        assert [event.status for event in growth.events].count("applied") == 2


@pytest.mark.parametrize("rounds", [0, -1, 1.5, None, True])
def test_rounds_are_a_whole_number(rounds):
    with pytest.raises(ValueError, match="rounds must be a whole number >= 1"):
        blind_growth(rounds=rounds)


def test_the_second_moments_of_newborn_units_are_alive():
    model = compiled(mlp())
    growth = blind_growth(morphism="add", every=1)
    fit(model, [growth], epochs=1)
    slots = {}

    class Look(keras.callbacks.Callback):
        def on_train_batch_begin(self, batch, logs=None):
            velocities = self.model.optimizer._velocities
            slots.setdefault("kernel", velocities[0].numpy())
            slots.setdefault("outgoing", velocities[2].numpy())

    fit(model, [growth, Look()], epochs=1)
    assert slots["kernel"].shape == (4, 4)
    assert (slots["kernel"][:, -1] > 0).all()
    np.testing.assert_allclose(slots["kernel"][:, -1], slots["kernel"][:, :-1].mean(1), rtol=1e-5)
    np.testing.assert_allclose(slots["outgoing"][-1], slots["outgoing"][:-1].mean(0), rtol=1e-5)
    assert growth.events[0].newborn_alive == 1.0


def test_a_dead_newborn_is_seen():
    """Units that a ReLU never lets through are not alive; the others of the event are."""
    model = compiled(mlp(), keras.optimizers.SGD(0.0))
    tfgrow.widen(model, "hidden", 2)
    hidden = model.get_layer("hidden")
    hidden.kernel.assign(hidden.kernel.numpy() * np.array([1, 1, 1, 1, 0.0]))
    assert alive_share(model, {"hidden": 2}, [arrays()]) == 0.5
    assert alive_share(model, {"hidden": 1}, [arrays()]) == 0.0
    assert alive_share(model, {}, [arrays()]) == 1.0


def test_a_rejected_event_does_not_touch_training():
    """Not one bit of the weights, the optimizer or the random state differs."""

    def dropout_net():
        keras.utils.set_random_seed(3)
        layers = [
            keras.Input((4,)),
            keras.layers.Dense(3, "relu"),
            keras.layers.Dropout(0.5, seed=1),
            keras.layers.Dense(3),
        ]
        return compiled(tfgrow.convert(keras.Sequential(layers)))

    plain, guarded, growth = dropout_net(), dropout_net(), blind_growth(tolerance=-100.0)
    for model, callbacks in ((plain, []), (guarded, [growth])):
        keras.utils.set_random_seed(5)
        fit(model, callbacks, shuffle=True)
    assert [event.status for event in growth.events] == ["rejected"] * 2
    assert all("rose at every scale" in event.reason for event in growth.events)
    assert {event.alpha for event in growth.events} == {0.0}
    assert_same_bits(state(guarded), state(plain))


# ---- from one fit to the next ------------------------------------------------------------------


def test_what_is_due_at_the_end_of_a_fit_happens_in_the_next():
    model, growth = compiled(mlp()), blind_growth(every=2)
    fit(model, [growth], epochs=2)
    assert not growth.events
    history = fit(model, [growth], epochs=4, initial_epoch=2).history
    assert [event.epoch for event in growth.events] == [2]
    assert history["tfgrow_params"] == [35, 35]
    assert history["tfgrow_events"] == [1, 1]
    other = compiled(mlp())
    fit(other, [growth], epochs=1)  # what is due is due for another model
    assert other.count_params() == 27


def test_fits_too_short_to_grow_in_are_told():
    model, growth = compiled(mlp()), blind_growth(every=3)
    with pytest.warns(UserWarning, match="ends after epoch 2, before the first growth.* epoch 3"):
        fit(model, [growth], epochs=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        fit(model, [growth], epochs=3, initial_epoch=2)
        fit(model, [growth], epochs=1)  # in which it does grow
    assert [event.epoch for event in growth.events] == [3]


def test_it_keeps_no_model_alive():
    model, growth = compiled(mlp()), blind_growth()
    fit(model, [growth], epochs=2)
    seen = weakref.ref(model)
    twin = copy.deepcopy(growth)
    growth.set_model(None)
    del model
    keras.backend.clear_session()
    gc.collect()
    assert seen() is None
    assert len(twin.events) == 1


def test_deep_copies_are_independent():
    data = tf.data.Dataset.from_tensor_slices(arrays()).batch(16)  # cannot be copied itself
    growth = blind_growth(data)
    fresh = copy.deepcopy(growth)
    fit(compiled(mlp()), [growth], epochs=2)
    after = copy.deepcopy(growth)
    assert after.model is None
    assert after.data is data
    assert after.events == growth.events
    assert fresh.events == []
    for twin in (fresh, after):
        model = compiled(mlp())
        fit(model, [twin], epochs=2)
        assert model.count_params() == 35
    assert (len(growth.events), len(fresh.events), len(after.events)) == (1, 1, 2)
    assert len(growth.oracle.trials) == 1


# ---- what it says --------------------------------------------------------------------------------


def printed(capsys, verbose, fit_verbose):
    growth = Growth(quick_oracle(), arrays(), every=1, tolerance=1.0, verbose=verbose)
    fit(compiled(mlp()), [growth], epochs=2, verbose=fit_verbose)
    return capsys.readouterr().out, growth


def test_one_line_per_event(capsys):
    out, growth = printed(capsys, verbose=2, fit_verbose=0)
    (event,) = growth.events
    assert out == event_line(event) + "\n"
    assert re.fullmatch(
        r"growth after epoch 1: hidden 3->\d \(.*\); parameters 27 -> \d+; loss estimated "
        r"[+-]\d\.\d{4}, measured [+-]\d\.\d{4}.*; \d+\.\d s\n",
        out,
    )


def test_a_progress_bar_with_the_time_left(capsys):
    out, growth = printed(capsys, verbose="auto", fit_verbose="auto")  # fit's own default
    assert "Growing" in out
    assert event_line(growth.events[0]) in out
    shown = re.sub(r"\x1b\[\d+m", "", out[out.index("Growing") : out.index("growth after")])
    # Keras writes " 2/14 <bar> 1s 133ms/batch": what is done, the time left, and per batch.
    first = re.search(r"\b1/(\d+) ━+ \d+s [^\n]*/batch", shown)
    assert first, shown
    assert re.search(rf"\b{first[1]}/{first[1]} ━+ \d+s", shown), shown


def test_silent(capsys):
    out, growth = printed(capsys, verbose="auto", fit_verbose=0)
    assert (out, len(growth.events)) == ("", 1)


def test_the_journal_is_on_disk(tmp_path):
    growth = blind_growth(journal=str(tmp_path / "journal.json"))
    fit(compiled(mlp()), [growth])
    found = json.loads((tmp_path / "journal.json").read_text())["events"]
    assert [event["widths"] for event in found] == [{"hidden": [3, 4]}, {"hidden": [4, 5]}]
    assert tfgrow.Journal.load(tmp_path / "journal.json").events == growth.events


# ---- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "error", "named"),
    [
        ({"oracle": object()}, TypeError, "growth oracle such as tfgrow.GaussNewtonOracle"),
        ({"every": 2, "when": "on_plateau"}, ValueError, "`every` or `when`"),
        ({"every": 0}, ValueError, ">= 1"),
        ({"when": "sometimes"}, ValueError, "sometimes"),
    ],
)
def test_bad_arguments(arguments, error, named):
    with pytest.raises(error, match=re.escape(named)):
        Growth(**{"oracle": Blind(), "data": arrays(), **arguments})


X, Y = arrays()
BAD_FITS = {
    "no data": ({}, None, ValueError, r"Growth\(oracle, data=train_ds\)"),
    "a generator": ({}, iter([(X, Y)]), TypeError, "Can't read a dataset"),
    "no targets": ({}, tf.data.Dataset.from_tensors(X), ValueError, "targets"),
    "empty": ({}, (X[:0], Y[:0]), ValueError, "empty"),
    "lengths": ({}, (X, Y[:5]), ValueError, "different lengths"),
    "shapes": ({}, (X[:, :3], Y), ValueError, r"input 'x' of model 'mlp' expects \(4,\)"),
    "NaN": ({}, (X * np.nan, Y), ValueError, "not finite"),
    "include": ({"include": "hiden"}, (X, Y), ValueError, r"hiden.*Found: \['hidden'\]"),
    "budget": ({"max_params": 20}, (X, Y), ValueError, "has 27 parameters, more than"),
    "flops": ({"max_flops": 20}, (X, Y), ValueError, "42 FLOPs per sample, more than"),
}


@pytest.mark.parametrize("case", list(BAD_FITS))
def test_bad_input_is_refused_before_the_first_step(case):
    options, data, error, named = BAD_FITS[case]
    model = compiled(mlp())
    before = state(model)
    growth = Growth(quick_oracle(**options), data=data, every=5)
    with pytest.raises(error, match=named):
        fit(model, [growth], epochs=1)
    assert_same_bits(state(model)[: len(model.weights)], before[: len(model.weights)])
    assert not growth.events


def test_a_model_in_which_nothing_can_grow():
    model = compiled(
        tfgrow.convert(keras.Sequential([keras.Input((4,)), keras.layers.Dense(3, name="only")]))
    )
    with pytest.raises(ValueError, match=r"Nothing in model .* can grow.*only"):
        fit(model, [blind_growth()])


def test_why_no_edit_of_that_kind_is_possible():
    model = compiled(mlp())
    growth = Growth(quick_oracle(morphisms="enlarge_kernel"), data=arrays())
    with pytest.raises(ValueError, match=r"hidden: layer 'hidden' \(Dense\) has no kernel that"):
        fit(model, [growth])


def test_an_optimizer_whose_slots_are_unknown_is_refused_before_it_is_built():
    model = mlp()
    model.compile("ftrl", logits_loss())
    before = state(model)
    with pytest.raises(ValueError, match=r"slots of optimizer 'ftrl'"):
        fit(model, [Growth(quick_oracle(), data=arrays(), every=5)], epochs=6)
    assert_same_bits(state(model), before)
    assert not model.optimizer.built
    tfgrow.widen(model, "hidden", 1)  # nothing has to be carried over yet


def test_a_loss_of_the_models_own_is_warned_of():
    class Own(keras.Model):
        def compute_loss(self, *args, **kwargs):
            return super().compute_loss(*args, **kwargs)

    stock = mlp()
    model = tfgrow.convert(Own(stock.inputs, stock.outputs))
    model.compile("sgd", logits_loss())
    with pytest.warns(UserWarning, match=r"an? Own with a compute_loss of its own"):
        fit(model, [Growth(quick_oracle(), data=arrays(), every=5)], epochs=1)


def test_units_are_alive_that_vary_over_batches_of_one_sample():
    model = mlp()
    x, y = arrays()
    whole = alive_share(model, {"hidden": 2}, [(x[:32], y[:32])])
    assert whole == 1.0
    assert (
        alive_share(model, {"hidden": 2}, [(x[i : i + 1], y[i : i + 1]) for i in range(32)]) == 1.0
    )


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"journal": 3}, TypeError, "journal must be a path"),
        ({"every": 0}, ValueError, "every must"),
    ],
)
def test_wrong_arguments_are_named(arguments, error, message):
    with pytest.raises(error, match=message):
        Growth(quick_oracle(), data=arrays(), **arguments)


def test_a_layer_that_goes_on_from_batch_to_batch_is_refused():
    inputs = keras.Input(batch_shape=(16, 5, 4))
    x = keras.layers.GRU(3, stateful=True, name="memory")(inputs)
    x = keras.layers.Dense(3)(keras.layers.Dense(3, "relu")(x))
    model = compiled(tfgrow.convert(keras.Model(inputs, x)))
    data = np.zeros((32, 5, 4)), np.zeros(32)
    with pytest.raises(ValueError, match=r"'memory' \(GRU\) is stateful.*stateful=False"):
        model.fit(*data, batch_size=16, verbose=0, callbacks=[Growth(Blind(), data=data)])


def test_a_journal_goes_on(tmp_path):
    path = tmp_path / "journal.json"
    model = compiled(mlp())
    fit(model, [blind_growth(every=1, journal=path)], epochs=3)
    earlier = tfgrow.Journal.load(path).events
    growth = blind_growth(every=1, journal=tfgrow.Journal.load(path))
    history = fit(model, [growth], epochs=2).history
    assert len(earlier) == 2
    assert growth.events[:2] == earlier
    found = [event.to_json() for event in tfgrow.Journal.load(path)]
    assert found == [event.to_json() for event in growth.events]
    assert len(found) == 3
    assert history["tfgrow_events"] == [2, 3]
    fit(model, [blind_growth(every=1, journal=path)], epochs=2)
    assert len(tfgrow.Journal.load(path).events) == 1, "a path is a new journal's"


def test_a_stock_model_is_refused():
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3), keras.layers.Dense(3)])
    model.compile("adam", logits_loss())
    with pytest.raises(ValueError, match=r"tfgrow\.convert"):
        fit(model, [blind_growth()])


def test_nan_that_comes_later_is_an_error_and_leaves_the_model():
    x, y = (part.copy() for part in arrays())
    model = compiled(mlp())
    growth = Growth(quick_oracle(), data=(x, y), every=1)
    fit(model, [growth], epochs=1)
    before = state(model)

    class Spoil(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            x[:] = np.nan

    with pytest.raises(ValueError, match="not finite"):
        fit(model, [growth, Spoil()], arrays(), epochs=1)
    assert_same_bits(state(model), before)
    assert not growth.events


def test_deep_copies_keep_files_of_their_own(tmp_path):
    """As Keras Tuner copies callbacks for every trial: nothing of one overwrites another's."""
    oracle = Blind(seed=0, directory=tmp_path, project_name="grow")
    growth = Growth(
        oracle, arrays(), every=1, tolerance=100.0, verbose=0, journal=str(tmp_path / "j.json")
    )
    copies = [copy.deepcopy(growth) for _ in range(2)]
    for number, twin in enumerate([*copies, growth], start=1):
        fit(compiled(mlp()), [twin], epochs=1 + number)
    found = {}
    for name in ("grow-1", "grow-2", "grow"):
        again = Blind(seed=0, directory=tmp_path, project_name=name)
        found[name] = [trial.status for trial in again.trials.values()]
    assert found == {
        "grow-1": ["COMPLETED"], "grow-2": ["COMPLETED"] * 2, "grow": ["COMPLETED"] * 3
    }  # fmt: skip
    assert [len(tfgrow.Journal.load(tmp_path / f"j{n}.json")) for n in ("-1", "-2", "")] == [
        1,
        2,
        3,
    ]


def test_a_backup_that_could_not_be_restored_is_warned_of(tmp_path):
    backup = keras.callbacks.BackupAndRestore(tmp_path)
    with pytest.warns(UserWarning, match=r"BackupAndRestore keeps weights.*load_model"):
        fit(compiled(mlp()), [backup, blind_growth()], epochs=1)


@pytest.mark.parametrize(
    "arguments", [{"tolerance": float("nan")}, {"tolerance": "0"}, {"verbose": "loud"}]
)
def test_settings_that_make_no_sense(arguments):
    with pytest.raises(ValueError, match=next(iter(arguments))):
        Growth(quick_oracle(), arrays(), **arguments)


@pytest.mark.parametrize(
    ("data", "options", "message"),
    [
        ((np.ones((2, 4)), np.zeros(2, int)), {}, "has 2 samples"),
        (arrays(), {"exclude": ".*"}, "leave no site"),
        (arrays(), {"max_flops": 5}, "more than max_flops=5"),
    ],
)
def test_what_could_never_grow_is_refused_before_training(data, options, message):
    model = compiled(mlp())
    before = state(model)
    with pytest.raises(ValueError, match=message):
        fit(model, [Growth(quick_oracle(**options), data)], epochs=1)
    assert_same_bits(state(model), before)


def test_the_folder_of_a_journal_is_made(tmp_path):
    path = tmp_path / "new" / "folder" / "journal.json"
    fit(compiled(mlp()), [blind_growth(journal=str(path))], epochs=2)
    assert len(tfgrow.Journal.load(path)) == 1


class TwoOptimizers(keras.Model):
    """Averages the steps of two optimizers; the second is one that `compile` knows nothing of."""

    def train_step(self, data):
        x, y = data
        with tf.GradientTape() as tape:
            loss = self.compute_loss(x, y, self(x, training=True))
        gradients = tape.gradient(loss, self.trainable_variables)
        self.optimizer.apply(gradients, self.trainable_variables)
        self.second.apply(gradients, self.trainable_variables)
        return {"loss": loss}


def test_a_second_optimizer_grows_too():
    stock = mlp()
    model = TwoOptimizers(stock.inputs, stock.outputs)
    model.second = keras.optimizers.Adam(1e-3)
    model.compile("sgd", logits_loss())
    fit(model, [blind_growth(morphism="add")], epochs=3)
    assert model.get_layer("hidden").units == 5
    assert [tuple(v.shape) for v in model.second._momentums] == [
        tuple(v.shape) for v in model.trainable_variables
    ]


def test_two_growths_of_one_fit_add_up():
    first, second = blind_growth(), blind_growth(morphism="add")
    history = fit(compiled(mlp()), [first, second], epochs=3).history
    assert history["tfgrow_events"] == [0, 2, 4]


def test_the_line_of_an_event_that_keeps_the_widths():
    grew = {"epoch": 4, "params_before": 90, "params_after": 90, "alpha": 1.0, "status": "applied"}
    event = GrowthEvent(
        **grew,
        applied=(
            {"site": "a", "morphism": "prune", "units": [0]},
            {"site": "a", "morphism": "add", "units": [1]},
            {"site": "b", "morphism": "split", "units": [2, 3]},
        ),
        widths={"b": (4, 6)},
        flops_before=1,
        flops_after=1,
        estimated_change=-0.5,
        measured_change=-0.25,
        loss_before=1.0,
        seconds={"learn": 1.0},
        newborn={"a": 1, "b": 2},
    )
    assert event_line(event) == (
        "growth after epoch 4: a (prune 1, add 1), b 4->6 (split 2); parameters 90 -> 90; loss "
        "estimated -0.5000, measured -0.2500; 1.0 s"
    )


@pytest.mark.parametrize(
    ("estimated", "warned"), [(-0.5, True), (-1e-3, False), (None, False), (0.5, False)]
)
def test_an_event_that_brings_far_less_than_was_estimated_warns(monkeypatch, estimated, warned):
    propose = Blind.propose_plan
    monkeypatch.setattr(
        Blind,
        "propose_plan",
        lambda *args, **context: dataclasses.replace(
            propose(*args, **context), estimated_change=estimated
        ),
    )
    growth = blind_growth(every=2)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(compiled(mlp()), [growth])
    (event,) = growth.events
    said = [str(w.message) for w in caught if "of the estimated" in str(w.message)]
    assert bool(said) == warned
    if estimated is not None:
        assert event.realized == pytest.approx(event.measured_change / estimated)
        assert event.to_json()["realized"] == event.realized
        assert tfgrow.GrowthEvent.from_json(event.to_json()) == event
    else:
        assert event.realized is None
    if warned:
        assert event.realized < 0.25
        assert "-0.5000" in said[0]


def test_what_was_not_applied_has_no_realized_share():
    growth = blind_growth(every=2, tolerance=-100.0)
    fit(compiled(mlp()), [growth])
    (event,) = growth.events
    assert event.status == "rejected"
    assert event.realized is None
