"""What flags of several binaries have in common; imports nothing that takes time."""

from __future__ import annotations

from collections.abc import Iterable


def are_whole(texts: Iterable[str]) -> bool:
    """Whether all texts are whole numbers of at least 1, such as units per layer."""
    return all(text.strip().isdigit() and int(text) > 0 for text in texts)
