"""Writes a model as a SavedModel that runs without tfgrow and without Keras.

The SavedModel has one endpoint, `serve` (also under TF Serving's name `serving_default`): named
inputs of a stated dtype, a free batch size, inference mode. The directory appears complete or not
at all: it is written under a temporary name beside its destination and then renamed.
"""

from __future__ import annotations

import dataclasses
import keyword
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import keras
import tensorflow as tf
from tensorflow.core.protobuf import saved_model_pb2

ENDPOINT = "serve"


@dataclasses.dataclass(frozen=True)
class TensorSignature:
    """Shape and dtype of one input or output; None marks a free axis."""

    shape: tuple[int | None, ...]
    dtype: str

    def __str__(self) -> str:
        return f"{self.dtype} [{', '.join('?' if n is None else str(n) for n in self.shape)}]"


@dataclasses.dataclass(frozen=True)
class ExportSignature:
    """What a written SavedModel takes and gives.

    Attributes:
      path: absolute path of the SavedModel directory.
      endpoint: name of the signature.
      inputs, outputs: by name; the batch axis is free.
    """

    path: str
    endpoint: str
    inputs: Mapping[str, TensorSignature]
    outputs: Mapping[str, TensorSignature]

    def __str__(self) -> str:
        takes = ", ".join(f"{name}: {spec}" for name, spec in self.inputs.items())
        gives = ", ".join(f"{name}: {spec}" for name, spec in self.outputs.items())
        return f"{self.path}: {self.endpoint}({takes}) -> {gives}"


def export(
    model: keras.Model,
    path: str | os.PathLike[str],
    *,
    input_names: Sequence[str] | None = None,
    dtype: str | None = None,
    output_dtype: str | None = None,
    overwrite: bool = False,
    verbose: bool = True,
) -> ExportSignature:
    """Writes `model` as a SavedModel whose endpoint `serve` runs it in inference mode.

    The model itself is not changed. Read it back with `tf.saved_model.load(path)`, then call
    `.serve(x)` or `.signatures["serve"](**{name: x})`.

    Args:
      model: a built Functional or Sequential model.
      path: the directory to create; missing parents are created too.
      input_names: names of the inputs in the signature, one per input in the order of
        `model.inputs`; by default those of the model's `keras.Input`s.
      dtype: dtype that the endpoint takes, e.g. `"uint8"` for images as they are on disk; the
        model's own by default. It is cast to the model's inside the SavedModel.
      output_dtype: dtype that the endpoint gives, e.g. `"float32"` for a model that computes in
        float16; the model's own by default.
      overwrite: replace the SavedModel that is at `path`.
      verbose: print the signature.

    Returns:
      The signature as it was written.

    Raises:
      TypeError: if `model` is not a Keras model or has no fixed inputs (a subclassed one), or a
        dtype cannot be cast to the model's without loss.
      ValueError: if the model is not built, `path` is not local or is taken, or an input name is
        unusable.

    Example:

    >>> import keras, tempfile, tfgrow
    >>> image = keras.Input((4,), name="image")
    >>> model = keras.Model(image, keras.layers.Dense(2)(image))
    >>> path = tempfile.mkdtemp() + "/1"
    >>> tfgrow.export(model, path, verbose=False).inputs["image"].dtype
    'float32'
    """
    structure = _input_structure(model)
    specs = _input_specs(structure, input_names, dtype)
    target = _free_path(path, overwrite)
    archive = keras.export.ExportArchive()
    archive.track(model)
    archive.add_endpoint(ENDPOINT, _serving_function(model, structure, output_dtype), [specs])

    def write(directory: Path) -> ExportSignature:
        archive.write_out(str(directory), verbose=False)
        return _read_signature(directory, target)

    signature = _write_atomically(target, write)
    if verbose:
        print(signature)
    return signature


def _input_structure(model: Any) -> Any:
    """The model's inputs in the structure that its call takes."""
    if not isinstance(model, keras.Model):
        raise TypeError(f"export expects a keras.Model, found {type(model).__name__}.")
    if not model.built:
        raise ValueError(
            f"Model {model.name!r} is not built, so its weights do not exist yet. Call it on a "
            "batch, or start it with keras.Input, before exporting it."
        )
    inputs = getattr(model, "inputs", None)
    if not inputs:
        raise TypeError(
            f"Model {model.name!r} ({type(model).__name__}) has no fixed inputs; export expects a "
            "Functional or Sequential model. Wrap it: keras.Model(inputs, model(inputs))."
        )
    return inputs[0] if isinstance(model, keras.Sequential) else model.input


