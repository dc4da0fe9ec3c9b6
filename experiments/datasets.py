"""Image classification data for the experiments: three seeded splits, in memory, as uint8.

Pixels stay uint8 from disk to the model, whose first layer rescales them; augmentation is a layer
of the model too (`experiments.models`). So what is exported takes the images as they are.
"""

from __future__ import annotations

import dataclasses
import os
from typing import TYPE_CHECKING, Any

import numpy as np

from experiments._extras import require

if TYPE_CHECKING:
    import tensorflow as tf

DIGITS_TEST_FRACTION = 0.2
SPLITS = ("train", "val", "test")


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
    """Labelled images in three splits.

    Attributes:
      name: the name it was loaded by.
      x_train, x_val, x_test: images, uint8 `[samples, height, width, channels]` in 0..255.
      y_train, y_val, y_test: class indices, int64 `[samples]`.
      num_classes: how many classes there are.
    """

    name: str
    x_train: np.ndarray
    y_train: np.ndarray
    x_val: np.ndarray
    y_val: np.ndarray
    x_test: np.ndarray
    y_test: np.ndarray
    num_classes: int

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape `(height, width, channels)` of one image."""
        return self.x_train.shape[1:]

    def arrays(self, split: str) -> tuple[np.ndarray, np.ndarray]:
        """Images and labels of one split, `"train"`, `"val"` or `"test"`."""
        if split not in SPLITS:
            raise ValueError(f"Unknown split {split!r} of {self.name!r}; expected one of {SPLITS}.")
        return getattr(self, f"x_{split}"), getattr(self, f"y_{split}")

    def as_dataset(
        self,
        split: str = "train",
        batch_size: int = 128,
        shuffle: bool | None = None,
        seed: int = 0,
        drop_remainder: bool = False,
    ) -> tf.data.Dataset:
        """One split as batches `(uint8 [batch, height, width, channels], int64 [batch])`.

        The whole split is reshuffled at every pass. The order follows from `seed` and from
        TensorFlow's global seed (`keras.utils.set_random_seed`) alone.

        Args:
          split: `"train"`, `"val"` or `"test"`.
          batch_size: images per batch, positive.
          shuffle: whether to shuffle; by default only the training split is.
          seed: seed of the order.
          drop_remainder: leave out a last batch that is not full.

        Example:

        >>> from experiments import datasets
        >>> batches = datasets.load("digits").as_dataset("val", batch_size=32)
        >>> batches.element_spec[0].shape
        TensorShape([None, 8, 8, 1])
        """
        import tensorflow as tf

        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, found {batch_size}.")
        x, y = self.arrays(split)
        with tf.device("cpu:0"):
            images, labels = tf.constant(x), tf.constant(y)
        # The shuffle buffer holds indices, not images, so it can span the whole split; a cache
        # would only copy what is in memory already.
        order = tf.data.Dataset.range(len(x))
        if shuffle if shuffle is not None else split == "train":
            order = order.shuffle(len(x), seed=seed, reshuffle_each_iteration=True)
        batches = order.batch(batch_size, drop_remainder=drop_remainder)
        return batches.map(
            lambda index: (tf.gather(images, index), tf.gather(labels, index)),
            num_parallel_calls=tf.data.AUTOTUNE,
        ).prefetch(tf.data.AUTOTUNE)


def load(
    name: str = "digits",
    data_dir: str | os.PathLike[str] | None = None,
    *,
    val_fraction: float = 0.1,
    seed: int = 0,
    download: bool = False,
    image_size: int | tuple[int, int] | None = None,
    max_train: int | None = None,
) -> Dataset:
    """Loads a dataset and cuts a validation split from its training data.

    Args:
      name: `"digits"` (scikit-learn's 1,797 images of 8x8 pixels; no network, no files), or any
        TensorFlow Datasets name of images with class labels, such as `"cifar10"`.
      data_dir: where TensorFlow Datasets keeps its data; None for its own default.
      val_fraction: share of the training data that becomes the validation split.
      seed: seed of the splits, which are stratified by class.
      download: let TensorFlow Datasets download and prepare what is not in `data_dir`.
      image_size: resize to this height and width; needed if the images differ in size.
      max_train: keep at most this many training images, stratified by class.

    Raises:
      ValueError: if the dataset is unknown, not prepared in `data_dir`, or not made of uint8
        images with class labels; the message says which flag or command helps.
      ImportError: if the package that provides it is missing.

    Example:

    >>> from experiments import datasets
    >>> data = datasets.load("digits")
    >>> data.input_shape, data.num_classes, len(data.x_train) + len(data.x_val) + len(data.x_test)
    ((8, 8, 1), 10, 1797)
    """
    if not 0 < val_fraction < 1:
        raise ValueError(f"val_fraction must lie between 0 and 1, found {val_fraction}.")
    if name == "digits":
        if image_size is not None:
            raise ValueError("image_size does not apply to 'digits': leave it out.")
        x, y, x_test, y_test = _digits(seed)
        num_classes = 10
    else:
        from experiments import tfds_images

        x, y, x_test, y_test, num_classes = tfds_images.read(name, data_dir, download, image_size)
    keep, held_out = stratified_split(y, val_fraction, seed)
    if max_train is not None and max_train < len(keep):
        _, chosen = stratified_split(y[keep], max_train / len(keep), seed)
        keep = keep[chosen]
    return Dataset(name, x[keep], y[keep], x[held_out], y[held_out], x_test, y_test, num_classes)


def stratified_split(y: np.ndarray, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Parts indices in two so that every class is parted in the same proportion.

    Args:
      y: class indices `[samples]`.
      fraction: share of the second part; of every class that has two samples or more, at least
        one lands on each side.
      seed: which samples are drawn.

    Returns:
      Two sorted index arrays that together are `range(samples)`.
    """
    rng = np.random.default_rng(seed)
    second = []
    for label in np.unique(y):
        members = rng.permutation(np.flatnonzero(y == label))
        count = round(fraction * len(members))
        second.append(members[: min(max(count, 1), len(members) - 1)])
    chosen = np.zeros(len(y), bool)
    chosen[np.concatenate(second)] = True
    return np.flatnonzero(~chosen), np.flatnonzero(chosen)


def _digits(seed: int) -> tuple[Any, Any, Any, Any]:
    sklearn_datasets = require("sklearn.datasets", "The dataset 'digits'")
    digits = sklearn_datasets.load_digits()
    # The original grey levels are 0..16; the models expect 0..255.
    x = np.round(digits.images[..., None] * (255 / 16)).astype(np.uint8)
    y = digits.target.astype(np.int64)
    train, test = stratified_split(y, DIGITS_TEST_FRACTION, seed)
    return x[train], y[train], x[test], y[test]
