"""GaussNewtonEstimator: what edits of a model would do to its loss, without building any."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence

import keras
import numpy as np
import tensorflow as tf

from tfgrow._checks import require_whole
from tfgrow._keras import compiled_loss_weights
from tfgrow.capture.batches import (
    batches_of,
    check_finite,
    forever,
    mean_of_batches,
    size_of_batch,
)
from tfgrow.capture.capture import flat_inputs
from tfgrow.capture.checks import check_loss
from tfgrow.capture.execute import float32_compute
from tfgrow.capture.path import needs_moments
from tfgrow.curvature.arranging import Arranging
from tfgrow.curvature.correction import corrections
from tfgrow.curvature.normal import add_sums, is_factored
from tfgrow.curvature.total_loss import TotalLoss, make_total_loss
from tfgrow.graph.nodes import Graph, trace
from tfgrow.graph.sites import sites_of
from tfgrow.graph.versions import version_of
from tfgrow.morphisms.base import Candidate
from tfgrow.morphisms.registry import at_lengths, group_candidates, named, removals
from tfgrow.morphisms.retrain import retraining
from tfgrow.passes import Parameters, Passes, best_lengths, new_adam, tensors
from tfgrow.types import Interaction

SETTLE = 12
"""Batches over which closed forms and statistics are summed when learning is over.

On a 19k-parameter VGG on CIFAR-10 they buy more than learning steps do: the mean held-out change by
one added unit is -0.075 after 16 learning and 6 settling batches of 128, -0.088 after 8 and 12.
"""

SHORTENING = 4
"""Batches on which it is seen how long the closed forms on a factored curvature should be."""

SETTLING_ALPHAS = (1.0, 0.5, 0.25, 0.125)
"""Shares of the existing weights' step that are tried, the first that lowers the loss is taken."""


