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
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from absl import app, flags

import tfgrow
from experiments import datasets, models, tables
from experiments._messages import in_words, quiet_logs
from experiments.progress import Progress
from experiments.rival import RivalTimes, time_rival
from experiments.variants import widths_of

CIFAR_WIDTHS = (8, 8, 16, 16, 32, 32)
SMALL_WIDTHS = (4, 4, 8, 8, 16, 16)
PARTS = ("fit", "round", "rival", "double")
SET_SIZE = 16

GOALS = {
    "growth work in the time of a growing fit": ("<=", 0.10),
    "a round over every channel, in epochs": ("<=", 0.5),
    "rival over round, for the same candidates": (">=", 100.0),
    "doubled widths: factor of a round over factor of a train step": ("<=", 1.2),
}


def make_oracle(options: Any, **settings: Any) -> tfgrow.GaussNewtonOracle:
    """The oracle with its defaults, except for what the flags say."""
    if options.curvature is not None:
        settings["curvature"] = options.curvature
    return tfgrow.GaussNewtonOracle(
        morphisms=tuple(options.morphisms), seed=options.seed, **settings
    )


@dataclasses.dataclass(frozen=True)
class Round:
    """Seconds of one round over every channel: what an oracle does to propose a plan.

    Attributes:
      seconds: all of it, tracing included.
      phases: seconds by phase.
      learning_step: a learning step once it is traced.
      steps: learning steps and the batches that settle closed forms after them.
    """

    seconds: float
    phases: dict[str, float]
    learning_step: float
    steps: int


def time_round(model: keras.Model, oracle: tfgrow.GaussNewtonOracle, parts: Any) -> Round:
    """Makes, learns and scores the candidates of every site and chooses among them.

    Args:
      model: the growable model.
      oracle: whose settings count.
      parts: its `split` of a dataset.
    """
    ticks = []
    started = time.perf_counter()
    plan = oracle.propose_plan(
        model, parts, progress=lambda done, total: ticks.append(time.perf_counter())
    )
    seconds = time.perf_counter() - started
    return Round(seconds, dict(plan.seconds), float(np.median(np.diff(ticks))), len(ticks))


def every_candidate(model: keras.Model, oracle) -> list[tfgrow.Candidate]:
    """The candidates of a round, as it begins with them."""
    return tfgrow.candidates(
        model, oracle.morphisms, new_units=oracle.new_units, seed=oracle.seed or 0
    )


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
        shuffle=False,
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
    model.fit(data, epochs=1, shuffle=False, verbose=0)
    return time.perf_counter() - started


def rounds_and_epochs(
    model: keras.Model, data, oracle, parts, repeats: int
) -> tuple[list[Round], list[float]]:
    """Rounds and epochs taken in turn, so that both see the same neighbours on the machine."""
    model.fit(data.take(2), epochs=1, shuffle=False, verbose=0)  # traces the train function
    rounds, epochs = [], []
    progress = Progress("rounds and epochs")
    for number in range(repeats):
        rounds.append(time_round(model, oracle, parts))
        epochs.append(time_epoch(model, data))
        progress(number + 1, repeats)
    return rounds, epochs


def middle(rounds: Sequence[Round], epochs: Sequence[float]) -> tuple[float, float]:
    """Median seconds of a round and of an epoch."""
    return float(np.median([r.seconds for r in rounds])), float(np.median(epochs))


def rivals(model: keras.Model, oracle, parts, steps: int, per_site: int | None) -> dict[str, Any]:
    """Times the rival for some candidates of every site and kind of edit.

    Args:
      model: the growable model.
      oracle: whose candidates count.
      parts: the data of its round.
      steps: learning steps of the round, those that settle closed forms included.
      per_site: how many of each site and kind; None for all.

    Returns:
      `candidates` in all, those `timed`, and the `seconds for all`.
    """
    found = every_candidate(model, oracle)
    by_kind: dict[tuple[str, str], list] = {}
    for candidate in found:
        by_kind.setdefault((candidate.site.name, candidate.morphism), []).append(candidate)
    tried = [c for group in by_kind.values() for c in group[:per_site]]
    progress, timed = Progress("rivals"), []
    for number, candidate in enumerate(tried):
        times = time_rival(model, candidate, parts.learn, parts.score, steps)
        timed.append((candidate.site.name, candidate.morphism, times))
        progress(number + 1, len(tried))
    counts = {kind: len(group) for kind, group in by_kind.items()}
    return {
        "candidates": len(found),
        "timed": [{"site": s, "morphism": m, **dataclasses.asdict(t)} for s, m, t in timed],
        "seconds for all": extrapolate(timed, counts),
    }


