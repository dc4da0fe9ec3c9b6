"""How true the Gauss-Newton estimates are: held against really expanded networks.

    python -m experiments.fidelity
    python -m experiments.fidelity --dataset=cifar10 --data_dir=../shared/tfds --epochs=6

For every network it trains a seed for a few epochs and estimates, on samples that nothing was
learned on: the split of every channel (three curvatures), added units, and a set of 16 edits at
once; or, with --morphism=prune, every edit of that kind alone. The truth is the loss of the
expanded network on the same samples minus the loss before. Writes a picture per network and
`fidelity.json`, and ends with a table of goals and readings.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from absl import app, flags

import tfgrow
from experiments import datasets, figures, models, tables, training
from experiments._messages import in_words, quiet_logs
from experiments.expanded import Arrays, true_changes
from experiments.measures import agreement
from experiments.progress import Progress
from tfgrow.morphisms.registry import MORPHISMS

CIFAR_WIDTHS = (8, 8, 16, 16, 32, 32)
CIFAR_HEADS = (8, 32, 8, 32)
SMALL_WIDTHS = (4, 4, 8, 8, 16, 16)
CURVATURES = ("exact", "sampled", "empirical")
CHECKED = "checked"
"""Exact curvature, corrected by checks."""

SET_SIZE = 16
EPOCHS = 6
DIGITS_EPOCHS = 40
"""Digits has a dozen batches an epoch: after six, BatchNormalization has hardly any statistics."""


@dataclasses.dataclass(frozen=True)
class Goal:
    """A bound on a reading: at least `bound`, or at most."""

    bound: float
    at_least: bool

    def met(self, reading: float) -> bool:
        return bool(reading >= self.bound if self.at_least else reading <= self.bound)

    def __str__(self) -> str:
        return f"{'>=' if self.at_least else '<='} {self.bound:g}"


GOALS = {
    "split exact, Pearson": Goal(0.99, True),
    "split exact, Spearman": Goal(0.99, True),
    "split exact, median relative error": Goal(0.04, False),
    "split sampled, Pearson": Goal(0.98, True),
    "add exact, Pearson": Goal(0.95, True),
    "add exact, median relative error": Goal(0.15, False),
    "set of split, relative error": Goal(0.15, False),
    "set of add, relative error": Goal(0.15, False),
    "set of split and add, relative error": Goal(0.15, False),
    "forward against reverse mode, relative difference": Goal(1e-4, False),
}

ALONE_GOALS = {"Pearson": Goal(0.98, True), "median relative error": Goal(0.10, False)}
"""Of the exact curvature, without and with checks, for one kind of edits alone (`--morphism`)."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a run of one network needs to know besides the network and the data."""

    samples: int = 2048
    steps: int = 50
    new_units: int = 4
    seed: int = 0
    checks: int = 16


def check_network(model: keras.Model, x, y, settings: Settings) -> dict[str, Any]:
    """All readings of one trained growable network.

    Args:
      model: growable, compiled, ending in class probabilities.
      x: images to take disjoint samples from, for learning and for judging.
      y: their integer labels.
      settings: how many of what.

    Returns:
      JSON-ready: `splits` and `adds` hold `keys`, `estimated` (by curvature) and `true`; `sets`
      what came of 16 at once; `readings` the figures, those with goals by the goals' names.
    """
    learn_on, judge_on = disjoint(x, y, settings.samples, settings.seed)
    splits = _compare(model, "split", CURVATURES, learn_on, judge_on, settings)
    adds = _compare(model, "add", CURVATURES[:1], learn_on, judge_on, settings)
    chosen = {
        " and ".join(kinds): _compare_set(model, kinds, learn_on, judge_on, settings)
        for kinds in (("split",), ("add",), ("split", "add"))
    }
    result = {"splits": splits, "adds": adds, "sets": chosen, "samples": len(judge_on[1])}
    return {**result, "readings": readings(result)}


