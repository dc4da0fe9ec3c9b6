"""What growing costs, side by side with what it is measured against, in one run.

    python -m experiments.cost
    python -m experiments.cost --dataset=cifar10 --data_dir=../shared/tfds

Four readings, each a ratio of times taken alternately on the same machine:

* `fit`: all growth work of one growing `fit` (learning, scoring, guard, surgery, tracing the train
  and test functions anew) as a share of its wall time;
* `round`: learning and scoring the candidates of every site, in epochs of training;
* `rival`: building each expanded network, learning its theta on the true loss for as many steps and
  evaluating it, over a round for the same candidates;
* `double`: by how much doubling all widths multiplies a round, over what it does to a train step.

Writes `cost.json` and ends with a table of goals and readings.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np
from absl import app, flags

import tfgrow
from experiments import datasets, models, tables
from experiments.progress import Progress
from experiments.rival import RivalTimes, time_rival

CIFAR_WIDTHS = (8, 8, 16, 16, 32, 32)
SMALL_WIDTHS = (4, 4, 8, 8, 16, 16)
PARTS = ("fit", "round", "rival", "double")

GOALS = {
    "growth work in the time of a growing fit": ("<=", 0.10),
    "a round over every channel, in epochs": ("<=", 0.5),
    "rival over round, for the same candidates": (">=", 100.0),
    "doubled widths: factor of a round over factor of a train step": ("<=", 1.2),
}

_DATASET = flags.DEFINE_string("dataset", "digits", "digits, or an image dataset of TFDS.")
_DATA_DIR = flags.DEFINE_string("data_dir", None, "Where TensorFlow Datasets keeps its data.")
_MODEL = flags.DEFINE_enum("model", "vgg", models.variants(), "The network to grow.")
_WIDTHS = flags.DEFINE_list("widths", None, "Units per layer; by default by image size.")
_PARTS = flags.DEFINE_list("parts", list(PARTS), f"What to measure, of {', '.join(PARTS)}.")
_EPOCHS = flags.DEFINE_integer("epochs", 8, "Epochs of the growing fit.", 1)
_EVERY = flags.DEFINE_integer("every", 2, "The growing fit grows every so many epochs.", 1)
_BUDGET = flags.DEFINE_float("budget", 4.0, "Its budget, in multiples of the seed's parameters.")
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 128, "Samples per batch, of all batches.", 1)
_MAX_TRAIN = flags.DEFINE_integer("max_train", None, "Use at most so many training images.")
_MORPHISMS = flags.DEFINE_list("morphisms", ["split", "add"], "Kinds of edits.")
_CURVATURE = flags.DEFINE_string("curvature", None, "exact, sampled, ...; by default the oracle's.")
_PER_SITE = flags.DEFINE_integer("per_site", 1, "Rivals timed per site and kind of edit.", 1)
_ALL = flags.DEFINE_bool("all", False, "Time the rival of every candidate; nothing extrapolated.")
_REPEATS = flags.DEFINE_integer("repeats", 3, "Alternating readings of round and epoch.", 1)
_OUTPUT_DIR = flags.DEFINE_string("output_dir", "saved_models/cost", "Where cost.json goes.")
_SEED = flags.DEFINE_integer("seed", 0, "Of everything random.", 0)

Clock = Callable[[], float]


@dataclasses.dataclass(frozen=True, eq=False)
class Setting:
    """What one round of growth is made of: the oracle's defaults, unless a flag says otherwise.

    Attributes:
      morphisms, curvature, new_units, learn_steps, learning_rate: as the oracle takes them.
      learn: batches to learn on.
      score: batches to score on.
      seed: of everything random.
    """

    morphisms: tuple[str, ...]
    curvature: str
    new_units: int
    learn_steps: int
    learning_rate: float
    learn: list
    score: list
    seed: int


def make_setting(data, morphisms: Sequence[str], curvature: str | None, seed: int) -> Setting:
    """The setting of `GaussNewtonOracle()` on batches of a `tf.data.Dataset`."""
    options = {} if curvature is None else {"curvature": curvature}
    oracle = tfgrow.GaussNewtonOracle(morphisms=tuple(morphisms), seed=seed, **options)
    parts = oracle.split(data)
    return Setting(
        oracle.morphisms,
        oracle.curvature,
        oracle.new_units,
        oracle.learn_steps,
        oracle.learning_rate,
        parts.learn,
        parts.score,
        seed,
    )


@dataclasses.dataclass(frozen=True)
class Round:
    """Seconds of one round over every channel.

    Attributes:
      seconds: all of it, tracing included.
      learning_step: a learning step once it is traced.
      steps: learning steps and the batches that settle closed forms after them.
      candidates: how many it served.
    """

    seconds: float
    learning_step: float
    steps: int
    candidates: int


def time_round(model: keras.Model, setting: Setting) -> tuple[Round, list[tfgrow.Candidate]]:
    """Makes, learns and scores the candidates of every site; also returns them as they began."""
    ticks = []
    started = time.perf_counter()
    found = tfgrow.candidates(
        model, setting.morphisms, new_units=setting.new_units, seed=setting.seed
    )
    estimator = tfgrow.GaussNewtonEstimator(model, curvature=setting.curvature, seed=setting.seed)
    learned = estimator.learn(
        found,
        setting.learn,
        setting.learn_steps,
        setting.learning_rate,
        progress=lambda done, total: ticks.append(time.perf_counter()),
    )
    estimator.score(learned, setting.score)
    seconds = time.perf_counter() - started
    return Round(seconds, float(np.median(np.diff(ticks))), len(ticks), len(found)), found


class Stopwatch(tfgrow.callbacks.Growth):
    """`Growth` that knows what it cost.

    Attributes:
      inside: seconds in its own methods: capture, learning, scoring, guard, surgery, bookkeeping.
      train_steps, test_steps: seconds of every train and test step.
      first_steps: positions in them of those that came first after growth and had to be traced.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.inside = 0.0
        self.train_steps: list[float] = []
        self.test_steps: list[float] = []
        self.first_steps: dict[str, list[int]] = {"train": [], "test": []}
        self._began = 0.0

    @property
    def tracing(self) -> float:
        """Seconds by which the first steps after growth were longer than the others."""
        return extra_seconds(self.train_steps, self.first_steps["train"]) + extra_seconds(
            self.test_steps, self.first_steps["test"]
        )

    def on_train_begin(self, logs=None):
        self._timed(super().on_train_begin, logs)

    def on_epoch_end(self, epoch, logs=None):
        self._timed(super().on_epoch_end, epoch, logs)

    def on_train_batch_begin(self, batch, logs=None):
        before = len(self.events)
        self._timed(super().on_train_batch_begin, batch, logs)
        if len(self.events) > before and self.events[-1].status != "nothing":
            self.first_steps["train"].append(len(self.train_steps))
            self.first_steps["test"].append(len(self.test_steps))
        self._began = time.perf_counter()

    def on_train_batch_end(self, batch, logs=None):
        self.train_steps.append(time.perf_counter() - self._began)
        super().on_train_batch_end(batch, logs)

    def on_test_batch_begin(self, batch, logs=None):
        super().on_test_batch_begin(batch, logs)
        self._began = time.perf_counter()

    def on_test_batch_end(self, batch, logs=None):
        self.test_steps.append(time.perf_counter() - self._began)
        super().on_test_batch_end(batch, logs)

    def _timed(self, method, *args) -> None:
        started = time.perf_counter()
        method(*args)
        self.inside += time.perf_counter() - started


