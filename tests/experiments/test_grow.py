"""The main job: a run's folder, the same again, refusals before anything is trained."""

import json
import pathlib
import signal
import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf
from absl import flags
from absl.testing import flagsaver

import tfgrow
from experiments import datasets, grow, reports, training
from tfgrow.oracle.gauss_newton import SCORES

ROOT = pathlib.Path(__file__).parents[2]
TINY = {
    "model": "mlp",
    "widths": ["3", "4"],
    "max_params": 700,
    "epochs": 3,
    "every": 1,
    "settle": 0.0,
    "batch_size": 64,
}
WRITTEN = {
    "1",
    "config.json",
    "estimates.png",
    "growth.png",
    "journal.json",
    "model.keras",
    "oracle",
    "results.json",
    "widths.json",
}


@pytest.fixture(autouse=True)
def _parsed():
    """Flags with their defaults, whatever another test of the process did with them."""
    if not flags.FLAGS.is_parsed():
        flags.FLAGS(["grow"])


@pytest.fixture(autouse=True)
def _ordinary_sums(monkeypatch):
    # The request for one order of sums cannot be taken back in a process that other tests share.
    monkeypatch.setattr(training, "make_repeatable", keras.utils.set_random_seed)


def run_tiny(directory, **changes):
    with flagsaver.flagsaver(**{**TINY, "output_dir": str(directory), **changes}):
        chosen = grow.settings()
        grow.run(grow.prepare(chosen), chosen)


def prepare(directory, **changes):
    with flagsaver.flagsaver(**{**TINY, "output_dir": str(directory), **changes}):
        return grow.prepare(grow.settings())


@pytest.mark.slow
def test_run_leaves_a_whole_folder(tmp_path, capsys):
    run_tiny(tmp_path)
    printed = capsys.readouterr().out
    run = tmp_path / "digits-mlp"
    assert {path.name for path in run.iterdir()} == WRITTEN
    assert [path.name for path in tmp_path.iterdir()] == ["digits-mlp"], "nothing beside it"

    journal = tfgrow.Journal.load(run / "journal.json")
    grew = [event for event in journal if event.status == "applied"]
    assert grew
    assert all(event.measured_change <= 0 for event in grew)
    widths = json.loads((run / "widths.json").read_text())
    assert list(widths) == ["dense1", "dense2"]
    assert sum(widths.values()) == 7 + sum(sum(event.newborn.values()) for event in grew)

    data = datasets.load("digits")
    plain = keras.models.load_model(run / "model.keras")
    assert {type(layer).__module__.split(".")[0] for layer in plain.layers} == {"keras"}
    assert plain.count_params() == grew[-1].params_after <= 700
    served = tf.saved_model.load(str(run / "1"))
    scores = served.serve(data.x_test)
    assert served.signatures["serve"].structured_input_signature[1]["image"].dtype == tf.uint8
    np.testing.assert_allclose(scores, plain.predict(data.x_test, verbose=0), atol=1e-5)

    seed, grown = json.loads((run / "results.json").read_text())["table"]
    assert grown["test_accuracy"] == pytest.approx(
        np.mean(np.argmax(scores, axis=-1) == data.y_test), abs=1e-6
    )
    assert grown["widths"] == widths
    assert (seed["widths"], seed["params"]) == ({"dense1": 3, "dense2": 4}, 261)
    assert seed["flops"] < grown["flops"]
    assert seed["growth_seconds"] == 0 < grown["growth_seconds"] < grown["seconds"]
    assert f"{100 * grown['test_accuracy']:.2f} %" in printed.split("seed, not grown")[-1]
    for name in ("growth.png", "estimates.png"):
        assert (run / name).read_bytes().startswith(b"\x89PNG")
    config = json.loads((run / "config.json").read_text())
    assert (config["max_params"], config["widths"], config["learning_rate"]) == (700, [3, 4], 5e-3)
    trials = json.loads((run / "oracle" / "oracle.json").read_text())["end_order"]
    assert len(trials) == len(grew)


def test_existing_folders_are_kept_unless_asked(tmp_path):
    run = tmp_path / "digits-mlp"
    run.mkdir()
    with pytest.raises(ValueError, match=r"exists\. Choose another --run or --output_dir"):
        prepare(tmp_path)
    with pytest.raises(ValueError, match=r"holds no config\.json, so it is not a run"):
        prepare(tmp_path, overwrite=True)
    (run / "config.json").write_text("{}")
    assert prepare(tmp_path, overwrite=True).target == run


def test_a_failed_run_changes_nothing(tmp_path):
    target = tmp_path / "run"
    with reports.run_directory(target) as directory:
        (directory / "first").touch()

    def interrupted():
        with reports.run_directory(target) as directory:
            (directory / "second").touch()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert [path.name for path in tmp_path.rglob("*")] == ["run", "first"]
    with reports.run_directory(target) as directory:
        (directory / "third").touch()
    assert [path.name for path in tmp_path.rglob("*")] == ["run", "third"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"morphisms": ["melt"]}, "Unknown morphism 'melt'"),
        ({"morphisms": []}, "No morphisms given"),
        ({"max_flops": 5}, "more than max_flops=5"),
        ({"epochs": 1}, "needs --epochs=2 or more"),
        ({"max_params": 100}, "has 261 parameters, more than max_params=100"),
        ({"include": ["conv.*"]}, r"conv\.\*"),
        ({"dataset": "cifar1O", "data_dir": "/nowhere"}, "Unknown dataset 'cifar1O'"),
    ],
)
def test_settings_that_cannot_be(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        prepare(tmp_path, **changes)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "argument",
    [
        "--widths=4,0",
        "--widths=a",
        "--model=vgg19",
        "--run=../other",
        "--epochs=0",
        "--settle=1.5",
        "--settle=nan",
        "--learning_rate=nan",
    ],
)
def test_flags_that_cannot_be(argument):
    with flagsaver.flagsaver(), pytest.raises(flags.IllegalFlagValueError):
        flags.FLAGS(["grow", argument])


