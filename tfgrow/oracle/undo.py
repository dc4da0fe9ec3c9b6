"""What an oracle knows, in memory and on disk, put back when a growth step is cut off."""

from __future__ import annotations

import contextlib
import copy
import os
import re
from collections.abc import Iterator
from typing import Any

import tensorflow as tf

from tfgrow._files import write_text


@contextlib.contextmanager
def restored_on_error(oracle: Any, directory: str | None) -> Iterator[None]:
    """Restores an oracle's attributes and its project's files if the block raises anything at all.

    Args:
      oracle: the object. Its dicts, lists and sets are restored, not what is inside of them.
      directory: where its files are, or None. Its JSON files are restored, and the directories of
        trials that the block added are removed; what others keep there is none of its business.
    """
    attributes = {name: _copied(value) for name, value in vars(oracle).items()}
    files = None if directory is None else _read(directory)
    try:
        yield
    except BaseException:
        vars(oracle).clear()
        vars(oracle).update(attributes)
        if directory is not None and files is not None:
            _write_back(directory, files)
        raise


def _copied(value: Any) -> Any:
    return copy.copy(value) if isinstance(value, (dict, list, set)) else value


def _read(directory: str) -> dict[str, str | None]:
    """Text of every file in a directory, by name; None for directories."""
    found: dict[str, str | None] = {}
    for name in _names(directory):
        path = os.path.join(directory, name)
        found[name] = None if tf.io.gfile.isdir(path) else _text(path)
    return found


def _write_back(directory: str, files: dict[str, str | None]) -> None:
    for name in set(_names(directory)) - set(files):
        path = os.path.join(directory, name)
        (tf.io.gfile.rmtree if tf.io.gfile.isdir(path) else tf.io.gfile.remove)(path)
    for name, text in files.items():
        path = os.path.join(directory, name)
        if text is not None and not (tf.io.gfile.exists(path) and _text(path) == text):
            write_text(path, text)


def _names(directory: str) -> list[str]:
    """What in the directory is the oracle's own."""
    # Some file systems list directories with a slash at the end.
    names = (name.rstrip("/") for name in tf.io.gfile.listdir(directory))
    return [name for name in names if re.match(r"(oracle|widths)\.json|trial_\d+$", name)]


def _text(path: str) -> str:
    with tf.io.gfile.GFile(path) as file:
        return file.read()
