r"""Grows a small network on images while it trains, and writes what came of it.

    python -m experiments.grow
    python -m experiments.grow --dataset=fashion_mnist --data_dir=$HOME/tensorflow_datasets
    python -m experiments.grow --dataset=cifar10 --model=resnet --max_params=60000 --epochs=30
    python -m experiments.grow --flagfile=my_flags.txt

The folder <output_dir>/<run>/ appears when the run has ended well, and holds a SavedModel (1/), the
same network as a plain Keras file (model.keras), the journal of the growth (journal.json), the
settings (config.json), the final widths (widths.json), the figures by epoch (results.json), two
pictures (growth.png, estimates.png) and the oracle's Keras Tuner project (oracle/).
"""

from __future__ import annotations

import dataclasses
import math
import os
import platform
import sys
from collections.abc import Mapping
from typing import Any

from absl import app, flags

from experiments._flags import SCORES, are_whole
from experiments._messages import in_words, quiet_logs, stopped_cleanly
from experiments.variants import VARIANTS

# Before TensorFlow is imported, which happens once the flags have been found to make sense.
os.environ.setdefault("KERAS_BACKEND", "tensorflow")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

# What depends on the dataset, so that a flag left out has a sensible value for either kind.
DIGITS_DEFAULTS: dict[str, Any] = {
    "epochs": 30,
    "every": 3,
    "batch_size": 32,
    "learning_rate": 5e-3,
    "growth_per_step": 0.6,
    "max_params": 5_000,
    "widths": (3, 3, 6, 6),
}
OTHER_DEFAULTS: dict[str, Any] = {
    "epochs": 20,
    "every": 2,
    "batch_size": 128,
    "learning_rate": 3e-3,
    "growth_per_step": 0.5,
    "max_params": 40_000,
    "widths": None,
}
CURVATURES = ("auto", "exact", "sampled", "empirical")
OPTIMIZERS = ("adagrad", "adam", "adamw", "lion", "rmsprop", "sgd")
# Flags that go on under their own names.
RECIPE_FLAGS = ("epochs", "batch_size", "learning_rate", "optimizer", "decay", "seed")
ORACLE_FLAGS = (
    "max_params",
    "max_flops",
    "growth_per_step",
    "min_gain_per_param",
    "round_to",
    "include",
    "exclude",
    "morphisms",
    "new_units",
    "curvature",
    "score",
)


def _default(name: str) -> str:
    return f"default: {DIGITS_DEFAULTS[name]:g} for digits, {OTHER_DEFAULTS[name]:g} for others"