def check_morphism(model: keras.Model, morphism: str, x, y, settings: Settings) -> dict[str, Any]:
    """Every edit of one kind alone; arguments and result as of `check_network`."""
    learn_on, judge_on = disjoint(x, y, settings.samples, settings.seed)
    ways = (*CURVATURES[:2], CHECKED)
    part = _compare(model, morphism, ways, learn_on, judge_on, settings)
    found = _agreement(morphism, part)
    return {morphism: part, "samples": len(judge_on[1]), "readings": found}


def disjoint(x, y, samples: int, seed: int) -> tuple[Arrays, Arrays]:
    """Samples to learn theta on, and others (at most half of all) to judge on."""
    order = np.random.default_rng(seed).permutation(len(y))
    count = min(samples, len(y) // 2)
    return (x[order[count:]], y[order[count:]]), (x[order[:count]], y[order[:count]])


def _compare(model, morphism, ways, learn_on, judge_on, settings) -> dict[str, Any]:
    """Every candidate of one kind alone: its estimates and its truth."""
    candidates = tfgrow.candidates(
        model, morphism, new_units=settings.new_units, seed=settings.seed
    )
    estimator = tfgrow.GaussNewtonEstimator(model, curvature="exact", seed=settings.seed)
    learned = estimator.learn(
        candidates, learn_on, settings.steps, progress=Progress(f"{morphism}: learning")
    )
    estimated = {}
    for way in ways:
        curvature, checks = ("exact", settings.checks) if way == CHECKED else (way, 0)
        estimator = tfgrow.GaussNewtonEstimator(model, curvature=curvature, seed=settings.seed)
        estimated[way] = estimator.score(learned, judge_on, checks=checks).tolist()
    true = true_changes(model, learned, judge_on, Progress(f"{morphism}: expanding"))
    return {
        "sites": [candidate.site.name for candidate in learned],
        "units": [int(candidate.unit) for candidate in learned],
        "estimated": estimated,
        "true": true.tolist(),
    }


def _compare_set(model, morphisms, learn_on, judge_on, settings) -> dict[str, Any]:
    """The set that an oracle chooses, all at once."""
    oracle = tfgrow.GaussNewtonOracle(
        morphisms=morphisms,
        curvature="exact",
        new_units=settings.new_units,
        learn_steps=settings.steps,
        growth_per_step=SET_SIZE,
        seed=settings.seed,
        score="raw",  # the sets whose estimates are largest: the hardest to hold
    )
    plan = oracle.propose_plan(
        model, learn_on, progress=Progress(f"{' and '.join(morphisms)}: choosing {SET_SIZE}")
    )
    chosen = list(plan.candidates)
    if not chosen:
        return {"size": 0, "reason": plan.reason}
    estimator = tfgrow.GaussNewtonEstimator(model, curvature="exact", seed=settings.seed)
    interaction = estimator.interaction(chosen, judge_on)
    return {
        "size": len(chosen),
        "widths": {name: list(pair) for name, pair in plan.widths.items()},
        "sum of estimates": float(interaction.scores.sum()),
        "estimated": interaction.change(),
        "estimated by forward mode": estimator.joint_change(chosen, judge_on),
        "true": tfgrow.measure_change(model, chosen, judge_on),
    }


def readings(result: dict[str, Any]) -> dict[str, float]:
    """The figures of one network, by name; those of `GOALS` under the goals' names."""
    found = {}
    for kind, part in (("split", result["splits"]), ("add", result["adds"])):
        found |= _agreement(kind, part)
    chosen = {kinds: part for kinds, part in result["sets"].items() if part["size"]}
    for kinds, part in chosen.items():
        found[f"set of {kinds}, relative error"] = _difference(part["estimated"], part["true"])
    if chosen:
        found["forward against reverse mode, relative difference"] = max(
            _difference(part["estimated by forward mode"], part["estimated"])
            for part in chosen.values()
        )
    return found


def _agreement(kind: str, part: dict[str, Any]) -> dict[str, float]:
    """Figures of single edits of one kind, by curvature."""
    found = {}
    for curvature, estimated in part["estimated"].items():
        match = agreement(estimated, part["true"])
        found[f"{kind} {curvature}, Pearson"] = match.pearson
        found[f"{kind} {curvature}, Spearman"] = match.spearman
        found[f"{kind} {curvature}, median relative error"] = match.median_relative_error
    return found


def _difference(value: float, reference: float) -> float:
    return abs(value - reference) / abs(reference) if value != reference else 0.0


def table(
    found: dict[str, float], goals: Mapping[str, Goal] = MappingProxyType(GOALS)
) -> list[tuple[Any, ...]]:
    """Rows of figure, goal, reading, and whether it is met."""
    rows = []
    for name, reading in found.items():
        goal = goals.get(name)
        verdict = "" if goal is None else "met" if goal.met(reading) else "not met"
        rows.append((name, "" if goal is None else str(goal), float(reading), verdict))
    return rows


def set_table(sets: dict[str, Any]) -> list[tuple[Any, ...]]:
    """Rows of the sets: edits, sum of single estimates, joint estimate, truth."""
    names = ("size", "sum of estimates", "estimated", "true")
    return [(kinds, *(part.get(name) for name in names)) for kinds, part in sets.items()]


def trained(net: str, data: datasets.Dataset, options: Any) -> keras.Model:
    """A seed network, trained for a few epochs or read from `--model_file`, made growable."""
    path = options.model_file
    if path and os.path.exists(path):
        print(f"{net}: read from {path}")
        return tfgrow.convert(keras.models.load_model(path))
    keras.utils.set_random_seed(options.seed)
    widths = _widths(net, data, options.widths)
    model = models.build(net, data.input_shape, data.num_classes, widths, options.seed)
    model.compile("adam", "sparse_categorical_crossentropy", metrics=["accuracy"])
    epochs = _epochs(options)
    progress = Progress(f"{net}: training, epochs")
    epoch_done = keras.callbacks.LambdaCallback(
        on_epoch_end=lambda epoch, logs: progress(epoch + 1, epochs)
    )
    train = data.as_dataset("train", 128, seed=options.seed)
    model.fit(train, epochs=epochs, shuffle=False, verbose=0, callbacks=[epoch_done])
    loss, accuracy = model.evaluate(data.as_dataset("val"), verbose=0)
    print(
        f"{net}: {model.count_params():,} parameters, val loss {loss:.3f}, accuracy {accuracy:.3f}"
    )
    if path:
        model.save(path)
    return tfgrow.convert(model)


def _epochs(options: Any) -> int:
    if options.epochs is not None:
        return options.epochs
    return DIGITS_EPOCHS if options.dataset == "digits" else EPOCHS


def _widths(net: str, data: datasets.Dataset, given: list[str] | None) -> list[int] | None:
    if given:
        return models.parse_widths(given)
    large = min(data.input_shape[:2]) >= 28
    if net == "vit":
        return list(CIFAR_HEADS) if large else None
    if net == "mlp":
        return None
    return list(CIFAR_WIDTHS if large else SMALL_WIDTHS)


def report(net: str, result: dict[str, Any], folder: Path) -> None:
    """Prints a network's tables and draws its pictures."""
    figure_columns = ("figure", "goal", "reading", "")
    parts = {name: one for name, one in result.items() if isinstance(one, dict) and "true" in one}
    goals = GOALS
    if "sets" not in result:
        (kind,) = parts
        goals = {
            f"{kind} {way}, {figure}": goal
            for way in ("exact", CHECKED)
            for figure, goal in ALONE_GOALS.items()
        }
    title = f"\n{net}: on {result['samples']} samples not learned on"
    tables.show(figure_columns, table(result["readings"], goals), title)
    if "sets" in result:
        set_columns = ("set of", "edits", "sum of estimates", "joint estimate", "truth")
        tables.show(set_columns, set_table(result["sets"]), f"\n{net}: edits applied at once")
    for part, one in parts.items():
        path = folder / f"{net}_{part}.png"
        figures.plot_estimates(one["estimated"]["exact"], one["true"], path, one["sites"])
        print(f"picture: {path}")


def prepare(options: Any) -> datasets.Dataset:
    """The data, after everything that the flags name has been made once.

    Raises:
      ValueError, ImportError, OSError: a setting that can't be, in words for the user.
    """
    data = datasets.load(options.dataset, options.data_dir, seed=options.seed)
    for net in options.nets:
        widths = _widths(net, data, options.widths)
        models.build(net, data.input_shape, data.num_classes, widths, options.seed)
    folder = Path(options.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / "fidelity.json").exists() and not options.overwrite:
        raise ValueError(
            f"'{folder}' holds an earlier run. Choose another --output_dir, or say --overwrite."
        )
    return data


def run(options: Any, data: datasets.Dataset) -> dict[str, Any]:
    """Checks every network and writes what came of it.

    Args:
      options: the values of the flags, as attributes.
      data: from `prepare`.

    Returns:
      What `fidelity.json` holds.
    """
    settings = Settings(
        options.samples, options.steps, options.new_units, options.seed, options.checks
    )
    folder = Path(options.output_dir)
    results: dict[str, Any] = {}
    about = {**dataclasses.asdict(settings), "dataset": options.dataset, "epochs": _epochs(options)}
    for net in options.nets:
        model = trained(net, data, options)
        if options.morphism is None:
            results[net] = check_network(model, data.x_train, data.y_train, settings)
        else:
            results[net] = check_morphism(
                model, options.morphism, data.x_train, data.y_train, settings
            )
        report(net, results[net], folder)
        (folder / "fidelity.json").write_text(json.dumps({**about, "nets": results}, indent=1))
    print(f"all figures: {folder / 'fidelity.json'}")
    return results


# Not at the top: binaries that define flags of the same names can then be imported side by side.
def define_flags(values: flags.FlagValues = flags.FLAGS) -> None:
    """Defines this binary's flags."""
    known = ", ".join(models.variants())
    for name, default, text in (
        ("dataset", "digits", "digits, or an image classification dataset of TFDS."),
        ("data_dir", None, "Where TensorFlow Datasets keeps its data."),
        ("model_file", None, "A trained network: read if it exists, else written."),
        ("output_dir", "saved_models/fidelity", "Where pictures and fidelity.json go."),
    ):
        flags.DEFINE_string(name, default, text, flag_values=values)
    for name, number, text, least in (
        (
            "epochs",
            None,
            f"Epochs of training before; by default {EPOCHS}, {DIGITS_EPOCHS} on digits.",
            0,
        ),
        ("samples", 2048, "Samples that estimates and truth are taken on.", 1),
        ("steps", 50, "Learning steps of theta, a batch of 256 each.", 1),
        ("new_units", 4, "Added units tried per layer.", 1),
        ("checks", 16, "With --morphism: forward passes per batch that correct the estimates.", 0),
        ("seed", 0, "Of everything random.", 0),
    ):
        flags.DEFINE_integer(name, number, text, least, flag_values=values)
    flags.DEFINE_list("nets", ["vgg"], f"Networks to check, of {known}.", flag_values=values)
    flags.DEFINE_enum(
        "morphism",
        None,
        sorted(MORPHISMS),
        "Check every edit of this kind alone, instead of splits, adds and sets of both.",
        flag_values=values,
    )
    flags.DEFINE_list("widths", None, "Units per layer; default by image size.", flag_values=values)
    flags.DEFINE_bool("overwrite", False, "Replace an earlier run.", flag_values=values)

    @flags.validator("nets", f"expected some of {known}", flag_values=values)
    def _known(nets):
        return bool(nets) and set(nets) <= set(models.variants())

    @flags.multi_flags_validator(
        ["model_file", "nets"], "--model_file holds one network", flag_values=values
    )
    def _one_file(given):
        return given["model_file"] is None or len(given["nets"]) == 1


def main(argv: list[str]) -> None:
    """Entry point; see the module's docstring."""
    if len(argv) > 1:
        raise app.UsageError(f"Unknown arguments: {argv[1:]}. Flags start with --.")
    # Many small networks are traced on purpose; TensorFlow takes that for a mistake.
    tf.get_logger().setLevel("ERROR")
    quiet_logs()
    with in_words("experiments.fidelity"):
        data = prepare(flags.FLAGS)
    training.make_repeatable(flags.FLAGS.seed)
    run(flags.FLAGS, data)


if __name__ == "__main__":
    define_flags()
    app.run(main)
