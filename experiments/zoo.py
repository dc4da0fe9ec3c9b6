r"""Every architecture of `keras.applications`, made growable and grown.

    python -m experiments.zoo
    python -m experiments.zoo --models='ResNet.*V2|VGG16'

Each network has random weights and sees a few small random images, in a process of its own, --jobs
of them side by side: is it converted without a change of its outputs, where can it grow, does each
kind of edit change nothing at theta = 0, do estimates hold against the applied edits, do files and
SavedModel of the grown network compute the same?

A network whose file lies under --output_dir is not run again, so that a sweep that was ended goes
on where it was; one that failed is. All finished ones make up `zoo.json`, `zoo.csv` and --docs.
"""

from __future__ import annotations

import csv
import dataclasses
import gc
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from absl import app, flags

from experiments._messages import in_words, quiet_logs
from experiments.cells import in_fresh_process, load
from experiments.progress import Progress

os.environ.setdefault("KERAS_BACKEND", "tensorflow")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

SETTINGS = ("images", "batch_size", "steps", "scale", "seed")
SAME = 1e-4
"""Outputs count as equal up to so much of the largest one."""

SAME_IN_DOUBLE = 1e-8
"""Where they differ by more, rounding is told from error by the same edit in double precision."""

UNCHANGED = ("converted", "taken back", "saved", "exported")
"""What is done to a network besides edits that leaves its outputs as they are."""


@dataclasses.dataclass(frozen=True)
class Cell:
    """One architecture: its name, and what decides its outcome.

    Attributes:
      model: its name in `keras.applications`.
      settings: by flag.
      folder: where its file lies.
      threads: that TensorFlow may use; None leaves it to TensorFlow.
    """

    model: str
    settings: Mapping[str, Any]
    folder: str
    threads: int | None = None

    @property
    def path(self) -> Path:
        """The cell's file."""
        return Path(self.folder) / f"{self.model}.json"

    @property
    def key(self) -> Mapping[str, Any]:
        """The settings that a finished cell must agree with to count."""
        return self.settings


def run_cell(cell: Cell) -> dict[str, Any]:
    """Examines one architecture and writes its file; meant for a fresh process."""
    import keras
    import tensorflow as tf

    from experiments import reports, specimen

    if cell.threads is not None:
        tf.config.threading.set_intra_op_parallelism_threads(cell.threads)
        tf.config.threading.set_inter_op_parallelism_threads(cell.threads)
    # What is traced runs a few times only: to optimise it takes longer than that saves.
    tf.config.optimizer.set_experimental_options({"disable_meta_optimizer": True})
    # Networks are traced anew on purpose; TensorFlow takes that for a mistake.
    tf.get_logger().setLevel("ERROR")
    # Looking for cycles among the millions of objects of a graph takes a tenth of the time.
    gc.freeze()
    gc.set_threshold(100_000, 50, 100)
    keras.utils.set_random_seed(cell.settings["seed"])
    build = specimen.architectures()[cell.model]
    examined = specimen.Specimen(build, cell.settings, SAME).examine()
    result = {"model": cell.model, "settings": dict(cell.settings), **examined}
    reports.write_json(cell.path, result)
    return result


def names() -> list[str]:
    """All architectures, in the order of the alphabet."""
    from experiments import specimen

    return sorted(specimen.architectures())


def sweep(cells: Sequence[Cell], jobs: int = 1) -> list[dict[str, Any]]:
    """Runs the cells that are missing or failed, `jobs` side by side, and returns all."""
    found = {cell.model: load(cell) for cell in cells}
    missing = [cell for cell in cells if not _finished(found[cell.model])]
    progress = Progress("zoo, networks")
    with ThreadPoolExecutor(jobs) as pool:
        running = [pool.submit(_run, cell) for cell in missing]
        try:
            for number, done in enumerate(as_completed(running)):
                result = done.result()
                found[result["model"]] = result
                print(in_a_line(result), flush=True)
                progress(number + 1, len(missing))
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
    return [result for result in found.values() if result is not None]


