r"""One long run: how good a network gets that grows to so many parameters, with augmentation.

    python -m experiments.headline --data_dir=$HOME/tensorflow_datasets
    python -m experiments.headline --data_dir=... --hours=2.5    # stops then; again to go on

The network grows to --max_params in the first --grow share of the epochs, at a constant learning
rate, which then falls to 0. After every epoch the model, its optimizer and the figures are written
to <output_dir>/<run>/; a run that was stopped or killed goes on after the last of them, but for an
epoch that a growth was to follow, which is trained again. The test images are looked at once, when
all epochs are done; the end is a SavedModel (1/), model.keras and result.json. Whenever it stops,
the figures of the run are written to <results_dir>/<run>.json, and the page --docs from them.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from absl import app, flags

from experiments._flags import are_whole
from experiments._messages import in_words, quiet_logs, stopped_cleanly
from experiments.variants import VARIANTS

os.environ.setdefault("KERAS_BACKEND", "tensorflow")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

STATE, PLAIN, RESULT = "state.json", "model.keras", "result.json"
PLACES = ("data_dir", "output_dir", "results_dir", "docs", "run", "hours", "threads")
"""Flags that a run may be continued with other values of."""

EARLIER = {"optimizer": "adamw"}
"""What runs did that are older than the flag."""

SETTINGS = (
    "dataset", "data_dir", "max_train", "model", "widths", "max_params", "max_flops", "epochs",
    "every", "grow", "rounds", "growth_per_step", "morphisms", "new_units", "curvature",
    "batch_size", "optimizer", "learning_rate", "weight_decay", "augment", "seed", "threads",
    "hours", "output_dir", "results_dir", "docs", "run",
)  # fmt: skip


def define_flags(values: flags.FlagValues = flags.FLAGS) -> None:
    """Defines this binary's flags."""
    for name, default, text in (
        ("dataset", "cifar10", "digits, or a TensorFlow Datasets name."),
        ("data_dir", None, "Where TensorFlow Datasets keeps its data."),
        ("output_dir", "saved_models", "Where the run is kept."),
        ("results_dir", "experiments/results/headline", "Where its figures are kept."),
        ("docs", "docs/headline.md", "The page to write; empty for none."),
        ("run", "headline", "Name of its folder."),
    ):
        flags.DEFINE_string(name, default, text, flag_values=values)
    for name, number, text, least in (
        ("max_train", None, "Training images used, at most.", 100),
        ("max_params", 160_000, "Most parameters.", 1),
        ("max_flops", None, "Most FLOPs per image.", 1),
        ("epochs", 120, "Epochs in all.", 2),
        ("every", 4, "Epochs from one moment of growth to the next.", 2),
        ("rounds", 4, "Events at a time, at most.", 1),
        ("new_units", 8, "New units tried per layer and event.", 1),
        ("batch_size", 128, "Images per training step.", 1),
        ("threads", 2, "Threads of TensorFlow within an operation.", 1),
        ("seed", 0, "Of everything random.", 0),
    ):
        flags.DEFINE_integer(name, number, text, least, flag_values=values)
    for name, share, text in (
        ("learning_rate", 3e-3, "While it grows; then it falls to 0."),
        ("weight_decay", 1e-4, "Decoupled; per step times the learning rate."),
        ("growth_per_step", 0.3, "Most parameters an event adds, relative to those before."),
    ):
        flags.DEFINE_float(name, share, text, 0.0, flag_values=values)
    flags.DEFINE_float("hours", None, "Stop after so many, to go on later.", 0, flag_values=values)
    flags.DEFINE_float(
        "grow", 0.5, "Share of the epochs in which it grows.", 0, 1, flag_values=values
    )
    flags.DEFINE_enum("model", "vgg", tuple(VARIANTS), "Seed network.", flag_values=values)
    flags.DEFINE_enum(
        "curvature", "sampled", ("auto", "exact", "sampled", "empirical"), "Of the estimates.",
        flag_values=values,
    )  # fmt: skip
    flags.DEFINE_enum(
        "optimizer", "adamw", ("adamw", "sgd"), "sgd: with Nesterov momentum.", flag_values=values
    )
    flags.DEFINE_bool("augment", True, "Shift (and mirror) the images.", flag_values=values)
    flags.DEFINE_list("morphisms", ["split", "add"], "Kinds of edits.", flag_values=values)
    flags.DEFINE_list("widths", None, "Units per layer of the seed.", flag_values=values)

    @flags.validator("widths", "expected whole numbers >= 1 such as 4,4,8,8.", flag_values=values)
    def _whole(found):
        return not found or are_whole(found)


