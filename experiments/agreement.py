r"""Do scores point where capacity is missing? What is estimated beside what training makes of it.

    python -m experiments.agreement --data_dir=$HOME/tensorflow_datasets
    python -m experiments.agreement --dataset=digits --shapes=3-6-3-6 --epochs=10 --after=4

Each layer of a network is widened by as many units as --spend of its parameters pay for, and every
one of these networks is trained from the start. How much lower their validation loss is says where
capacity is missing. Beside it stands what new units of each layer would bring at the network as it
is after --after epochs: now, and beyond what training its weights would bring (`settled`, once and
twice; see `GaussNewtonEstimator.settle`); and what the units that are there would be missed by, on
average (`worth`). The rank correlation of the two is what a score is good for: counted by the unit,
and by the parameter.

Every training is a cell in a process of its own, kept under --results_dir; --docs is a page of what
they say.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import app, flags

from experiments._flags import are_whole
from experiments._messages import in_words, quiet_logs
from experiments.cells import begin, in_fresh_process, load, recipe_of

os.environ.setdefault("KERAS_BACKEND", "tensorflow")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

BASE, SCORES = "base", "scores"
SETTLED = ("now", "settled", "settled twice")
WORTH = "worth"
NAMES = (*SETTLED, WORTH)
COMMON = (
    "dataset", "model", "data_dir", "max_train", "epochs", "after", "spend", "new_units", "steps",
    "batch_size", "learning_rate", "optimizer", "threads", "results_dir",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Cell:
    """One training.

    Attributes:
      shape: units per layer of the network that is looked at.
      what: `"base"` (that network), `"scores"`, or the number of the layer that is widened.
      seed: of everything random.
      settings: the flags.
    """

    shape: tuple[int, ...]
    what: str
    seed: int
    settings: Mapping[str, Any]

    @property
    def path(self) -> Path:
        """The cell's file."""
        shape = "-".join(map(str, self.shape))
        folder = f"{self.settings['dataset'].replace('/', '-')}-{self.settings['model']}-{shape}"
        return Path(self.settings["results_dir"]) / folder / f"{self.what}-seed{self.seed}.json"

    @property
    def key(self) -> dict[str, Any]:
        """The settings that a finished cell must agree with to count."""
        places = ("data_dir", "results_dir", "threads")
        return {name: value for name, value in self.settings.items() if name not in places}


def run_cell(cell: Cell) -> dict[str, Any]:
    """Trains one network and writes the cell's file; meant for a fresh process."""
    data = begin(cell)
    from experiments import reports, training

    settings = cell.settings
    recipe = recipe_of(cell, settings["epochs"])
    if cell.what == SCORES:
        recipe = dataclasses.replace(recipe, epochs=settings["after"], decay="constant")
    widths = list(cell.shape)
    if cell.what.isdigit():
        widths[int(cell.what)] += units_for(cell, data)[int(cell.what)]
    model = training.seed_network(settings["model"], data, widths, cell.seed)
    trained = training.train(model, data, recipe)
    result: dict[str, Any] = {
        "settings": cell.key,
        "params": model.count_params(),
        "val_loss": trained.history["val_loss"][-1],
        "val_accuracy": trained.history["val_accuracy"][-1],
    }
    if cell.what == SCORES:
        result |= {"units": units_for(cell, data), "scores": scores_of(model, data, cell)}
    reports.write_json(cell.path, result)
    return result


def units_for(cell: Cell, data: Any) -> list[int]:
    """How many units of each layer cost about a share --spend of the network's parameters."""
    from experiments import training

    def params(widths: Sequence[int]) -> int:
        return training.params_of(cell.settings["model"], data, widths)

    base = params(cell.shape)
    wider = [
        params([*cell.shape[:i], n + 1, *cell.shape[i + 1 :]]) for i, n in enumerate(cell.shape)
    ]
    return [max(1, round(cell.settings["spend"] * base / (more - base))) for more in wider]