def _run(cell: Cell) -> dict[str, Any]:
    print(f"{cell.model}...", flush=True)
    try:
        return in_fresh_process(run_cell, cell)
    except Exception as error:  # the process died (memory), or nothing could be built
        return _failed(cell, error)


def _finished(result: Mapping[str, Any] | None) -> bool:
    return result is not None and not result["errors"]


def _failed(cell: Cell, error: Exception) -> dict[str, Any]:
    said = {"process": {"error": f"{type(error).__name__}: {error}", "trace": ""}}
    return {"model": cell.model, "settings": dict(cell.settings), "errors": said}


def in_a_line(result: Mapping[str, Any]) -> str:
    """What came of one architecture, in short."""
    if result["errors"]:
        said = [f"{phase}: {one['error']}" for phase, one in result["errors"].items()]
        return f"{result['model']} failed. " + "; ".join(said)
    return (
        f"{result['model']}: {result['sites']} sites of {result['layers']} layers, "
        f"{verdict(result)}, {seconds(result):.0f} s, {result['peak_gb']:.1f} GB"
    )


def seconds(result: Mapping[str, Any]) -> float:
    """Seconds of all phases."""
    return float(sum(result.get("seconds", {}).values()))


def deviations(result: Mapping[str, Any]) -> dict[str, float]:
    """By how much outputs differ that are to be equal, by what was done between them."""
    known = {name: result[name] for name in UNCHANGED if name in result}
    for name, found in result.get("morphisms", {}).items():
        if "unchanged" in found:
            known[f"{name} at theta 0"] = found["unchanged"]
    return known


def in_double(result: Mapping[str, Any]) -> dict[str, float]:
    """The same in double precision, of what single precision differed after."""
    found = result.get("morphisms", {}).items()
    edits = {f"{name} at theta 0": one["in double"] for name, one in found if "in double" in one}
    return {**edits, **result.get("in double", {})}


def verdict(result: Mapping[str, Any]) -> str:
    """`equal`, or what was not."""
    if result["errors"]:
        return "failed"
    large = {name: value for name, value in deviations(result).items() if value > SAME}
    doubled = in_double(result)
    wrong = [name for name in large if doubled.get(name, 1.0) > SAME_IN_DOUBLE]
    if wrong:
        return "not equal: " + ", ".join(f"{name} {large[name]:.1e}" for name in wrong)
    rounded = ", ".join(
        f"{name} {large[name]:.1e}, {doubled[name]:.1e} in float64" for name in large
    )
    return f"equal up to rounding: {rounded}" if rounded else "equal"


def kinds_of(results: Sequence[Mapping[str, Any]]) -> list[str]:
    """Every kind of edit that a result speaks of, in order."""
    return list(dict.fromkeys(name for one in results for name in one.get("morphisms", {})))


def table(results: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[Any]]]:
    """Columns and rows: a row per architecture."""
    kinds = kinds_of(results)
    columns = ["network", "input", "parameters", "sites", "layers", "convolutions", "blocked"]
    columns += ["outputs", "largest difference", *(f"{kind}: estimate/truth" for kind in kinds)]
    columns += ["all", "seconds", "CPU seconds", "GB"]
    rows = []
    for one in results:
        row = [one["model"], one.get("input"), one.get("params"), _sites(one), one.get("layers")]
        row += [_convolutions(one), sum(one.get("blocked", {}).values()), verdict(one)]
        row += [max(deviations(one).values(), default=None)]
        row += [_ratio(one.get("morphisms", {}).get(kind, {})) for kind in kinds]
        cpu = one.get("cpu_seconds")
        row += [_ratio(one.get("all", {})), round(seconds(one)), cpu and round(cpu)]
        row += [one.get("peak_gb")]
        rows.append(row)
    return columns, rows


