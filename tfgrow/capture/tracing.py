"""TensorFlow functions that are made anew for every model shape."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import tensorflow as tf


def traced_anew(function: Callable) -> Any:
    """A `tf.function` of a local function, of which there will be others from the same lines.

    TensorFlow counts traces by lines of code, and warns users where five of the last ten calls were
    traced, as with few batches between two edits. Of a partial it knows no lines.
    """
    return tf.function(functools.partial(function), reduce_retracing=True, autograph=False)
