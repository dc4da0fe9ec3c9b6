r"""Does growing pay? A grown network against its own final shape, trained from scratch.

    python -m experiments.pays --data_dir=$HOME/tensorflow_datasets

For every seed, three cells:

* `grown`: from the seed network to the budget, in --epochs epochs;
* `same_epochs`: the final widths of `grown` from scratch, for as many epochs;
* `same_time`: the same from scratch, for as many seconds as `grown` took, by the clock.

Each cell runs in a process of its own with --threads threads, and writes one JSON file under
--results_dir when it has ended; a cell whose file exists is not run again. All cells have the same
recipe, and a learning rate that falls to 0 over their own epochs or seconds.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from absl import app, flags

from experiments._flags import SCORES, are_whole
from experiments._messages import in_words, quiet_logs
from experiments.cells import ARMS, Cell, in_fresh_process, load, run_cell

os.environ.setdefault("KERAS_BACKEND", "tensorflow")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

# Networks whose widths that can grow are exactly those that `models.build` takes.
MODELS = ("vgg", "mlp", "resnet", "vgg_no_bn", "vgg_gelu")

FLAGS = flags.FLAGS
flags.DEFINE_string("dataset", "cifar10", "digits, or a TensorFlow Datasets name.")
flags.DEFINE_string("data_dir", None, "Where TensorFlow Datasets keeps its data.")
flags.DEFINE_enum("model", "vgg", MODELS, "Seed network of experiments.models.")
flags.DEFINE_list("widths", None, "Units per layer of the seed network (default: the model's own).")
flags.DEFINE_bool("augment", False, "Shift (and mirror, if coloured) the training images.")
flags.DEFINE_integer("seeds", 3, "Number of seeds: 0, 1, ...", lower_bound=1)
flags.DEFINE_integer("max_params", 40_000, "Most parameters of the grown network.", lower_bound=1)
flags.DEFINE_integer("epochs", 20, "Epochs of the grown network.", lower_bound=2)
flags.DEFINE_integer("every", 2, "Epochs from one growth to the next.", lower_bound=1)
flags.DEFINE_float(
    "settle", 0.3, "Share of the epochs, at the end, without growth.", lower_bound=0, upper_bound=1
)
flags.DEFINE_float(
    "growth_per_step", 0.5, "Most parameters a step adds, relative to those before.", lower_bound=0
)
flags.DEFINE_list("morphisms", ["split", "add"], "Kinds of edits to consider.")
flags.DEFINE_integer("new_units", 4, "New units tried per layer and step.", lower_bound=1)
flags.DEFINE_enum(
    "curvature", "sampled", ("auto", "exact", "sampled", "empirical"), "Curvature of the estimates."
)
flags.DEFINE_enum(
    "score", "raw", SCORES, "What the oracle goes by."
)  # of the committed cells, not the oracle's default
flags.DEFINE_integer("batch_size", 128, "Images per training step.", lower_bound=1)
flags.DEFINE_float("learning_rate", 3e-3, "Learning rate at the start.", lower_bound=1e-9)
flags.DEFINE_enum(
    "optimizer", "adam", ("adagrad", "adam", "adamw", "lion", "rmsprop", "sgd"), "Optimizer."
)
flags.DEFINE_integer("threads", 2, "Threads of TensorFlow within an operation.", lower_bound=1)
flags.DEFINE_string("results_dir", "experiments/results/pays", "Where the cells are kept.")


@flags.validator("widths", message="expected whole numbers >= 1 such as --widths=4,4,8,8.")
def _widths_are_whole(widths: list[str] | None) -> bool:
    return widths is None or are_whole(widths)


def show(results: Mapping[tuple[str, int], Mapping[str, Any]], seeds: Sequence[int]) -> None:
    """Prints the events of every seed and the three arms side by side."""
    from experiments import tables

    events = [
        [seed, *_event_cells(event)]
        for seed in seeds
        for event in results["grown", seed]["events"]
        if event["status"] == "applied"
    ]
    tables.show(("seed", "epoch", "parameters", "estimated", "measured", "scale"), events)
    changes = [e["measured_change"] for s in seeds for e in results["grown", s]["events"]]
    worse = [change for change in changes if change is not None and change > 0]
    print(f"events whose measured change on held-out batches is above 0: {len(worse)}\n")
    tables.show(
        ("network", "parameters", "epochs", "seconds", "test accuracy", "test loss", "growth"),
        [_arm_cells(arm, [results[arm, seed] for seed in seeds]) for arm in ARMS],
    )


def _event_cells(event: Mapping[str, Any]) -> list[Any]:
    size = f"{event['params_before']:,} -> {event['params_after']:,}"
    changes = [event["estimated_change"], event["measured_change"]]
    texts = ["-" if change is None else f"{change:+.4f}" for change in changes]
    return [event["epoch"], size, *texts, f"{event['alpha']:g}"]


def _arm_cells(arm: str, cells: Sequence[Mapping[str, Any]]) -> list[str]:
    from experiments.tables import mean_std

    def over_seeds(name: str, **how: Any) -> str:
        return mean_std([cell[name] for cell in cells], **how)

    shares = [cell["growth_seconds"] / cell["seconds"] for cell in cells]
    return [
        arm,
        over_seeds("params", digits=0),
        over_seeds("epochs", digits=1),
        over_seeds("seconds", digits=0),
        over_seeds("test_accuracy", digits=2, scale=100, unit=" %"),
        over_seeds("test_loss", digits=4),
        mean_std(shares, digits=1, scale=100, unit=" %"),
    ]


def _settings() -> dict[str, Any]:
    own = {flag.name: flag.value for flag in FLAGS.get_key_flags_for_module(sys.modules[__name__])}
    own["widths"] = None if own["widths"] is None else [int(text) for text in own["widths"]]
    return own


def main(arguments: list[str]) -> None:
    """Runs the cells that are missing, seed by seed, and prints all."""
    if len(arguments) > 1:
        raise app.UsageError(f"Unexpected arguments {arguments[1:]}; settings are --flags.")
    quiet_logs()
    settings, seeds = _settings(), range(FLAGS.seeds)
    results: dict[tuple[str, int], dict[str, Any]] = {}
    cells = [Cell(arm, seed, settings) for seed in seeds for arm in ARMS]
    with in_words("experiments.pays"):
        finished = {(cell.arm, cell.seed): load(cell) for cell in cells}
        for cell in cells:
            print(f"{cell.arm}, seed {cell.seed}: {cell.path}", flush=True)
            grown = None if cell.arm == "grown" else results["grown", cell.seed]
            done = finished[cell.arm, cell.seed]
            results[cell.arm, cell.seed] = done or in_fresh_process(run_cell, cell, grown)
    show(results, seeds)


if __name__ == "__main__":
    app.run(main)