def extra_seconds(steps: Sequence[float], first: Sequence[int]) -> float:
    """By how much the steps at `first` are longer than the median of all, added up."""
    return float(sum(steps[i] - np.median(steps) for i in set(first) if i < len(steps)))


def growing_fit(model: keras.Model, oracle, data, val, epochs: int, every: int) -> dict[str, Any]:
    """Seconds of one growing fit and of its growth work."""
    growth = Stopwatch(oracle, data=data, every=every, verbose=0)
    started = time.perf_counter()
    progress = Progress("growing fit, epochs")
    model.fit(
        data,
        validation_data=val,
        epochs=epochs,
        verbose=0,
        callbacks=[growth, on_epoch_end(lambda epoch: progress(epoch + 1, epochs))],
    )
    wall = time.perf_counter() - started
    phases: dict[str, float] = {}
    for event in growth.events:
        for name, seconds in event.seconds.items():
            phases[name] = phases.get(name, 0.0) + seconds
    return {
        "wall": wall,
        "events": len(growth.events),
        "params": [growth.events[0].params_before, model.count_params()] if growth.events else [],
        "phases": phases,
        "growth": growth.inside,
        "tracing": growth.tracing,
        "share": (growth.inside + growth.tracing) / wall,
    }


def on_epoch_end(call: Callable[[int], None]) -> keras.callbacks.Callback:
    """A callback that calls back with the epoch's number."""
    return keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: call(epoch))


def time_epoch(model: keras.Model, data) -> float:
    """Seconds of one epoch of training that is traced already."""
    started = time.perf_counter()
    model.fit(data, epochs=1, verbose=0)
    return time.perf_counter() - started


