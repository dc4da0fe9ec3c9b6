"""Datasets: seeded stratified splits, exact pipelines, errors that say what to do."""

import collections
import sys

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from experiments import datasets, tfds_images


@pytest.fixture(scope="module")
def digits():
    return datasets.load("digits")


def rows(x):
    return collections.Counter(image.tobytes() for image in x)


def test_digits_splits_hold_every_image_once(digits):
    from sklearn.datasets import load_digits

    original = load_digits().images[..., None]
    images = [digits.arrays(split)[0] for split in datasets.SPLITS]
    assert all(x.dtype == np.uint8 for x in images)
    restored = np.round(np.concatenate(images) * (16 / 255))
    assert rows(restored) == rows(original)
    assert max(x.max() for x in images) == 255
    assert [len(x) for x in images] == [1295, 143, 359]
    assert (digits.input_shape, digits.num_classes) == ((8, 8, 1), 10)


def test_splits_follow_the_seed(digits):
    again, other = datasets.load("digits", seed=0), datasets.load("digits", seed=1)
    for split in datasets.SPLITS:
        np.testing.assert_array_equal(digits.arrays(split)[0], again.arrays(split)[0])
        assert rows(digits.arrays(split)[0]) != rows(other.arrays(split)[0])


@hypothesis.given(
    counts=st.lists(st.integers(1, 40), min_size=1, max_size=5),
    fraction=st.floats(0.02, 0.98),
    seed=st.integers(0, 2**32 - 1),
)
def test_stratified_split_parts_every_class_alike(counts, fraction, seed):
    y = np.random.default_rng(seed).permutation(np.repeat(np.arange(len(counts)), counts))
    first, second = datasets.stratified_split(y, fraction, seed)
    assert sorted([*first, *second]) == list(range(len(y)))
    for label, count in enumerate(counts):
        drawn = int((y[second] == label).sum())
        assert abs(drawn - fraction * count) <= 1
        assert count == 1 or 0 < drawn < count


def test_max_train_keeps_a_stratified_part_and_the_other_splits(digits):
    small = datasets.load("digits", max_train=200)
    assert abs(len(small.x_train) - 200) <= 5
    assert np.bincount(small.y_train).min() >= 18
    assert not rows(small.x_train) - rows(digits.x_train)
    np.testing.assert_array_equal(small.x_val, digits.x_val)


def test_pipeline_keeps_images_with_their_labels_and_reshuffles(digits):
    pipeline = digits.as_dataset("train", batch_size=100, seed=3)
    assert int(pipeline.cardinality()) == 13
    expected = collections.Counter(
        (image.tobytes(), int(label))
        for image, label in zip(digits.x_train, digits.y_train, strict=True)
    )
    passes = []
    for _ in range(2):
        batches = list(pipeline.as_numpy_iterator())
        assert batches[0][0].shape == (100, 8, 8, 1)
        images, labels = (np.concatenate(part) for part in zip(*batches, strict=True))
        pairs = [(x.tobytes(), int(y)) for x, y in zip(images, labels, strict=True)]
        assert collections.Counter(pairs) == expected
        passes.append(pairs)
    assert passes[0] != passes[1]


def labels_of(pipeline):
    return np.concatenate([labels for _, labels in pipeline.as_numpy_iterator()])


