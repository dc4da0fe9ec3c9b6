"""tfgrow.callbacks.Growth: grows a model inside an ordinary `model.fit`."""

from __future__ import annotations

import copy
import gc
import inspect
import itertools
import math
import os
import time
import warnings
import weakref
from collections import Counter
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np

from tfgrow import schedules, strategies
from tfgrow._checks import require_whole
from tfgrow._keras import layers_within
from tfgrow.averaging import WeightAverage, refresh_statistics
from tfgrow.graph.sites import find_sites
from tfgrow.growth import describe, newborn_of, size_of, widths_changed, widths_of
from tfgrow.journal import Journal
from tfgrow.liveness import alive_share
from tfgrow.measure import real_loss
from tfgrow.oracle.base import GrowthOracle
from tfgrow.oracle.guard import ALPHAS, Outcome, commit
from tfgrow.peer_callbacks import carry_over
from tfgrow.surgery.optimizer import check_optimizer
from tfgrow.surgery.transaction import growth_transaction
from tfgrow.types import GrowthEvent, Plan

_NO_MODEL = {
    "_due": False,
    "_epochs_done": 0,
    "_trained": None,
    "_peers": (),
    "_newborn": (),
    "_average": None,
}
"""What `Growth` knows of a model when it has none."""

DOUBTFUL = 0.25
"""An event that brings less than this share of its estimate is warned of."""

RELEVANT = 0.01
"""Estimates of less than this share of the loss are not: held-out batches don't tell so little."""


_NO_BACKUP = (
    "BackupAndRestore keeps weights, not the architecture: it cannot resume a run from before a "
    "growth. Keep whole models with ModelCheckpoint('model.keras') beside it, and go on from "
    "keras.models.load_model('model.keras')."
)

_TOO_SHORT = (
    "Growth: this fit ends after epoch {epochs}, before the first growth, which is due after epoch "
    "{earliest}. Where fit is called again and again, tell it the epochs that are done "
    "(initial_epoch=2, epochs=3), or grow after every one (every=1)."
)


