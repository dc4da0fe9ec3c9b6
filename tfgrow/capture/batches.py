"""Anything `model.fit` takes as data, as a stream of `(x, y, sample_weight)` batches."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

Batch = tuple[Any, Any, Any]
"""`(x, y, sample_weight)`, each an array or a structure of arrays."""

BATCH_SIZE = 256


def batches_of(dataset, batch_size: int = BATCH_SIZE, seed: int | None = None) -> Iterator[Batch]:
    """One pass over a dataset.

    Args:
      dataset: `(x, y)` or `(x, y, sample_weight)` arrays, a `tf.data.Dataset` of such batches, a
        `keras.utils.PyDataset`, or a list of such batches.
      batch_size: for arrays.
      seed: arrays are shuffled with it; None keeps their order.

    Yields:
      `(x, y, sample_weight)` as tensors, the weights float32 (ones by default). For a model of
      several outputs y is a structure of tensors, and the weights may be.

    Raises:
      TypeError: if the dataset is none of these.
      ValueError: if a batch isn't `(x, y)` or `(x, y, sample_weight)`, or there is none.
    """
    empty = True
    for batch in _raw_batches(dataset, batch_size, seed):
        empty = False
        yield _standard(batch)
    if empty:
        raise ValueError("The dataset is empty; expected at least one batch of (x, y).")


def forever(dataset, batch_size: int = BATCH_SIZE, seed: int | None = None) -> Iterator[Batch]:
    """Passes over a dataset without end."""
    epoch = 0
    while True:
        yield from batches_of(dataset, batch_size, None if seed is None else seed + epoch)
        epoch += 1


def size_of_batch(batch: Batch) -> int:
    """Number of its samples."""
    return int(tf.nest.flatten(batch[0])[0].shape[0])


def mean_of_batches(means: Sequence, sizes: Sequence[int]) -> np.ndarray:
    """The mean over all samples, from the means over batches of some sizes; float32."""
    if len(set(sizes)) == 1:
        return np.mean([np.asarray(mean) for mean in means], axis=0)
    return np.average(means, axis=0, weights=sizes).astype("float32")


def map_arrays(function: Callable, *structures: Any) -> Any:
    """`tf.nest.map_structure` that leaves None, which outputs without a loss may have, alone."""
    return tf.nest.map_structure(
        lambda *parts: None if parts[0] is None else function(*parts), *structures
    )


def check_finite(dataset) -> None:
    """Refuses a dataset that never ends where one whole pass is wanted."""
    endless = (
        isinstance(dataset, tf.data.Dataset)
        and dataset.cardinality().numpy() == tf.data.INFINITE_CARDINALITY
    )
    if endless or (isinstance(dataset, keras.utils.PyDataset) and dataset.num_batches is None):
        raise ValueError(
            "The dataset repeats for ever; this needs one finite pass. Use dataset.take(n)."
        )


def _raw_batches(dataset, batch_size, seed):
    if isinstance(dataset, tf.data.Dataset):
        return iter(dataset)
    if isinstance(dataset, keras.utils.PyDataset):
        count = dataset.num_batches
        return map(dataset.__getitem__, itertools.count() if count is None else range(count))
    if isinstance(dataset, list) and all(isinstance(item, tuple) for item in dataset):
        return iter(dataset)
    if isinstance(dataset, tuple) and len(dataset) in (2, 3):
        return _array_batches(dataset, batch_size, seed)
    raise TypeError(
        f"Can't read a dataset of type {type(dataset).__name__}; expected (x, y) or (x, y, "
        "sample_weight) arrays, a tf.data.Dataset of such batches, or a keras.utils.PyDataset."
    )


def _array_batches(arrays, batch_size, seed):
    arrays = tuple(part for part in arrays if part is not None)
    parts = [part for part in tf.nest.flatten(arrays) if part is not None]
    if any(np.ndim(part) == 0 for part in parts):
        raise TypeError(
            "Expected (x, y) as arrays, found Python lists or scalars; give np.asarray(x)."
        )
    lengths = {len(part) for part in parts}
    if len(lengths) != 1:
        raise ValueError(f"The arrays have different lengths: {sorted(lengths)}.")
    (length,) = lengths
    order = np.arange(length)
    if seed is not None:
        np.random.default_rng(seed).shuffle(order)
    for start in range(0, length, batch_size):
        rows = order[start : start + batch_size]
        yield map_arrays(lambda part: np.asarray(part)[rows], arrays)  # noqa: B023


def _standard(batch) -> Batch:
    if not isinstance(batch, (tuple, list)) or len(batch) not in (2, 3) or batch[1] is None:
        found = f"{len(batch)} parts" if isinstance(batch, (tuple, list)) else type(batch).__name__
        raise ValueError(
            f"A batch has {found}; expected (x, y) or (x, y, sample_weight): growth estimates the "
            "change of the loss, so it needs targets."
        )
    x, y = (map_arrays(tf.convert_to_tensor, part) for part in batch[:2])
    size = tf.shape(tf.nest.flatten(x)[0])[0]
    weight = batch[2] if len(batch) == 3 and batch[2] is not None else tf.ones((size,))
    return x, y, map_arrays(_standard_weight, weight)


def _standard_weight(weight):
    weight = tf.cast(weight, tf.float32)
    while weight.shape.rank > 1 and weight.shape[-1] == 1:
        weight = tf.squeeze(weight, axis=-1)
    return weight