def scores_of(model: Any, data: Any, cell: Cell) -> dict[str, list[float]]:
    """By how often the weights were settled: what the best new unit of each layer would bring.

    And what a unit of each layer is worth.
    """
    import tfgrow
    from experiments import training

    settings = cell.settings
    sites = list(training.open_widths(model))
    batches = list(data.as_dataset("train", settings["batch_size"], seed=cell.seed + 1))
    first, second, judge_on = (batches[part::3] for part in range(3))
    estimator = tfgrow.GaussNewtonEstimator(model, curvature="sampled", seed=cell.seed)
    found = {}
    for name in SETTLED:
        if name != SETTLED[0]:
            estimator.settle(first, second)
        every = tfgrow.candidates(model, "add", new_units=settings["new_units"], seed=cell.seed)
        learned = estimator.learn(every, [*first, *second], settings["steps"])
        gains = -estimator.interaction(learned, judge_on).scores
        found[name] = [max(some) for some in _by_site(gains, learned, sites)]
    worth = estimator.worth(first, judge_on, sites)
    most = max((units.mean() for units in worth.values()), default=0.0)  # a lone unit's, as it were
    found[WORTH] = [float(np.mean(worth.get(site, most))) for site in sites]
    return found


def _by_site(values: Any, candidates: Sequence[Any], sites: Sequence[str]) -> list[list[float]]:
    """What is said of some candidates, site by site."""
    return [
        [float(v) for v, one in zip(values, candidates, strict=True) if one.site.name == site]
        for site in sites
    ]


COLUMNS = ("network", "seeds", "score", "by the unit", "by the parameter")


def rows_of(results: Mapping[tuple[int, ...], Mapping[int, Mapping[str, Any]]]) -> list[list[Any]]:
    """A line per network and score: Spearman's correlation with what training made of it.

    Args:
      results: by shape and seed, cells by `Cell.what`.
    """
    from experiments.measures import spearman

    rows = []
    for shape, by_seed in results.items():
        truth = np.mean([true_gains(cells, len(shape)) for cells in by_seed.values()], axis=0)
        seeds = list(by_seed.values())
        units = np.array(seeds[0][SCORES]["units"])
        for name in NAMES:
            scores = np.mean([cells[SCORES]["scores"][name] for cells in seeds], axis=0)
            matches = (spearman(scores, truth), spearman(scores * units, truth))
            rows.append(
                ["-".join(map(str, shape)), len(seeds), name, *(f"{m:+.2f}" for m in matches)]
            )
    return rows


def true_gains(cells: Mapping[str, Any], layers: int) -> list[float]:
    """How much lower the validation loss gets by widening each layer."""
    base = cells[BASE]["val_loss"]
    return [base - cells[str(number)]["val_loss"] for number in range(layers)]


GAINS = ("network", "layer", "units more", "lower validation loss", *NAMES)


def gains_of(results: Mapping[tuple[int, ...], Mapping[int, Mapping[str, Any]]]) -> list[list[Any]]:
    """A line per layer: what training made of it, and what a unit was estimated to bring."""
    from experiments import tables

    rows = []
    for shape, by_seed in results.items():
        truth = [true_gains(cells, len(shape)) for cells in by_seed.values()]
        scores = [cells[SCORES] for cells in by_seed.values()]
        for number, units in enumerate(scores[0]["units"]):
            estimated = [
                tables.mean_std([one["scores"][name][number] for one in scores], 4)
                for name in NAMES
            ]
            true = tables.mean_std([one[number] for one in truth], 4)
            rows.append(["-".join(map(str, shape)), number + 1, f"+{units}", true, *estimated])
    return rows


PAGE = """# Do scores point where capacity is missing?

Made by `python -m experiments.agreement` from its cells; don't edit by hand.

Each layer of a network is widened until the network has {spend:.0%} more parameters, and trained
from the start ({epochs} epochs of {dataset}): by how much lower its validation loss is than that of
the network itself says where capacity is missing. Beside it stands what can be known of the network
after {after} epochs. `now`: by how much the loss would fall at once by the best of {new_units} new
units. `settled`: the same beyond what a Gauss-Newton step of the weights there are would bring,
taken once or twice. `worth`: by how much the loss would rise if one of the layer's units went, the
others standing in for it, on average, with the gradient left out. All are by the unit.

{gains}

Spearman's rank correlation of these with what training made of it, by the unit and for equally many
parameters in every layer:

{correlations}
"""