def settings_of(options: Any) -> dict[str, Any]:
    """The values of the flags, widths as numbers."""
    settings = {name: getattr(options, name) for name in SETTINGS}
    return settings | {"widths": settings["widths"] and [int(w) for w in settings["widths"]]}


def growing_until(settings: Mapping[str, Any]) -> int:
    """The last epoch after which it may grow."""
    return min(math.floor(settings["grow"] * settings["epochs"]), settings["epochs"] - 1)


def rate_at(epoch: int, settings: Mapping[str, Any]) -> float:
    """The learning rate of an epoch, counted from 0: constant while it grows, then a cosine."""
    start, end = growing_until(settings), settings["epochs"]
    share = max(0.0, (epoch - start) / (end - start))
    return settings["learning_rate"] * 0.5 * (1 + math.cos(math.pi * share))


class Run:
    """A run in a folder, from wherever it is to its end.

    Args:
      settings: the flags.

    Raises:
      ValueError: the folder holds a run of other settings.
    """

    def __init__(self, settings: Mapping[str, Any]):
        self.settings = settings
        self.folder = Path(settings["output_dir"]) / settings["run"]
        self.key = {name: value for name, value in settings.items() if name not in PLACES}
        self.state: dict[str, Any] = {"settings": self.key, "model": None, "epochs": []}
        if (self.folder / STATE).exists():
            self.state = json.loads((self.folder / STATE).read_text())
            kept = {**EARLIER, **self.state["settings"]}
            differ = [name for name, value in self.key.items() if kept.get(name) != value]
            if differ:
                raise ValueError(
                    f"'{self.folder}' holds a run with other --{', --'.join(differ)}. Choose "
                    "another --run, or remove the folder."
                )

    @property
    def done(self) -> int:
        """Epochs that are trained and written."""
        return len(self.state["epochs"])

    def go_on(self) -> Mapping[str, Any] | None:
        """Trains on; returns the result, or None if it was stopped before the end."""
        import keras

        import tfgrow
        from experiments import datasets, training

        settings = self.settings
        training.make_repeatable(settings["seed"] + self.done)
        data = datasets.load(
            settings["dataset"], settings["data_dir"], seed=settings["seed"],
            max_train=settings["max_train"],
        )  # fmt: skip
        if self.done:
            model = keras.models.load_model(self.folder / self.state["model"])
            print(f"going on after epoch {self.done}: {model.count_params():,} parameters")
        else:
            model = training.seed_network(
                settings["model"], data, settings["widths"], settings["seed"], settings["augment"]
            )
            optimizer = training.OPTIMIZERS[settings["optimizer"]](settings["learning_rate"])
            optimizer.weight_decay = settings["weight_decay"]
            model.compile(optimizer, training.LOSS, metrics=["accuracy"])
        if self.done < settings["epochs"]:
            self._fit(model, data)
        if self.done < settings["epochs"]:
            return None
        loss, accuracy = model.evaluate(data.as_dataset("test", 256), verbose=0)
        tfgrow.strip(model).save(self.folder / PLAIN)
        tfgrow.export(model, self.folder / "1", overwrite=True, verbose=False)
        return self._finished(model, loss, accuracy)

    def _fit(self, model: Any, data: Any) -> None:
        import keras

        import tfgrow
        from experiments import training

        settings = self.settings
        names = (
            "max_params", "max_flops", "growth_per_step", "morphisms", "new_units", "curvature",
        )  # fmt: skip
        oracle = tfgrow.GaussNewtonOracle(
            "val_loss", seed=settings["seed"], directory=self.folder, project_name="oracle",
            **{name: settings[name] for name in names},
        )  # fmt: skip
        when = tfgrow.schedules.EveryNEpochs(settings["every"], stop=growing_until(settings))
        batch, seed = settings["batch_size"], settings["seed"] + self.done
        growth = tfgrow.callbacks.Growth(
            oracle, data.as_dataset("train", batch, seed=seed + 1), when=when, verbose=2,
            rounds=settings["rounds"],
        )  # fmt: skip
        model.fit(
            data.as_dataset("train", batch, seed=seed),
            validation_data=data.as_dataset("val", 256),
            epochs=settings["epochs"],
            initial_epoch=self.done,
            shuffle=False,
            verbose=0,
            callbacks=[
                growth,
                keras.callbacks.LearningRateScheduler(lambda epoch: rate_at(epoch, settings)),
                training.EpochLines(),
                _Keeper(self, growth, when).callback(),
            ],
        )

    def _finished(self, model: Any, loss: float, accuracy: float) -> dict[str, Any]:
        from experiments import reports, training

        epochs = self.state["epochs"]
        result = {
            "settings": self.key,
            "test_accuracy": accuracy,
            "test_loss": loss,
            "params": model.count_params(),
            "flops": epochs[-1]["flops"],
            "widths": training.open_widths(model),
            "hours": sum(one["seconds"] for one in epochs) / 3600,
            "threads": self.settings["threads"],
        }
        reports.write_json(self.folder / RESULT, result)
        return result


