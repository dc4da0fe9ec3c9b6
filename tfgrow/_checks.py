"""Checks of arguments that several modules make."""

from __future__ import annotations

import numpy as np


def require_whole(name: str, value: object, least: int = 1, optional: bool = True) -> None:
    """Raises ValueError unless `value` is a whole number >= `least`, or None if `optional`."""
    whole = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
    if (value is None and optional) or (whole and value >= least):  # type: ignore[operator]
        return
    either = "None or " if optional else ""
    raise ValueError(f"{name} must be {either}a whole number >= {least}. Found: {value!r}")
