"""The growth oracle: every growth step is a trial of a `keras_tuner.Oracle`.

    propose(model, data) -> trial RUNNING, Plan        what should change
    record(trial, event) -> trial COMPLETED / INVALID  what it did
    report(trial_id, logs)                             how the grown model did afterwards

A strategy is one method, `propose_plan`; everything else here is bookkeeping. On disk a project
looks as Keras Tuner users know it, every file replaced as a whole or not at all:

    directory/project_name/oracle.json, widths.json, trial_0000/trial.json, ...
"""

from __future__ import annotations

import abc
import contextlib
import dataclasses
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import keras_tuner
import numpy as np
import tensorflow as tf
from keras_tuner.engine.trial import Trial, TrialStatus

from tfgrow._checks import require_whole
from tfgrow._files import write_json
from tfgrow.graph.cost import CostModel, model_flops
from tfgrow.graph.nodes import trace
from tfgrow.graph.sites import Site, find_sites, sites_of
from tfgrow.morphisms.registry import joint_cost
from tfgrow.oracle.data import GrowthData, split_data
from tfgrow.oracle.limits import Limits
from tfgrow.oracle.names import as_patterns, matching_names
from tfgrow.oracle.trials import as_number, last_value, metrics_of, table_of, values_of
from tfgrow.oracle.undo import restored_on_error
from tfgrow.types import Cost, GrowthEvent, Plan

_LOSSES = ("loss", "val_loss", "default_objective")

TUNER_ID = "tfgrow"
"""Under which tuner id growth trials are created; one step is under way at a time."""

_BATCHES = (16, 12, 8)
"""Batches to learn, score and judge on, if a strategy does not say."""


