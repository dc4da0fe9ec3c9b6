"""Export: runs with TensorFlow alone, says what it takes, appears whole or not at all."""

import os
import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf

from tfgrow.export import ENDPOINT, TensorSignature, export


def image_model(name="image", **input_options):
    image = keras.Input((6, 6, 1), name=name, **input_options)
    x = keras.layers.Rescaling(1 / 255)(image)
    x = keras.layers.RandomFlip(seed=1)(x)
    x = keras.layers.Conv2D(3, 3, activation="relu")(x)
    x = keras.layers.BatchNormalization()(x)
    x = keras.layers.Dropout(0.5, seed=2)(x)
    return keras.Model(
        image, keras.layers.Dense(2, activation="softmax")(keras.layers.Flatten()(x))
    )


def images(count, dtype=np.float32):
    return np.random.default_rng(0).integers(0, 256, (count, 6, 6, 1)).astype(dtype)


def serve(path, x):
    """What the SavedModel gives, as arrays."""
    loaded = tf.saved_model.load(path)  # held: functions do not keep their variables alive
    return keras.tree.map_structure(keras.ops.convert_to_numpy, loaded.serve(x))


SERVE_WITHOUT_KERAS = """
import sys
sys.modules["keras"] = None
sys.modules["tfgrow"] = None
import numpy as np
import tensorflow as tf

path, data = sys.argv[1:]
served = tf.saved_model.load(path)
arrays = np.load(data)
for key in ("one", "many"):
    by_name = served.signatures["serve"](image=tf.constant(arrays[key]))
    arrays_out = served.serve(arrays[key]).numpy()
    np.testing.assert_allclose(by_name["output_0"].numpy(), arrays_out, atol=1e-7)
    np.testing.assert_allclose(arrays_out, arrays[key + "_expected"], atol=1e-6)
try:
    import keras
except ImportError:
    print("served without keras")
"""


