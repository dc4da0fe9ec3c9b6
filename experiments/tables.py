"""Result tables: rich on a terminal, plain lines in a log, Markdown for the docs."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TextIO

from numpy.typing import ArrayLike

from experiments.measures import mean_and_std


def mean_std(values: ArrayLike, digits: int = 2, scale: float = 1.0, unit: str = "") -> str:
    """Mean ± sample standard deviation as text; the mean alone for a single value.

    Args:
      values: the readings, e.g. one per seed.
      digits: digits after the point.
      scale: factor on both, e.g. 100 for percent.
      unit: text put after the number.

    Example:

    >>> from experiments import tables
    >>> tables.mean_std([0.651, 0.664, 0.659], digits=1, scale=100, unit=" %")
    '65.8 ± 0.7 %'
    """
    mean, std = mean_and_std(values)
    spread = "" if math.isnan(std) else f" ± {std * scale:.{digits}f}"
    return f"{mean * scale:.{digits}f}{spread}{unit}"


def plain(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """The table as aligned plain text, for logs and files.

    Example:

    >>> from experiments import tables
    >>> print(tables.plain(["net", "params"], [["seed", 5022], ["grown", 40000]]))
    net    params
    -----  ------
    seed    5,022
    grown  40,000
    """
    cells, right = _cells(columns, rows)
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["  ".join(_aligned(row, widths, right)).rstrip() for row in cells]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)


def markdown(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """The table in Markdown, numbers flush right.

    Example:

    >>> from experiments import tables
    >>> print(tables.markdown(["net", "params"], [["seed", 5022]]))
    | net | params |
    | --- | ---: |
    | seed | 5,022 |
    """
    cells, right = _cells(columns, rows)
    cells = [[cell.replace("|", "\\|") for cell in row] for row in cells]
    lines = ["| " + " | ".join(row) + " |" for row in cells]
    lines.insert(1, "| " + " | ".join("---:" if flag else "---" for flag in right) + " |")
    return "\n".join(lines)


def show(
    columns: Sequence[str],
    rows: Iterable[Sequence[Any]],
    title: str = "",
    file: TextIO | None = None,
) -> None:
    """Prints the table: framed on a terminal, plain lines when the output goes elsewhere.

    Args:
      columns: the headings.
      rows: the cells, one sequence per row; anything `str` or a number.
      title: a line above the table.
      file: where to print, standard output by default.
    """
    stream = sys.stdout if file is None else file
    cells, right = _cells(columns, rows)
    if not stream.isatty():
        print(*filter(None, [title, plain(columns, cells[1:])]), sep="\n", file=stream)
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title or None)
    for column, flag in zip(cells[0], right, strict=True):
        table.add_column(Text(column), justify="right" if flag else "left")
    for row in cells[1:]:
        table.add_row(*map(Text, row))
    Console(file=stream).print(table)


def write_page(path: str | os.PathLike[str], text: str) -> Path:
    """Writes a page of the docs, its folder too if there is none."""
    page = Path(path)
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(text)
    return page


def _cells(
    columns: Sequence[str], rows: Iterable[Sequence[Any]]
) -> tuple[list[list[str]], list[bool]]:
    """All cells as text, headings first, and which columns hold numbers only."""
    cells = [list(map(str, columns))]
    for number, row in enumerate(rows):
        if len(row) != len(columns):
            raise ValueError(
                f"Row {number} has {len(row)} cells, expected {len(columns)} for {list(columns)}."
            )
        cells.append([_text(cell) for cell in row])
    right = [
        len(column) > 1 and all(map(_looks_numeric, column[1:]))
        for column in zip(*cells, strict=True)
    ]
    return cells, right


def _text(cell: Any) -> str:
    if cell is None:
        return "-"
    if isinstance(cell, bool | str):
        return str(cell)
    if hasattr(cell, "__index__"):
        return f"{cell:,}"
    return f"{cell:.4g}" if isinstance(cell, float) else str(cell)


def _looks_numeric(text: str) -> bool:
    return text == "-" or text.lstrip("+-")[:1].isdigit() or text in ("nan", "inf", "-inf")


def _aligned(row: Sequence[str], widths: Sequence[int], right: Sequence[bool]) -> list[str]:
    return [
        cell.rjust(width) if flag else cell.ljust(width)
        for cell, width, flag in zip(row, widths, right, strict=True)
    ]
