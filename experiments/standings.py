"""What `experiments.compare` came to: CSV files of all cells, and the page and pictures of them.

The page is made of the CSV files alone, so that anybody's results can be laid out by it.
"""

from __future__ import annotations

import csv
import dataclasses
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments import comparison_figures as figures
from experiments import tables
from experiments._flags import as_text
from experiments.comparison_figures import OURS, place_of, places_of
from experiments.contest import CLAIMS, FROM_SCRATCH, GROWN, PARAMS, TEMPLATE

CELL = ("dataset", "model", "budget_in", "budget", "method", "seed", "claim")
PLACE = CELL[:4]
"""What a table is of."""

FIGURES = (
    "test_accuracy", "test_loss", "val_accuracy", "params", "flops", "training_flops", "seconds",
    "growth_seconds", "peak_gb", "newborn_alive", "epochs", "widths", "settings",
)  # fmt: skip
CURVE = ("epoch", "val_accuracy", "training_flops", "seconds")

TEXT = {
    FROM_SCRATCH: "Better architectures: the widths found, trained from scratch by one recipe",
    GROWN: "Cheaper training: the networks as they were grown",
}

Row = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Results:
    """All finished cells.

    Attributes:
      cells: a row per cell, columns `CELL` and `FIGURES`.
      curves: a row per cell and epoch, columns `CELL` and `CURVE`; FLOPs and seconds add up.
    """

    cells: Sequence[Row]
    curves: Sequence[Row]


def collect(folder: str | Path) -> Results:
    """The results of all cells under a folder."""
    cells, curves = [], []
    for path in sorted(Path(folder).glob("cells/*/*.json")):
        found = {"budget_in": PARAMS, **json.loads(path.read_text())}
        cell = {name: found[name] for name in CELL}
        widths = " ".join(f"{name}={units}" for name, units in found["widths"].items())
        told = {**found, "widths": widths, "settings": as_text(found["settings"])}
        cells.append({**cell, **{name: told[name] for name in FIGURES}})
        by_epoch = found["by_epoch"]
        columns = (
            by_epoch["val_accuracy"],
            np.cumsum(by_epoch["flops"]).tolist(),
            np.cumsum(by_epoch["seconds"]).tolist(),
        )
        for number, values in enumerate(zip(*columns, strict=True)):
            curves.append({**cell, **dict(zip(CURVE, (number + 1, *values), strict=True))})
    order = {claim: number for number, claim in enumerate(CLAIMS)}
    cells.sort(key=lambda row: (*(row[n] for n in CELL[:5]), order[row["claim"]], row["seed"]))
    return Results(cells, curves)


def write(
    results: Results, folder: Path, docs: str | None, introduction: str | None = None
) -> list[Path]:
    """Writes the CSV files, and the page if it has a place.

    Args:
      results: all finished cells.
      folder: where the CSV files go.
      docs: the page to write; nothing for none.
      introduction: what the page begins with, instead of that of the comparison and its pictures.
    """
    folder.mkdir(parents=True, exist_ok=True)
    written = [folder / "compare.csv", folder / "curves.csv"]
    _write_csv(written[0], (*CELL, *FIGURES), results.cells)
    _write_csv(written[1], (*CELL, *CURVE), results.curves)
    if docs and results.cells:
        if introduction is None:
            written += draw(results, Path(docs).parent / "images", folder.name)
        written.append(tables.write_page(docs, page_of(read(folder), folder, introduction)))
    return written


def read(folder: str | Path) -> Results:
    """The results in a folder's CSV files, numbers as numbers."""
    tables_read = []
    for name in ("compare.csv", "curves.csv"):
        with open(Path(folder) / name, newline="") as file:
            rows = [{k: _number(v) for k, v in row.items()} for row in csv.DictReader(file)]
        tables_read.append(rows)
    return Results(*tables_read)


def show(results: Results) -> None:
    """Prints the tables of both claims."""
    for title, columns, rows in sections(results):
        tables.show(columns, rows, title)
        print()


def sections(results: Results) -> Iterable[tuple[str, tuple[str, ...], list[list[Any]]]]:
    """Title, columns and rows of every table about one place."""
    for where, mine in _by_place(results):
        for claim in (FROM_SCRATCH, GROWN):
            rows = list(_standing(mine, claim))
            if rows:
                yield f"{TEXT[claim]}. {where}", COLUMNS[claim], rows
        rows = list(_paying(results, mine))
        if rows:
            yield f"Growing against training the final shape. {where}", PAYING, rows


def _by_place(results: Results) -> Iterable[tuple[str, list[Row]]]:
    """What the cells of a table are of, in words, and they."""
    for place in places_of(results.cells, PLACE):
        dataset, model, budget_in, budget = place
        where = f"{dataset}, {model}, at most {budget:,} {figures.UNITS[budget_in]}"
        yield where, [row for row in results.cells if place_of(row, PLACE) == place]


