"""What growth steps look like as trials of Keras Tuner: values, metrics, and the table of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from keras_tuner.engine.trial import Trial

from tfgrow.types import GrowthEvent, Plan, describe_widths

EVENT_METRICS = ("estimated_change", "measured_change", "loss_before", "alpha", "newborn_alive")
"""Figures of a `GrowthEvent` that become metrics of its trial under the same name."""


def values_of(plan: Plan, epoch: int, parent: str) -> dict[str, Any]:
    """A plan as the values of a trial: plain ints and strings."""
    morphisms = sorted({_name(candidate.morphism) for candidate in plan.candidates})
    return {
        **{name: int(after) for name, (_, after) in plan.widths.items()},
        "tfgrow/grew": describe_widths(plan.widths),
        "tfgrow/morphisms": ", ".join(morphisms),
        "tfgrow/edits": len(plan.candidates),
        "tfgrow/epoch": int(epoch),
        "tfgrow/parent": parent,
    }


def metrics_of(event: GrowthEvent) -> dict[str, float]:
    """What a growth event did as the metrics of its trial; what is not known is left out."""
    figures = {name: as_number(getattr(event, name)) for name in EVENT_METRICS}
    rejected = event.status != "applied"
    figures |= {
        "params_before": event.params_before,
        "params": event.params_before if rejected else event.params_after,
        "flops_before": event.flops_before,
        "flops": event.flops_before if rejected else event.flops_after,
        "seconds": sum(event.seconds.values()),
    }
    return {name: float(value) for name, value in figures.items() if value is not None}


def table_of(trials: Sequence[Trial], objective: str) -> list[str]:
    """The trials as aligned text lines, headed."""
    head = ("trial", "epoch", "status", "grew", "parameters", "estimated", "measured", objective)
    rows = [head, *(_row(trial, objective) for trial in trials)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
    lines.insert(1, "  ".join("-" * width for width in widths))
    notes = [f"{t.trial_id}: {t.message}" for t in trials if t.message]
    return lines + notes


def _row(trial: Trial, objective: str) -> tuple[str, ...]:
    values = trial.hyperparameters.values

    def figure(name: str, form: str, unknown: str = "-") -> str:
        value = last_value(trial, name)
        return unknown if value is None else form.format(value)

    return (
        trial.trial_id,
        str(values.get("tfgrow/epoch", "-")),
        trial.status,
        f"{values.get('tfgrow/grew', '-')} ({values.get('tfgrow/morphisms', '-')})",
        figure("params_before", "{:.0f} -> ") + figure("params", "{:.0f}", unknown=""),
        figure("estimated_change", "{:+.4f}"),
        figure("measured_change", "{:+.4f}"),
        figure(objective, "{:.4f}"),
    )


def last_value(trial: Trial, metric: str) -> float | None:
    """A metric's latest value; None if there is none."""
    return trial.metrics.get_last_value(metric) if trial.metrics.exists(metric) else None


def as_number(value: Any) -> float | None:
    """The value as a finite float, else None."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None


def _name(morphism: Any) -> str:
    return morphism if isinstance(morphism, str) else morphism.name