def test_flags_name_what_exists():
    assert set(grow.SCORES) == set(SCORES)
    assert set(grow.OPTIMIZERS) == set(training.OPTIMIZERS)


def test_defaults_follow_the_dataset():
    with flagsaver.flagsaver(dataset="digits"):
        chosen = grow.settings()
    assert (chosen["max_params"], chosen["widths"]) == (5_000, (3, 3, 6, 6))
    with flagsaver.flagsaver(dataset="digits", model="resnet"):
        chosen = grow.settings()
    assert (chosen["max_params"], chosen["widths"]) == (20_000, None)
    with flagsaver.flagsaver(dataset="cifar10", model="resnet", epochs=7):
        chosen = grow.settings()
    assert (chosen["run"], chosen["epochs"]) == ("cifar10-resnet", 7)
    assert (chosen["max_params"], chosen["widths"]) == (40_000, None)


def test_the_last_epochs_only_train():
    until = training.Until(tfgrow.schedules.EveryNEpochs(2), last=5)
    assert [epoch for epoch in range(1, 12) if until.should_grow(epoch)] == [2, 4]


def test_estimates_without_events_draw_nothing(tmp_path):
    assert reports.draw_estimates([], tmp_path / "a.png") is None
    assert not list(tmp_path.iterdir())


def run_binary(name, *arguments):
    command = [sys.executable, "-m", f"experiments.{name}", *arguments]
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
    )


@pytest.mark.slow
def test_errors_come_as_one_line(tmp_path):
    ended = run_binary("grow", f"--output_dir={tmp_path}", "--morphisms=melt")
    assert ended.returncode == 1
    assert ended.stderr.splitlines()[-1].startswith("experiments.grow: Unknown morphism 'melt'")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_run_leaves_nothing_and_says_no_more_than_a_line(tmp_path, number):
    """As by `kill` or Ctrl-C, while it trains."""
    command = [sys.executable, "-m", "experiments.grow", "--epochs=200"]
    command.append(f"--output_dir={tmp_path}")
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    # Tests that run in the background of a shell, and what they start, ignore Ctrl-C otherwise.
    heeds = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)}
    with subprocess.Popen(command, cwd=ROOT, text=True, **pipes, **heeds) as running:
        for line in running.stdout:
            if line.startswith("epoch"):
                break
        running.send_signal(number)
        _, said = running.communicate(timeout=180)
    assert running.returncode == {signal.SIGTERM: 143, signal.SIGINT: 130}[number]
    assert "Traceback" not in said
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_equal_seeds_give_equal_runs(tmp_path):
    settings = [f"--{name}={value}" for name, value in TINY.items() if name != "widths"]
    for run in ("a", "b"):
        arguments = [f"--output_dir={tmp_path}", f"--run={run}", "--widths=3,4", "--nobaseline"]
        ended = run_binary("grow", *arguments, *settings)
        assert ended.returncode == 0, ended.stderr
    first, second = (tfgrow.Journal.load(tmp_path / run / "journal.json") for run in "ab")
    assert len(first) > 1
    timeless = [[{**e.to_json(), "seconds": None} for e in journal] for journal in (first, second)]
    assert timeless[0] == timeless[1]
    losses = [
        json.loads((tmp_path / run / "results.json").read_text())["history"]["val_loss"]
        for run in "ab"
    ]
    assert losses[0] == losses[1]


@pytest.mark.slow
def test_pays_resumes_and_compares(tmp_path):
    settings = ["--dataset=digits", "--model=mlp", "--widths=3,4", "--epochs=3", "--every=1"]
    settings += ["--seeds=1", "--max_params=500", f"--results_dir={tmp_path}", "--threads=1"]
    ended = run_binary("pays", *settings)
    assert ended.returncode == 0, ended.stderr
    cells = {path.name: path for path in tmp_path.rglob("*.json")}
    arms = ("grown", "same_epochs", "same_time")
    assert set(cells) == {f"{arm}-seed0.json" for arm in arms}
    found = {arm: json.loads(cells[f"{arm}-seed0.json"].read_text()) for arm in arms}
    assert len({cell["params"] for cell in found.values()}) == 1
    assert found["same_epochs"]["widths"] == found["grown"]["widths"]
    assert found["same_epochs"]["epochs"] == found["grown"]["epochs"] == 3
    # By the clock, to within the last validation.
    assert found["same_time"]["seconds"] >= found["grown"]["seconds"]
    assert found["same_time"]["seconds"] < found["grown"]["seconds"] + 5
    assert found["grown"]["events"]
    assert not found["same_time"]["events"]

    times = {name: path.stat().st_mtime_ns for name, path in cells.items()}
    again = run_binary("pays", *settings)
    assert again.returncode == 0, again.stderr
    assert times == {name: path.stat().st_mtime_ns for name, path in cells.items()}
    assert again.stdout.splitlines()[-3:] == ended.stdout.splitlines()[-3:]
    other = run_binary("pays", *settings, "--every=2")
    assert other.returncode == 1
    assert "made with other settings (found, wanted): {'every': (1, 2)}" in other.stderr