FLAGS = flags.FLAGS
flags.DEFINE_string(
    "dataset",
    "digits",
    "Images to learn: digits (1,797 images of scikit-learn, no network needed), or a TensorFlow "
    "Datasets name of labelled images such as cifar10 or fashion_mnist.",
)
flags.DEFINE_string("data_dir", None, "Where TensorFlow Datasets keeps its data.")
flags.DEFINE_bool("download", False, "Let TensorFlow Datasets download what is not in --data_dir.")
flags.DEFINE_bool("augment", False, "Shift (and mirror, if coloured) the training images.")
flags.DEFINE_enum(
    "model",
    "vgg",
    tuple(VARIANTS),
    "Seed network: pairs of 3x3 convolutions (vgg and its variants), Dense layers (mlp), "
    "residual blocks (resnet), or transformer blocks (vit).",
)
flags.DEFINE_list(
    "widths",
    None,
    "Units per layer of the seed network, or per residual block (heads and feed-forward units per "
    "transformer block), such as 4,4,8,8 "
    "(default: 3,3,6,6 for a vgg on digits, else the model's own).",
)
flags.DEFINE_integer(
    "max_params",
    None,
    "Budget: most parameters of the grown network (default: 5000 for a vgg on digits, 20000 for "
    "other models on digits, 40000 for other datasets).",
    lower_bound=1,
)
flags.DEFINE_integer("max_flops", None, "Budget: most inference FLOPs per image.", lower_bound=1)
flags.DEFINE_float(
    "growth_per_step",
    None,
    "Most parameters one growth step adds, relative to those before it "
    f"({_default('growth_per_step')}).",
    lower_bound=1e-6,
)
flags.DEFINE_float(
    "min_gain_per_param",
    0.0,
    "A growth step stops choosing where the marginal gain in loss per parameter falls under this.",
    lower_bound=0.0,
)
flags.DEFINE_integer(
    "round_to", None, "Bring the widths that grow to multiples of this.", lower_bound=1
)
flags.DEFINE_multi_string(
    "include", None, "Only layers of this name, or matching this regular expression, may grow."
)
flags.DEFINE_multi_string(
    "exclude", None, "Layers of this name, or matching this regular expression, may not grow."
)
flags.DEFINE_list("morphisms", ["split", "add"], "Kinds of edits to consider.")
flags.DEFINE_integer(
    "new_units", 8, "Single new units tried per layer and growth step.", lower_bound=1
)
flags.DEFINE_enum(
    "curvature",
    "auto",
    CURVATURES,
    "Curvature of the estimates: exact (a column per class), sampled, empirical, or auto (exact up "
    "to 16 classes).",
)
flags.DEFINE_enum(
    "score",
    "auto",
    SCORES,
    "Units go where those there are are worth most (worth), or where edits bring most, at once "
    "(raw) or beyond what training brings anyway (marginal). auto: worth where all --morphisms add "
    "single units and no --min_gain_per_param is given, else raw.",
)
flags.DEFINE_enum(
    "schedule",
    "every",
    ("every", "plateau"),
    "Grow each --every epochs, or when the validation loss has not improved for --every epochs.",
)
flags.DEFINE_integer("every", None, f"See --schedule ({_default('every')}).", lower_bound=1)
flags.DEFINE_float(
    "settle",
    0.3,
    "Share of the epochs, at the end, in which the network only trains.",
    lower_bound=0.0,
    upper_bound=1.0,
)
flags.DEFINE_integer("epochs", None, f"Epochs ({_default('epochs')}).", lower_bound=1)
flags.DEFINE_integer(
    "batch_size", None, f"Images per training step ({_default('batch_size')}).", lower_bound=1
)
flags.DEFINE_enum("optimizer", "adam", OPTIMIZERS, "Optimizer (sgd: with Nesterov momentum 0.9).")
flags.DEFINE_float(
    "learning_rate",
    None,
    f"Learning rate at the start ({_default('learning_rate')}).",
    lower_bound=1e-9,
)
flags.DEFINE_enum(
    "decay",
    "cosine",
    ("cosine", "constant"),
    "Whether the learning rate falls to 0 over the epochs or stays.",
)
flags.DEFINE_enum(
    "precision",
    "float32",
    ("float32", "mixed_float16", "mixed_bfloat16"),
    "Keras dtype policy of the network; estimates are in float32 whatever it is.",
)
flags.DEFINE_integer("seed", 0, "Seed of everything random.", lower_bound=0, upper_bound=2**31 - 1)
flags.DEFINE_bool(
    "baseline", True, "Also train the seed network without growing it, for the closing table."
)
flags.DEFINE_string("output_dir", "saved_models", "Where runs are written.")
flags.DEFINE_string("run", None, "Name of the run's folder (default: <dataset>-<model>).")
flags.DEFINE_bool("overwrite", False, "Replace a run of the same name.")


@flags.validator("widths", message="expected whole numbers >= 1 such as --widths=4,4,8,8.")
def _widths_are_whole(widths: list[str] | None) -> bool:
    return widths is None or are_whole(widths)


@flags.multi_flags_validator(
    ["learning_rate", "settle", "growth_per_step", "min_gain_per_param"], "expected numbers."
)
def _no_nan(given: Mapping[str, float | None]) -> bool:
    return all(value is None or math.isfinite(value) for value in given.values())


@flags.validator("run", message="expected the name of one folder, such as --run=digits-wide.")
def _run_is_a_name(run: str | None) -> bool:
    return run is None or (run == os.path.basename(run) and run not in ("", ".", ".."))


@dataclasses.dataclass(frozen=True, eq=False)
class Job:
    """Everything that was checked before the first training step."""

    target: Any
    data: Any
    model: Any
    recipe: Any
    growing: Any


def settings() -> dict[str, Any]:
    """All flags of this binary, defaults of the dataset filled in."""
    module = sys.modules[__name__]
    own: dict[str, Any] = {f.name: f.value for f in FLAGS.get_key_flags_for_module(module)}
    preset = dict(DIGITS_DEFAULTS if own["dataset"] == "digits" else OTHER_DEFAULTS)
    if own["model"] != "vgg":
        preset |= {"widths": None, "max_params": max(preset["max_params"], 20_000)}
    if own["widths"] is not None:
        own["widths"] = [int(text) for text in own["widths"]]
    own["run"] = own["run"] or f"{str(own['dataset']).replace('/', '-')}-{own['model']}"
    return {name: preset.get(name) if value is None else value for name, value in own.items()}