class Growth(keras.callbacks.Callback):
    """Grows the model while it trains.

    When the schedule says so, before the first batch of the next epoch, the oracle proposes a set
    of edits, a guard applies it at the largest scale that does not raise the loss on held-out
    batches, and training goes on with the same optimizer. It never calls `compile`, works beside
    the stock callbacks in any order, and puts `tfgrow_params`, `tfgrow_flops`, `tfgrow_events`,
    `tfgrow_estimated_change` and `tfgrow_measured_change` (0 in epochs without an event) in the
    epoch's logs from the first epoch on. An event that brings less than a quarter of what was
    estimated (`GrowthEvent.realized`) gives a warning, if that was 1 % of the loss or more.

    All losses here are those of inference mode: without dropout and augmentation in the model, and
    with BatchNormalization's moving statistics. In training mode an event can raise the loss that
    it lowers so.

    Estimates and guard see the sample weights of `data` and no `class_weight` of `fit`: give those
    as sample weights. Kernels with a constraint are projected onto it before the guard judges. The
    best weights that `EarlyStopping` keeps are widened with the model; after a removal (`"prune"`)
    they no longer compute what they did, since what stands in for a unit does so in the weights of
    now.

    An event that is cut off by an error or an interrupt leaves model, optimizer, journal and the
    oracle's files as they were before it. It stays due: like growth that falls due at the end of
    `fit`, it happens when the next `fit` of the same model begins. A deep copy has the settings
    and events of the original and shares its data, but belongs to no model; the n-th one keeps its
    project and its journal in places of its own, named like the original's with `-n` at the end.

    Args:
      oracle: what proposes the edits, usually a `tfgrow.GaussNewtonOracle`; or the name of one,
        see `tfgrow.strategies.get`.
      data: what edits are learned, scored and judged on, usually the training data: anything
        `model.fit` takes, with targets, but a generator, which can be read only once.
      every: grow every so many epochs, by the numbers that `fit` gives them, which start anew at
        `initial_epoch`. Give this or `when`; 2 by default.
      when: a `tfgrow.schedules.Schedule`, or its short form such as `"on_plateau"`.
      guard: whether to judge a set on held-out batches before it is committed; strategies that
        promise nothing of the loss are never judged.
      tolerance: by how much an event may raise the held-out loss (negative: must lower it).
      journal: path of a JSON file that holds the events, which is replaced if it exists; or a
        `tfgrow.Journal`: `tfgrow.Journal.load(path)` goes on with the events of a file. Or None.
      verbose: 0 silent, 1 a line per event and a progress bar, 2 a line per event; `"auto"` as fit.
      rounds: how many events may follow each other when it grows, until one brings nothing. New
        units of one layer repeat each other, so that an event often gives it one; the next event
        learns on the network that has it.
      ema_momentum: with 0.99, for instance, the model grows at the running average of its weights
        over about 100 steps, if that has the lower loss on held-out batches, and trains on from
        there; BatchNormalization's statistics are taken anew for it. Estimates are ten times
        smaller there, and nearer to those of weights that have settled; networks that grow while
        they train came out no better for it. None grows at the weights as they are.

    Attributes:
      events: list of `GrowthEvent`, in order.

    Example:

    >>> import keras, numpy as np, tfgrow
    >>> model = tfgrow.convert(keras.Sequential(
    ...     [keras.Input((4,)), keras.layers.Dense(2, "tanh"), keras.layers.Dense(1)]))
    >>> model.compile("adam", "mse")
    >>> x = np.random.default_rng(0).normal(size=(256, 4)).astype("float32")
    >>> data = x, np.sin(x.sum(axis=1, keepdims=True))
    >>> growth = tfgrow.callbacks.Growth(
    ...     tfgrow.GaussNewtonOracle("loss", max_params=40, seed=0), data=data, every=1)
    >>> history = model.fit(*data, epochs=2, callbacks=[growth], verbose=0)
    >>> len(growth.events)
    1
    """

    def __init__(
        self,
        oracle: GrowthOracle | str,
        data: Any = None,
        every: int | None = None,
        when: Any = None,
        guard: bool = True,
        tolerance: float = 0.0,
        journal: str | os.PathLike | Journal | None = None,
        verbose: int | str = "auto",
        rounds: int = 1,
        ema_momentum: float | None = None,
    ) -> None:
        super().__init__()
        if every is not None and when is not None:
            raise ValueError("Give `every` or `when`, not both.")
        if not isinstance(tolerance, (int, float)) or math.isnan(tolerance):
            raise ValueError(f"tolerance must be a number. Found: {tolerance!r}")
        if verbose not in ("auto", 0, 1, 2):
            raise ValueError(f"verbose must be 'auto', 0, 1 or 2. Found: {verbose!r}")
        require_whole("rounds", rounds, optional=False)
        require_whole("every", every)
        if not isinstance(journal, (str, os.PathLike, Journal, type(None))):
            raise TypeError(f"journal must be a path, a tfgrow.Journal or None. Found: {journal!r}")
        if ema_momentum is not None and not _is_share(ema_momentum):
            raise ValueError(
                f"ema_momentum must be at least 0 and under 1, or None. Found: {ema_momentum!r}"
            )
        self.oracle = strategies.get(oracle)
        self.data = data
        self.rounds = rounds
        self.ema_momentum = ema_momentum
        self.schedule = schedules.get((2 if every is None else every) if when is None else when)
        self.guard = guard
        self.tolerance = tolerance
        self.verbose = verbose
        self.journal = journal if isinstance(journal, Journal) else Journal(journal)
        self._finished = False
        self._reported = 0
        self._copies = itertools.count(1)
        self._copy_number: int | None = None  # of a deep copy that has written nothing yet
        self._due: bool
        self._epochs_done: int
        self._trained: weakref.ref | None  # the model that what is due belongs to
        self._peers: Sequence[keras.callbacks.Callback]
        self._newborn: Sequence[tuple[int, list]]  # events, and batches to see their units on
        self._average: WeightAverage | None
        self._stepped = False
        self.__dict__.update(_NO_MODEL)

    @property
    def events(self) -> list[GrowthEvent]:
        return list(self.journal)

    def __deepcopy__(self, memo):
        twin = copy.copy(self)
        memo[id(self)] = twin
        twin.set_model(None)
        twin.__dict__.update(_NO_MODEL)
        for name in ("oracle", "schedule", "journal"):
            setattr(twin, name, copy.deepcopy(getattr(self, name), memo))
        twin.__dict__.update(_copy_number=next(self._copies), _copies=itertools.count(1))
        return twin

    def _part_from_original(self) -> None:
        """Gives a deep copy, as Keras Tuner makes one per trial, files of its own."""
        if self._copy_number is None:
            return
        suffix, self._copy_number = f"-{self._copy_number}", None
        self.oracle.move_project(suffix)
        if self.journal.path is not None:
            stem, ending = os.path.splitext(self.journal.path)
            self.journal = Journal(f"{stem}{suffix}{ending}", self.journal.events)

    # ---- Keras's calls ----------------------------------------------------------------------

    def on_train_begin(self, logs=None):
        del logs
        self._check()
        self._part_from_original()
        if self._trained is None or self._trained() is not self.model:
            self.__dict__.update(_NO_MODEL)
            self._trained = weakref.ref(self.model)
        self.schedule.reset()
        self._finished, self._newborn = False, ()
        # Whoever called `fit` may have changed the weights since.
        self._average, self._stepped = None, False
        self._reported = len(self.journal)
        self._step_forward()
        if any(isinstance(peer, keras.callbacks.BackupAndRestore) for peer in self._peers):
            warnings.warn(_NO_BACKUP, stacklevel=2)
        epochs, earliest = (self.params or {}).get("epochs"), self.schedule.earliest
        if epochs and epochs < earliest and not self._due:
            warnings.warn(_TOO_SHORT.format(epochs=epochs, earliest=earliest), stacklevel=2)

    def on_epoch_end(self, epoch, logs=None):
        logs = {} if logs is None else logs
        self._epochs_done = epoch + 1
        self._note_newborn()
        self._log(logs)
        if not self._finished and self.schedule.should_grow(epoch + 1, logs):
            self._due = True

    def on_train_batch_begin(self, batch, logs=None):
        # Not at the end of an epoch: only here have all callbacks had their say about the epoch,
        # SwapEMAWeights put the weights back, and nothing is grown that won't be trained.
        self._take_average()
        if self._due:
            for _ in range(self.rounds):
                self._grow()
                if self._finished or self.events[-1].status != "applied":
                    break
            self._due = False  # only now: one that is cut off stays due

    def on_train_end(self, logs=None):
        del logs
        self._peers = ()

    def _check(self) -> None:
        """Raises now for what would make growing fail epochs later."""
        if self.data is None:
            raise ValueError(
                "Growth needs data to learn edits on: Growth(oracle, data=train_ds) or "
                "data=(x_train, y_train)."
            )
        sites = find_sites(self.model)
        if not self.oracle.open_sites(sites):
            reasons = "; ".join(f"{site.name}: {self.oracle.why_closed(site)}" for site in sites)
            raise ValueError(f"Nothing in model '{self.model.name}' can grow. {reasons}")
        for layer in layers_within(self.model):
            if isinstance(layer, keras.layers.RNN) and layer.stateful:
                raise ValueError(
                    f"Layer '{layer.name}' ({type(layer).__name__}) is stateful: every batch goes "
                    "on where the last one ended, and growth looks at batches of its own. Build it "
                    "with stateful=False."
                )
        self.oracle.check(self.model, self.data)
        check_optimizer(self.model, unbuilt=True)
        _warn_of_own_loss(self.model)

    # ---- one event --------------------------------------------------------------------------

    def _grow(self) -> None:
        with growth_transaction(self.model) as attempt, self.oracle.all_or_nothing():
            before, widths = size_of(self.model), widths_of(self.model)
            data = self.oracle.split(self.data)
            clock = time.perf_counter()
            averaged, loss = self._go_to_average(data)
            seconds = {"average": time.perf_counter() - clock} if self._average else {}
            trial, plan = self.oracle.propose(
                self.model, data, epoch=self._epochs_done, progress=self._progress()
            )
            outcome = None
            if plan.candidates:
                clock = time.perf_counter()
                outcome = self._commit(plan, data, loss)
                seconds["commit"] = time.perf_counter() - clock
                carry_over(self._peers, self.model, outcome.changes)
            if averaged and not (outcome and outcome.alpha):
                attempt.rollback()
            event = self._event(before, widths, plan, outcome, seconds, averaged)
            event = self.oracle.record(trial, event)
            self.journal.append(event)
        self._finished = trial.status == "STOPPED"
        if event.newborn:
            self._newborn = (*self._newborn, (len(self.journal) - 1, data.few_held_out))
        self._say(event)
        gc.collect()  # traced functions are cycles that hold on to replaced variables

    def _take_average(self) -> None:
        """Notes the weights after a step, when the next one begins.

        Not when the step ends: Keras waits for the logs of every step if a callback is told then.
        """
        if self.ema_momentum is not None and self._stepped and not self._finished:
            if self._average is None:
                self._average = WeightAverage(self.ema_momentum)
            self._average.update(self.model, self.model.steps_per_execution)
        self._stepped = True

    def _go_to_average(self, data) -> tuple[bool, float | None]:
        """Gives the model its averaged weights if their held-out loss is lower; and that loss."""
        if self._average is None:
            return False, None
        before = real_loss(self.model, data.held_out)
        with growth_transaction(self.model) as attempt:
            if self._average.assign(self.model):
                refresh_statistics(self.model, data.learn)
                after = real_loss(self.model, data.held_out)
                if after < before:
                    return True, after
                attempt.rollback()
        return False, before

    @property
    def _guards(self) -> bool:
        return self.guard and self.oracle.guarded

    def _commit(self, plan: Plan, data, loss_before: float | None) -> Outcome:
        """Applies the plan as the guard allows."""
        model = self.model
        alphas, tolerance = (ALPHAS, self.tolerance) if self._guards else ((1.0,), np.inf)
        return commit(
            model,
            plan.candidates,
            lambda grown: real_loss(grown, data.held_out),
            tolerance,
            alphas,
            estimate_of=lambda scaled: self.oracle.estimate(model, scaled, data.score),
            fits=lambda scaled: self.oracle.fits(model, scaled),
            loss_before=loss_before,
        )

    def _event(
        self, before, widths, plan: Plan, outcome: Outcome | None, seconds, averaged: bool
    ) -> GrowthEvent:
        applied = outcome is not None and outcome.alpha > 0
        after = size_of(self.model)
        reason = plan.reason if applied or outcome is None else self._why_rejected(outcome)
        return GrowthEvent(
            epoch=self._epochs_done,
            applied=describe(outcome.candidates) if outcome else (),
            widths=widths_changed(widths, self.model),
            params_before=before[0],
            params_after=after[0],
            flops_before=before[1],
            flops_after=after[1],
            estimated_change=_estimate(plan, outcome),
            measured_change=outcome.loss_after - outcome.loss_before if outcome else None,
            loss_before=outcome.loss_before if outcome else None,
            alpha=outcome.alpha if outcome else 0.0,
            seconds={**plan.seconds, **seconds},
            newborn=newborn_of(outcome.candidates) if outcome else {},
            status="applied" if applied else "rejected" if outcome else "nothing",
            reason=reason,
            averaged=averaged and applied,
        )

    def _why_rejected(self, outcome: Outcome) -> str:
        if not self._guards:
            return f"the held-out loss became {outcome.loss_after}"
        return f"the held-out loss rose at every scale down to {ALPHAS[-1]}"

    # ---- reporting --------------------------------------------------------------------------

    def _log(self, logs) -> None:
        new = self.events[self._reported :]
        self._reported = len(self.journal)
        params, flops = size_of(self.model)
        logs["tfgrow_params"] = params
        logs["tfgrow_flops"] = flops
        applied = [event for event in new if event.status == "applied"]
        # Added to what another Growth of the same fit has said.
        logs["tfgrow_events"] = logs.get("tfgrow_events", 0) + sum(
            event.status == "applied" for event in self.events
        )
        for name in ("estimated_change", "measured_change"):
            total = float(sum(getattr(event, name) or 0.0 for event in applied))
            logs[f"tfgrow_{name}"] = logs.get(f"tfgrow_{name}", 0.0) + total
        for event in new:
            if event.trial_id is not None:
                self.oracle.report(event.trial_id, logs, epoch=self._epochs_done)

    def _note_newborn(self) -> None:
        """What came to life of one moment's new units, whichever of its events brought them."""
        if not self._newborn:
            return
        indices, batches = zip(*self._newborn, strict=True)
        self._newborn = ()
        newborn: Counter = Counter()
        for index in indices:
            newborn.update(self.events[index].newborn)
        share = alive_share(self.model, newborn, batches[-1])
        for index in indices:
            self.journal.note_newborn_alive(index, share)
            trial = self.events[index].trial_id
            if trial is not None:
                self.oracle.report(trial, {"newborn_alive": share}, epoch=self._epochs_done)

    def _level(self) -> int:
        verbose = self.verbose
        if verbose == "auto":
            verbose = (self.params or {}).get("verbose", 1)
        return 1 if verbose == "auto" else int(verbose)  # what `fit` makes of its own "auto"

    def _progress(self):
        if self._level() != 1:
            return None
        bar: list = []

        def show(done: int, total: int) -> None:
            if not bar:
                print("Growing", flush=True)
                bar.append(keras.utils.Progbar(total, unit_name="batch"))
            bar[0].target = total
            bar[0].update(done)

        return show

    def _say(self, event: GrowthEvent) -> None:
        if self._level():
            print(event_line(event), flush=True)
        if _doubtful(event):
            warnings.warn(
                f"Growth after epoch {event.epoch}: the held-out loss changed by "
                f"{event.measured_change:+.4f}, {event.realized:.0%} of the estimated "
                f"{event.estimated_change:+.4f}. So far off, the choice of edits is little better "
                "than chance: smaller steps (growth_per_step), more batches to learn and score on, "
                "or growing later, when training has settled, may help.",
                stacklevel=2,
            )

    # ---- neighbours -------------------------------------------------------------------------

    def _step_forward(self) -> None:
        """Goes first in the callback list, so that the others see this one's logs.

        Keras tells a callback nothing of its neighbours; the list is the caller of this method.
        """
        frame = inspect.currentframe()
        while frame is not None:
            owner = frame.f_locals.get("self")
            if isinstance(owner, keras.callbacks.CallbackList) and self in owner.callbacks:
                owner.callbacks.remove(self)
                owner.callbacks.insert(0, self)
                self._peers = owner.callbacks
                return
            frame = frame.f_back