class _Keeper:
    """Writes model and figures after every epoch; the figures say which model file is theirs."""

    def __init__(self, run: Run, growth: Any, when: Any):
        self._run, self._growth, self._when = run, growth, when
        self._waiting: list[dict[str, Any]] = []
        self._started = self._last = time.perf_counter()
        self._events = 0

    def callback(self) -> Any:
        """The Keras callback."""
        import keras

        keeper = self

        class Keep(keras.callbacks.Callback):
            def on_epoch_end(self, epoch, logs=None):
                keeper.note(self.model, epoch, logs or {})

        return Keep()

    def note(self, model: Any, epoch: int, logs: Mapping[str, Any]) -> None:
        """One epoch's figures, written unless a growth is to follow: it would be lost."""
        now = time.perf_counter()
        names = {"params": "tfgrow_params", "flops": "tfgrow_flops"}
        figures: dict[str, Any] = {name: int(logs[key]) for name, key in names.items()}
        figures |= {name: float(logs[name]) for name in ("loss", "val_loss", "val_accuracy")}
        figures["seconds"] = now - self._last
        figures["events"] = [e.to_json() for e in self._growth.events[self._events :]]
        self._last, self._events = now, len(self._growth.events)
        self._waiting.append(figures)
        if self._when.should_grow(epoch + 1, logs):
            return
        self._write(model)
        hours = self._run.settings["hours"]
        if hours is not None and now - self._started > 3600 * hours:
            model.stop_training = True

    def _write(self, model: Any) -> None:
        from experiments import reports

        folder, state = self._run.folder, self._run.state
        folder.mkdir(parents=True, exist_ok=True)
        old, state["epochs"] = state["model"], [*state["epochs"], *self._waiting]
        state["model"], self._waiting = f"epoch-{len(state['epochs'])}.keras", []
        model.save(folder / state["model"])
        reports.write_json(folder / STATE, state)  # from here on the new one counts
        if old is not None:
            (folder / old).unlink(missing_ok=True)


def main(arguments: list[str]) -> None:
    """Goes on with the run, and says what came of it."""
    if len(arguments) > 1:
        raise app.UsageError(f"Unexpected arguments {arguments[1:]}; settings are --flags.")
    quiet_logs()
    with stopped_cleanly("experiments.headline"), in_words("experiments.headline"):
        run = Run(settings_of(flags.FLAGS))
        result = run.go_on()
        if run.done and flags.FLAGS.docs:
            from experiments import headline_page

            kept = Path(flags.FLAGS.results_dir) / f"{flags.FLAGS.run}.json"
            headline_page.write(run.state, result, kept, flags.FLAGS.docs, EARLIER)
    if result is None:
        print(f"stopped after epoch {run.done} of {run.settings['epochs']}; run it again to go on")
        return
    print(
        f"test accuracy {100 * result['test_accuracy']:.2f} % with {result['params']:,} parameters "
        f"(all of them dense), {result['hours']:.1f} hours; {run.folder}"
    )


if __name__ == "__main__":
    define_flags()
    app.run(main)
