"""A growth event that is cut off, by an error, an interrupt or a kill, has never been."""

import json
import signal

import keras
import numpy as np
import pytest

import tfgrow
import tfgrow.callbacks
import tfgrow.journal
import tfgrow.surgery.optimizer
from tests.integration.fitting import (
    Blind,
    arrays,
    assert_same_bits,
    compiled,
    fit,
    in_another_process,
    mlp,
    quick_oracle,
    state,
)
from tests.surgery.hand_made import summary
from tfgrow.callbacks import Growth


def files_in(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def known(oracle):
    """What it knows, as text: the state itself refers to the oracle's own lists."""
    return json.dumps(oracle.get_state(), sort_keys=True)


class Spoilsport(keras.callbacks.Callback):
    """Fails when it is told of growth, which is after the model has grown."""

    spoils = False

    def on_model_grown(self, changes):
        if self.spoils:
            raise RuntimeError("no growth, please")


def fail(error):
    def raising(*args, **kwargs):
        raise error

    return raising


def fail_at(call, function, error):
    """The function, but raising at its n-th call."""
    calls = []

    def counted(*args, **kwargs):
        calls.append(1)
        if len(calls) == call:
            raise error
        return function(*args, **kwargs)

    return counted


def in_learn(patch):
    patch.setattr(tfgrow.estimator, "check_loss", fail(KeyboardInterrupt()))
    # the check before the fit is not to be cut off
    patch.setattr(tfgrow.GaussNewtonEstimator, "loss", lambda self, batches: 0.0)
    return KeyboardInterrupt


def in_scoring(patch):
    patch.setattr(tfgrow.GaussNewtonEstimator, "interaction", fail(KeyboardInterrupt()))
    return KeyboardInterrupt


def in_surgery(patch):
    patch.setattr(tfgrow.surgery.optimizer, "grow_optimizer", fail(KeyboardInterrupt()))
    return KeyboardInterrupt


def in_guard(patch):
    loss = fail_at(2, tfgrow.callbacks.real_loss, KeyboardInterrupt())
    patch.setattr(tfgrow.callbacks, "real_loss", loss)
    return KeyboardInterrupt


def in_a_neighbour(patch):
    patch.setattr(Spoilsport, "spoils", True)
    return RuntimeError


def while_recording(patch):
    patch.setattr(Blind, "end_trial", fail(KeyboardInterrupt()))
    return KeyboardInterrupt


def on_a_full_disk(patch):
    patch.setattr(tfgrow.journal.Journal, "save", fail(OSError("no space left on device")))
    return OSError


def check_cut_off(oracle, folder, patch, spoil):
    """One event, then one that is cut off, and is made up for in the next fit."""
    model = compiled(mlp())
    growth = Growth(
        oracle, arrays(), every=1, tolerance=100.0, journal=str(folder / "journal.json")
    )
    callbacks = [growth, Spoilsport()]
    fit(model, callbacks, epochs=2)  # what is due after it happens before the next first batch
    before = state(model), summary(model), files_in(folder), growth.events, known(oracle)
    assert len(growth.events) == 1
    with patch.context() as spoiled:
        error = spoil(spoiled)
        with pytest.raises(error):
            fit(model, callbacks, epochs=1)
    assert_same_bits(state(model), before[0])
    assert summary(model) == before[1]
    assert files_in(folder) == before[2]
    assert growth.events == before[3]
    assert known(oracle) == before[4]
    history = fit(model, callbacks, epochs=1).history
    assert [event.status for event in growth.events] == ["applied"] * 2
    assert model.get_layer("hidden").units == growth.events[-1].widths["hidden"][1]
    assert [trial.status for trial in oracle.trials.values()] == ["COMPLETED"] * 2
    assert np.isfinite(history["loss"]).all()


@pytest.mark.parametrize(
    "spoil", [in_surgery, in_guard, in_a_neighbour, while_recording, on_a_full_disk]
)
def test_cut_off(tmp_path, monkeypatch, spoil):
    check_cut_off(Blind(seed=0, directory=tmp_path), tmp_path, monkeypatch, spoil)


@pytest.mark.parametrize("spoil", [in_learn, in_scoring])
def test_cut_off_while_estimating(tmp_path, monkeypatch, spoil):
    check_cut_off(quick_oracle(directory=tmp_path), tmp_path, monkeypatch, spoil)


def test_files_of_others_in_the_projects_folder_are_left_alone(tmp_path, monkeypatch):
    """A checkpoint beside the oracle's files, binary and changing, is not for it to read."""
    oracle = Blind(seed=0, directory=tmp_path, project_name="run")
    model = compiled(mlp())
    growth = Growth(oracle, arrays(), every=1, tolerance=100.0, verbose=0)
    save = keras.callbacks.ModelCheckpoint(tmp_path / "run" / "model.keras")
    fit(model, [growth, save], epochs=3)
    assert [event.status for event in growth.events] == ["applied"] * 2
    written = (tmp_path / "run" / "model.keras").read_bytes()
    (tmp_path / "run" / "notes.bin").write_bytes(b"\x8d\xff")
    with monkeypatch.context() as spoiled:
        in_guard(spoiled)
        with pytest.raises(KeyboardInterrupt):
            fit(model, [growth], epochs=1)
    assert (tmp_path / "run" / "model.keras").read_bytes() == written
    assert (tmp_path / "run" / "notes.bin").read_bytes() == b"\x8d\xff"


KILLED = """
import os, signal, sys
import keras, numpy as np
import tfgrow.callbacks
from tests.integration.fitting import Blind, arrays, compiled, fit, mlp

folder = sys.argv[1]
real_loss, calls = tfgrow.callbacks.real_loss, []

def kill_after_the_second_edit(model, *rest):
    calls.append(model.count_params())
    if len(calls) == 4:
        assert calls == [27, 35, 35, 43], calls
        os.kill(os.getpid(), signal.SIGKILL)
    return real_loss(model, *rest)

tfgrow.callbacks.real_loss = kill_after_the_second_edit
growth = tfgrow.callbacks.Growth(
    Blind(seed=0, directory=folder), arrays(), every=1, tolerance=100.0,
    journal=folder + "/journal.json")
save = keras.callbacks.ModelCheckpoint(folder + "/model.keras")
out = keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: np.save(
    folder + "/outputs.npy", save.model(arrays()[0], training=False)))
fit(compiled(mlp()), [save, out, growth], epochs=5)
"""


@pytest.mark.slow
def test_killed_in_the_middle_of_an_event(tmp_path):
    """Files on disk load, and are the state before it."""
    run = in_another_process(KILLED, str(tmp_path))
    assert run.returncode == -signal.SIGKILL, run.stderr
    model = keras.models.load_model(tmp_path / "model.keras")
    assert model.get_layer("hidden").units == 4
    assert int(model.optimizer.iterations.numpy()) == 12
    outputs = np.load(tmp_path / "outputs.npy")
    np.testing.assert_array_equal(model(arrays()[0], training=False), outputs)
    journal = tfgrow.Journal.load(tmp_path / "journal.json")
    assert [event.widths for event in journal] == [{"hidden": (3, 4)}]
    oracle = Blind(seed=0, directory=tmp_path)
    assert [trial.status for trial in oracle.trials.values()] == ["COMPLETED", "INVALID"]
    assert oracle.widths == {"hidden": 4}
    growth = Growth(oracle, arrays(), every=1, tolerance=100.0)
    history = fit(model, [growth], epochs=4, initial_epoch=2).history
    assert history["tfgrow_params"] == [35, 43]
