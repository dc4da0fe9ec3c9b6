"""Files that are replaced as a whole or stay as they were."""

from __future__ import annotations

import json
import os
from typing import Any

import tensorflow as tf


def write_json(path: str | os.PathLike, data: Any, indent: int | None = None) -> None:
    """Writes JSON so that the file is replaced as a whole or stays as it was."""
    write_text(path, json.dumps(data, indent=indent))  # what JSON can't say fails first


def write_text(path: str | os.PathLike, text: str) -> None:
    """Writes text so that the file is replaced as a whole or stays as it was."""
    path = os.fspath(path)
    temporary = f"{path}.{os.getpid()}.tmp"
    try:
        with tf.io.gfile.GFile(temporary, "w") as file:
            file.write(text)
        tf.io.gfile.rename(temporary, path, overwrite=True)
    except BaseException:
        if tf.io.gfile.exists(temporary):
            tf.io.gfile.remove(temporary)
        raise
