r"""Do badly chosen widths mend themselves? One network in two shapes of as many parameters.

    python -m experiments.reallocate --data_dir=$HOME/tensorflow_datasets

--good are well-chosen widths, --bad have a starved layer and a bloated one. Both networks train for
--before epochs, in which the learning rate falls to 0, and for --after more, in which it does so
again. For every seed, three cells:

* `bad`: the bad widths all the way;
* `reallocated`: the same until --before; then, and every --every epochs from then on, an oracle may
  edit it within the parameters that the network has, in up to --rounds events at a time;
* `good`: the well-chosen widths all the way.

The recovered share is `(reallocated - bad) / (good - bad)`, in test accuracy. Each cell runs in a
process of its own with --threads threads, and writes one JSON file under --results_dir when it has
ended; a cell whose file exists is not run again.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from absl import app, flags

from experiments._flags import are_whole
from experiments._messages import in_words, quiet_logs
from experiments.cells import Cell, begin, finish, in_fresh_process, load

os.environ.setdefault("KERAS_BACKEND", "tensorflow")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

MODELS = ("vgg", "mlp", "vgg_no_bn", "vgg_gelu")
ARMS = ("bad", "reallocated", "good")
EQUAL_TO = 0.02
"""Share by which the parameters of the two shapes may differ."""

Results = Mapping[tuple[str, int], Mapping[str, Any]]


def run_cell(cell: Cell) -> dict[str, Any]:
    """Trains one cell and writes its file; meant for a fresh process."""
    data = begin(cell)
    from experiments import training

    settings = cell.settings
    recipe = training.Recipe(
        epochs=settings["before"] + settings["after"],
        restart=settings["before"],
        seed=cell.seed,
        **{name: settings[name] for name in ("batch_size", "learning_rate", "optimizer")},
    )
    widths = settings["good" if cell.arm == "good" else "bad"]
    model = training.seed_network(settings["model"], data, widths, cell.seed)
    if cell.arm == "reallocated":
        growing = _growing(settings, model.count_params())
        oracle = training.make_oracle(growing, cell.seed)
        trained = training.train_growing(model, data, recipe, growing, oracle)
    else:
        trained = training.train(model, data, recipe)
    return finish(cell, trained, recipe.epochs)


def _growing(settings: Mapping[str, Any], params: int) -> Any:
    from experiments import training

    names = ("new_units", "growth_per_step", "curvature")
    oracle = {name: settings[name] for name in names}
    oracle |= {"morphisms": settings["morphisms"], "max_params": params}
    share = settings["settle"] / (settings["before"] + settings["after"])
    return training.Growing(
        "every", settings["every"], share, oracle, settings["before"], settings["rounds"]
    )


def recovered(bad: float, reallocated: float, good: float) -> float:
    """Share of the gap between the bad and the good that is closed; NaN without a gap.

    Example:

    >>> from experiments import reallocate
    >>> round(reallocate.recovered(0.5, 0.56, 0.6), 3)
    0.6
    """
    return (reallocated - bad) / (good - bad) if good > bad else float("nan")


def check_sizes(settings: Mapping[str, Any]) -> None:
    """Raises ValueError if the two shapes are no fair match.

    Args:
      settings: the flags.
    """
    from experiments import datasets, models

    # The sizes follow from the images alone; how many of them are read doesn't matter.
    data = datasets.load(settings["dataset"], settings["data_dir"], max_train=settings["max_train"])
    counts = {
        name: models.build(
            settings["model"], data.input_shape, data.num_classes, settings[name]
        ).count_params()
        for name in ("good", "bad")
    }
    if abs(counts["bad"] - counts["good"]) > EQUAL_TO * counts["good"]:
        raise ValueError(
            f"--good and --bad should have equally many parameters, to within {EQUAL_TO:.0%}. "
            f"Found: {counts}. Change a width of either."
        )


def show(results: Results, seeds: Sequence[int]) -> None:
    """Prints the events of every seed, the three arms side by side, and what was recovered."""
    from experiments import tables

    tables.show(
        ("seed", "after epoch", "", "widths", "parameters", "estimated", "measured"),
        [
            [seed, *_event_cells(event)]
            for seed in seeds
            for event in results["reallocated", seed]["events"]
        ],
    )
    print()
    tables.show(
        ("seed", "network", "widths at the end", "parameters", "validation", "test", "seconds"),
        [
            [seed, arm, *_arm_cells(results[arm, seed])]
            for seed in seeds
            for arm in ARMS
        ],
    )  # fmt: skip
    print()
    shares = [
        recovered(*(results[arm, seed]["test_accuracy"] for arm in ARMS)) for seed in seeds
    ]  # fmt: skip
    means = {
        arm: sum(results[arm, seed]["test_accuracy"] for seed in seeds) / len(seeds) for arm in ARMS
    }
    tables.show(
        ("test accuracy", "mean and standard deviation"),
        [
            [
                arm,
                tables.mean_std(
                    [results[arm, seed]["test_accuracy"] for seed in seeds], scale=100, unit=" %"
                ),
            ]
            for arm in ARMS
        ],
    )
    by_seed = ", ".join(f"{share:.0%}" for share in shares)
    print(f"recovered of the gap: {recovered(*means.values()):.0%} of the means; by seed {by_seed}")


def _event_cells(event: Mapping[str, Any]) -> list[Any]:
    widths = " ".join(f"{name} {old}->{new}" for name, (old, new) in event["widths"].items())
    changes = [event["estimated_change"], event["measured_change"]]
    texts = ["-" if change is None else f"{change:+.4f}" for change in changes]
    size = f"{event['params_before']:,} -> {event['params_after']:,}"
    return [event["epoch"], event["status"], widths, size, *texts]


def _arm_cells(cell: Mapping[str, Any]) -> list[Any]:
    return [
        ", ".join(map(str, cell["widths"].values())),
        cell["params"],
        f"{100 * cell['history']['val_accuracy'][-1]:.2f} %",
        f"{100 * cell['test_accuracy']:.2f} %",
        f"{cell['seconds']:.0f}",
    ]


SETTINGS = (
    "dataset", "data_dir", "max_train", "model", "good", "bad", "seeds", "before", "after", "every",
    "rounds", "morphisms", "settle", "growth_per_step", "new_units", "curvature", "batch_size",
    "learning_rate", "optimizer", "threads", "results_dir",
)  # fmt: skip


def define_flags(values: flags.FlagValues = flags.FLAGS) -> None:
    """Defines this binary's flags."""
    for name, default, text in (
        ("dataset", "cifar10", "digits, or a TensorFlow Datasets name."),
        ("data_dir", None, "Where TensorFlow Datasets keeps its data."),
        ("results_dir", "experiments/results/reallocate", "Where the cells are kept."),
    ):
        flags.DEFINE_string(name, default, text, flag_values=values)
    for name, number, text, least in (
        ("max_train", 15_000, "Training images used, at most.", 100),
        ("seeds", 2, "Number of seeds: 0, 1, ...", 1),
        ("before", 5, "Epochs before the first event, the learning rate falling to 0.", 1),
        ("after", 5, "Epochs afterwards, in which it does so again.", 1),
        ("every", 5, "Epochs from one moment of growth to the next.", 1),
        ("rounds", 8, "Events at a time, at most.", 1),
        ("settle", 1, "Epochs at the end without an event.", 0),
        ("new_units", 8, "New units tried per layer and event.", 1),
        ("batch_size", 128, "Images per training step.", 1),
        ("threads", 2, "Threads of TensorFlow within an operation.", 1),
    ):
        flags.DEFINE_integer(name, number, text, least, flag_values=values)
    flags.DEFINE_float("learning_rate", 3e-3, "At the start.", 1e-9, flag_values=values)
    flags.DEFINE_float(
        "growth_per_step", 0.3, "Most parameters an event adds, relative to those before.", 0,
        flag_values=values,
    )  # fmt: skip
    flags.DEFINE_enum("model", "vgg", MODELS, "The network.", flag_values=values)
    flags.DEFINE_enum(
        "curvature", "sampled", ("auto", "exact", "sampled", "empirical"),
        "Curvature of the estimates.", flag_values=values,
    )  # fmt: skip
    flags.DEFINE_enum(
        "optimizer", "adam", ("adam", "adamw", "rmsprop", "sgd"), "Optimizer.", flag_values=values
    )
    flags.DEFINE_list("morphisms", ["add", "prune"], "Kinds of edits.", flag_values=values)
    for name, widths, how in (("good", "8,8,16,16", "well"), ("bad", "8,1,8,49", "badly")):
        flags.DEFINE_list(name, widths, f"Units per layer, {how} chosen.", flag_values=values)

        @flags.validator(name, "expected whole numbers >= 1 such as 4,4,8,8.", flag_values=values)
        def _widths(found):
            return bool(found) and are_whole(found)


def settings_of(options: Any) -> dict[str, Any]:
    """The values of the flags, widths as numbers."""
    settings = {name: getattr(options, name) for name in SETTINGS}
    return settings | {name: [int(text) for text in settings[name]] for name in ("good", "bad")}


def main(arguments: list[str]) -> None:
    """Runs the cells that are missing, seed by seed, and prints all."""
    if len(arguments) > 1:
        raise app.UsageError(f"Unexpected arguments {arguments[1:]}; settings are --flags.")
    quiet_logs()
    settings, seeds = settings_of(flags.FLAGS), range(flags.FLAGS.seeds)
    cells = [Cell(arm, seed, settings) for seed in seeds for arm in ARMS]
    results: dict[tuple[str, int], dict[str, Any]] = {}
    with in_words("experiments.reallocate"):
        check_sizes(settings)
        finished = {(cell.arm, cell.seed): load(cell) for cell in cells}
        for cell in cells:
            print(f"{cell.arm}, seed {cell.seed}: {cell.path}", flush=True)
            done = finished[cell.arm, cell.seed]
            results[cell.arm, cell.seed] = done or in_fresh_process(run_cell, cell)
    show(results, seeds)


if __name__ == "__main__":
    define_flags()
    app.run(main)