def rounds_and_epochs(
    model: keras.Model, data, setting: Setting, repeats: int
) -> tuple[list[Round], list[float]]:
    """Rounds and epochs taken in turn, so that both see the same neighbours on the machine."""
    model.fit(data.take(2), epochs=1, verbose=0)  # traces the train function
    rounds, epochs = [], []
    progress = Progress("rounds and epochs")
    for number in range(repeats):
        rounds.append(time_round(model, setting)[0])
        epochs.append(time_epoch(model, data))
        progress(number + 1, repeats)
    return rounds, epochs


def middle(rounds: Sequence[Round], epochs: Sequence[float]) -> tuple[float, float]:
    """Median seconds of a round and of an epoch."""
    return float(np.median([r.seconds for r in rounds])), float(np.median(epochs))


def rivals(
    model: keras.Model, setting: Setting, steps: int, per_site: int | None
) -> tuple[list[tuple[str, str, RivalTimes]], dict[tuple[str, str], int]]:
    """Times the rival for some candidates of every site and kind of edit.

    Args:
      model: the growable model.
      setting: of the round.
      steps: learning steps of the round, those that settle closed forms included.
      per_site: how many of each site and kind; None for all.

    Returns:
      `(site, morphism, times)` of those timed, and how many candidates of each there are.
    """
    found = tfgrow.candidates(
        model, setting.morphisms, new_units=setting.new_units, seed=setting.seed
    )
    by_kind: dict[tuple[str, str], list] = {}
    for candidate in found:
        by_kind.setdefault((candidate.site.name, candidate.morphism), []).append(candidate)
    tried = [c for group in by_kind.values() for c in group[:per_site]]
    progress, timed = Progress("rivals"), []
    for number, candidate in enumerate(tried):
        times = time_rival(model, candidate, setting.learn, setting.score, steps)
        timed.append((candidate.site.name, candidate.morphism, times))
        progress(number + 1, len(tried))
    return timed, {kind: len(group) for kind, group in by_kind.items()}


def extrapolate(timed, counts) -> dict[str, float]:
    """Seconds for all candidates: each site's and kind's mean times how many there are."""
    totals = {"seconds": 0.0, "build": 0.0, "trace": 0.0, "learn": 0.0, "evaluate": 0.0}
    for kind, count in counts.items():
        mine = [times for site, morphism, times in timed if (site, morphism) == kind]
        for name in totals:
            totals[name] += count * float(np.mean([getattr(times, name) for times in mine]))
    return totals


def measure(parts: Sequence[str], data: datasets.Dataset, make: Callable[[float], keras.Model]):
    """All the readings asked for, JSON-ready: `{"readings": {...}, "details": {...}}`.

    Args:
      parts: some of `PARTS`.
      data: images.
      make: a factor on the widths -> a compiled growable network.
    """
    train = data.as_dataset("train", _BATCH_SIZE.value, seed=_SEED.value)
    readings: dict[str, float] = {}
    details: dict[str, Any] = {}
    setting = make_setting(train, _MORPHISMS.value, _CURVATURE.value, _SEED.value)
    if "fit" in parts:
        details["fit"] = _fit_part(make(1.0), train, data.as_dataset("val", _BATCH_SIZE.value))
        readings["growth work in the time of a growing fit"] = details["fit"]["share"]
    if {"round", "rival", "double"} & set(parts):
        model = make(1.0)
        rounds, epochs = rounds_and_epochs(model, train, setting, _REPEATS.value)
        one_round, epoch = middle(rounds, epochs)
        readings["a round over every channel, in epochs"] = one_round / epoch
        details["round"] = {"rounds": _plain(rounds), "epochs": epochs}
    if "rival" in parts:
        per_site = None if _ALL.value else _PER_SITE.value
        timed, counts = rivals(model, setting, rounds[0].steps, per_site)
        total = extrapolate(timed, counts)
        readings["rival over round, for the same candidates"] = total["seconds"] / one_round
        without = (total["learn"] + total["evaluate"]) / one_round
        readings["the same, building and tracing given to the rival for free"] = without
        details["rival"] = {
            "candidates": sum(counts.values()),
            "timed": [{"site": s, "morphism": m, **dataclasses.asdict(t)} for s, m, t in timed],
            "seconds for all": total,
        }
    if "double" in parts:
        wide_rounds, wide_epochs = rounds_and_epochs(make(2.0), train, setting, _REPEATS.value)
        wide_round, wide_epoch = middle(wide_rounds, wide_epochs)
        factors = wide_round / one_round, wide_epoch / epoch
        readings["doubled widths: factor of a round"] = factors[0]
        readings["doubled widths: factor of a train step"] = factors[1]
        name = "doubled widths: factor of a round over factor of a train step"
        readings[name] = factors[0] / factors[1]
        details["double"] = {"rounds": _plain(wide_rounds), "epochs": wide_epochs}
    return {"readings": readings, "details": details}