def extrapolate(
    timed: Sequence[tuple[str, str, RivalTimes]], counts: Mapping[tuple[str, str], int]
) -> dict[str, float]:
    """Seconds for all candidates: each site's and kind's mean times how many there are.

    Args:
      timed: `(site, morphism, times)` of those that were timed.
      counts: how many there are of each site and kind.
    """
    totals = {"seconds": 0.0, "build": 0.0, "trace": 0.0, "learn": 0.0, "evaluate": 0.0}
    for kind, count in counts.items():
        mine = [times for site, morphism, times in timed if (site, morphism) == kind]
        for name in totals:
            totals[name] += count * float(np.mean([getattr(times, name) for times in mine]))
    return totals


def measure(
    data: datasets.Dataset, make: Callable[[float], keras.Model], options: Any
) -> dict[str, Any]:
    """The readings that `options.parts` names, JSON-ready.

    Args:
      data: images.
      make: a factor on the widths -> a compiled growable network.
      options: the values of the flags, as attributes.

    Returns:
      `{"readings": {ratio: value}, "details": {part: what it was taken from}}`.
    """
    train = data.as_dataset("train", options.batch_size, seed=options.seed)
    val = data.as_dataset("val", options.batch_size)
    parts, readings, details = set(options.parts), {}, {}
    if "fit" in parts:
        details["fit"] = _fit_part(make(1.0), train, val, options)
        readings["growth work in the time of a growing fit"] = details["fit"]["share"]
    if parts & {"round", "rival", "double"}:
        model = make(1.0)
        # What it may choose doesn't matter here, but that every candidate is in the running does.
        oracle = make_oracle(options, growth_per_step=SET_SIZE)
        pieces = oracle.split(train)
        rounds, epochs = rounds_and_epochs(model, train, oracle, pieces, options.repeats)
        one_round, epoch = middle(rounds, epochs)
        readings["a round over every channel, in epochs"] = one_round / epoch
        count = len(every_candidate(model, oracle))
        details["round"] = {"rounds": _plain(rounds), "epochs": epochs, "candidates": count}
    if "rival" in parts:
        per_site = None if options.all else options.per_site
        details["rival"] = rivals(model, oracle, pieces, rounds[0].steps, per_site)
        total = details["rival"]["seconds for all"]
        readings["rival over round, for the same candidates"] = total["seconds"] / one_round
        bare = (total["learn"] + total["evaluate"]) / one_round
        readings["the same, building and tracing given to the rival for free"] = bare
    if "double" in parts:
        wide, wide_epochs = rounds_and_epochs(make(2.0), train, oracle, pieces, options.repeats)
        details["double"] = {"rounds": _plain(wide), "epochs": wide_epochs}
        wide_round, wide_epoch = middle(wide, wide_epochs)
        readings |= doubling(wide_round / one_round, wide_epoch / epoch)
    return {"readings": readings, "details": details}


def doubling(round_factor: float, step_factor: float) -> dict[str, float]:
    """What doubling all widths multiplied, as readings."""
    return {
        "doubled widths: factor of a round": round_factor,
        "doubled widths: factor of a train step": step_factor,
        "doubled widths: factor of a round over factor of a train step": round_factor / step_factor,
    }


def _fit_part(model, train, val, options) -> dict[str, Any]:
    oracle = make_oracle(options, max_params=round(options.budget * model.count_params()))
    return growing_fit(model, oracle, train, val, options.epochs, options.every)


def _plain(rounds: Sequence[Round]) -> list[dict[str, Any]]:
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