def _input_specs(structure: Any, names: Sequence[str] | None, dtype: str | None) -> Any:
    """The structure with each input as a `TensorSpec`: named, of the stated dtype, free batch."""
    inputs = keras.tree.flatten(structure)
    chosen = [tensor.name for tensor in inputs] if names is None else list(names)
    if isinstance(names, str) or len(chosen) != len(inputs) or len(set(chosen)) != len(chosen):
        raise ValueError(
            f"input_names must be {len(inputs)} different names, one for each of "
            f"{[tensor.name for tensor in inputs]}; found {names!r}."
        )
    unusable = [name for name in chosen if not _is_signature_name(name)]
    if unusable:
        raise ValueError(
            f"A SavedModel signature cannot name its inputs {unusable}: expected a letter, then "
            "letters, digits or any of _ - . (and no Python keyword). Pass others as input_names=."
        )
    specs = [
        tf.TensorSpec((None, *tensor.shape[1:]), _input_dtype(tensor, dtype), name)
        for tensor, name in zip(inputs, chosen, strict=True)
    ]
    return keras.tree.pack_sequence_as(structure, specs)


def _is_signature_name(name: str) -> bool:
    """Whether TensorFlow takes the name as it is, as the argument of a function."""
    plain = re.fullmatch(r"[A-Za-z][A-Za-z0-9_.-]*", name) is not None
    return plain and not keyword.iskeyword(name) and name != "self"


def _input_dtype(tensor: Any, dtype: str | None) -> tf.DType:
    own = tf.as_dtype(tensor.dtype)
    wanted = own if dtype is None else _as_dtype(dtype)
    numeric = wanted.is_floating or wanted.is_integer or wanted.is_bool
    if wanted != own and (not numeric or (wanted.is_floating and not own.is_floating)):
        raise TypeError(
            f"Input {tensor.name!r} has dtype {own.name}; {wanted.name} values cannot be cast to "
            "it without loss. Leave `dtype` out or choose one that can."
        )
    return wanted


def _as_dtype(dtype: str) -> tf.DType:
    try:
        return tf.as_dtype(dtype)
    except TypeError:
        raise TypeError(
            f"Unknown dtype {dtype!r}; expected one like 'float32' or 'uint8'."
        ) from None


def _serving_function(
    model: keras.Model, structure: Any, output_dtype: str | None
) -> Callable[[Any], Any]:
    output = None if output_dtype is None else _as_dtype(output_dtype)
    if output is not None and not (output.is_floating or output.is_integer):
        raise TypeError(
            f"output_dtype must be a number type such as 'float32', found {output.name}."
        )
    own_dtypes = keras.tree.map_structure(lambda tensor: tf.as_dtype(tensor.dtype), structure)

    def serve(inputs: Any) -> Any:
        outputs = model(keras.tree.map_structure(tf.cast, inputs, own_dtypes), training=False)
        if output is None:
            return outputs
        return keras.tree.map_structure(lambda tensor: tf.cast(tensor, output), outputs)

    return serve


def _free_path(path: str | os.PathLike[str], overwrite: bool) -> Path:
    if not isinstance(path, (str, os.PathLike)) or not os.fspath(path):
        raise ValueError(f"export needs the path of the directory to write, found {path!r}.")
    if "://" in os.fspath(path):
        raise ValueError(
            f"export writes to local directories, found {path!r}: copy it there after."
        )
    target = Path(os.path.abspath(path))
    if not os.path.lexists(target):
        return target
    if not overwrite:
        raise ValueError(
            f"{str(target)!r} exists. Choose another path, or pass overwrite=True to replace it."
        )
    # Replacing deletes what was there: never delete a directory that is something else.
    if not (target / "saved_model.pb").is_file():
        raise ValueError(
            f"{str(target)!r} exists and is not a SavedModel (it has no saved_model.pb), so it is "
            "not replaced. Choose another path, or remove it yourself."
        )
    return target


def _write_atomically(target: Path, write: Callable[[Path], ExportSignature]) -> ExportSignature:
    """Calls `write` on a directory beside `target`, then puts that in the place of `target`."""
    target.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent))
    try:
        # One level down: `mkdtemp` makes private directories, a served model must be readable.
        fresh, old = staging / "new", staging / "old"
        result = write(fresh)
        replaced = os.path.lexists(target)
        if replaced:
            os.rename(target, old)
        try:
            os.rename(fresh, target)
        except BaseException:
            if replaced:
                os.rename(old, target)
            raise
        return result
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _read_signature(directory: Path, target: Path) -> ExportSignature:
    """The signature as it stands in the written files, not as it was asked for."""
    saved = saved_model_pb2.SavedModel()
    saved.ParseFromString((directory / "saved_model.pb").read_bytes())
    written = saved.meta_graphs[0].signature_def[ENDPOINT]
    return ExportSignature(
        str(target),
        ENDPOINT,
        _tensor_signatures(written.inputs),
        _tensor_signatures(written.outputs),
    )


def _tensor_signatures(tensors: Mapping[str, Any]) -> dict[str, TensorSignature]:
    return {
        name: TensorSignature(
            tuple(tf.TensorShape(info.tensor_shape).as_list()), tf.as_dtype(info.dtype).name
        )
        for name, info in sorted(tensors.items())
    }
