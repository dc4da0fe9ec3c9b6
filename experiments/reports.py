"""What a run leaves behind: a folder that appears whole or not at all, and a short table."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import tfgrow
from experiments import figures
from experiments.training import Trained

CONFIG = "config.json"
"""The file that marks a folder as a run's: only such a folder is ever replaced."""

VERSION = "1"
"""Name of the SavedModel's folder; TensorFlow Serving wants a whole number."""


def check_free(path: str | os.PathLike[str], overwrite: bool) -> Path:
    """The absolute path a run may be written to.

    Raises:
      ValueError: something is there that must not be replaced.
    """
    target = Path(os.path.abspath(path))
    if not os.path.lexists(target):
        return target
    if not overwrite:
        raise ValueError(
            f"{str(target)!r} exists. Choose another --run or --output_dir, or pass --overwrite."
        )
    if not (target / CONFIG).is_file():
        raise ValueError(
            f"{str(target)!r} exists and holds no {CONFIG}, so it is not a run and is not "
            "replaced. Choose another --run or --output_dir, or remove it yourself."
        )
    return target


@contextlib.contextmanager
def run_directory(target: Path) -> Iterator[Path]:
    """A fresh directory that takes the place of `target` when the block ends without an error.

    Until then, and after an error, whatever is at `target` stays as it is.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent))
    try:
        # One level down: `mkdtemp` makes private directories, and results are to be read.
        fresh, old = staging / "new", staging / "old"
        fresh.mkdir()
        yield fresh
        replaced = os.path.lexists(target)
        if replaced:
            os.rename(target, old)
        try:
            os.rename(fresh, target)
        except BaseException:
            if replaced:
                os.rename(old, target)
            raise
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def write_json(path: Path, data: Any) -> None:
    """Writes indented JSON, replacing the file as a whole; makes its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(json.dumps(data, indent=1) + "\n")
    os.replace(temporary, path)


def write_run(
    directory: Path,
    grown: Trained,
    config: Mapping[str, Any],
    initial_widths: Mapping[str, int],
    final_widths: Mapping[str, int],
    results: Sequence[Mapping[str, Any]],
) -> None:
    """Writes everything but the journal and the oracle's project, which the run wrote itself.

    Args:
      directory: an existing directory.
      grown: the grown network and its fit.
      config: every setting of the run.
      initial_widths: units by site before the fit, in the order of the network.
      final_widths: the same after it.
      results: rows of the table, JSON-ready.
    """
    tfgrow.strip(grown.model).save(directory / "model.keras")
    tfgrow.export(
        grown.model, directory / VERSION, dtype="uint8", output_dtype="float32", verbose=False
    )
    write_json(directory / "widths.json", dict(final_widths))
    write_json(directory / "results.json", {"table": list(results), "history": grown.history})
    figures.plot_growth(
        grown.events, grown.history, directory / "growth.png", initial_widths=initial_widths
    )
    draw_estimates(grown.events, directory / "estimates.png")
    write_json(directory / CONFIG, dict(config))


def draw_estimates(events: Sequence[tfgrow.GrowthEvent], path: Path) -> Path | None:
    """Estimated against measured change, a point per event; nothing if no event measured any.

    Sets that the guard committed at a smaller scale than they were learned at are a group of
    their own.
    """
    known = [
        event
        for event in events
        if event.status == "applied"
        and event.measured_change is not None
        and event.estimated_change is not None
    ]
    if not known:
        return None
    groups = ["as learned" if event.alpha == 1 else "scaled down by the guard" for event in known]
    return figures.plot_estimates(
        [event.estimated_change or 0.0 for event in known],
        [event.measured_change or 0.0 for event in known],
        path,
        groups,
    )


def shape_text(widths: Mapping[str, int]) -> str:
    """`{"conv1": 4, "conv2": 8}` -> `4,8`: as the flag --widths takes them."""
    return ",".join(map(str, widths.values()))
