r"""Where do estimates get poor? By depth, with and without residual connections, early and late.

    python -m experiments.depth --data_dir=$HOME/tensorflow_datasets
    python -m experiments.depth --dataset=digits --depths=4,8 --epochs=2,10

For every depth and family a network is trained; after so many epochs as --epochs says, splits and
new units at --places sites spread over the depth are learned, estimated by exact curvature on
samples that nothing was learned on, and held against the really expanded network: each alone, and
all at once, at the lengths that are best together. `realized` is the measured over the estimated
change of the latter, as in an event of growth (`GrowthEvent.realized`).

Each network is trained in a process of its own, and writes one JSON file under --results_dir when
it has ended; one whose file exists is not run again. All of them make up the page --docs.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import app, flags

from experiments._messages import in_words, quiet_logs
from experiments.cells import begin, in_fresh_process, load

os.environ.setdefault("KERAS_BACKEND", "tensorflow")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

FAMILIES = ("plain", "residual")
MODELS = {"plain": "vgg", "residual": "resnet"}
KINDS = ("split", "add")
COMMON = (
    "dataset", "data_dir", "max_train", "width", "epochs", "places", "samples", "steps",
    "learning_rate", "batch_size", "threads", "results_dir",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Cell:
    """One network.

    Attributes:
      depth: number of convolutions, shortcuts and stem left out.
      family: one of `FAMILIES`.
      seed: of the network and everything else random.
      settings: the flags.
    """

    depth: int
    family: str
    seed: int
    settings: Mapping[str, Any]

    @property
    def path(self) -> Path:
        """The cell's file."""
        name = f"{self.family}-{self.depth}-seed{self.seed}.json"
        return Path(self.settings["results_dir"]) / name

    @property
    def key(self) -> dict[str, Any]:
        """The settings that a finished cell must agree with to count."""
        places = ("data_dir", "results_dir", "threads")
        return {name: value for name, value in self.settings.items() if name not in places}