def _warn_of_own_loss(model: keras.Model) -> None:
    kind = type(model)
    if kind.compute_loss is not keras.Model.compute_loss:
        warnings.warn(
            f"Model '{model.name}' is a {kind.__name__} with a compute_loss of its own: growth "
            "estimates, and judges by, the loss that it was compiled with, and knows nothing of "
            "what that method adds.",
            stacklevel=2,
        )


def event_line(event: GrowthEvent) -> str:
    """One line that says what an event did."""
    seconds = sum(event.seconds.values())
    if event.status == "nothing":
        return f"growth after epoch {event.epoch}: nothing ({event.reason}); {seconds:.1f} s"
    measured = "" if event.measured_change is None else f", measured {event.measured_change:+.4f}"
    known = event.estimated_change is not None
    estimated = f"estimated {event.estimated_change:+.4f}" if known else "not estimated"
    loss = f"loss {estimated}{measured}"
    if event.status == "rejected":
        return (
            f"growth after epoch {event.epoch}: rejected ({event.reason}); {loss}; {seconds:.1f} s"
        )
    how: dict[str, list[str]] = {}
    for edit in event.applied:
        how.setdefault(edit["site"], []).append(f"{edit['morphism']} {len(edit['units'])}")
    grew = ", ".join(
        f"{name} {_arrow(event.widths.get(name))}({', '.join(edits)})"
        for name, edits in how.items()
    )
    scale = "" if event.alpha == 1 else f" at scale {event.alpha:g}"
    return (
        f"growth after epoch {event.epoch}: {grew}; parameters {event.params_before:,} -> "
        f"{event.params_after:,}; {loss}{scale}; {seconds:.1f} s"
    )


def _doubtful(event: GrowthEvent) -> bool:
    """Whether an event did far less than was estimated, and not for want of precision."""
    if event.realized is None or event.estimated_change is None or event.loss_before is None:
        return False
    promised = -event.estimated_change > RELEVANT * abs(event.loss_before)
    return promised and event.realized < DOUBTFUL


def _is_share(number: Any) -> bool:
    return isinstance(number, (int, float)) and 0 <= number < 1


def _arrow(widths: tuple[int, int] | None) -> str:
    return f"{widths[0]}->{widths[1]} " if widths else ""


def _estimate(plan: Plan, outcome: Outcome | None) -> float | None:
    """The joint estimate at the committed scale, or as proposed if nothing was committed."""
    if outcome is None or outcome.alpha in (0.0, 1.0):
        return plan.estimated_change
    return outcome.estimated_change