def network(data: datasets.Dataset, factor: float, options: Any) -> keras.Model:
    """The seed network with widths times `factor`, compiled and growable."""
    keras.utils.set_random_seed(options.seed)
    widths = [round(factor * width) for width in _widths(data, options)]
    model = models.build(options.model, data.input_shape, data.num_classes, widths, options.seed)
    model = tfgrow.convert(model)
    model.compile("adam", "sparse_categorical_crossentropy", metrics=["accuracy"])
    return model


def _widths(data: datasets.Dataset, options) -> list[int]:
    if options.widths:
        return models.parse_widths(options.widths)
    if options.model in ("mlp", "vit"):
        return widths_of(options.model, None)
    return list(CIFAR_WIDTHS if min(data.input_shape[:2]) >= 28 else SMALL_WIDTHS)


def prepare(options: Any) -> datasets.Dataset:
    """The data, after everything that the flags name has been made once.

    Raises:
      ValueError, ImportError, OSError: a setting that can't be, in words for the user.
    """
    data = datasets.load(
        options.dataset, options.data_dir, seed=options.seed, max_train=options.max_train
    )
    make_oracle(options)
    network(data, 1.0, options)
    Path(options.output_dir).mkdir(parents=True, exist_ok=True)
    return data


def run(options: Any, data: datasets.Dataset) -> dict[str, Any]:
    """Measures, prints and writes; `options` are the values of the flags, as attributes."""
    result = measure(data, lambda factor: network(data, factor, options), options)
    folder = Path(options.output_dir)
    (folder / "cost.json").write_text(json.dumps(result, indent=1))
    report(result)
    print(f"all figures: {folder / 'cost.json'}")
    return result


# Not at the top: binaries that define flags of the same names can then be imported side by side.
def define_flags(values: flags.FlagValues = flags.FLAGS) -> None:
    """Defines this binary's flags."""
    for name, default, text in (
        ("dataset", "digits", "digits, or an image classification dataset of TFDS."),
        ("data_dir", None, "Where TensorFlow Datasets keeps its data."),
        ("curvature", None, "exact, sampled, empirical or auto; by default the oracle's."),
        ("output_dir", "saved_models/cost", "Where cost.json goes."),
    ):
        flags.DEFINE_string(name, default, text, flag_values=values)
    for name, number, text, least in (
        ("epochs", 8, "Epochs of the growing fit.", 1),
        ("every", 2, "The growing fit grows every so many epochs.", 1),
        ("batch_size", 128, "Samples per batch, in training and in growing.", 1),
        ("max_train", None, "Use at most so many training images.", 1),
        ("per_site", 1, "Rivals timed per site and kind of edit.", 1),
        ("repeats", 3, "Alternating readings of rounds and epochs.", 1),
        ("seed", 0, "Of everything random.", 0),
    ):
        flags.DEFINE_integer(name, number, text, least, flag_values=values)
    flags.DEFINE_float("budget", 4.0, "Of the fit, in parameters of the seed.", flag_values=values)
    flags.DEFINE_bool("all", False, "Time the rival of every candidate.", flag_values=values)
    flags.DEFINE_enum("model", "vgg", models.variants(), "Network to grow.", flag_values=values)
    flags.DEFINE_list("widths", None, "Units per layer; default by image size.", flag_values=values)
    flags.DEFINE_list("morphisms", ["split", "add"], "Kinds of edits.", flag_values=values)
    flags.DEFINE_list("parts", list(PARTS), f"What to measure: {PARTS}.", flag_values=values)

    @flags.validator("parts", f"expected some of {', '.join(PARTS)}", flag_values=values)
    def _known(parts):
        return bool(parts) and set(parts) <= set(PARTS)


def main(argv: list[str]) -> None:
    """Entry point; see the module's docstring."""
    if len(argv) > 1:
        raise app.UsageError(f"Unknown arguments: {argv[1:]}. Flags start with --.")
    # Many small networks are traced on purpose; TensorFlow takes that for a mistake.
    tf.get_logger().setLevel("ERROR")
    quiet_logs()
    with in_words("experiments.cost"):
        data = prepare(flags.FLAGS)
    run(flags.FLAGS, data)


if __name__ == "__main__":
    define_flags()
    app.run(main)