class GaussNewtonEstimator:
    """Estimates how edits of a model would change its loss, from activations and gradients alone.

    For sample i and a perturbation D the change of the loss is taken as
    `g.D + 1/2 (J D)' H (J D)` (Lawton et al., arXiv 2411.05855), with g the gradient and J the
    Jacobian of the logits where D is linearised, and H the Hessian of the loss at the logits.
    With several outputs the loss is the sum of what they cost, and H has a block for each of them.
    All changes are of the mean loss per sample; negative is better.

    Args:
      model: a growable model, built.
      loss: what the estimate is of, as `model.compile` takes it; by default the compiled loss with
        its `loss_weights`.
      curvature: `"exact"` (one back-propagated column per logit), `"sampled"` (columns drawn so
        that the expectation is exact), `"empirical"` (the gradient as the only column), `"none"`
        (the estimate is of first order) or `"auto"` (exact up to 16 logits of all outputs
        together).
      draws: number of sampled columns.
      seed: of everything random in the estimate.
      loss_weights: of the outputs' losses, as `model.compile` takes them, to go with `loss`.

    Attributes:
      curvature: the one in use; a tuple where outputs differ (`"auto"` is empirical for those whose
        loss is piecewise linear, at the scale of reweighted least squares: the gradient's square
        over the mean loss).

    Raises:
      ValueError: if there is no loss, losses and outputs don't match, or `curvature` is unknown.

    Example:

    >>> import keras, numpy as np, tfgrow
    >>> model = tfgrow.convert(keras.Sequential(
    ...     [keras.Input((4,)), keras.layers.Dense(3, "relu"), keras.layers.Dense(2)]))
    >>> estimator = tfgrow.GaussNewtonEstimator(model, loss="mse")
    >>> data = np.ones((8, 4), "float32"), np.ones((8, 2), "float32")
    >>> learned = estimator.learn(tfgrow.candidates(model, "split"), data, steps=3)
    >>> estimator.score(learned, data).shape
    (3,)
    """

    def __init__(
        self,
        model: keras.Model,
        loss=None,
        curvature: str = "auto",
        draws=1,
        seed=0,
        loss_weights=None,
    ):
        require_whole("draws", draws, optional=False)
        require_whole("seed", seed, least=0, optional=False)
        self.model = model
        self.seed = int(seed)
        self._graph = trace(model)
        self._loss = total_loss(model, self._graph, loss, loss_weights, curvature)
        self.curvature = self._loss.curvature
        self._arranged = Arranging(model, self._graph, self._loss)
        self._version = version_of(model)
        self._passes = Passes(self._graph, self._loss, draws)
        self._draws = draws
        self._steps = 0

    def learn(
        self,
        candidates: Sequence[Candidate],
        dataset,
        steps: int = 100,
        learning_rate: float = 0.1,
        settle: int = SETTLE,
        progress: Callable[[int, int], None] | None = None,
    ) -> list[Candidate]:
        """Improves the candidates' theta on the estimate. Nothing is built.

        Every step takes a fresh batch and improves all candidates of all sites. A few more batches
        then settle what has a closed form (outgoing weights of new units) and the statistics that
        BatchNormalization needs, and where the curvature of a closed form is factored (above 600
        outgoing weights of a unit), `SHORTENING` more say whether it is too long. `dataset` is
        repeated if it is too short.

        Args:
          candidates: from `tfgrow.candidates(model)`.
          dataset: anything `model.fit` takes, with targets.
          steps: number of learning steps; 0 only settles.
          learning_rate: step size relative to the natural size of the weights.
          settle: number of settling batches, at least 2, where something is to be settled.
          progress: called with (batches done, batches in all).

        Returns:
          New candidates, in the same order.

        Raises:
          ValueError: if the dataset is empty or doesn't fit, or the loss on it isn't finite; for
            weights in closed form where there is no curvature.
        """
        require_whole("steps", steps, least=0, optional=False)
        require_whole("settle", settle, least=0, optional=False)
        if not (isinstance(learning_rate, (int, float)) and learning_rate > 0):
            raise ValueError(f"learning_rate must be a positive number. Found: {learning_rate!r}")
        stream = forever(dataset, seed=self.seed)
        learned, doubtful = self._learn(candidates, stream, steps, learning_rate, settle, progress)
        return self._shortened(learned, doubtful, stream) if doubtful else learned

    def _learn(
        self, candidates, stream, steps=0, learning_rate=0.0, settle=SETTLE, progress=None
    ) -> tuple[list[Candidate], list[int]]:
        """`learn`, with closed forms as long as their curvature says; and which may be too long."""
        groups, positions = self._group(candidates)
        self._check_solvable(groups)
        parameters = Parameters(groups)
        adam = new_adam(parameters.pack())
        kept = [group.morphism.no_equations(group) for group in groups]
        settled = _Settled()
        step = None
        settling = max(2, settle) if any(_settles(group) for group in groups) else 0
        if not parameters.size:
            steps = 0  # all there is has a closed form
        for number in range(steps + settling):
            rate = learning_rate * _fade(number, steps) if number < steps else 0.0
            batch = self._arranged(next(stream))
            inputs = (batch, self._batch_seed(), adam, kept, tf.constant(rate, tf.float32))
            step = step or self._trace(
                lambda b, s, a, k, r: self._passes.learn(b, s, groups, parameters, a, k, r), inputs
            )
            adam, sums, kept, moments, objective = step(*inputs)
            check_loss(objective)
            if number >= steps:
                settled.add(sums, moments, size_of_batch(batch))
            if progress is not None:
                progress(number + 1, steps + settling)
        learned = _unstack(candidates, groups, positions, parameters.unpack(adam[0]), settled)
        factored = [w for w, sums in zip(positions, kept, strict=True) if is_factored(sums)]
        return learned, [int(row) for where in factored for row in where]

    def _shortened(
        self, learned: Sequence[Candidate], rows: Sequence[int], stream: Iterator
    ) -> list[Candidate]:
        """The candidates, those of some rows at the best length up to 1 of each alone."""
        groups, positions = self._group([learned[row] for row in rows])
        thetas = [tensors(group.theta) for group in groups]
        _, linear, curvature = self._sum(
            [next(stream) for _ in range(SHORTENING)],
            lambda batch, seed, th: self._passes.alone(batch, seed, groups, th),
            thetas,
        )
        order = np.argsort(np.concatenate(positions))
        lengths = best_lengths(linear, curvature).numpy()[order]
        found = list(learned)
        for row, one in zip(rows, at_lengths([learned[row] for row in rows], lengths), strict=True):
            found[row] = one
        return found

    def settle(self, dataset, judged_on) -> float:
        """From here on, takes what training the weights that are there would bring as done.

        While a network trains, its loss would fall by much if only its weights were better, and
        every new unit can bring most of that: it reads what others read. All units look alike
        then, whatever they bring beyond. Therefore the weights of all layers take a Gauss-Newton
        step, along the linearised network (nothing is changed), and gradient and curvature are
        from now on those of the loss at the logits that follow: estimates are of what is left.

        Repeating it settles the weights further.

        Args:
          dataset: what the step is learned on, as in `learn`.
          judged_on: finite; other samples, on which the length of the step is found.

        Returns:
          The change of the mean loss on `judged_on` that is taken as done; 0 where no step lowers
          it.
        """
        directions = retraining(self.model, self._graph)
        if not directions:
            return 0.0
        learned, _ = self._learn(directions, forever(dataset, seed=self.seed))
        interaction, before = self._interaction(learned, judged_on)
        lengths = interaction.best_lengths()
        for alpha in SETTLING_ALPHAS:
            moved = at_lengths(learned, alpha * lengths)
            groups, _ = self._group(moved)
            self._passes.settle(groups, [group.theta for group in groups])
            change = self.loss(judged_on) - before
            if change < 0:
                return change
            self._passes.unsettle()
        return 0.0

    def worth(
        self,
        dataset,
        judged_on,
        sites: Iterable[str] | str | None = None,
        units: int | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> dict[str, np.ndarray]:
        """By how much the mean loss would rise if a unit went, the others standing in for it.

        The gradient is taken for zero, as it will be when training is over: while a network trains,
        most of what an edit changes along the gradient is what the next steps change too. (So do
        LeCun et al. 1990, "Optimal Brain Damage", and Hassibi & Stork 1993; here for whole units,
        in the Gauss-Newton metric of the loss.) Where a loss has no curvature (absolute error,
        hinge) the empirical one is used.

        Args:
          dataset: what the others' standing in is learned on, as in `learn`.
          judged_on: finite; other samples, on which it is judged.
          sites: names, or one; all whose units can be taken away by default.
          units: how many units of a site are looked at, at most, drawn at random; all by default.
          progress: as in `learn`, of which it is a part.

        Returns:
          By site, the worth of each unit looked at, `[units]`, never negative. Sites of a single
          unit, and those whose units can't go, are left out.

        Raises:
          ValueError: for an unknown site; where it is not finite, or there is no curvature.

        Example:

        >>> import keras, numpy as np, tfgrow
        >>> model = tfgrow.convert(keras.Sequential(
        ...     [keras.Input((4,)), keras.layers.Dense(3, name="a"), keras.layers.Dense(2)]))
        >>> x = np.random.default_rng(0).normal(size=(64, 4)).astype("float32")
        >>> estimator = tfgrow.GaussNewtonEstimator(model, "mse")
        >>> worth = estimator.worth((x, x[:, :2]), (x, x[:, :2]))
        >>> worth["a"].shape, bool((worth["a"] >= 0).all())
        ((3,), True)
        """
        every = sites_of(self.model, self._graph)
        chosen = every if sites is None else named(self.model, every, sites).values()
        wanted = {site.name for site in chosen}
        require_whole("units", units)
        alone = _some_of_each(
            removals([site for site in every if site.name in wanted]), units, self.seed
        )
        if not alone:
            return {}
        with self._at_minimum():
            stream = forever(dataset, seed=self.seed)
            learned, _ = self._learn(alone, stream, progress=progress)
            scores = self.score(learned, judged_on)
        found: dict[str, list[float]] = {}
        for removal, score in zip(alone, scores, strict=True):
            found.setdefault(removal.site.name, []).append(float(score))
        odd = sorted(name for name, some in found.items() if not np.isfinite(some).all())
        if odd:
            raise ValueError(
                f"What units of the sites {odd} are worth is not finite. Check the data and the "
                "loss for NaN or overflow."
            )
        return {name: np.array(some) for name, some in found.items()}

    @contextlib.contextmanager
    def _at_minimum(self) -> Iterator[None]:
        """As long as it runs the gradient is taken for zero, and nothing for settled."""
        passes = self._passes
        self._passes = Passes(self._graph, self._loss.curved(), self._draws, at_minimum=True)
        try:
            yield
        finally:
            self._passes = passes

    def interaction(self, candidates: Sequence[Candidate], dataset) -> Interaction:
        """The quadratic over sets of candidates, from one pass over the dataset.

        Args:
          candidates: learned candidates.
          dataset: finite; samples that `learn` did not see give honest estimates.

        Returns:
          An `Interaction` over the candidates, in their order.
        """
        return self._interaction(candidates, dataset)[0]

    def _interaction(self, candidates, dataset) -> tuple[Interaction, float]:
        """The interaction, and the mean loss as it is."""
        groups, positions = self._group(candidates)
        thetas = [tensors(group.theta) for group in groups]
        total = self._sum(
            dataset, lambda batch, seed, th: self._passes.scalars(batch, seed, groups, th), thetas
        )
        loss, linear, gram, count = (np.asarray(part, dtype=np.float64) for part in total)
        order = np.argsort(np.concatenate(positions))
        found = Interaction(linear[order] / count, gram[np.ix_(order, order)] / count)
        return found, float(loss / count)

    def score(self, candidates: Sequence[Candidate], dataset, checks: int = 0) -> np.ndarray:
        """Estimated change of the mean loss by each candidate applied alone, `[n]`.

        It is the change along the linearised logits of the loss itself where exact columns tell
        them (crossentropies), and else of its second order, as in `interaction(...).scores`: large
        edits, such as removals, are estimated truer, small ones alike.

        Args:
          candidates: learned candidates.
          dataset: finite; samples that `learn` did not see give honest estimates.
          checks: so many forward passes per batch carry candidates really through the network, on
            every sample one that is drawn at random, and the estimates are corrected by what that
            shows of each kind and site. It pays for removals, which are no small perturbations.
        """
        require_whole("checks", checks, least=0, optional=False)
        groups, positions = self._group(candidates)
        thetas = [tensors(group.theta) for group in groups]
        _, change, count, *found = self._sum(
            dataset,
            lambda batch, seed, th: self._passes.changes(batch, seed, groups, th, checks),
            thetas,
        )
        scores = change / count
        if found:
            squares, *others = found
            kinds = np.repeat(np.arange(len(groups)), [len(group.units) for group in groups])
            scores = scores + corrections(kinds, squares / count, *others)
        return scores[np.argsort(np.concatenate(positions))]

    def joint_change(self, candidates: Sequence[Candidate], dataset) -> float:
        """Estimated change of the mean loss by all candidates at once, by forward accumulators.

        With exact curvature it equals `interaction(...).change()` up to rounding; where TensorFlow
        has no forward mode (behind recurrent loops, softsign, most ways to resize), and central
        differences stand in for it, up to a few percent.
        """
        groups, _ = self._group(candidates)
        thetas = [tensors(group.theta) for group in groups]
        change, count = self._sum(
            dataset, lambda batch, seed, th: self._passes.joint(batch, groups, th), thetas
        )
        return float(change / count)

    def loss(self, dataset) -> float:
        """Mean loss per sample in inference mode, in float32."""
        total, count = self._sum(dataset, lambda batch, seed, _: self._passes.loss(batch), [])
        return float(total / count)

    def _sum(self, dataset, pass_over, thetas):
        check_finite(dataset)
        function, total = None, []
        for batch in batches_of(dataset):
            inputs = (self._arranged(batch), self._batch_seed(), thetas)
            function = function or self._trace(pass_over, inputs)
            part = [np.asarray(value, dtype=np.float64) for value in function(*inputs)]
            total = [a + b for a, b in zip(total, part, strict=True)] if total else part
        check_loss(total[0])
        return total

    def _trace(self, function, inputs):
        """One trace that serves batches of any size, and images of any size if the model does."""
        batch, *rest = inputs
        specs = [self._batch_spec(batch)]
        specs += [tf.nest.map_structure(tf.TensorSpec.from_tensor, part) for part in rest]
        with float32_compute(self.model):
            return tf.function(function, autograph=False).get_concrete_function(*specs)

    def _batch_spec(self, batch):
        """Batches of any size; where the model leaves sizes free, of any size there too."""
        expected = [self._graph.tensors[tensor].shape for tensor in self._graph.inputs]
        free = any(None in shape[1:] for shape in expected)
        ranks = [
            len(self._graph.tensors[self._graph.outputs[part.output]].shape)
            for part in self._loss.parts
        ]

        def spec(tensor, channels):
            shape = [None, *tensor.shape[1:]]
            if free:
                kept = tensor.shape.rank - 1 if channels else tensor.shape.rank
                shape = [None] * kept + shape[kept:]
            return tf.TensorSpec(shape, tensor.dtype)

        x, targets, weights = batch
        read = dict(zip(map(id, flat_inputs(self._graph, x)), expected, strict=True))

        def input_spec(tensor):
            shape = read.get(id(tensor), ())
            if len(shape) != tensor.shape.rank:  # not read, or a scalar per sample
                return spec(tensor, channels=False)
            return tf.TensorSpec([None, *shape[1:]], tensor.dtype)

        return (
            tf.nest.map_structure(input_spec, x),
            tuple(spec(y, y.shape.rank == rank) for y, rank in zip(targets, ranks, strict=True)),
            tuple(spec(weight, channels=False) for weight in weights),
        )

    def _batch_seed(self):
        self._steps += 1
        return tf.constant([self.seed, self._steps], tf.int32)

    def _group(self, candidates):
        if version_of(self.model) != self._version:
            raise ValueError(
                f"Model '{self.model.name}' has grown since this estimator was made; make a new "
                "GaussNewtonEstimator(model)."
            )
        return group_candidates(self.model, candidates)

    def _check_solvable(self, groups):
        solved = sorted({group.morphism.name for group in groups if group.morphism.solved})
        if solved and self.curvature == "none":
            raise ValueError(
                f"To first order the weights of {solved} have no closed form: the longer the "
                "better. Learn them with another curvature than 'none'."
            )


def total_loss(
    model: keras.Model, graph: Graph, loss=None, loss_weights=None, curvature: str = "auto"
) -> TotalLoss:
    """A loss and loss weights as `compile` takes them, the compiled ones by default, at the logits.

    Raises:
      ValueError: if there are loss weights without a loss, or neither is given nor compiled.
    """
    if loss is None and loss_weights is not None:
        raise ValueError("loss_weights go with a loss; give both, or neither.")
    if loss is None:
        loss, loss_weights = compiled_loss(model)
    return make_total_loss(graph, loss, loss_weights, curvature)


def compiled_loss(model: keras.Model) -> tuple:
    """The loss a model was compiled with, and its loss weights."""
    if not getattr(model, "compiled", False) or getattr(model, "loss", None) is None:
        raise ValueError(
            f"Model '{model.name}' is not compiled with a loss: pass loss=..., or call "
            "model.compile(loss=...) first."
        )
    return model.loss, compiled_loss_weights(model)


def _some_of_each(every: Sequence[Candidate], most: int | None, seed: int) -> list[Candidate]:
    """At most so many candidates per site, drawn at random, in their order."""
    by_site: dict[str, list[Candidate]] = {}
    for candidate in every:
        by_site.setdefault(candidate.site.name, []).append(candidate)
    rng, some = np.random.default_rng(seed), list[Candidate]()
    for those in by_site.values():
        count = min(len(those), most or len(those))
        some += [those[i] for i in np.sort(rng.choice(len(those), count, replace=False))]
    return some


def _fade(number: int, steps: int) -> float:
    """The step size falls linearly to a tenth, so that the last steps average out the noise."""
    return 1.0 - 0.9 * number / max(steps, 1)


def _settles(group) -> bool:
    needs = any(needs_moments(step) for step in group.path.steps)
    return bool(group.morphism.solved) or needs


class _Settled:
    """What the settling batches said, the normal equations in two halves."""

    def __init__(self):
        self._halves: list = [None, None]
        self._moments: list = []
        self._sizes: list[int] = []

    def add(self, sums, moments, samples: int) -> None:
        half = len(self._moments) % 2
        known = self._halves[half]
        self._halves[half] = sums if known is None else _add(known, sums)
        self._moments.append(moments)
        self._sizes.append(samples)

    def solve(self, index: int, group) -> dict:
        """A group's solved parameters, at the damping that either half likes for the other."""
        if not group.morphism.solved:
            return {}
        first, second = (half[index] for half in self._halves)
        damping = group.morphism.choose_damping(group, first, second)
        return group.morphism.solve(group, add_sums(first, second), damping)

    def moments(self, index: int) -> dict[str, np.ndarray]:
        """A group's statistics, averaged over the samples of the batches."""
        seen = [batch[index] for batch in self._moments]
        return {
            name: mean_of_batches([batch[name] for batch in seen], self._sizes)
            for name in (seen[0] if seen else ())
        }


def _add(first, second):
    return [add_sums(a, b) for a, b in zip(first, second, strict=True)]


def _unstack(candidates, groups, positions, thetas, settled: _Settled) -> list[Candidate]:
    """Candidates with what was learned, solved and measured."""
    learned = list(candidates)
    for index, (group, where) in enumerate(zip(groups, positions, strict=True)):
        theta = {**group.theta, **thetas[index], **settled.solve(index, group)}
        state = settled.moments(index)
        for row, position in enumerate(where):
            old = candidates[position]
            learned[position] = old.replace(
                theta={name: np.asarray(theta[name][row]) for name in old.theta},
                state={**old.state, **{name: value[row] for name, value in state.items()}},
            )
    return learned