def _sites(one: Mapping[str, Any]) -> str | None:
    """How many can grow unit by unit, and how many by doubling all of them."""
    doubling = one.get("doubling")
    return (
        f"{one['sites']} + {doubling}"
        if doubling
        else str(one["sites"])
        if "sites" in one
        else None
    )


def _convolutions(one: Mapping[str, Any]) -> str | None:
    """How many can grow, of how many."""
    return f"{one['either']} of {one['convolutions']}" if "either" in one else None


def _ratio(found: Mapping[str, Any]) -> str | None:
    if "true" not in found:
        return None
    ratio = "-" if found["ratio"] is None else f"{found['ratio']:.2f}"
    return f"{ratio} ({found['true']:+.1e})"


def reasons(results: Sequence[Mapping[str, Any]]) -> list[tuple[str, int, int]]:
    """Rows of why places can't grow: reason, places, networks."""
    places: Counter = Counter()
    networks: Counter = Counter()
    for one in results:
        places.update(one.get("blocked", {}))
        networks.update(dict.fromkeys(one.get("blocked", {}), 1))
    return [(reason, count, networks[reason]) for reason, count in places.most_common()]


def phases(results: Sequence[Mapping[str, Any]]) -> list[tuple[str, float, float, str]]:
    """Rows of what took the time: phase, seconds in all, most of one network, which."""
    names = dict.fromkeys(name for one in results for name in one.get("seconds", {}))
    rows = []
    for name in names:
        spent = {one["model"]: one.get("seconds", {}).get(name, 0.0) for one in results}
        slowest = max(spent, key=lambda model: spent[model])
        rows.append((name, float(sum(spent.values())), float(spent[slowest]), slowest))
    return rows


def page(results: Sequence[Mapping[str, Any]]) -> str:
    """The page for the docs."""
    from experiments import tables

    settings = results[0]["settings"]
    parts = [
        "# The zoo: growing every architecture of `keras.applications`",
        f"{len(results)} networks with random weights and {settings['images']} random images, "
        "written by `python -m experiments.zoo`. A site's layers are tied by additions or gates "
        "and grow together; after a + stand sites whose units can only be doubled, all at once, "
        "since a layer normalises over them. Convolutions that can grow have filters to be added, "
        "have channels that follow those of another layer, or a kernel that can be enlarged on "
        "inputs of this size; a place is blocked where nothing of this is possible. Outputs are "
        "those after "
        "converting, after edits at theta = 0 (a pruned unit: a copy of another), after saving and "
        "loading and in the SavedModel of the grown "
        f"network; they are equal if they differ by at most {SAME:g} of the largest. Where an edit "
        "at theta = 0 makes them differ by more, it is applied again, alone, to a float64 copy, "
        "and where the SavedModel does, it is made again of one: if they agree to "
        f"{SAME_IN_DOUBLE:g} there, the difference is float32's rounding, not an error; both "
        "figures are given. Estimates are "
        f"of edits at a few sites, learned for {settings['steps']} steps and scaled by "
        f"{settings['scale']:g} (by its root where the effect is of second order), "
        "on the samples they were learned on; the true change of the mean loss is in brackets. "
        "Ratios far from 1 are of random networks that even such steps change beyond all "
        "quadratics. "
        "What can only be done as a whole (a removal) is judged at the last of the sites, and "
        "estimated by `score`, which goes by the loss itself at the linearised logits: an "
        "untrained deep network turns a change as large as that, further ahead, into anything. It "
        "is not among `all`, which are those of as many kinds as can be applied at once.",
        tables.markdown(*table(results)),
    ]
    if stuck := [one for one in results if one.get("sites") == 0]:
        parts.append("## Where nothing can grow")
        parts += [f"* {one['model']}: {'; '.join(one['blocked'])}." for one in stuck]
    if failed := [one for one in results if one["errors"]]:
        parts.append("## What failed")
        parts += [f"* {in_a_line(one)}" for one in failed]
    if rows := reasons(results):
        parts.append("## Why places can't grow")
        parts.append(tables.markdown(("reason", "places", "networks"), rows))
    parts.append("## What takes the time")
    columns = ("phase", "seconds in all", "most", "of")
    parts.append(tables.markdown(columns, phases(results)))
    return "\n\n".join(parts) + "\n"


