"""Packages that only the experiments need, imported when they are first used."""

from __future__ import annotations

import importlib
from types import ModuleType


def require(module: str, purpose: str) -> ModuleType:
    """Imports an optional package, or says how to install it.

    Args:
      module: dotted name of the module to import.
      purpose: what needs it, as the start of a sentence, e.g. `"Drawing figures"`.

    Raises:
      ImportError: if the module, or one it imports itself, is missing.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        missing = error.name or module
        raise ImportError(
            f"{purpose} needs the Python package `{missing}`, which cannot be imported ({error}). "
            'Install the optional packages with: pip install "tfgrow[experiments]"',
            name=missing,
        ) from error
