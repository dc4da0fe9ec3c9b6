r"""What matters and what doesn't: growing by Gauss-Newton with one choice changed at a time.

    python -m experiments.ablation --data_dir=$HOME/tensorflow_datasets
    python -m experiments.ablation --variants=gauss_newton,independent --seeds=2

Every variant is grown, and the widths that it found are trained from scratch, as the methods of
`experiments.compare` are and with the same settings; `gauss_newton` is what nothing is changed of.
Cells that are finished are not run again. All of them make up `compare.csv` under --results_dir,
and --docs.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import Any

from absl import app, flags

from experiments import compare
from experiments._messages import in_words, quiet_logs
from experiments.contest import FROM_SCRATCH, GROWN, Cell

os.environ.setdefault("KERAS_BACKEND", "tensorflow")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

STRATEGY = "gauss_newton"

RAW = {"score": "raw", "cost_exponent": 1.0}

VARIANTS: Mapping[str, Mapping[str, Any]] = {
    STRATEGY: {},
    "raw": RAW,
    "marginal": {"score": "marginal", "morphisms": ["add"], "new_units": 8},
    "first_order": {"strategy": "gradmax"},
    "add_only": {"morphisms": ["add"]},
    "split_only": {"morphisms": ["split"]},
    "per_parameter": {"cost_exponent": 1.0},
    "cost_aside": {"cost_exponent": 0.0},
    "falling_rate": {"fall": 1.0},
    "late": {"every": 2, "settle": 0.3},
    "on_plateau": {"schedule": "plateau", "settle": 0.3},
    "slowly": {"growth_per_step": 0.3, "every": 2, "settle": 0.1},
    "small_steps": {"growth_per_step": 0.2, "rounds": 3},
    "large_steps": {"growth_per_step": 4.0},
    "no_guard": {"guard": False},
    "average": {"ema_momentum": 0.99},
    "exact": {"curvature": "exact"},
    "empirical": {"curvature": "empirical"},
    "few_steps": {"learn_steps": 2},
    "many_steps": {"learn_steps": 32},
    "few_samples": {"score_batches": 4},
    "many_samples": {"score_batches": 64},
    "same_samples": {"cross_fitted": False},
    "independent": {"joint": False},
    "raw_add": {**RAW, "morphisms": ["add"]},
    "raw_split": {**RAW, "morphisms": ["split"]},
    "raw_with_prune": {**RAW, "morphisms": ["split", "add", "prune"]},
    "raw_same_samples": {**RAW, "cross_fitted": False},
    "raw_independent": {**RAW, "joint": False},
}
"""What each differs in: flags of `experiments.compare`, and `experiments.contest.CHANGES`."""

SAID = {
    "raw": "splits and new units scored by what they bring at once, per parameter",
    "marginal": "scored by what they bring beyond training the existing weights",
    "first_order": "the gradient alone: new units, sites and directions as in GradMax",
    "add_only": "edits are new units",
    "split_only": "edits are splits",
    "per_parameter": "worth compared per parameter instead of per root of the parameters",
    "cost_aside": "worth compared as it is, whatever units cost within the budget",
    "falling_rate": "the learning rate falls from the start, not from half of the epochs on",
    "late": "grown every other epoch, until 70% of the epochs",
    "on_plateau": "grown when the validation loss has not fallen, until 70% of the epochs",
    "slowly": "at most 30% more parameters, every other epoch, until 90% of the epochs",
    "small_steps": "many small events, up to three at a time",
    "large_steps": "all growth that the budget allows in few events",
    "no_guard": "sets are applied whatever the held-out loss says",
    "average": "grown at the running average of the weights where that is better",
    "exact": "exact columns of the curvature instead of one sampled column per image",
    "empirical": "curvature from the labels' own gradients",
    "few_steps": "2 learning steps of theta",
    "many_steps": "32 learning steps of theta",
    "few_samples": "scored on 4 batches",
    "many_samples": "scored on 64 batches",
    "same_samples": "scored on the batches that were learned on",
    "independent": "each edit takes its own gain for itself, overlaps counted twice",
    "raw_add": "`raw`, new units only",
    "raw_split": "`raw`, splits only",
    "raw_with_prune": "`raw`, and units can be removed, too",
    "raw_same_samples": "`raw`, scored on the batches that were learned on",
    "raw_independent": "`raw`, overlaps counted twice",
}


def define_flags(values: flags.FlagValues = flags.FLAGS) -> None:
    """Defines this binary's flags: the variants instead of the methods of `experiments.compare`."""
    compare.define_common_flags(values)
    compare.define_some("variants", VARIANTS, VARIANTS, "What is grown.", values)
    values.set_default("results_dir", "experiments/results/ablation")
    values.set_default("docs", "docs/ablation.md")
    flags.adopt_module_key_flags(compare, flag_values=values)  # else --help would not list them


def cells_of(options: Any) -> Iterator[Cell]:
    """All cells, seed by seed."""
    common = compare.common_settings(options)
    for seed, dataset, model, budget in compare.places_of(options):
        for name in options.variants:
            settings = {**common, "strategy": STRATEGY, **VARIANTS[name]}
            for claim in (GROWN, FROM_SCRATCH):
                yield Cell(dataset, model, budget, name, claim, seed, settings)


INTRODUCTION = """\
# What matters and what doesn't

Made by `python -m experiments.ablation` from `experiments/results/ablation`; don't edit by hand.
`gauss_newton` is the recipe of `experiments.compare`; a variant differs from it in what is said
here:

{lines}

Every figure is a mean ± standard deviation over seeds; "behind gauss_newton" is by how much the
variant's test accuracy, in points, is lower on the same seeds, with the standard error of that.
Test data were used once per cell, at its end.
"""


def introduction(results: Any) -> str:
    """What the page begins with: the variants that there are cells of."""
    there = {row["method"] for row in results.cells}
    lines = [f"- `{name}`: {text}" for name, text in SAID.items() if name in there]
    return INTRODUCTION.format(lines="\n".join(lines))


def main(arguments: list[str]) -> None:
    """Runs what is missing, then writes the tables of all there is."""
    if len(arguments) > 1:
        raise app.UsageError(f"Unexpected arguments {arguments[1:]}; settings are --flags.")
    quiet_logs()
    with in_words("experiments.ablation"):
        compare.run(cells_of(flags.FLAGS), flags.FLAGS, introduction)


if __name__ == "__main__":
    define_flags()
    app.run(main)
