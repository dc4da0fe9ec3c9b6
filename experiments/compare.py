r"""Growing by Gauss-Newton beside other ways to grow: the same networks, budgets, recipe and seeds.

    python -m experiments.compare --data_dir=$HOME/tensorflow_datasets
    python -m experiments.compare --methods=gauss_newton,uniform --budgets=10000 --results_dir=r

Two claims, kept apart. *Better architectures*: the widths that a method found, trained from scratch
(`from_scratch`), beside a template whose widths are all scaled alike. *Cheaper training*: the
network as it was grown (`grown`), beside its final shape trained from scratch for as many epochs
(`from_scratch`), FLOPs (`same_flops`) or seconds (`same_time`); the latter two for --references.

Every cell runs in a process of its own with --threads threads, --jobs of them side by side, and
writes one JSON file under --results_dir when it has ended; a cell whose file exists is not run
again, so that a sweep that was ended goes on where it was. All finished cells make up
`compare.csv`, `curves.csv` and --docs.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from absl import app, flags

from experiments._flags import are_whole
from experiments._messages import in_words, quiet_logs
from experiments.cells import in_fresh_process, load
from experiments.contest import (
    CLAIMS,
    CLOCKED,
    FLOPS,
    FROM_SCRATCH,
    GROWN,
    PARAMS,
    SEARCH,
    TEMPLATE,
    Cell,
    run_cell,
)

os.environ.setdefault("KERAS_BACKEND", "tensorflow")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

# Networks whose widths that can grow are exactly those that `models.build` takes.
MODELS = ("vgg", "vgg_uneven", "mlp", "resnet", "vgg_no_bn", "vgg_gelu")
# The names of tfgrow.strategies, which takes seconds to import.
GROWERS = (
    "firefly", CLOCKED, "gradmax", "net2net", "random", "splitting", "tiny", "uniform",
)  # fmt: skip
METHODS = (TEMPLATE, *GROWERS, SEARCH)

COMMON = (
    "data_dir", "max_train", "budget_in", "widths", "augment", "epochs", "every", "settle",
    "rounds", "growth_per_step", "ema_momentum", "morphisms", "new_units", "curvature", "score",
    "cost_exponent", "batch_size", "learning_rate", "fall", "optimizer", "threads",
    "results_dir",
)  # fmt: skip


def define_flags(values: flags.FlagValues = flags.FLAGS) -> None:
    """Defines this binary's flags."""
    define_common_flags(values)
    for name, some, known, text in (
        ("methods", (TEMPLATE, *GROWERS), METHODS, "What chooses the widths."),
        ("claims", CLAIMS, CLAIMS, "Which trainings of each method."),
        ("references", ("gauss_newton",), METHODS, "Methods of same_flops and same_time."),
    ):
        define_some(name, some, known, text, values)


def define_some(
    name: str, some: Iterable[str], known: Iterable[str], text: str, values: flags.FlagValues
) -> None:
    """Defines a flag that lists some of what is known."""
    named = ", ".join(known)
    flags.DEFINE_list(name, list(some), f"{text} Of: {named}.", flag_values=values)

    @flags.validator(name, f"expected some of {named}.", flag_values=values)
    def _known(found):
        return bool(found) and set(found) <= set(known)