def test_runs_where_neither_keras_nor_tfgrow_can_be_imported(tmp_path):
    model = image_model()
    export(model, tmp_path / "1", verbose=False)
    data = {"one": images(1), "many": images(5)}
    data |= {f"{key}_expected": model(x, training=False) for key, x in data.items()}
    np.savez(tmp_path / "data.npz", **data)
    result = subprocess.run(
        [sys.executable, "-c", SERVE_WITHOUT_KERAS, tmp_path / "1", tmp_path / "data.npz"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "served without keras"


def test_signature_is_returned_written_and_printed(tmp_path, capsys):
    signature = export(image_model(), tmp_path / "1")
    assert signature.endpoint == ENDPOINT == "serve"
    assert signature.path == str(tmp_path / "1")
    assert signature.inputs == {"image": TensorSignature((None, 6, 6, 1), "float32")}
    assert signature.outputs == {"output_0": TensorSignature((None, 2), "float32")}
    assert "serve(image: float32 [?, 6, 6, 1]) -> output_0: float32 [?, 2]" in (
        capsys.readouterr().out
    )
    loaded = tf.saved_model.load(tmp_path / "1")
    for name in ("serve", "serving_default"):
        _, takes = loaded.signatures[name].structured_input_signature
        assert takes["image"].shape.as_list() == [None, 6, 6, 1]


def test_stated_dtypes_are_cast_inside(tmp_path):
    model = image_model()
    signature = export(model, tmp_path / "1", dtype="uint8", output_dtype="float64", verbose=False)
    assert signature.inputs["image"].dtype == "uint8"
    assert signature.outputs["output_0"].dtype == "float64"
    served = serve(tmp_path / "1", images(4, np.uint8))
    np.testing.assert_allclose(served, model(images(4), training=False), atol=1e-6)


@pytest.mark.parametrize(("stated", "expected"), [(None, "float16"), ("float32", "float32")])
def test_mixed_precision_states_its_output_dtype(tmp_path, stated, expected):
    keras.config.set_dtype_policy("mixed_float16")
    model = image_model()
    signature = export(model, tmp_path / "1", output_dtype=stated, verbose=False)
    assert signature.inputs["image"].dtype == "float32"
    assert signature.outputs["output_0"].dtype == expected
    served = serve(tmp_path / "1", images(2))
    assert served.dtype == expected
    np.testing.assert_allclose(served, model(images(2), training=False), atol=1e-6)


@pytest.mark.parametrize("structure", ["list", "dict"])
def test_several_inputs_and_outputs_keep_names_and_structure(tmp_path, structure):
    a, b = keras.Input((3,), name="a"), keras.Input((2,), name="b", dtype="int32")
    joined = keras.layers.Concatenate()([a, keras.ops.cast(b, "float32")])
    outputs = {"u": keras.layers.Dense(2)(joined), "v": keras.layers.Dense(1)(joined)}
    model = keras.Model([b, a] if structure == "list" else {"a": a, "b": b}, outputs)
    signature = export(model, tmp_path / "1", verbose=False)
    assert {name: spec.dtype for name, spec in signature.inputs.items()} == {
        "a": "float32",
        "b": "int32",
    }
    assert set(signature.outputs) == {"u", "v"}
    x = {"a": np.ones((4, 3), np.float32), "b": np.arange(8, dtype=np.int32).reshape(4, 2)}
    call = [x["b"], x["a"]] if structure == "list" else x
    expected = model(call)
    loaded = tf.saved_model.load(tmp_path / "1")
    by_name = loaded.signatures["serve"](**{name: tf.constant(v) for name, v in x.items()})
    by_structure = loaded.serve(call)
    for name in ("u", "v"):
        np.testing.assert_allclose(by_name[name], expected[name], atol=1e-6)
        np.testing.assert_allclose(by_structure[name], expected[name], atol=1e-6)


def test_sequential_with_a_chosen_name_and_a_fixed_batch_made_free(tmp_path):
    model = keras.Sequential([keras.layers.Dense(2)])
    model(np.zeros((1, 3), np.float32))
    signature = export(model, tmp_path / "1", input_names=["features"], verbose=False)
    assert signature.inputs == {"features": TensorSignature((None, 3), "float32")}
    fixed = keras.Input(batch_shape=(4, 3), name="fixed")
    export(keras.Model(fixed, model.layers[0](fixed)), tmp_path / "2", verbose=False)
    x = np.ones((5, 3), np.float32)
    np.testing.assert_allclose(serve(tmp_path / "2", x), model(x), atol=1e-6)


def test_the_model_is_not_changed_and_trains_on(tmp_path):
    model = image_model()
    model.compile("adam", "sparse_categorical_crossentropy")
    x, y = images(8), np.arange(8) % 2
    model.fit(x, y, verbose=0)
    before = [*model.get_weights(), *(v.numpy() for v in model.optimizer.variables)]
    train_function, attributes = model.train_function, set(vars(model))
    export(model, tmp_path / "1", verbose=False)
    after = [*model.get_weights(), *(v.numpy() for v in model.optimizer.variables)]
    for a, b in zip(before, after, strict=True):
        np.testing.assert_array_equal(a, b)
    assert model.train_function is train_function
    assert set(vars(model)) == attributes
    served = serve(tmp_path / "1", x)
    model.fit(x, y, verbose=0)
    reloaded = serve(tmp_path / "1", x)
    np.testing.assert_array_equal(served, reloaded)
    assert not np.allclose(model(x, training=False), reloaded), (
        "the export must be a copy, not a view"
    )


@pytest.mark.parametrize("there", ["nothing", "an export"])
def test_a_failing_write_leaves_what_was_there(tmp_path, monkeypatch, there):
    target = tmp_path / "runs" / "1"
    model = image_model()
    if there == "an export":
        export(model, target, verbose=False)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    def half_write(self, filepath, **_):
        os.makedirs(filepath)
        with open(os.path.join(filepath, "saved_model.pb"), "wb") as file:
            file.write(b"half")
        raise KeyboardInterrupt

    archive = type(keras.export.ExportArchive())  # the class that Keras picks for its backend
    monkeypatch.setattr(archive, "write_out", half_write)
    with pytest.raises(KeyboardInterrupt):
        export(model, target, overwrite=True, verbose=False)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert os.listdir(target.parent) == (["1"] if there == "an export" else [])


def test_a_failing_rename_restores_the_export_it_replaces(tmp_path, monkeypatch):
    target = tmp_path / "1"
    export(image_model(), target, verbose=False)
    before = (target / "saved_model.pb").read_bytes()
    rename = os.rename

    def fail_for_new(source, destination):
        if os.path.basename(source) == "new":
            raise OSError("disk full")
        rename(source, destination)

    monkeypatch.setattr(os, "rename", fail_for_new)
    with pytest.raises(OSError, match="disk full"):
        export(image_model(), target, overwrite=True, verbose=False)
    assert (target / "saved_model.pb").read_bytes() == before
    assert os.listdir(tmp_path) == ["1"]


def test_the_directory_is_as_readable_as_any_other(tmp_path):
    export(image_model(), tmp_path / "1", verbose=False)
    (tmp_path / "other").mkdir()
    assert (tmp_path / "1").stat().st_mode == (tmp_path / "other").stat().st_mode


def test_overwrite_replaces_exports_and_nothing_else(tmp_path):
    target = tmp_path / "1"
    export(image_model(), target, verbose=False)
    with pytest.raises(ValueError, match=r"exists.*overwrite=True"):
        export(image_model("other"), target, verbose=False)
    export(image_model("other"), target, overwrite=True, verbose=False)
    takes = tf.saved_model.load(target).signatures["serve"].structured_input_signature[1]
    assert list(takes) == ["other"]
    precious = tmp_path / "photos"
    precious.mkdir()
    (precious / "a.jpg").write_bytes(b"x")
    with pytest.raises(ValueError, match="not a SavedModel"):
        export(image_model(), precious, overwrite=True, verbose=False)
    assert os.listdir(precious) == ["a.jpg"]


class Subclassed(keras.Model):
    def __init__(self):
        super().__init__()
        self.dense = keras.layers.Dense(2)

    def call(self, inputs):
        return self.dense(inputs)


def called(model):
    model(np.zeros((1, 3), np.float32))
    return model


def integer_model():
    tokens = keras.Input((3,), name="tokens", dtype="int32")
    return keras.Model(tokens, keras.layers.Embedding(4, 2)(tokens))


@pytest.mark.parametrize(
    ("make", "options", "error", "message"),
    [
        (lambda: "model", {}, TypeError, "expects a keras.Model, found str"),
        (lambda: keras.Sequential([keras.layers.Dense(2)]), {}, ValueError, "is not built"),
        (lambda: called(Subclassed()), {}, TypeError, "no fixed inputs"),
        (image_model, {"input_names": ["a", "b"]}, ValueError, "1 different names"),
        (image_model, {"input_names": "image"}, ValueError, "1 different names"),
        (image_model, {"input_names": ["a b"]}, ValueError, "cannot name its inputs"),
        (image_model, {"input_names": ["self"]}, ValueError, "cannot name its inputs"),
        (image_model, {"dtype": "float33"}, TypeError, "Unknown dtype 'float33'"),
        (image_model, {"dtype": "string"}, TypeError, "string values cannot be cast"),
        (integer_model, {"dtype": "float32"}, TypeError, "'tokens' has dtype int32"),
        (image_model, {"output_dtype": "string"}, TypeError, "output_dtype must be a number type"),
    ],
)
def test_bad_arguments(tmp_path, make, options, error, message):
    with pytest.raises(error, match=message):
        export(make(), tmp_path / "1", verbose=False, **options)
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("path", [None, 3, ""])
def test_what_is_no_path_is_refused(path):
    with pytest.raises(ValueError, match="needs the path of the directory"):
        export(image_model(), path, verbose=False)


def test_remote_paths_are_refused():
    with pytest.raises(ValueError, match="local directories"):
        export(image_model(), "gs://bucket/1", verbose=False)