GLANCE = (
    "where", "claim", "place", OURS, "best other", "its accuracy", f"behind {OURS}", "MFLOPs",
    "its MFLOPs",
)  # fmt: skip


def at_a_glance(results: Results) -> list[list[Any]]:
    """A line per place and claim: how ours stands, and the best of the others; see `GLANCE`."""
    lines = []
    for where, rows in _by_place(results):
        for claim in (FROM_SCRATCH, GROWN):
            ranked = _ranked(rows, claim)
            others = [method for method in ranked if method != OURS]
            if OURS not in ranked or not others:
                continue
            ours, best = ranked[OURS], ranked[others[0]]
            standing = f"{1 + list(ranked).index(OURS)} of {len(ranked)}"
            lines.append([
                where, claim, standing, _over(list(ours.values()), *ACCURACY),
                others[0], _over(list(best.values()), *ACCURACY), _paired(ours, best),
                *(_over(list(one.values()), "flops", 1, 1e-6) for one in (ours, best)),
            ])  # fmt: skip
    return lines


COMMON = ("method", "seeds", "test accuracy", f"behind {OURS}", "test loss", "parameters")
COLUMNS = {
    FROM_SCRATCH: (*COMMON, "MFLOPs"),
    GROWN: (
        *COMMON, "MFLOPs", "training TFLOPs", "seconds", "of them growing", "peak GB",
        "newborn alive",
    ),
}  # fmt: skip
PAYING = (
    "method", "claim", "seeds", "test accuracy", "TFLOPs", "seconds", "TFLOPs to its accuracy",
    "seconds to its accuracy",
)  # fmt: skip


ACCURACY = ("test_accuracy", 2, 100, " %")
"""How it is written, see `_over`."""


def _ranked(rows: Sequence[Row], claim: str) -> dict[str, dict[int, Row]]:
    """By method and seed the cells of one place and claim, the best method first."""
    found: dict[str, dict[int, Row]] = {}
    for row in rows:
        if row["claim"] == claim:
            found.setdefault(row["method"], {})[row["seed"]] = row

    def mean(method: str) -> float:
        return float(np.mean([row["test_accuracy"] for row in found[method].values()]))

    return {method: found[method] for method in sorted(found, key=mean, reverse=True)}


def _standing(rows: Sequence[Row], claim: str) -> Iterable[list[Any]]:
    """A line per method, the best first."""
    found = _ranked(rows, claim)
    for method, by_seed in found.items():
        mine = list(by_seed.values())
        line = [
            method,
            len(mine),
            _over(mine, *ACCURACY),
            _paired(found.get(OURS, {}), by_seed) if method != OURS else "",
            _over(mine, "test_loss", 4),
            _over(mine, "params", 0),
            _over(mine, "flops", 2, 1e-6),
        ]
        if claim == GROWN:
            shares = [row["growth_seconds"] / row["seconds"] for row in mine]
            alive = [row["newborn_alive"] for row in mine if row["newborn_alive"] not in (None, "")]
            line += [
                _over(mine, "training_flops", 2, 1e-12),
                _over(mine, "seconds", 0),
                tables.mean_std(shares, digits=1, scale=100, unit=" %"),
                _over(mine, "peak_gb", 1),
                tables.mean_std(alive, digits=0, scale=100, unit=" %") if alive else "-",
            ]
        yield line


def _paired(ours: Mapping[int, Row], theirs: Mapping[int, Row]) -> str:
    """By how much ours is better on the same seeds, and the standard error of that."""
    seeds = sorted(set(ours) & set(theirs))
    if not seeds:
        return "-"
    gains = [100 * (ours[s]["test_accuracy"] - theirs[s]["test_accuracy"]) for s in seeds]
    error = np.std(gains, ddof=1) / math.sqrt(len(gains)) if len(gains) > 1 else math.nan
    spread = "" if math.isnan(error) else f" ± {error:.2f} (s.e.)"
    return f"{np.mean(gains):+.2f}{spread}"


def _paying(results: Results, rows: Sequence[Row]) -> Iterable[list[Any]]:
    """A grown network beside its final shape from scratch, and when it reaches that accuracy."""
    methods = dict.fromkeys(row["method"] for row in rows if row["method"] != TEMPLATE)
    for method in methods:
        mine = [row for row in rows if row["method"] == method]
        if {GROWN, FROM_SCRATCH} - {row["claim"] for row in mine}:
            continue
        for claim in CLAIMS:
            chosen = [row for row in mine if row["claim"] == claim]
            if chosen:
                yield [
                    method,
                    claim,
                    len(chosen),
                    _over(chosen, *ACCURACY),
                    _over(chosen, "training_flops", 2, 1e-12),
                    _over(chosen, "seconds", 0),
                    *(_until(results, chosen) if claim == GROWN else ("", "")),
                ]