def write(results: Sequence[Mapping[str, Any]], options: Any) -> None:
    """Writes `zoo.json`, `zoo.csv` and the page."""
    from experiments import reports, tables

    folder = Path(options.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    reports.write_json(folder / "zoo.json", list(results))
    with open(folder / "zoo.csv", "w", newline="") as file:
        columns, rows = table(results)
        csv.writer(file).writerows([columns, *rows])
    written = [folder / "zoo.json", folder / "zoo.csv"]
    if options.docs:
        written.append(tables.write_page(options.docs, page(results)))
    print("written: " + ", ".join(map(str, written)))


def run(options: Any) -> list[dict[str, Any]]:
    """The whole sweep; `options` are the values of the flags, as attributes.

    Returns:
      The results of all networks that are finished, also by earlier sweeps.

    Raises:
      ValueError: no network is named so, or finished ones were run with other settings.
    """
    from experiments import tables

    settings = {name: getattr(options, name) for name in SETTINGS}
    # Side by side, each takes its share of the cores; numpy reads this when a process starts.
    threads = max(1, (os.cpu_count() or 1) // options.jobs)
    os.environ["OPENBLAS_NUM_THREADS"] = str(threads)
    every = [Cell(name, settings, options.output_dir, threads) for name in names()]
    chosen = [cell for cell in every if re.fullmatch(options.models, cell.model)]
    if not chosen:
        raise ValueError(
            f"--models={options.models!r} names none of {', '.join(cell.model for cell in every)}."
        )
    found = {one["model"]: one for one in sweep(chosen, options.jobs)}
    known = {cell.model: load(cell) for cell in every if cell.model not in found}
    results = [r for cell in every if (r := found.get(cell.model) or known.get(cell.model))]
    tables.show(*table(results), "\nzoo")
    write(results, options)
    return results


# Not at the top: binaries that define flags of the same names can then be imported side by side.
def define_flags(values: flags.FlagValues = flags.FLAGS) -> None:
    """Defines this binary's flags."""
    for name, default, text in (
        ("models", ".*", "Regular expression of the whole names of the networks to run."),
        ("output_dir", "saved_models/zoo", "Where finished networks, zoo.json and zoo.csv go."),
        ("docs", "docs/zoo.md", "Where the page goes; empty for none."),
    ):
        flags.DEFINE_string(name, default, text, flag_values=values)
    for name, number, text, least in (
        ("images", 32, "Random images that edits are learned and judged on.", 2),
        ("batch_size", 8, "Images per batch.", 1),
        ("steps", 4, "Learning steps of theta, and batches that settle closed forms.", 2),
        ("seed", 0, "Of weights, images and edits.", 0),
    ):
        flags.DEFINE_integer(name, number, text, least, flag_values=values)
    flags.DEFINE_integer(
        "jobs", 2, "Networks side by side; the largest take 6 GB each.", 1, flag_values=values
    )
    flags.DEFINE_float(
        "scale",
        0.01,
        "How much of what was learned is applied: estimates are of small changes.",
        0,
        1,
        flag_values=values,
    )

    @flags.validator("models", "expected a regular expression", flag_values=values)
    def _compiles(text):
        try:
            re.compile(text)
        except re.error:
            return False
        return True


def main(argv: list[str]) -> None:
    """Entry point; see the module's docstring."""
    if len(argv) > 1:
        raise app.UsageError(f"Unknown arguments: {argv[1:]}. Flags start with --.")
    quiet_logs()
    with in_words("experiments.zoo"):
        run(flags.FLAGS)


if __name__ == "__main__":
    define_flags()
    app.run(main)
