"""Reads any image classification dataset of TensorFlow Datasets into memory."""

from __future__ import annotations

import difflib
import os
from typing import Any

import numpy as np

from experiments._extras import require

READ_BATCH = 512


def read(
    name: str,
    data_dir: str | os.PathLike[str] | None,
    download: bool,
    image_size: int | tuple[int, int] | None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, int]:
    """Training and test arrays of a TFDS dataset, and its number of classes.

    The test data is the split `test`, or `validation` where there is none.

    Returns:
      `x_train` uint8 `[samples, height, width, channels]`, `y_train` int64 `[samples]`, `x_test`,
      `y_test`, `num_classes`.

    Raises:
      ValueError: see `experiments.datasets.load`.
    """
    tfds = require("tensorflow_datasets", f"The dataset {name!r}")
    directory = os.fspath(data_dir) if data_dir is not None else None
    builder = _builder(tfds, name, directory)
    image_key, label_key = _image_and_label(tfds, name, builder.info)
    _prepare(builder, name, directory, download)
    size = (image_size, image_size) if isinstance(image_size, int) else image_size
    _check_image(name, builder.info.features[image_key], size)
    train, test = _train_and_test(name, builder.info.splits)
    arrays: list[np.ndarray] = []
    for split in (train, test):
        arrays += _read_split(builder, split, image_key, label_key, size)
        if arrays[-1].min() < 0:
            raise ValueError(
                f"The split {split!r} of the dataset {name!r} holds unlabelled images (label -1). "
                "Choose a dataset whose train and test splits are labelled."
            )
    return (*arrays, builder.info.features[label_key].num_classes)


def _builder(tfds: Any, name: str, directory: str | None) -> Any:
    try:
        return tfds.builder(name, data_dir=directory)
    except tfds.core.DatasetNotFoundError:
        # TFDS's own message lists all of its thousand names.
        known = ["digits", *tfds.list_builders(with_community_datasets=False)]
        near = difflib.get_close_matches(name, known, n=3)
        hint = f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
        raise ValueError(
            f"Unknown dataset {name!r}.{hint} Expected 'digits' or an image classification dataset "
            "of TensorFlow Datasets (https://www.tensorflow.org/datasets/catalog/overview)."
        ) from None


def _prepare(builder: Any, name: str, directory: str | None, download: bool) -> None:
    if builder.info.splits:
        return
    if not download:
        where = repr(directory) if directory else "TensorFlow Datasets' default directory"
        option = f" --data_dir={directory}" if directory else ""
        raise ValueError(
            f"The dataset {name!r} is not prepared in {where}. Point --data_dir (data_dir=) to the "
            "directory that holds it, or let it be downloaded: on the command line `tfds build "
            f"{name}{option}`, in Python download=True (--download of experiments.grow)."
        )
    builder.download_and_prepare()


def _image_and_label(tfds: Any, name: str, info: Any) -> tuple[str, str]:
    """The keys of the one image and the one class label of a sample."""
    features = info.features
    is_dict = isinstance(features, tfds.features.FeaturesDict)
    found = dict(features.items()) if is_dict else {}
    keys = info.supervised_keys if is_dict and info.supervised_keys else tuple(found)
    images = [key for key in keys if isinstance(found.get(key), tfds.features.Image)]
    labels = [key for key in keys if isinstance(found.get(key), tfds.features.ClassLabel)]
    if len(images) == 1 and len(labels) == 1 and found[labels[0]].num_classes:
        return images[0], labels[0]
    kinds = {key: type(feature).__name__ for key, feature in found.items()} or features
    raise ValueError(
        f"The dataset {name!r} is not an image classification dataset: expected one Image and one "
        f"ClassLabel per sample, found {kinds}. Choose another --dataset, such as 'cifar10'."
    )


def _check_image(name: str, image: Any, size: tuple[int, int] | None) -> None:
    if image.np_dtype != np.uint8:
        raise ValueError(
            f"The images of the dataset {name!r} have dtype {np.dtype(image.np_dtype).name}; "
            "expected uint8. Choose another --dataset."
        )
    height, width, channels = image.shape
    if channels is None or (size is None and None in (height, width)):
        raise ValueError(
            f"The images of the dataset {name!r} differ in shape (found {image.shape}). Give them "
            "one size with --image_size (image_size=32)."
        )


def _train_and_test(name: str, splits: Any) -> tuple[str, str]:
    test = next((split for split in ("test", "validation") if split in splits), None)
    if "train" not in splits or test is None:
        raise ValueError(
            f"The dataset {name!r} has the splits {sorted(splits)}; expected 'train', and 'test' "
            "or 'validation'. Choose another --dataset."
        )
    return "train", test


def _read_split(
    builder: Any, split: str, image_key: str, label_key: str, size: tuple[int, int] | None
) -> tuple[np.ndarray, np.ndarray]:
    import tensorflow as tf

    def image_and_label(sample: Any) -> tuple[Any, Any]:
        image = sample[image_key]
        if size is not None:
            image = tf.image.resize(image, size, antialias=True)
            image = tf.cast(tf.clip_by_value(tf.round(image), 0, 255), tf.uint8)
        return image, sample[label_key]

    samples = builder.as_dataset(split=split, shuffle_files=False)
    samples = samples.map(image_and_label, num_parallel_calls=tf.data.AUTOTUNE).batch(READ_BATCH)
    batches = list(samples.prefetch(tf.data.AUTOTUNE).as_numpy_iterator())
    images, labels = zip(*batches, strict=True)
    return np.concatenate(images), np.concatenate(labels).astype(np.int64)