def _until(results: Results, grown: Sequence[Row]) -> tuple[str, str]:
    """What growing cost until the validation accuracy that the final shape from scratch ends with.

    As a share of what that took from scratch, per seed; of the seeds that reach it.
    """
    shares = []
    for row in grown:
        target = {**row, "claim": FROM_SCRATCH}
        ours, theirs = (_curve(results.curves, cell) for cell in (row, target))
        if not theirs:
            continue
        reached = [e for e in ours if e["val_accuracy"] >= theirs[-1]["val_accuracy"]]
        first = reached[0] if reached else None
        shares.append(
            [first[name] / theirs[-1][name] if first else None
             for name in ("training_flops", "seconds")]
        )  # fmt: skip
    texts = []
    for column in zip(*shares, strict=True):
        known = [share for share in column if share is not None]
        text = f"{tables.mean_std(known, digits=2)} x" if known else "never"
        missed = len(column) - len(known)
        texts.append(text + (f" ({missed} of {len(column)} never)" if known and missed else ""))
    return (texts[0], texts[1]) if texts else ("-", "-")


def _curve(curves: Sequence[Row], cell: Row) -> list[Row]:
    return [row for row in curves if all(row[name] == cell[name] for name in CELL)]


def page_of(results: Results, folder: str | Path, introduction: str | None = None) -> str:
    """The page for the docs; that of a comparison has pictures."""
    parts = [
        introduction or INTRODUCTION.format(folder=folder),
        "\n".join(_recipe(results.cells)) + "\n",
    ]
    glance = at_a_glance(results) if introduction is None else []
    if glance:
        parts.append(f"## At a glance\n\n{tables.markdown(GLANCE, glance)}\n")
    for title, columns, rows in sections(results):
        parts.append(f"## {title}\n\n{tables.markdown(columns, rows)}\n")
    if introduction is None:
        name = Path(folder).name
        parts += [f"![{text}](images/{name}-{which}.png)\n" for which, text in PICTURES.items()]
    return "\n".join(parts)


def _recipe(rows: Sequence[Row]) -> Iterable[str]:
    """The flags that all cells have in common, and what those of a network or a method share.

    Of methods that have ours' flags too (variants of it), only what differs from ours.
    """
    shared = _shared_flags(rows)
    ours = _shared_flags([row for row in rows if row["method"] == OURS])
    yield f"All cells: `{' '.join(sorted(shared))}`."
    for column in ("model", "method"):
        for name in sorted({row[column] for row in rows}):
            own = _shared_flags([row for row in rows if row[column] == name]) - shared
            own -= ours if name != OURS else set()
            if own:
                yield f"{name}: `{' '.join(sorted(own))}`."


def _shared_flags(rows: Sequence[Row]) -> set[str]:
    flags = [set(str(row["settings"]).split()) for row in rows]
    return set.intersection(*flags) if flags else set()


PICTURES = {
    "accuracy": "Test accuracy against the budget, from scratch and as grown",
    "flops": "Validation accuracy against training FLOPs and seconds",
    "widths": "Widths chosen per layer at the largest budget",
}

INTRODUCTION = """\
# Results

Made by `python -m experiments.compare` from `{folder}`; don't edit by hand.
Every figure is a mean ± standard deviation over seeds; "behind gauss_newton" is by how much the
method's test accuracy, in points, is lower on the same seeds, with the standard error of that. Test
data were used once per cell, at its end. Training FLOPs are three forward passes per image and
epoch, growth steps left out; what these cost is in the seconds. The widths of `template` are those
of the seed network times one factor. What gauss_newton goes by was chosen on the
validation images of earlier cells of its own (CIFAR-10, vgg, seeds 0 to 2).
"""


def draw(results: Results, folder: Path, name: str) -> list[Path]:
    """The pictures of the page, whose files' names begin with `name`."""
    folder.mkdir(parents=True, exist_ok=True)
    makers: Mapping[str, Callable] = {
        "accuracy": figures.plot_standings,
        "flops": figures.plot_curves,
        "widths": figures.plot_widths,
    }
    return [
        make(results.curves if which == "flops" else results.cells, folder / f"{name}-{which}.png")
        for which, make in makers.items()
    ]


def _over(rows: Sequence[Row], name: str, digits: int, scale: float = 1.0, unit: str = "") -> str:
    return tables.mean_std([row[name] for row in rows], digits=digits, scale=scale, unit=unit)


def _write_csv(path: Path, columns: Sequence[str], rows: Sequence[Row]) -> None:
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def _number(text: str) -> Any:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
