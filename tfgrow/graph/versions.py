"""A mark per model that every structural edit changes.

Sites and candidates carry the mark they were traced at, so that stale ones are refused. Marks are
never used twice, so neither is anything traced between an edit and its rollback taken for current.
"""

from __future__ import annotations

import itertools
import weakref

_versions: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()
_fresh = itertools.count(1)


def version_of(model) -> int:
    """The model's present mark; 0 if tfgrow never edited it."""
    return _versions.get(model, 0)


def advance(model) -> None:
    """Gives the model a new mark, after an edit."""
    _versions[model] = next(_fresh)


def restore(model, version: int) -> None:
    """Gives the model an earlier mark back, after a rollback."""
    _versions[model] = version
