"""One stock architecture, made growable and grown: what `experiments.zoo` does in each process."""

from __future__ import annotations

import contextlib
import gc
import inspect
import re
import resource
import shutil
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

import tfgrow
from tfgrow.measure import real_loss
from tfgrow.morphisms.registry import MORPHISMS, get

CLASSES = 10
SMALLEST = 32
SPLIT = "split"
SHORT = 1e-3
"""A scale that starts smaller than this (LayerScale) is taken for a branch that is switched off."""

NOISE = 1e-5
"""Changes of the loss by less than this share of it can't be measured in float32."""

Arrays = tuple[np.ndarray, np.ndarray]
Build = Callable[..., keras.Model]


def architectures() -> dict[str, Build]:
    """The functions of `keras.applications` that build a classifier of images, by name."""
    return {
        name: build
        for name, build in inspect.getmembers(keras.applications, inspect.isfunction)
        if {"weights", "classes", "input_shape"} <= set(inspect.signature(build).parameters)
    }


def built_small(build: Build) -> keras.Model:
    """An architecture with random weights, on the smallest images it takes."""
    size = SMALLEST
    while True:
        try:
            return build(weights=None, classes=CLASSES, input_shape=(size, size, 3))
        except ValueError as error:
            least = re.search(r"at least (\d+)", str(error))
            if least is None or int(least[1]) <= size:
                raise
            size = int(least[1])


def images_for(build: Build, model: keras.Model, count: int, seed: int) -> Arrays:
    """Random images, as the architecture wants them, and random labels."""
    rng = np.random.default_rng(seed)
    shape = (count, *model.input_shape[1:])
    images = rng.uniform(0, 255, shape).astype("float32")
    prepare = getattr(inspect.getmodule(build), "preprocess_input", lambda x: x)
    return prepare(images), rng.integers(0, CLASSES, count)


def cut(data: Arrays, size: int) -> list[Arrays]:
    """The samples in batches; a `tf.data` pipeline of so few takes longer than they do."""
    images, labels = data
    starts = range(0, len(images), size)
    return [(images[start : start + size], labels[start : start + size]) for start in starts]


def every_layer(model: keras.Model) -> Iterator[keras.layers.Layer]:
    """The layers of a model and of those nested in it."""
    for layer in model.layers:
        yield layer
        if isinstance(layer, keras.Model):
            yield from every_layer(layer)


def wake(model: keras.Model, images: np.ndarray) -> None:
    """Gives random weights statistics as after training: else deep networks die or explode.

    BatchNormalization gets the statistics of the images in one pass, scales of next to nothing
    become 1, and the last kernel such a size that the logits of no image differ by more than 1: the
    loss of an image that is wrong for sure is beyond what any quadratic tells.
    """
    for layer in every_layer(model):
        for variable in layer.trainable_variables:
            value = np.asarray(variable) if len(variable.shape) == 1 else np.zeros(1)
            if 0 < np.abs(value).max() < SHORT and np.ptp(value) == 0:
                variable.assign(np.ones_like(value))
    silenced = (keras.layers.BatchNormalization, "momentum"), (keras.layers.Dropout, "rate")
    with contextlib.ExitStack() as stack:
        for kind, name in silenced:  # what drops out at training would be missing in the statistics
            for layer in every_layer(model):
                if isinstance(layer, kind):
                    stack.callback(setattr, layer, name, getattr(layer, name))
                    setattr(layer, name, 0.0)
        model(images, training=True)
    logits = np.log(np.maximum(outputs_of(model, images), 1e-30))
    (*_, kernel) = [v for v in model.trainable_variables if v.name == "kernel"]
    kernel.assign(kernel / np.std(logits, axis=-1).max())


def outputs_of(model: keras.Model, images: np.ndarray) -> np.ndarray:
    """The model's outputs in inference mode."""
    return np.asarray(model(images, training=False))


def served_by(model: keras.Model, folder: Path, images: np.ndarray) -> np.ndarray:
    """What the model's SavedModel answers."""
    tfgrow.export(model, folder, verbose=False)
    served = tf.saved_model.load(str(folder))  # which must live as long as it serves
    return served.serve(tf.constant(images)).numpy()


def in_double(model: keras.Model) -> keras.Model:
    """A copy that computes in double precision, with the same weights."""

    def double(layer: keras.Operation) -> keras.Operation:
        precision = {"dtype": "float64"} if isinstance(layer, keras.layers.Layer) else {}
        return type(layer).from_config({**layer.get_config(), **precision})

    copy = keras.models.clone_model(model, clone_function=double)
    copy.set_weights(model.get_weights())
    return copy