def _fit_part(model, train, val) -> dict[str, Any]:
    options = {} if _CURVATURE.value is None else {"curvature": _CURVATURE.value}
    oracle = tfgrow.GaussNewtonOracle(
        morphisms=tuple(_MORPHISMS.value),
        max_params=round(_BUDGET.value * model.count_params()),
        seed=_SEED.value,
        **options,
    )
    return growing_fit(model, oracle, train, val, _EPOCHS.value, _EVERY.value)


def _plain(rounds: Sequence[Round]) -> list[dict[str, float]]:
    return [dataclasses.asdict(one) for one in rounds]


def table(readings: dict[str, float]) -> list[tuple[Any, ...]]:
    """Rows of ratio, goal, reading, and whether it is met."""
    rows = []
    for name, reading in readings.items():
        if name not in GOALS:
            rows.append((name, "", float(reading), ""))
            continue
        sign, bound = GOALS[name]
        met = reading <= bound if sign == "<=" else reading >= bound
        rows.append((name, f"{sign} {bound:g}", float(reading), "met" if met else "not met"))
    return rows


def phase_table(fit: dict[str, Any]) -> list[tuple[str, float, str]]:
    """Rows of what the growing fit spent its time on: seconds, share."""
    known = {**fit["phases"], "tracing the grown model": fit["tracing"]}
    rest = fit["growth"] - sum(fit["phases"].values())
    known |= {"other growth work": rest, "whole fit": fit["wall"]}
    return [
        (name, float(seconds), f"{100 * seconds / fit['wall']:.1f} %")
        for name, seconds in known.items()
    ]


def report(result: dict[str, Any]) -> None:
    """Prints the tables."""
    details = result["details"]
    if "fit" in details:
        events = details["fit"]["events"]
        tables.show(
            ("phase", "seconds", "share"), phase_table(details["fit"]), f"\nfit: {events} events"
        )
    if "rival" in details:
        count, timed = details["rival"]["candidates"], len(details["rival"]["timed"])
        how = "all timed" if timed == count else f"{timed} timed, the others extrapolated"
        rows = [(name, float(s)) for name, s in details["rival"]["seconds for all"].items()]
        tables.show(("rival", "seconds"), rows, f"\nrival: {count} candidates, {how}")
    tables.show(("ratio", "goal", "reading", ""), table(result["readings"]), "\ncost")


def network(data: datasets.Dataset, factor: float) -> keras.Model:
    """The seed network with widths times `factor`, compiled and growable."""
    widths = _widths(data)
    keras.utils.set_random_seed(_SEED.value)
    model = models.build(
        _MODEL.value,
        data.input_shape,
        data.num_classes,
        [round(factor * width) for width in widths],
        _SEED.value,
    )
    model = tfgrow.convert(model)
    model.compile("adam", "sparse_categorical_crossentropy", metrics=["accuracy"])
    return model


def _widths(data: datasets.Dataset) -> tuple[int, ...]:
    if _WIDTHS.value:
        return tuple(int(width) for width in _WIDTHS.value)
    if _MODEL.value == "mlp":
        return models.VARIANTS["mlp"].widths
    return CIFAR_WIDTHS if min(data.input_shape[:2]) >= 28 else SMALL_WIDTHS


def main(argv: list[str]) -> None:
    """Measures what `--parts` names."""
    if len(argv) > 1:
        raise app.UsageError(f"Unknown arguments: {argv[1:]}. Flags start with --.")
    unknown = sorted(set(_PARTS.value) - set(PARTS))
    if unknown or not _PARTS.value:
        raise app.UsageError(f"--parts={unknown}: expected some of {', '.join(PARTS)}.")
    data = datasets.load(
        _DATASET.value, _DATA_DIR.value, seed=_SEED.value, max_train=_MAX_TRAIN.value
    )
    result = measure(_PARTS.value, data, lambda factor: network(data, factor))
    folder = Path(_OUTPUT_DIR.value)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "cost.json").write_text(json.dumps(result, indent=1))
    report(result)
    print(f"all figures: {folder / 'cost.json'}")


if __name__ == "__main__":
    app.run(main)