def widths_of(family: str, depth: int, width: int) -> list[int]:
    """Of a network of `experiments.models`; its residual blocks hold two convolutions each."""
    return [width] * (depth if family == "plain" else depth // 2)


def run_cell(cell: Cell) -> dict[str, Any]:
    """Trains one network, examines it on the way, and writes its file; for a fresh process."""
    data = begin(cell)
    from experiments import reports, training

    settings = cell.settings
    widths = widths_of(cell.family, cell.depth, settings["width"])
    model = training.seed_network(MODELS[cell.family], data, widths, cell.seed)
    model.compile(
        training.OPTIMIZERS["adam"](settings["learning_rate"]), training.LOSS, metrics=["accuracy"]
    )
    batches = data.as_dataset("train", settings["batch_size"], seed=cell.seed)
    readings, done = [], 0
    for epochs in settings["epochs"]:
        model.fit(batches, epochs=epochs, initial_epoch=done, shuffle=False, verbose=0)
        done = epochs
        readings.append({"epochs": epochs, **examine(model, data, settings, cell.seed)})
        print(f"{cell.path.stem}: {readings[-1]}", flush=True)
    result = {
        "depth": cell.depth, "family": cell.family, "seed": cell.seed, "settings": cell.key,
        "params": model.count_params(), "readings": readings,
    }  # fmt: skip
    reports.write_json(cell.path, result)
    return result


def examine(model: Any, data: Any, settings: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """Estimates beside truths, of single edits and of all of them at once.

    Args:
      model: a trained growable network.
      data: whose training images are parted in two: to learn on, and to judge by.
      settings: `places`, `samples`, `steps`.
      seed: of that.
    """
    import numpy as np

    import tfgrow
    from experiments.fidelity import disjoint
    from tfgrow.morphisms.registry import at_lengths

    learn_on, judge_on = disjoint(data.x_train, data.y_train, settings["samples"], seed)
    chosen = [c for kind in KINDS for c in picked(model, kind, settings["places"], seed)]
    estimator = tfgrow.GaussNewtonEstimator(model, curvature="exact", seed=seed)
    learned = estimator.learn(chosen, learn_on, settings["steps"])
    interaction = estimator.interaction(learned, judge_on)
    lengths = interaction.best_lengths(least=0.0, most=1.0)
    some = np.flatnonzero(lengths)
    together = at_lengths([learned[i] for i in some], lengths[some])
    single = [
        tfgrow.measure_change(model, candidate, judge_on, in_place=True) for candidate in learned
    ]
    return {
        "loss": estimator.loss(judge_on),
        "kinds": [candidate.morphism for candidate in learned],
        "sites": [candidate.site.name for candidate in learned],
        "estimated": interaction.scores.tolist(),
        "true": single,
        "estimated together": estimator.joint_change(together, judge_on),
        "true together": tfgrow.measure_change(model, together, judge_on, in_place=True),
    }


def picked(model: Any, kind: str, places: int, seed: int) -> list[Any]:
    """One edit of a kind at each of some sites, spread evenly over the depth."""
    import numpy as np

    import tfgrow

    sites = [site.name for site in tfgrow.find_sites(model) if site.blocked is None]
    at = np.unique(np.linspace(0, len(sites) - 1, places).round().astype(int))
    every = tfgrow.candidates(model, kind, [sites[i] for i in at], new_units=1, seed=seed)
    first = {candidate.site.name: candidate for candidate in reversed(every)}
    return [first[sites[i]] for i in at]


COLUMNS = (
    "family", "depth", "epochs", "seeds", "loss", "split: Pearson", "split: median error",
    "add: Pearson", "add: median error", "all at once: realized",
)  # fmt: skip


def rows_of(results: Sequence[Mapping[str, Any]]) -> list[list[Any]]:
    """A line per family, depth and number of epochs, over the seeds."""
    from experiments import tables
    from experiments.measures import agreement

    found: dict[tuple[str, int, int], list[Mapping[str, Any]]] = {}
    for result in results:
        for reading in result["readings"]:
            place = result["family"], result["depth"], reading["epochs"]
            found.setdefault(place, []).append(reading)
    rows = []
    for place, readings in sorted(found.items()):
        line: list[Any] = [*place, len(readings)]
        line.append(tables.mean_std([reading["loss"] for reading in readings], 3))
        for kind in KINDS:
            pairs = [
                (estimated, true)
                for reading in readings
                for name, estimated, true in zip(
                    reading["kinds"], reading["estimated"], reading["true"], strict=True
                )
                if name == kind
            ]
            match = agreement(*zip(*pairs, strict=True))
            line += [f"{match.pearson:.3f}", f"{match.median_relative_error:.0%}"]
        shares = [r["true together"] / r["estimated together"] for r in readings]
        rows.append([*line, tables.mean_std(shares, 2)])
    return rows


PAGE = """# Estimates against depth

Made by `python -m experiments.depth` from `experiments/results/depth`; don't edit by hand.

Networks of {width} units per layer (VGG) or block (with residual connections) are trained on
{max_train:,} images of {dataset}. After so many epochs as the table says, a split and a new unit at
{places} sites spread over the depth are learned, and estimated on {samples:,} images that nothing
was learned on. Beside the estimates stands what really expanding the network changes: of each edit
alone (correlation, and median relative error), and of all of them at once, at the lengths that are
best together (`realized` is the measured over the estimated change, as in `GrowthEvent.realized`).

{table}

![Measured over estimated change, against depth](images/depth.png)

`tfgrow.callbacks.Growth` warns of an event that realizes less than {doubtful:.0%} of what was
estimated, if that was more than {relevant:.0%} of the loss. Every event says it, in the journal and
in `growth.events`.
"""


def write_page(path: str, results: Sequence[Mapping[str, Any]]) -> list[Path]:
    """Writes the page and its picture."""
    from experiments import figures, tables
    from tfgrow.callbacks import DOUBTFUL, RELEVANT

    rows = [
        {
            "family": result["family"],
            "depth": result["depth"],
            "epochs": reading["epochs"],
            "realized": reading["true together"] / reading["estimated together"],
        }
        for result in results
        for reading in result["readings"]
    ]
    text = PAGE.format(
        **results[0]["settings"],
        table=tables.markdown(COLUMNS, rows_of(results)),
        doubtful=DOUBTFUL,
        relevant=RELEVANT,
    )
    picture = figures.plot_realized(rows, Path(path).parent / "images" / "depth.png")
    return [tables.write_page(path, text), picture]


def define_flags(values: flags.FlagValues = flags.FLAGS) -> None:
    """Defines this binary's flags."""
    for name, text_default, text in (
        ("dataset", "cifar10", "digits, or a TensorFlow Datasets name."),
        ("data_dir", None, "Where TensorFlow Datasets keeps its data."),
        ("results_dir", "experiments/results/depth", "Where the cells are kept."),
        ("docs", "docs/depth.md", "The page to write; empty for none."),
    ):
        flags.DEFINE_string(name, text_default, text, flag_values=values)
    for name, numbers, text in (
        ("depths", ["8", "14", "20", "30"], "Numbers of convolutions."),
        ("epochs", ["1", "8"], "After which the network is examined, in order."),
    ):
        flags.DEFINE_list(name, numbers, text, flag_values=values)

        @flags.validator(name, "expected whole numbers >= 2 in order.", flag_values=values)
        def _in_order(found, least=2 if name == "depths" else 1):
            whole = bool(found) and all(text.strip().isdigit() for text in found)
            numbers = [int(text) for text in found] if whole else []
            return whole and numbers[0] >= least and numbers == sorted(set(numbers))

    flags.DEFINE_list("families", list(FAMILIES), "plain, residual.", flag_values=values)

    @flags.validator("families", "expected plain, residual or both.", flag_values=values)
    def _known(found):
        return bool(found) and set(found) <= set(FAMILIES)

    for name, number, text, least in (
        ("max_train", 10_000, "Training images used, at most.", 100),
        ("seeds", 2, "Number of seeds: 0, 1, ...", 1),
        ("width", 8, "Units of every layer or block.", 1),
        ("places", 8, "Sites examined, spread over the depth.", 2),
        ("samples", 1024, "Images that estimates and truth are taken on.", 1),
        ("steps", 24, "Learning steps of theta.", 1),
        ("batch_size", 128, "Images per training step.", 1),
        ("threads", 2, "Threads of TensorFlow within an operation.", 1),
    ):
        flags.DEFINE_integer(name, number, text, least, flag_values=values)
    flags.DEFINE_float("learning_rate", 3e-3, "Of training.", 1e-9, flag_values=values)


def cells_of(options: Any) -> list[Cell]:
    """All networks that the flags ask for."""
    settings = {name: getattr(options, name) for name in COMMON}
    settings["epochs"] = [int(text) for text in settings["epochs"]]
    return [
        Cell(int(depth), family, seed, settings)
        for seed in range(options.seeds)
        for depth in options.depths
        for family in options.families
    ]


def main(arguments: list[str]) -> None:
    """Runs the cells that are missing, and lays out all."""
    if len(arguments) > 1:
        raise app.UsageError(f"Unexpected arguments {arguments[1:]}; settings are --flags.")
    quiet_logs()
    from experiments.progress import Progress

    with in_words("experiments.depth"):
        cells = cells_of(flags.FLAGS)
        finished = [load(cell) for cell in cells]
        progress, results = Progress("networks"), []
        for number, (cell, done) in enumerate(zip(cells, finished, strict=True)):
            results.append(done or in_fresh_process(run_cell, cell))
            progress(number + 1, len(cells))
    from experiments import tables

    tables.show(COLUMNS, rows_of(results))
    if flags.FLAGS.docs:
        write_page(flags.FLAGS.docs, results)


if __name__ == "__main__":
    define_flags()
    app.run(main)