def define_common_flags(values: flags.FlagValues) -> None:
    """Defines the flags of all that trains cells of `experiments.contest`."""
    define_some("models", ("vgg",), MODELS, "Seed networks of experiments.models.", values)
    for name, chosen, text in (
        ("datasets", ["cifar10"], "digits, or TensorFlow Datasets names."),
        ("budgets", ["20000"], "Most parameters of the grown networks, or FLOPs: --budget_in."),
        ("morphisms", ["split", "add"], "Kinds of edits of gauss_newton."),
    ):
        flags.DEFINE_list(name, chosen, text, flag_values=values)
    for name, text_default, text in (
        ("data_dir", None, "Where TensorFlow Datasets keeps its data."),
        ("results_dir", "experiments/results/compare", "Where cells and CSV files are kept."),
        ("docs", "docs/results.md", "The page to write; empty for none."),
    ):
        flags.DEFINE_string(name, text_default, text, flag_values=values)
    flags.DEFINE_list("widths", None, "Units per layer of the seed networks.", flag_values=values)
    flags.DEFINE_bool("augment", False, "Shift (and mirror) the images.", flag_values=values)
    for name, number, text, least in (
        ("max_train", 10_000, "Training images used, at most.", 100),
        ("seeds", 3, "Number of seeds: --first_seed, and those that follow it.", 1),
        ("first_seed", 0, "The first seed.", 0),
        ("epochs", 12, "Epochs of the grown networks, and from scratch.", 2),
        ("every", 1, "Epochs from one moment of growth to the next.", 1),
        ("rounds", 1, "Events at a time, at most.", 1),
        ("new_units", 4, "New units tried per layer and event, of gauss_newton.", 1),
        ("batch_size", 64, "Images per training step.", 1),
        ("threads", 2, "Threads of TensorFlow within an operation.", 1),
        ("jobs", 1, "Trainings side by side; with more, clocks tell less.", 1),
    ):
        flags.DEFINE_integer(name, number, text, least, flag_values=values)
    for name, share, text in (
        ("learning_rate", 3e-3, "At the start; it falls to 0."),
        ("settle", 0.5, "Share of the epochs, at the end, without growth."),
        ("growth_per_step", 1.0, "Most parameters an event adds, relative to those before."),
    ):
        flags.DEFINE_float(name, share, text, 0.0, flag_values=values)
    flags.DEFINE_float(
        "fall", 0.5, "Share of the epochs, at the end, over which the learning rate falls.",
        0.01, 1.0, flag_values=values,
    )  # fmt: skip
    flags.DEFINE_float(
        "ema_momentum", 0.0, "Of the average of the weights at which networks grow; 0 for none.",
        0.0, 1.0, flag_values=values,
    )  # fmt: skip
    flags.DEFINE_float(
        "cost_exponent", None, "Gains of gauss_newton are per cost to the power of this; 0.5 by "
        "default, or 1 where budgets count FLOPs.", 0.0, 1.0,
        flag_values=values,
    )  # fmt: skip
    flags.DEFINE_enum(
        "budget_in", PARAMS, (PARAMS, FLOPS), "What budgets count.", flag_values=values
    )
    flags.DEFINE_enum(
        "score", "worth", ("raw", "marginal", "worth"), "What gauss_newton goes by.",
        flag_values=values,
    )  # fmt: skip
    flags.DEFINE_enum(
        "curvature", "sampled", ("auto", "exact", "sampled", "empirical"),
        "Curvature of gauss_newton's estimates.", flag_values=values,
    )  # fmt: skip
    flags.DEFINE_enum(
        "optimizer", "adam", ("adam", "adamw", "rmsprop", "sgd"), "Optimizer.", flag_values=values
    )
    for name in ("widths", "budgets"):

        @flags.validator(name, "expected whole numbers >= 1 such as 4,4,8,8.", flag_values=values)
        def _whole(found):
            return not found or are_whole(found)


def common_settings(options: Any) -> dict[str, Any]:
    """The flags that all cells share, widths as numbers."""
    common = {name: getattr(options, name) for name in COMMON}
    if common["cost_exponent"] is None:
        common["cost_exponent"] = 1.0 if options.budget_in == FLOPS else 0.5
    return common | {"widths": common["widths"] and [int(text) for text in common["widths"]]}


def cells_of(options: Any) -> Iterator[Cell]:
    """All cells, seed by seed, so that what has been done when it is ended is comparable.

    The cell of a method that grows comes before those that need what it found.
    """
    common = common_settings(options)
    if SEARCH in options.methods and options.budget_in == FLOPS:
        raise ValueError(f"{SEARCH} fills budgets of parameters; leave it out of --methods.")
    for seed, dataset, model, budget in places_of(options):
        for method in sorted(options.methods, key=lambda method: method == SEARCH):
            for claim in _claims(method, options):
                yield Cell(dataset, model, budget, method, claim, seed, common)