def test_pipeline_order_follows_the_seed(digits):
    first, again, other = (labels_of(digits.as_dataset(seed=seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


def test_validation_and_test_come_in_order_and_may_drop_the_remainder(digits):
    np.testing.assert_array_equal(labels_of(digits.as_dataset("val")), digits.y_val)
    kept = labels_of(digits.as_dataset("test", batch_size=100, drop_remainder=True))
    np.testing.assert_array_equal(kept, digits.y_test[:300])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: datasets.load("digits", val_fraction=1.0), "val_fraction must lie between"),
        (lambda: datasets.load("digits", image_size=4), "does not apply to 'digits'"),
        (lambda: datasets.load("digits").arrays("valid"), "Unknown split 'valid'.*'val'"),
        (lambda: datasets.load("digits").as_dataset(batch_size=0), "at least 1, found 0"),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    ("name", "package"), [("digits", "sklearn.datasets"), ("mnist", "tensorflow_datasets")]
)
def test_missing_package_says_how_to_install(monkeypatch, name, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=r'pip install "tfgrow\[experiments\]"'):
        datasets.load(name)


# TensorFlow Datasets: its own builder class on generated images, prepared in a temporary folder.
def make_builder(tfds, feature="image", dtype=np.uint8, unlabelled=False, splits=("train", "test")):
    """A class of TFDS builders whose image `i` is constant `i` and has the label `i % 3`."""

    class TinyImages(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            features = {"label": tfds.features.ClassLabel(num_classes=3)}
            if feature == "image":
                features["image"] = tfds.features.Image(shape=(5, 4, 1), dtype=dtype)
            elif feature == "sizes":
                features["image"] = tfds.features.Image(shape=(None, None, 1))
            else:
                features["text"] = tfds.features.Text()
            return self.dataset_info_from_configs(features=tfds.features.FeaturesDict(features))

        def _split_generators(self, dl_manager):
            return {name: self._generate_examples(name) for name in splits}

        def _generate_examples(self, split):
            for i in range(30 if split == "train" else 12):
                label = -1 if unlabelled and split == "test" else i % 3
                height = 5 + i if feature == "sizes" else 5
                content = np.full((height, 4, 1), i, dtype)
                yield i, {"label": label, "image" if feature != "text" else "text": content}

    return TinyImages


@pytest.fixture
def tfds(monkeypatch):
    module = pytest.importorskip("tensorflow_datasets")

    def install(**options):
        with module.core.registered.skip_registration():  # each test makes the same name anew
            builder = make_builder(module, **options)
        monkeypatch.setattr(module, "builder", lambda name, data_dir: builder(data_dir=data_dir))

    module.install = install
    return module


def test_tfds_images_arrive_with_their_labels(tfds, tmp_path):
    tfds.install()
    data = datasets.load("tiny_images", tmp_path, download=True, val_fraction=0.2)
    assert (data.input_shape, data.num_classes) == ((5, 4, 1), 3)
    assert [len(data.arrays(split)[1]) for split in datasets.SPLITS] == [24, 6, 12]
    for split in datasets.SPLITS:
        x, y = data.arrays(split)
        assert x.dtype == np.uint8
        np.testing.assert_array_equal(x[:, 0, 0, 0] % 3, y)
        assert (x == x[:, :1, :1]).all()
    assert sorted({*data.x_train[:, 0, 0, 0], *data.x_val[:, 0, 0, 0]}) == list(range(30))
    # Prepared now, so that it loads without permission to download, and in the same order.
    again = datasets.load("tiny_images", tmp_path, val_fraction=0.2)
    np.testing.assert_array_equal(again.x_train, data.x_train)


def test_tfds_validation_split_stands_in_for_a_missing_test_split(tfds, tmp_path):
    tfds.install(splits=("train", "validation"))
    assert len(datasets.load("tiny_images", tmp_path, download=True).x_test) == 12


def test_tfds_images_of_many_sizes_need_a_size(tfds, tmp_path):
    tfds.install(feature="sizes")
    with pytest.raises(ValueError, match=r"differ in shape.*--image_size"):
        datasets.load("tiny_images", tmp_path, download=True)
    data = datasets.load("tiny_images", tmp_path, download=True, image_size=(6, 7))
    assert data.input_shape == (6, 7, 1)
    np.testing.assert_array_equal(data.x_test[:, 3, 3, 0] % 3, data.y_test)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"feature": "text"}, "not an image classification dataset.*'text': 'Text'.*--dataset"),
        ({"dtype": np.uint16}, "dtype uint16; expected uint8"),
        ({"unlabelled": True}, "'test'.*unlabelled images"),
        ({"splits": ("train",)}, r"splits \['train'\]; expected 'train', and 'test'"),
    ],
)
def test_tfds_datasets_of_another_kind(tfds, tmp_path, options, message):
    tfds.install(**options)
    with pytest.raises(ValueError, match=message):
        datasets.load("tiny_images", tmp_path, download=True)


def test_tfds_data_that_is_not_prepared(tfds, tmp_path):
    tfds.install()
    with pytest.raises(
        ValueError, match=f"not prepared in '{tmp_path}'.*tfds build .*download=True"
    ):
        datasets.load("tiny_images", tmp_path)


def test_tfds_unknown_name():
    pytest.importorskip("tensorflow_datasets")
    with pytest.raises(ValueError, match=r"Unknown dataset 'cifar1000'\. Did you mean 'cifar100'"):
        tfds_images.read("cifar1000", None, False, None)