def changed_in_double(
    model: keras.Model, name: str, sites: Sequence[str], images: np.ndarray, before: np.ndarray
) -> float:
    """What a kind of edit at theta = 0, alone, does to the outputs in double precision.

    `before` are those of the model itself.
    """
    copy = tfgrow.convert(model)
    change_nothing(copy, name, sites)
    return difference(outputs_of(in_double(copy), images), before)


def difference(found: np.ndarray, expected: np.ndarray) -> float:
    """Largest difference, relative to the largest output."""
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def spread(sites: Sequence[tfgrow.Site]) -> list[tfgrow.Site]:
    """A few sites over the depth: first, middle, last, a tied one, one behind a concatenation."""
    if not sites:
        return []
    tied = [site for site in sites if len(site.producers) > 1]
    in_a_row = [site for site in sites if site not in tied and _is_concatenated(site)]
    chosen = [sites[0], sites[len(sites) // 2], sites[-1]]
    chosen += [some[len(some) // 2] for some in (tied, in_a_row) if some]
    return [site for site in sites if site in chosen]


def layers_that_widen(site: tfgrow.Site) -> set[str]:
    """Layers that have more channels when a site has more units."""
    return set(site.names) | {step.layer.name for step in site.steps}


def layers_with_larger_kernels(site: tfgrow.Site) -> set[str]:
    """Convolutions whose kernel can become larger, whether or not they can be widened."""
    kind = get("enlarge_kernel")
    if kind.reason(site) is not None:
        return set()
    possible = kind.candidates(site, new_units=1, seed=0)
    return {site.producers[candidate.unit].name for candidate in possible}


def _is_concatenated(site: tfgrow.Site) -> bool:
    return any(isinstance(step.layer, keras.layers.Concatenate) for step in site.steps)


def grouped(reasons: Sequence[str]) -> dict[str, int]:
    """How often each reason is given, names of layers left out."""
    return dict(Counter(re.sub(r"'[^']*'", "'...'", reason) for reason in reasons).most_common())


def picked(model: keras.Model, name: str, sites: Sequence[str]) -> list[tfgrow.Candidate]:
    """One candidate of a kind per site; of some other site if it is possible at none of them.

    Kinds take different units, so that all can be applied at once.
    """
    kind, position = get(name), list(MORPHISMS).index(name)
    possible = [site for site in tfgrow.find_sites(model) if kind.reason(site) is None]
    # A tied site can go by another name after a skip; it answers to all.
    places = [site.name for site in possible if set(sites) & set(site.names)]
    places = places or [site.name for site in possible[:1]]
    if not places:
        return []
    by_site: dict[str, list[tfgrow.Candidate]] = {}
    for candidate in tfgrow.candidates(model, name, sites=places, new_units=1):
        by_site.setdefault(candidate.site.name, []).append(candidate)
    return [
        found[position % len(found)]
        for found in by_site.values()
        if len(found) > position or not kind.edits_unit
    ]


def change_nothing(model: keras.Model, name: str, sites: Sequence[str]) -> int:
    """Applies a kind of edit so that the model computes what it did; says at how many places.

    What can't be scaled down to nothing is the removal of a unit: a copy of another goes.
    """
    chosen = picked(model, name, sites)
    nothing = [get(name).scaled(candidate, 0.0) for candidate in chosen]
    scaled = [candidate for candidate in nothing if candidate is not None]
    if scaled:
        tfgrow.apply(model, scaled)
        return len(scaled)
    if chosen:
        copied = {}
        for split in tfgrow.candidates(model, SPLIT, sites=[c.site.name for c in chosen]):
            copied.setdefault(split.site.name, get(SPLIT).scaled(split, 0.0))
        tfgrow.apply(model, list(copied.values()))
        for site, split in copied.items():
            tfgrow.prune(model, site, [split.unit])
    return len(chosen)


class Specimen:
    """An architecture on its way through the phases; `result` holds what came of it.

    Args:
      build: the function that builds it.
      settings: `images`, `batch_size`, `steps`, `scale`, `seed`.
      same: difference of outputs from which on rounding is told from error in double precision.
    """

    def __init__(self, build: Build, settings: Mapping[str, Any], same: float = np.inf):
        self.same = same
        self.build = build
        self.settings = settings
        self.sites: list[str] = []
        self.result: dict[str, Any] = {"seconds": {}, "errors": {}, "morphisms": {}}

    def examine(self) -> dict[str, Any]:
        """Runs all phases; a failure ends its own phase, and all if there is no growable model."""
        with self._phase("build"):
            stock = built_small(self.build)
            self.data = images_for(
                self.build, stock, self.settings["images"], self.settings["seed"]
            )
            wake(stock, self.data[0])
            self.few = self.data[0][: self.settings["batch_size"]]
            expected = outputs_of(stock, self.few)
            self.result |= {"input": stock.input_shape[1], "params": stock.count_params()}
        with self._phase("convert"):
            self.model = tfgrow.convert(stock)
            self.result["converted"] = difference(outputs_of(self.model, self.few), expected)
            self.model.compile("sgd", "sparse_categorical_crossentropy")
        if not self.result["errors"]:
            del stock
            self._grow(expected)
        self.result["cpu_seconds"] = time.process_time()
        self.result["peak_gb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        return self.result

    def _grow(self, expected: np.ndarray) -> None:
        with self._phase("sites"):
            self._count_sites()
        if self.sites:
            self._change_nothing(expected)
            gc.collect()  # what was changed there was a copy, and graphs are cycles
            with self._phase("learn"):
                self._learn()
            with self._phase("score"):
                self._score()
            with self._phase("apply"):
                self._apply()
        self._keep()

    @contextlib.contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        """Takes the time, without that of phases inside; an error is noted instead of raised."""
        seconds = self.result["seconds"]
        started, inside = time.perf_counter(), sum(seconds.values())
        try:
            yield
        except Exception as error:
            text = f"{type(error).__name__}: {error}"
            self.result["errors"][name] = {"error": text, "trace": traceback.format_exc()}
        inside = sum(seconds.values()) - inside
        seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - started - inside

    def _count_sites(self) -> None:
        every = tfgrow.find_sites(self.model)
        can = [site for site in every if site.blocked is None]
        self.sites = [site.name for site in spread(can)]
        doubling = [site for site in every if site.doubles]
        wider = {layer for site in (*can, *doubling) for layer in layers_that_widen(site)}
        larger = {layer for site in every for layer in layers_with_larger_kernels(site)}
        convolutions = [layer.name for layer in self.model.layers if "Conv" in type(layer).__name__]
        self.result |= {
            "sites": len(can),
            "doubling": len(doubling),
            "layers": sum(len(site.producers) for site in can),
            "tied": sum(len(site.producers) > 1 for site in can),
            "in_a_row": sum(_is_concatenated(site) for site in can),
            "convolutions": len(convolutions),
            "wider": len(wider & set(convolutions)),
            "larger": len(larger & set(convolutions)),
            "either": len((wider | larger) & set(convolutions)),
            "blocked": grouped(
                [s.blocked for s in every if s.blocked and not (wider | larger) & set(s.names)]
            ),
            "grown": self.sites,
        }

    def _change_nothing(self, expected: np.ndarray) -> None:
        """Every kind of edit in turn, each on top of those before, at theta = 0."""
        before = None
        with self._phase("theta 0"):
            copy = tfgrow.convert(self.model)
        for name in MORPHISMS:
            found = self.result["morphisms"].setdefault(name, {})
            with self._phase("theta 0"):
                found["places"] = change_nothing(copy, name, self.sites)
                if found["places"]:
                    now = outputs_of(copy, self.few)
                    found["unchanged"], expected = difference(now, expected), now
                    if found["unchanged"] > self.same:
                        if before is None:  # of large networks it takes a while
                            before = outputs_of(in_double(self.model), self.few)
                        found["in double"] = changed_in_double(
                            self.model, name, self.sites, self.few, before
                        )

    def _learn(self) -> None:
        chosen = [c for name in MORPHISMS for c in picked(self.model, name, self.sites)]
        self.batches = cut(self.data, self.settings["batch_size"])
        seed, steps = self.settings["seed"], self.settings["steps"]
        learner = tfgrow.GaussNewtonEstimator(self.model, curvature="sampled", seed=seed)
        learned = learner.learn(chosen, self.batches, steps=steps, settle=steps)
        self.learned = [self._scaled(candidate) for candidate in learned]

    def _scaled(self, candidate: tfgrow.Candidate) -> tfgrow.Candidate:
        """A small step: edits without a closed form change the loss with the square of theta."""
        morphism, scale = get(candidate.morphism), self.settings["scale"]
        return morphism.scaled(candidate, scale if morphism.solved else np.sqrt(scale)) or candidate

    def _score(self) -> None:
        """Estimates against truth, of each kind alone."""
        estimator = tfgrow.GaussNewtonEstimator(self.model, curvature="exact")
        self.interaction = estimator.interaction(self.learned, self.batches)
        self.result["loss"] = self._loss()
        before = outputs_of(self.model, self.few)
        with self._phase("truth"):
            loss = real_loss(self.model, self.data)
        for name, found in self.result["morphisms"].items():
            if rows := rows_to_judge(self.learned, name):
                estimated = self._estimated(estimator, rows)
                with self._phase("truth"):
                    # In place, on one batch: to copy or trace a large network takes much longer.
                    chosen = [self.learned[row] for row in rows]
                    true = tfgrow.measure_change(
                        self.model, chosen, self.data, in_place=True, loss_before=loss
                    )
                    found |= against(estimated, true, self.result["loss"])
        with self._phase("truth"):
            self.result["taken back"] = difference(outputs_of(self.model, self.few), before)

    def _estimated(self, estimator: tfgrow.GaussNewtonEstimator, rows: Sequence[int]) -> float:
        """Of small steps all together, to second order; of a whole one as far as logits tell it."""
        first = self.learned[rows[0]]
        if _scalable(first):
            return self.interaction.change(rows)
        return float(estimator.score([first], self.batches)[0])

    def _apply(self) -> None:
        """Small steps of as many kinds as go together, in place; then the others, each by itself.

        Some kinds exclude each other, and some can only be done as a whole.
        """
        kinds = list(dict.fromkeys(c.morphism for c in self.learned))
        together = [k for k in kinds if all(map(_scalable, self._of_kind(k)))]
        before = self._loss()
        while together:
            rows = [row for row, c in enumerate(self.learned) if c.morphism in together]
            try:
                event = tfgrow.apply(self.model, [self.learned[row] for row in rows])
            except ValueError:
                if len(together) == 1:
                    raise
                together.pop()
                continue
            found = against(self.interaction.change(rows), self._loss() - before, before)
            self.result |= {"all": found, "together": together, "params_after": event.params_after}
            break
        for kind in kinds:
            if kind not in together:
                change_nothing(self.model, kind, self.sites[:1])

    def _of_kind(self, kind: str) -> list[tfgrow.Candidate]:
        return [candidate for candidate in self.learned if candidate.morphism == kind]

    def _loss(self) -> float:
        images, labels = self.data
        losses = keras.losses.sparse_categorical_crossentropy(
            labels, outputs_of(self.model, images)
        )
        return float(np.mean(np.asarray(losses, dtype=np.float64)))

    def _keep(self) -> None:
        """Saved and loaded, exported and served: the outputs stay."""
        folder = Path(tempfile.mkdtemp(prefix="zoo."))
        try:
            with self._phase("save and load"):
                expected = outputs_of(self.model, self.few)
                self.model.save(folder / "model.keras")
                loaded = keras.models.load_model(folder / "model.keras")
                self.result["saved"] = difference(outputs_of(loaded, self.few), expected)
                del loaded
            (folder / "model.keras").unlink(missing_ok=True)
            with self._phase("export"):
                served = served_by(self.model, folder / "1", self.few)
                self.result["exported"] = difference(served, expected)
                if self.result["exported"] > self.same:
                    copy = in_double(self.model)
                    served = served_by(copy, folder / "2", self.few)
                    apart = difference(served, outputs_of(copy, self.few))
                    self.result["in double"] = {"exported": apart}
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def rows_to_judge(candidates: Sequence[tfgrow.Candidate], kind: str) -> list[int]:
    """All of a kind; of what can't be made small one, where it changes least of the network."""
    mine = [row for row, candidate in enumerate(candidates) if candidate.morphism == kind]
    return mine if all(_scalable(candidates[row]) for row in mine) else mine[-1:]


def _scalable(candidate: tfgrow.Candidate) -> bool:
    return get(candidate.morphism).scaled(candidate, 0.0) is not None


def against(estimated: float, true: float, loss: float) -> dict[str, float | None]:
    """An estimate beside the truth; no ratio of changes that drown in the loss's rounding."""
    ratio = estimated / true if abs(true) > NOISE * loss else None
    return {"estimated": estimated, "true": true, "ratio": ratio}
