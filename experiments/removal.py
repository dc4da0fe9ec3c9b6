r"""Removes parameters without retraining: by tfgrow's prune and by the usual importances.

    python -m experiments.removal
    python -m experiments.removal --dataset=cifar10 --data_dir=$HOME/tensorflow_datasets

A trained network (--epochs, or --model_file) loses --shares percent of its parameters, in steps of
--step percent, before each of which every method looks at the network anew. Units go until the
parameters are at the target or just under it, so that the methods differ by less than one unit:

* `prune`: what stands in for each unit is learned, removals are chosen on the interaction matrix,
  fewest loss per parameter first, none that stands in for another;
* `magnitude`, `magnitude_relative`, `gamma`, `taylor_squared`, `taylor_absolute`: see
  experiments/importances.py. The units that score least in the whole network go, and nothing stands
  in for them.

All methods see the same training images and are judged on the test images. Writes `removal.csv`,
`removal.png` and the settings (`removal.json`) to --output_dir, and prints the table.
"""

from __future__ import annotations

import csv
import functools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from absl import app, flags

import tfgrow
from experiments import datasets, figures, importances, models, tables, training
from experiments._messages import in_words, quiet_logs
from experiments.expanded import Arrays, batches
from experiments.fidelity import trained

NETS = ("vgg", "vgg_no_bn", "vgg_gelu", "mlp")
"""Networks that `models.build` makes from exactly the widths that can change."""

IMPORTANCES: dict[str, Callable[[keras.Model, Arrays], importances.Importance]] = {
    "magnitude": importances.magnitude,
    "magnitude_relative": importances.magnitude_relative,
    "gamma": importances.gamma,
    "taylor_squared": importances.taylor_squared,
    "taylor_absolute": importances.taylor_absolute,
}
METHODS = ("prune", *IMPORTANCES)
LEARN_SHARE = 0.6
"""Of the images looked at: on these prune learns, on the others it scores."""

STANDS_IN = 0.1
"""Two units don't go together if one stands in for the other by more than this."""

COLUMNS = ("method", "removed", "parameters", "test loss", "test accuracy", "units")

Size = Callable[[Mapping[str, int]], int]


def remove_least(
    model: keras.Model, scores: Mapping[str, np.ndarray], target: int, size: Size
) -> None:
    """Removes the units of least importance until `target` parameters are reached.

    Args:
      model: a growable model, edited in place. The last unit of a site stays.
      scores: importance `[units]` by site.
      target: parameters wanted at most.
      size: widths -> parameters.
    """
    ranked = sorted(
        (score, site, unit) for site, mine in scores.items() for unit, score in enumerate(mine)
    )
    widths, going = training.open_widths(model), {name: [] for name in scores}
    for _, site, unit in ranked:
        if size(widths) <= target:
            break
        if widths[site] > 1:
            widths[site] -= 1
            going[site].append(unit)
    for site, units in going.items():
        if units:
            tfgrow.prune(model, site, units)


def remove_by_prune(model: keras.Model, data: Arrays, target: int, size: Size, seed: int) -> None:
    """Removes the units whose removal the estimate says costs least; see `remove_least`."""
    count = int(LEARN_SHARE * len(data[1]))
    x, y = data
    learn, score = batches((x[:count], y[:count])), batches((x[count:], y[count:]))
    while size(training.open_widths(model)) > target:
        estimator = tfgrow.GaussNewtonEstimator(model, seed=seed)
        candidates = tfgrow.candidates(model, "prune")
        if not candidates:
            raise ValueError(f"Nothing is left to remove at {model.count_params()} parameters.")
        learned = estimator.learn(candidates, learn, settle=len(learn))
        interaction = estimator.interaction(learned, score)
        chosen = choose(interaction, learned, training.open_widths(model), target, size)
        tfgrow.apply(model, [learned[row] for row in chosen])


def choose(
    interaction: tfgrow.Interaction,
    candidates: Sequence[tfgrow.Candidate],
    widths: Mapping[str, int],
    target: int,
    size: Size,
) -> list[int]:
    """Greedily, by marginal loss per parameter, until `target` is reached or nothing is left."""
    widths = dict(widths)
    slope, gram = interaction.linear.copy(), interaction.gram
    freed = np.array([-candidate.cost.params for candidate in candidates], dtype=float)
    sites = np.array([candidate.site.name for candidate in candidates])
    free, chosen = np.ones(len(candidates), dtype=bool), []
    while size(widths) > target:
        free &= np.array([widths[site] > 1 for site in sites])
        if not free.any():
            break
        price = np.where(free, (slope + 0.5 * np.diag(gram)) / freed, np.inf)
        pick = int(np.argmin(price))
        chosen.append(pick)
        widths[sites[pick]] -= 1
        slope += gram[:, pick]
        free[pick] = False
        mine = candidates[pick]
        for row in np.flatnonzero(free & (sites == sites[pick])).tolist():
            other = candidates[row]
            leans = mine.theta["share"][other.unit], other.theta["share"][mine.unit]
            free[row] = max(map(abs, leans)) <= STANDS_IN
    return chosen


def sizes(net: str, input_shape: Sequence[int], classes: int) -> Size:
    """Widths -> parameters of the network that has them."""

    @functools.cache
    def count(widths: tuple[int, ...]) -> int:
        return models.build(net, input_shape, classes, widths).count_params()

    return lambda widths: count(tuple(widths.values()))


