"""`include` and `exclude`: which names they leave."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence


def matching_names(
    names: Iterable[str | Sequence[str]],
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
) -> list[str]:
    """The names that `include` / `exclude` leave, in their order.

    Args:
      names: names of the model's sites or layers; several of one site that answers to each of
        them (`Site.names`), and is then known by the first.
      include: names or regular expressions that must match a whole name; None takes all.
      exclude: the same, for what to leave out.

    Raises:
      ValueError: a pattern that matches none of the names.

    Example:

    >>> matching_names(["conv1", "conv2", "dense"], include=["conv.*"], exclude=["conv1"])
    ['conv2']
    >>> matching_names([("conv1", "shortcut"), "conv2"], include=["shortcut"])
    ['conv1']
    """
    known = [(name,) if isinstance(name, str) else tuple(name) for name in names]
    every = [name for aliases in known for name in aliases]
    unmatched = [p for p in (*(include or ()), *(exclude or ())) if not _any_match([p], every)]
    if unmatched:
        raise ValueError(
            f"include/exclude name sites that the model does not have: {unmatched}. "
            f"Found: {every}. Give their names, or regular expressions that match whole names "
            "('conv.*')."
        )
    kept = known if include is None else [one for one in known if _any_match(include, one)]
    return [one[0] for one in kept if not _any_match(exclude or (), one)]


def _any_match(patterns: Sequence[str], names: Sequence[str]) -> bool:
    return any(p == n or re.fullmatch(p, n) for p in patterns for n in names)


def as_patterns(name: str, value: str | Sequence[str] | None) -> tuple[str, ...] | None:
    """`include` or `exclude`, as its argument was given, as a tuple.

    Args:
      name: of the argument.
      value: a name or regular expression, several, or None.

    Raises:
      TypeError, ValueError: what is no string, or no regular expression.
    """
    if value is None:
        return None
    found = (value,) if isinstance(value, str) else tuple(value)
    for pattern in found:
        if not isinstance(pattern, str):
            raise TypeError(
                f"{name} takes site names or regular expressions as strings. Found: {pattern!r}"
            )
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"{name}={pattern!r} is no regular expression: {error}") from error
    return found