def places_of(options: Any) -> Iterator[tuple[int, str, str, int]]:
    """Seed, dataset, network and budget of all that is compared, seed by seed."""
    budgets = [int(text) for text in options.budgets]
    seeds = range(options.first_seed, options.first_seed + options.seeds)
    return itertools.product(seeds, options.datasets, options.models, budgets)


def _claims(method: str, options: Any) -> list[str]:
    if method == TEMPLATE:
        return [FROM_SCRATCH] if FROM_SCRATCH in options.claims else []
    wanted = {GROWN, *options.claims}
    if method not in options.references:
        wanted &= {GROWN, FROM_SCRATCH}
    return [claim for claim in CLAIMS if claim in wanted]


def sweep(cells: Sequence[Cell], jobs: int = 1) -> None:
    """Runs the cells that are missing, `jobs` side by side, saying how far it is.

    Those that need what another one finds come after it.
    """
    from experiments.progress import Progress

    missing = [cell for cell in cells if load(cell) is None]
    print(f"{len(cells)} cells, {len(missing)} of them to run", flush=True)
    chains: dict[Path, list[Cell]] = {}
    for cell in missing:
        chains.setdefault(_first_of(cell).path, []).append(cell)
    progress, done = Progress("cells"), itertools.count(1)
    with ThreadPoolExecutor(jobs) as pool:
        running = [
            pool.submit(_run, chain, lambda: progress(next(done), len(missing)))
            for chain in chains.values()
        ]
        try:
            for chain in as_completed(running):
                chain.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _run(chain: Sequence[Cell], progress: Callable[[], None]) -> None:
    for cell in chain:
        print(f"{cell.path}", flush=True)
        before = _needed(cell)
        in_fresh_process(run_cell, cell, None if before is None else _found(before))
        progress()


def _needed(cell: Cell) -> Cell | None:
    """The cell whose outcome another one needs."""
    if cell.method == SEARCH and cell.claim == GROWN:
        return dataclasses.replace(cell, method=CLOCKED)
    if cell.claim == GROWN or cell.method == TEMPLATE:
        return None
    return dataclasses.replace(cell, claim=GROWN)


def _first_of(cell: Cell) -> Cell:
    """Where the chain of cells begins that have to run one after the other."""
    before = _needed(cell)
    return cell if before is None else _first_of(before)


def _found(cell: Cell) -> Mapping[str, Any]:
    found = load(cell)
    if found is None:
        raise ValueError(
            f"{SEARCH} searches for as long as {cell.method} grows, and there is no "
            f"'{cell.path}'; name {cell.method} among --methods."
        )
    return found


def main(arguments: list[str]) -> None:
    """Runs what is missing, then writes tables and pictures of all there is."""
    if len(arguments) > 1:
        raise app.UsageError(f"Unexpected arguments {arguments[1:]}; settings are --flags.")
    quiet_logs()
    with in_words("experiments.compare"):
        run(cells_of(flags.FLAGS), flags.FLAGS)


def run(
    cells: Iterable[Cell], options: Any, introduction: Callable[[Any], str] | None = None
) -> None:
    """Runs the cells that are missing, then writes and shows the tables of all there is.

    Args:
      cells: all cells.
      options: the values of the flags, as attributes.
      introduction: makes of the results what `experiments.standings.write` takes for one.
    """
    sweep(list(cells), options.jobs)
    from experiments import standings

    results = standings.collect(options.results_dir)
    said = introduction(results) if introduction is not None else None
    standings.write(results, Path(options.results_dir), options.docs, said)
    standings.show(results)


if __name__ == "__main__":
    define_flags()
    app.run(main)