def run_method(
    method: str, seed_model: keras.Model, looked_at: Arrays, test: Any, options: Any, size: Size
) -> list[dict[str, Any]]:
    """One row per share, of a copy of the network from which a method removes more and more."""
    model = tfgrow.convert(keras.Model(seed_model.inputs, seed_model.outputs))
    full, shares = model.count_params(), sorted(map(int, options.shares))
    rows = []
    for percent in sorted({*range(options.step, shares[-1], options.step), *shares}):
        model.compile(loss=training.LOSS, metrics=["accuracy"])
        target = int(full * (1 - percent / 100))
        if method == "prune":
            remove_by_prune(model, looked_at, target, size, options.seed)
        else:
            remove_least(model, IMPORTANCES[method](model, looked_at), target, size)
        if percent in shares:
            row = {"method": method, "removed": percent, **judge(model, test)}
            rows.append(row)
            print(f"{method}: {percent} % removed, test loss {row['loss']:.4f}", flush=True)
    return rows


def judge(model: keras.Model, test: Any) -> dict[str, Any]:
    """Size and figures of a network."""
    loss, accuracy = model.evaluate(test, verbose=0)
    widths = training.open_widths(model)
    return {
        "params": model.count_params(), "loss": float(loss), "accuracy": float(accuracy),
        "widths": list(widths.values()),
    }  # fmt: skip


def run(options: Any, data: datasets.Dataset) -> list[dict[str, Any]]:
    """Every method on the same network; writes and prints what came of it.

    Args:
      options: the values of the flags, as attributes.
      data: the dataset.

    Returns:
      The rows: the network as it was, then one per method and share.
    """
    folder = Path(options.output_dir)
    model = trained(options.net, data, options)
    model.compile(loss=training.LOSS, metrics=["accuracy"])
    test = data.as_dataset("test", training.EVALUATION_BATCH)
    size = sizes(options.net, data.input_shape, data.num_classes)
    order = np.random.default_rng(options.seed).permutation(len(data.y_train))[: options.samples]
    looked_at = data.x_train[order], data.y_train[order]
    rows = [{"method": "none", "removed": 0, **judge(model, test)}]
    for method in options.methods:
        rows += run_method(method, model, looked_at, test, options, size)
    with (folder / "removal.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows({**row, "widths": " ".join(map(str, row["widths"]))} for row in rows)
    settings = {name: getattr(options, name) for name in SETTINGS}
    (folder / "removal.json").write_text(json.dumps({**settings, "rows": rows}, indent=1))
    figures.plot_removal(rows, folder / "removal.png")
    tables.show(COLUMNS, [_cells(row) for row in sorted(rows, key=lambda row: row["removed"])])
    print(f"all figures: {folder / 'removal.csv'}, picture: {folder / 'removal.png'}")
    return rows


def _cells(row: Mapping[str, Any]) -> list[Any]:
    return [
        row["method"], f"{row['removed']} %", row["params"], f"{row['loss']:.4f}",
        f"{100 * row['accuracy']:.2f} %", ", ".join(map(str, row["widths"])),
    ]  # fmt: skip


def prepare(options: Any) -> datasets.Dataset:
    """The data, after everything that the flags name has been looked at.

    Raises:
      ValueError, ImportError, OSError: a setting that can't be, in words for the user.
    """
    if options.widths:
        models.parse_widths(options.widths)
    folder = Path(options.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / "removal.json").exists() and not options.overwrite:
        raise ValueError(
            f"'{folder}' holds an earlier run. Choose another --output_dir, or say --overwrite."
        )
    return datasets.load(options.dataset, options.data_dir, seed=options.seed)


SETTINGS = ("dataset", "net", "widths", "epochs", "samples", "shares", "step", "methods", "seed")


def define_flags(values: flags.FlagValues = flags.FLAGS) -> None:
    """Defines this binary's flags."""
    for name, default, text in (
        ("dataset", "digits", "digits, or an image classification dataset of TFDS."),
        ("data_dir", None, "Where TensorFlow Datasets keeps its data."),
        ("model_file", None, "A trained network: read if it exists, else written."),
        ("output_dir", "saved_models/removal", "Where the table and the picture go."),
    ):
        flags.DEFINE_string(name, default, text, flag_values=values)
    for name, number, text, least in (
        ("epochs", None, "Epochs of training before; by default 6, 40 on digits.", 0),
        ("samples", 5120, "Training images that the methods look at.", 10),
        ("step", 5, "Percent of the parameters that go before a method looks anew.", 1),
        ("seed", 0, "Of everything random.", 0),
    ):
        flags.DEFINE_integer(name, number, text, least, flag_values=values)
    flags.DEFINE_enum("net", "vgg", NETS, "The network.", flag_values=values)
    flags.DEFINE_list("widths", None, "Units per layer; default by image size.", flag_values=values)
    flags.DEFINE_list("shares", ["10", "30", "50"], "Percent to remove.", flag_values=values)
    flags.DEFINE_list("methods", list(METHODS), f"Some of {METHODS}.", flag_values=values)
    flags.DEFINE_bool("overwrite", False, "Replace an earlier run.", flag_values=values)

    @flags.validator("methods", f"expected some of {', '.join(METHODS)}", flag_values=values)
    def _known(methods):
        return bool(methods) and set(methods) <= set(METHODS)

    @flags.validator("shares", "expected whole percents from 1 to 99", flag_values=values)
    def _percents(shares):
        return bool(shares) and all(s.isdigit() and 0 < int(s) < 100 for s in shares)


def main(argv: list[str]) -> None:
    """Entry point; see the module's docstring."""
    if len(argv) > 1:
        raise app.UsageError(f"Unknown arguments: {argv[1:]}. Flags start with --.")
    # Every smaller network is traced on purpose; TensorFlow takes that for a mistake.
    tf.get_logger().setLevel("ERROR")
    quiet_logs()
    with in_words("experiments.removal"):
        data = prepare(flags.FLAGS)
    training.make_repeatable(flags.FLAGS.seed)
    run(flags.FLAGS, data)


if __name__ == "__main__":
    define_flags()
    app.run(main)