class GrowthOracle(keras_tuner.Oracle, abc.ABC):
    """Base of the oracles that decide where a model grows; subclasses write `propose_plan`.

    A trial's `hyperparameters.values` hold what was proposed: the units after the step by site
    name, and `tfgrow/grew`, `tfgrow/morphisms`, `tfgrow/edits`, `tfgrow/epoch`,
    `tfgrow/parent` (the last completed step). Its metrics hold `estimated_change`,
    `measured_change`, `params`, `flops`, the objective and whatever the logs contained.

    Args:
      objective: name of the metric that ranks the trials, a `keras_tuner.Objective`, or a list.
      max_trials: most growth steps; None is unlimited.
      max_params: most parameters (`model.count_params()`) the grown model may have.
      max_flops: most inference FLOPs per sample it may need. Gains are compared per FLOP if this
        is the only budget.
      growth_per_step: a whole number is the most edits of one step; a fraction such as 0.25 is the
        most parameters one step may add, relative to the parameters before it.
      min_gain_per_param: a step stops choosing where the marginal gain (loss per sample) per
        parameter (per FLOP if only those have a budget) falls under this.
      round_to: widths of the sites that grow are brought to multiples of this.
      include: site names, or regular expressions matching whole names, that may grow; None is all.
      exclude: the same, for what may not.
      seed: makes the proposals repeatable; None draws one from Python's `random`.
      directory: where the project is kept. With neither `directory` nor `project_name` nothing
        is written; with one of them the other has Keras Tuner's default.
      project_name: name of the project's folder inside `directory`.
      overwrite: False reloads the finished trials of an existing project, True deletes it.
      **kwargs: what `keras_tuner.Oracle` takes besides.

    Raises:
      ValueError, TypeError: an argument that makes no sense; it names it and what is expected.

    Example:

    >>> import tfgrow.oracle.base as base
    >>> from tfgrow.types import Cost, Plan
    >>> class Never(base.GrowthOracle):
    ...     def propose_plan(self, model, data, *, epoch=0):
    ...         return Plan((), 0.0, Cost(), {}, {}, reason="I never grow")
    >>> import keras
    >>> model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    >>> trial, plan = Never(max_params=100).propose(model, data=None)
    >>> trial.status, plan.reason
    ('IDLE', 'I never grow')
    """

    trials: dict[str, Trial]  # made by Keras Tuner, which has no types

    guarded: ClassVar[bool] = True
    """Whether a step that raises the held-out loss is scaled down or dropped (`Growth(guard=)`)."""

    def __init__(
        self,
        objective: Any = "val_loss",
        max_trials: int | None = None,
        *,
        max_params: int | None = None,
        max_flops: int | None = None,
        growth_per_step: int | float | None = None,
        min_gain_per_param: float = 0.0,
        round_to: int | None = None,
        include: str | Sequence[str] | None = None,
        exclude: str | Sequence[str] | None = None,
        seed: int | None = None,
        directory: str | os.PathLike | None = None,
        project_name: str | None = None,
        overwrite: bool = False,
        **kwargs: Any,
    ) -> None:
        require_whole("max_trials", max_trials)
        require_whole("max_params", max_params)
        require_whole("max_flops", max_flops)
        require_whole("seed", seed, least=0)
        super().__init__(objective=objective, max_trials=max_trials, seed=seed, **kwargs)
        if seed is not None:  # Keras Tuner takes 0 for "no seed"
            self.seed = self._seed_state = int(seed)
        self.max_params = max_params
        self.max_flops = max_flops
        self.growth_per_step = _growth_per_step(growth_per_step)
        # The constructor of Limits checks the values that no model is needed for.
        self._limits = Limits(min_gain_per_param=min_gain_per_param, round_to=round_to)
        self.include = as_patterns("include", include)
        self.exclude = as_patterns("exclude", exclude)
        self.verbose = 0  # the caller reports one line per step; set it to 1 for Keras Tuner's
        self.widths: dict[str, int] = {}
        self._proposal: dict[str, Any] | None = None
        self._directory: str | None = None
        self._project_name: str | None = None
        if directory is not None or project_name is not None:
            self.set_project(directory, project_name, overwrite=overwrite)

    # ---- what a strategy writes -------------------------------------------------------------

    @abc.abstractmethod
    def propose_plan(self, model: Any, data: Any, *, epoch: int = 0) -> Plan:
        """Decides what to change; the one method of a strategy.

        It must not change the model. `self.limits(params, flops)` is what it may spend,
        `self.site_names([site.names for site in sites])` where, and `self.next_seed()` its
        randomness.

        Args:
          model: the live, built model.
          data: what `propose` was given.
          epoch: epochs completed.

        Returns:
          The plan; without candidates if nothing is worth doing, its `reason` saying why.
        """

    # ---- what a strategy may write ----------------------------------------------------------

    def check(self, model: Any, data: Any) -> None:
        """Raises ValueError or TypeError now for what would make every growth step fail.

        Args:
          model: the live, built model.
          data: what the steps will be given.
        """
        del data
        self.check_budget(model)
        names = [site.names for site in self.open_sites(find_sites(model))]
        if not self.site_names(names):
            raise ValueError(
                f"include={self.include} and exclude={self.exclude} leave no site of model "
                f"'{model.name}' to grow. Found: {[name for name, *_ in names]}."
            )

    def open_sites(self, sites: Sequence[Site]) -> list[Site]:
        """The sites at which the strategy could do something; by default those that can widen."""
        return [site for site in sites if site.blocked is None]

    def why_closed(self, site: Site) -> str:
        """Why the strategy can do nothing at a site that is not among `open_sites`."""
        return str(site.blocked)

    def split(self, dataset: Any) -> GrowthData:
        """Disjoint batches of a dataset for one step: to learn on, to score with, to judge by."""
        if isinstance(dataset, GrowthData):
            return dataset
        return split_data(dataset, *_BATCHES, seed=self.next_seed())

    def estimate(self, model: Any, candidates: Sequence[Any], batches: Any) -> float | None:
        """Estimated joint change of the loss by candidates that the guard has scaled down.

        Args:
          model: the live model, as it was when they were proposed.
          candidates: the scaled ones.
          batches: what to estimate on.

        Returns:
          The estimate, or None: a strategy need not have one.
        """
        del model, candidates, batches
        return None

    # ---- what a callback or a loop calls ----------------------------------------------------

    @contextlib.contextmanager
    def all_or_nothing(self) -> Iterator[None]:
        """Forgets what was proposed and recorded in the block, on disk too, if it raises."""
        with restored_on_error(self, self._project_dir if self._on_disk else None):
            yield

    def propose(self, model: Any, data: Any, epoch: int = 0, **context: Any) -> tuple[Trial, Plan]:
        """Asks the strategy for a plan and opens its trial.

        A step that was opened and never recorded is closed as INVALID first.

        Args:
          model: the live, built model.
          data: passed on to `propose_plan`.
          epoch: epochs completed.
          **context: passed on to `propose_plan`.

        Returns:
          The trial and the plan. The status is RUNNING if there is something to do, IDLE if
          nothing is worth doing now, STOPPED if `max_trials` or the budget is used up; `IDLE` and
          `STOPPED` trials are not kept, and their plan's `reason` says why.

        Raises:
          ValueError: the model is over the budget already, or the plan is not finite.
          TypeError: `propose_plan` did not return a `Plan`.
        """
        self.check_budget(model)
        self._close_unfinished("no event was recorded for this step")
        reason = self._why_stopped(model)
        if reason:
            return self._open(_nothing(reason), TrialStatus.STOPPED, epoch)
        plan = self.propose_plan(model, data, epoch=epoch, **context)
        _check_plan(plan, type(self).__name__)
        return self._open(plan, TrialStatus.RUNNING if plan.candidates else TrialStatus.IDLE, epoch)

    def record(
        self, trial: Trial, event: GrowthEvent, logs: Mapping[str, Any] | None = None
    ) -> GrowthEvent:
        """Writes what a step did to its trial and ends it.

        Until `logs` (here or in `report`) bring the objective, a loss objective is scored by the
        held-out loss after the event.

        Args:
          trial: what `propose` returned.
          event: what was done; status `"rejected"` ends the trial INVALID with the reason.
          logs: figures of the epoch, if known; numbers are kept as metrics.

        Returns:
          The event with its `trial_id`; unchanged if the trial was IDLE or STOPPED.

        Raises:
          ValueError: a trial that is not under way here.
        """
        if trial.status in (TrialStatus.IDLE, TrialStatus.STOPPED):
            return event
        if trial not in self.ongoing_trials.values():
            raise ValueError(
                f"Trial {trial.trial_id!r} is {trial.status} and not under way in this oracle. "
                "Record each trial once, before the next `propose`."
            )
        event = dataclasses.replace(event, trial_id=trial.trial_id)
        metrics = {**metrics_of(event), **self._numbers(logs)}
        self.update_trial(trial.trial_id, metrics, step=event.epoch)
        if event.status == "applied":
            self.widths.update({name: int(after) for name, (_, after) in event.widths.items()})
            trial.status = TrialStatus.COMPLETED
        else:
            trial.status = TrialStatus.INVALID
            trial.message = event.reason or event.status
        self.end_trial(trial)
        if self._on_disk:
            write_json(os.path.join(self._project_dir, "widths.json"), self.widths, indent=1)
        return event

    def report(self, trial_id: str, logs: Mapping[str, Any], epoch: int = 0) -> None:
        """Adds what is known only after a step: later objectives, `newborn_alive`.

        A completed trial is scored anew.

        Args:
          trial_id: a trial that was recorded.
          logs: figures by name; what is not a finite number is left out.
          epoch: epochs completed.
        """
        if trial_id not in self.trials:
            raise ValueError(
                f"No growth step has the trial id {trial_id!r}. Found: {sorted(self.trials)}."
            )
        metrics = self._numbers(logs)
        if not metrics:
            return
        trial = self.update_trial(trial_id, metrics, step=epoch)
        if trial.status == TrialStatus.COMPLETED:
            self.score_trial(trial)
        self._save_trial(trial)

    def results_summary(self, num_trials: int = 10) -> None:
        """Prints the last `num_trials` growth steps as a table, in the order they happened."""
        ids = self.start_order
        shown = [self.trials[trial_id] for trial_id in ids[max(0, len(ids) - num_trials) :]]
        lines = [
            "Results summary",
            f"Results in {self._project_dir if self._on_disk else 'memory only'}",
            f"Showing the last {len(shown)} of {len(ids)} growth steps",
            str(self.objective),
            *table_of(shown, self.objective.name),
        ]
        print("\n".join(lines))

    # ---- what a strategy is given -----------------------------------------------------------

    def limits(self, params: int, flops: int | None = None, smallest: int = 0) -> Limits:
        """What one step may spend on a model that has `params` parameters and `flops` FLOPs.

        Args:
          params: parameters of the model.
          flops: its FLOPs per sample; needed if `max_flops` is set.
          smallest: parameters of its smallest edit, which `growth_per_step` never forbids.

        Raises:
          ValueError: `max_flops` is set and `flops` is not given.
        """
        if self.max_flops is not None and flops is None:
            raise ValueError(f"max_flops={self.max_flops} needs the model's FLOPs per sample.")
        left = math.inf if self.max_params is None else max(0, self.max_params - params)
        share = math.inf
        if isinstance(self.growth_per_step, float):
            share = max(int(self.growth_per_step * params), smallest)
        return dataclasses.replace(
            self._limits,
            params=None if min(left, share) == math.inf else int(min(left, share)),
            step=share < left,
            flops=None if self.max_flops is None else max(0, self.max_flops - int(flops or 0)),
            # that a step may only spend so many parameters does not make them a budget
            prices=(0.0, 1.0) if self.counts_flops else None,
            edits=self.growth_per_step if isinstance(self.growth_per_step, int) else None,
        )

    @property
    def counts_flops(self) -> bool:
        """Whether FLOPs are the only budget, so that gains are compared per FLOP."""
        return self.max_params is None and self.max_flops is not None

    def site_names(self, names: Sequence[str | Sequence[str]]) -> list[str]:
        """Those of `names` that `include` and `exclude` leave.

        Args:
          names: names of sites, or `Site.names`, all that a site answers to.

        Raises:
          ValueError: a pattern that matches none of them.
        """
        return matching_names(names, self.include, self.exclude)

    def next_seed(self) -> int:
        """A new seed at each call, repeatable from `seed`, also after a reload."""
        self._seed_state += 1
        return self._seed_state

    def check_budget(self, model: Any) -> None:
        """Raises ValueError if the model is over `max_params` or `max_flops` already."""
        if self.max_params is not None and model.count_params() > self.max_params:
            raise ValueError(
                f"Model '{model.name}' has {model.count_params()} parameters, more than "
                f"max_params={self.max_params}. Start from a smaller model or raise max_params."
            )
        flops = 0 if self.max_flops is None else model_flops(trace(model))
        if self.max_flops is not None and flops > self.max_flops:
            raise ValueError(
                f"Model '{model.name}' needs {flops} FLOPs per sample, more than max_flops="
                f"{self.max_flops}. Start from a smaller model or raise max_flops."
            )

    def fits(self, model: Any, candidates: Sequence[Any]) -> bool:
        """Whether the model stays within `max_params` and `max_flops` with some edits."""
        if self.max_params is None and self.max_flops is None:
            return True
        graph = trace(model)
        costs = CostModel(graph, sites_of(model, graph))
        extra = joint_cost(costs, candidates)
        return all(
            budget is None or size <= budget
            for size, budget in (
                (model.count_params() + extra.params, self.max_params),
                (costs.base.flops + extra.flops, self.max_flops),
            )
        )

    # ---- the keras_tuner side ---------------------------------------------------------------

    def create_trial(self, tuner_id: str) -> Trial:
        """Opens the trial of a growth step; nothing else can ask for one.

        Raises:
          RuntimeError: a `keras_tuner.Tuner` asks, which would wait for hyperparameters forever.
        """
        if self._proposal is None:
            raise RuntimeError(
                f"{type(self).__name__} proposes edits of a model that trains, no hyperparameters "
                "for a tuner. Give it to tfgrow.callbacks.Growth, and that to any tuner: "
                "search(..., callbacks=[growth]) grows the model of every trial."
            )
        return super().create_trial(tuner_id)

    def populate_space(self, trial_id: str) -> dict[str, Any]:
        """The values of the plan that is being proposed; IDLE when there is none."""
        if self.max_trials and len(self.trials) >= self.max_trials:
            return {"status": TrialStatus.STOPPED}
        return self._proposal or {"status": TrialStatus.IDLE}

    def score_trial(self, trial: Trial) -> None:
        """Scores by the objective; before it is known, by the held-out loss, or ranks it last."""
        if trial.metrics.exists(self.objective.name):
            super().score_trial(trial)
            return
        after = (last_value(trial, "loss_before"), last_value(trial, "measured_change"))
        known = self.objective.name in _LOSSES and None not in after
        trial.score = sum(after) if known else self._worst_score

    def get_best_trials(self, num_trials: int = 1) -> list[Trial]:
        """The best trials; those without the objective come last."""
        for trial in self.trials.values():
            if trial.status == TrialStatus.COMPLETED and trial.score is None:
                trial.score = self._worst_score
        return super().get_best_trials(num_trials)

    def get_state(self) -> dict[str, Any]:
        """What `oracle.json` holds: Keras Tuner's state and the widths of the sites."""
        state = super().get_state()
        # A set has no order of its own; equal runs should write equal files.
        state["tried_so_far"] = sorted(state["tried_so_far"])
        return {**state, "widths": dict(self.widths)}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """The inverse of `get_state`; trials are reloaded from their own files."""
        super().set_state(state)
        self.widths = dict(state["widths"])

    def set_project(
        self,
        directory: str | os.PathLike | None,
        project_name: str | None = None,
        overwrite: bool = False,
    ) -> None:
        """Keeps the project in `directory/project_name` from now on.

        An existing project is reloaded, or deleted if `overwrite`.
        """
        if not isinstance(directory, (str, os.PathLike, type(None))):
            raise TypeError(f"directory must be a path or None. Found: {directory!r}")
        self._set_project_dir(os.fspath(directory or "."), project_name or "untitled_project")
        if overwrite:
            tf.io.gfile.rmtree(self._project_dir)
        elif tf.io.gfile.exists(self._get_oracle_fname()):
            print(f"Reloading Oracle from {self._get_oracle_fname()}")
            self.reload()

    def move_project(self, suffix: str) -> None:
        """Goes on in a project of the same name with a suffix; nothing in memory changes.

        What is there already, of an earlier run, is replaced.
        """
        if not self._on_disk:
            return
        self._set_project_dir(self._directory, f"{self._project_name}{suffix}")
        tf.io.gfile.rmtree(self._project_dir)
        for trial in self.trials.values():
            self._save_trial(trial)
        self.save()

    def save(self) -> None:
        """Writes `oracle.json`; nothing when the oracle has no directory."""
        if self._on_disk:
            write_json(self._get_oracle_fname(), self.get_state())

    def reload(self) -> None:
        """Reads the project's trials; a step that was cut off is closed as INVALID."""
        self._check_own_project()
        super().reload()
        # Keras Tuner would run unfinished trials again; the model they were meant for is gone.
        # Trials whose file is younger than oracle.json are in none of its lists.
        self._retry_queue = []
        read = dict(self.trials)
        self.start_order += sorted(set(read) - set(self.start_order))
        # Keras Tuner reads them in the order in which the file system lists them.
        self.trials = {trial_id: read[trial_id] for trial_id in self.start_order}
        for trial_id, trial in self.trials.items():
            if trial.status == TrialStatus.RUNNING:
                trial.status, trial.message = TrialStatus.INVALID, "the process ended in this step"
                self._save_trial(trial)
            if trial_id not in self.end_order:
                self.end_order.append(trial_id)

    def _check_own_project(self) -> None:
        path = self._get_oracle_fname()
        way_out = "Choose another directory or project_name, or delete it with overwrite=True."
        try:
            with tf.io.gfile.GFile(path) as file:
                known = json.load(file)
        except json.JSONDecodeError as error:
            raise ValueError(f"'{path}' is damaged ({error}). {way_out}") from error
        if "widths" not in known:
            raise ValueError(
                f"'{path}' is of another kind of oracle, not of a growth oracle. {way_out}"
            )

    def _save_trial(self, trial: Trial) -> None:
        if not self._on_disk:
            return
        state = trial.get_state()
        if state["score"] is not None and not math.isfinite(state["score"]):
            state["score"] = None  # JSON has no infinity
        write_json(os.path.join(self._get_trial_dir(trial.trial_id), "trial.json"), state)

    def _retry(self, trial: Trial) -> bool:
        # A rejected step is a result; and the model has moved on, so nothing can be run again.
        return False

    def _check_objective_found(self, metrics: Mapping[str, Any]) -> None:
        """Accepts metrics without the objective: a step's own figures are known before it."""

    # ---- inside -----------------------------------------------------------------------------

    @property
    def _on_disk(self) -> bool:
        return self._directory is not None

    @property
    def _worst_score(self) -> float:
        return -math.inf if self.objective.direction == "max" else math.inf

    def _why_out_of_trials(self) -> str | None:
        if self.max_trials and len(self.trials) >= self.max_trials:
            return f"limit of {self.max_trials} growth steps reached"
        return None

    def _why_stopped(self, model: Any) -> str | None:
        reason = self._why_out_of_trials()
        if reason:
            return reason
        if self.max_params is not None and model.count_params() >= self.max_params:
            return f"budget of {self.max_params} parameters reached"
        return None

    def _open(self, plan: Plan, status: str, epoch: int) -> tuple[Trial, Plan]:
        self._proposal = {
            "status": status,
            "values": values_of(plan, epoch, self._last_completed()),
        }
        try:
            return self.create_trial(TUNER_ID), plan
        finally:
            self._proposal = None

    def _close_unfinished(self, message: str) -> None:
        for trial in list(self.ongoing_trials.values()):
            trial.status, trial.message = TrialStatus.INVALID, message
            self.end_trial(trial)

    def _last_completed(self) -> str:
        done = [i for i in self.end_order if self.trials[i].status == TrialStatus.COMPLETED]
        return done[-1] if done else ""

    def _numbers(self, logs: Mapping[str, Any] | None) -> dict[str, float]:
        numbers = {name: as_number(value) for name, value in (logs or {}).items()}
        found = {name: number for name, number in numbers.items() if number is not None}
        if self.objective.has_value(found):
            found[self.objective.name] = float(self.objective.get_value(found))
        return found


def _nothing(reason: str) -> Plan:
    return Plan((), 0.0, Cost(), {}, {}, reason=reason)


def _check_plan(plan: Any, strategy: str) -> None:
    if not isinstance(plan, Plan):
        raise TypeError(f"{strategy}.propose_plan must return a Plan. Found: {plan!r}")
    if plan.estimated_change is not None and not math.isfinite(plan.estimated_change):
        raise ValueError(
            f"{strategy} estimated a change of {plan.estimated_change}. Check the estimation data "
            "and the loss for NaN or overflow."
        )


def _growth_per_step(value: Any) -> int | float | None:
    if value is None:
        return None
    if isinstance(value, (int, np.integer)) and not isinstance(value, bool) and value >= 1:
        return int(value)
    if isinstance(value, (float, np.floating)) and math.isfinite(value) and value > 0:
        return float(value)
    raise ValueError(
        "growth_per_step must be a whole number >= 1 (the most edits of one step), a positive "
        f"float (the most added parameters relative to those before), or None. Found: {value!r}"
    )