def write_page(path: str, results: Mapping[tuple[int, ...], Mapping[int, Any]]) -> None:
    """Writes both tables as Markdown."""
    from experiments import tables

    settings = next(iter(next(iter(results.values())).values()))[BASE]["settings"]
    text = PAGE.format(
        **settings,
        gains=tables.markdown(GAINS, gains_of(results)),
        correlations=tables.markdown(COLUMNS, rows_of(results)),
    )
    tables.write_page(path, text)


def define_flags(values: flags.FlagValues = flags.FLAGS) -> None:
    """Defines this binary's flags."""
    flags.DEFINE_list(
        "shapes", ["8-8-16-16-32-32", "20-5-20-8-24-16"], "Networks: units per layer, by dashes.",
        flag_values=values,
    )  # fmt: skip

    @flags.validator("shapes", "expected shapes such as 8-8-16-16.", flag_values=values)
    def _shapes(found):
        return bool(found) and all(are_whole(text.split("-")) for text in found)

    for name, text_default, text in (
        ("dataset", "cifar10", "digits, or a TensorFlow Datasets name."),
        ("model", "vgg", "A network of experiments.models."),
        ("data_dir", None, "Where TensorFlow Datasets keeps its data."),
        ("results_dir", "experiments/results/agreement", "Where the cells are kept."),
        ("optimizer", "adam", "Optimizer."),
        ("docs", "docs/agreement.md", "The page to write; empty for none."),
    ):
        flags.DEFINE_string(name, text_default, text, flag_values=values)
    for name, number, text, least in (
        ("max_train", 10_000, "Training images used, at most.", 100),
        ("seeds", 2, "Number of seeds: 0, 1, ...", 1),
        ("epochs", 12, "Epochs of every network.", 1),
        ("after", 6, "Epochs after which the scores are taken.", 1),
        ("new_units", 4, "New units tried per layer.", 1),
        ("steps", 8, "Learning steps of theta.", 1),
        ("batch_size", 64, "Images per training step.", 1),
        ("threads", 2, "Threads of TensorFlow within an operation.", 1),
    ):
        flags.DEFINE_integer(name, number, text, least, flag_values=values)
    for name, amount, text in (
        ("learning_rate", 3e-3, "At the start; it falls to 0, but not for the scores."),
        ("spend", 0.4, "Parameters that a layer gets, relative to those of the network."),
    ):
        flags.DEFINE_float(name, amount, text, 1e-9, flag_values=values)


def cells_of(options: Any) -> list[Cell]:
    """All trainings, seed by seed."""
    settings = {name: getattr(options, name) for name in COMMON}
    shapes = [tuple(int(part) for part in text.split("-")) for text in options.shapes]
    return [
        Cell(shape, what, seed, settings)
        for seed in range(options.seeds)
        for shape in shapes
        for what in (BASE, SCORES, *map(str, range(len(shape))))
    ]


def main(arguments: list[str]) -> None:
    """Runs the cells that are missing and prints what all say."""
    if len(arguments) > 1:
        raise app.UsageError(f"Unexpected arguments {arguments[1:]}; settings are --flags.")
    quiet_logs()
    from experiments import tables
    from experiments.progress import Progress

    with in_words("experiments.agreement"):
        cells = cells_of(flags.FLAGS)
        finished = [load(cell) for cell in cells]
        progress, results = Progress("networks"), {}
        for number, (cell, done) in enumerate(zip(cells, finished, strict=True)):
            found = done or in_fresh_process(run_cell, cell)
            results.setdefault(cell.shape, {}).setdefault(cell.seed, {})[cell.what] = found
            progress(number + 1, len(cells))
    tables.show(GAINS, gains_of(results))
    tables.show(COLUMNS, rows_of(results))
    if flags.FLAGS.docs:
        write_page(flags.FLAGS.docs, results)


if __name__ == "__main__":
    define_flags()
    app.run(main)