def prepare(chosen: Mapping[str, Any]) -> Job:
    """Builds what the run needs, cheapest checks first.

    Raises:
      ValueError, ImportError, OSError: a setting that can't be, in words for the user.
    """
    import keras

    from experiments import datasets, reports, training

    if chosen["epochs"] < 2:
        raise ValueError("it grows between epochs, so it needs --epochs=2 or more.")
    os.makedirs(chosen["output_dir"], exist_ok=True)
    path = os.path.join(chosen["output_dir"], chosen["run"])
    target = reports.check_free(path, chosen["overwrite"])
    recipe = training.Recipe(**{name: chosen[name] for name in RECIPE_FLAGS})
    oracle = {name: chosen[name] for name in ORACLE_FLAGS}
    growing = training.Growing(chosen["schedule"], chosen["every"], chosen["settle"], oracle)
    trial_oracle = training.make_oracle(growing, recipe.seed)
    training.make_repeatable(recipe.seed)
    keras.config.set_dtype_policy(chosen["precision"])
    data = datasets.load(
        chosen["dataset"], chosen["data_dir"], seed=recipe.seed, download=chosen["download"]
    )
    model = training.seed_network(
        chosen["model"], data, chosen["widths"], recipe.seed, chosen["augment"]
    )
    trial_oracle.check_budget(model)
    trial_oracle.site_names(list(training.open_widths(model)))
    return Job(target, data, model, recipe, growing)


def run(job: Job, chosen: Mapping[str, Any]) -> None:
    """Trains, grows, evaluates, writes the folder and prints the table."""
    from experiments import reports, tables, training

    start = training.open_widths(job.model)
    with reports.run_directory(job.target) as directory:
        print(f"Growing '{job.model.name}' on {chosen['dataset']}", flush=True)
        oracle = training.make_oracle(job.growing, job.recipe.seed, directory)
        grown = training.train_growing(
            job.model, job.data, job.recipe, job.growing, oracle, directory / "journal.json"
        )
        final = training.open_widths(grown.model)
        rows = [
            {**_size(grown, start, 0), **_figures(_baseline(job, chosen))},
            {**_size(grown, final, -1), **_figures(grown)},
        ]
        config = {**chosen, "versions": _versions()}
        reports.write_run(directory, grown, config, start, final, rows)
    print()
    tables.show(COLUMNS, [_cells(row) for row in rows])
    print(
        "growth: share of the seconds inside growth events; retracing the train step comes on top"
    )
    _print_paths(job.target)


def _baseline(job: Job, chosen: Mapping[str, Any]) -> Any:
    """The seed network, trained as the other one was, without growing; None if not wanted."""
    from experiments import training

    if not chosen["baseline"]:
        return None
    print("\nTraining the seed network without growing it", flush=True)
    training.make_repeatable(job.recipe.seed)
    model = training.seed_network(
        chosen["model"], job.data, chosen["widths"], job.recipe.seed, chosen["augment"]
    )
    return training.train(model, job.data, job.recipe, verbose=False)


COLUMNS = ("network", "widths", "parameters", "FLOPs", "test accuracy", "seconds", "growth")


def _size(grown: Any, widths: Mapping[str, int], epoch: int) -> dict[str, Any]:
    """What the network was at the end of an epoch; it never grows before the second."""
    return {
        "network": "grown" if epoch else "seed, not grown",
        "widths": dict(widths),
        "params": int(grown.history["tfgrow_params"][epoch]),
        "flops": int(grown.history["tfgrow_flops"][epoch]),
    }


def _figures(trained: Any) -> dict[str, Any]:
    names = ("test_accuracy", "test_loss", "seconds", "growth_seconds")
    return {name: None if trained is None else getattr(trained, name) for name in names}


def _cells(row: Mapping[str, Any]) -> list[Any]:
    from experiments import reports

    cells = [row["network"], reports.shape_text(row["widths"]), row["params"], row["flops"]]
    if row["seconds"] is None:
        return [*cells, None, None, None]
    share = row["growth_seconds"] / row["seconds"]
    accuracy = f"{100 * row['test_accuracy']:.2f} %"
    return [*cells, accuracy, f"{row['seconds']:.1f}", f"{100 * share:.0f} %"]


def _print_paths(target: Any) -> None:
    print(f"\nWritten to {os.path.relpath(target)}/")
    for path in sorted(target.iterdir()):
        print(f"  {path.name}{'/' if path.is_dir() else ''}")


def _versions() -> dict[str, str]:
    import keras
    import tensorflow as tf

    import tfgrow

    return {
        "python": platform.python_version(),
        "tfgrow": tfgrow.__version__,
        "keras": keras.__version__,
        "tensorflow": tf.__version__,
    }


def main(arguments: list[str]) -> None:
    """Checks the flags, then runs."""
    if len(arguments) > 1:
        raise app.UsageError(f"Unexpected arguments {arguments[1:]}; settings are --flags.")
    quiet_logs()
    chosen = settings()
    with stopped_cleanly("experiments.grow"):
        with in_words("experiments.grow"):
            job = prepare(chosen)
        run(job, chosen)


if __name__ == "__main__":
    app.run(main)
