"""Everything `model.fit` takes as data gives the same batches; the rest is refused in words."""

import itertools

import keras
import numpy as np
import pytest
import tensorflow as tf

from tfgrow.capture.batches import batches_of, check_finite, forever

X = np.arange(20, dtype="float32").reshape(10, 2)
Y = np.arange(10)
W = np.linspace(0.5, 2, 10).astype("float32")


class Sequence(keras.utils.PyDataset):
    def __len__(self):
        return 3

    def __getitem__(self, index):
        rows = slice(4 * index, 4 * index + 4)
        return X[rows], Y[rows], W[rows]


def dataset():
    return tf.data.Dataset.from_tensor_slices((X, Y, W)).batch(4)


@pytest.mark.parametrize(
    "data",
    [(X, Y, W), dataset(), Sequence(), list(dataset().as_numpy_iterator())],
    ids=["arrays", "tf.data", "PyDataset", "list"],
)
def test_all_forms_give_the_same_batches(data):
    batches = list(batches_of(data, batch_size=4))
    assert [len(batch[0]) for batch in batches] == [4, 4, 2]
    for part, expected in enumerate((X, Y, W)):
        np.testing.assert_array_equal(np.concatenate([b[part] for b in batches]), expected)
    assert all(batch[2].dtype == tf.float32 for batch in batches)


def test_weights_are_one_by_default():
    for data in ((X, Y), (X, Y, None), dataset().map(lambda x, y, w: (x, y))):
        assert all((weight.numpy() == 1).all() for _, _, weight in batches_of(data, 4))


def test_structures_of_inputs_stay_together():
    ((x, y, _),) = batches_of(({"a": X, "b": -X}, Y), batch_size=10, seed=3)
    np.testing.assert_array_equal(x["a"], -x["b"])
    np.testing.assert_array_equal(x["a"][:, 0], 2.0 * y.numpy())
    assert list(y.numpy()) != list(Y)


def test_shuffles_repeat_by_seed_and_differ_by_epoch():
    def epochs(seed):
        stream = itertools.islice(forever((X, Y), 10, seed), 3)
        return [tuple(y.numpy()) for _, y, _ in stream]

    assert epochs(1) == epochs(1)
    assert len(set(epochs(1))) == 3
    assert epochs(None) == [tuple(Y)] * 3


@pytest.mark.parametrize("empty", [(X[:0], Y[:0]), dataset().take(0), []])
def test_empty_data_is_refused(empty):
    with pytest.raises(ValueError, match="dataset is empty"):
        list(batches_of(empty))
    with pytest.raises(ValueError, match="dataset is empty"):
        next(forever(empty))


def test_other_data_is_refused():
    with pytest.raises(TypeError, match=r"dataset of type int; expected \(x, y\)"):
        list(batches_of(3))
    with pytest.raises(ValueError, match=r"different lengths: \[9, 10\]"):
        list(batches_of((X, Y[:9])))
    with pytest.raises(ValueError, match="needs targets"):
        list(batches_of(tf.data.Dataset.from_tensor_slices(X).batch(4)))
    with pytest.raises(ValueError, match="4 parts"):
        list(batches_of(dataset().map(lambda x, y, w: (x, y, w, w))))


def test_endless_data_is_refused_where_a_pass_is_wanted():
    check_finite(dataset())
    check_finite((X, Y))
    with pytest.raises(ValueError, match=r"dataset.take\(n\)"):
        check_finite(dataset().repeat())
