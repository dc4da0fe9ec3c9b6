"""What flags of several binaries have in common; imports nothing that takes time."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

SCORES = ("auto", "raw", "marginal", "worth")
"""Those of `tfgrow.GaussNewtonOracle`, which takes seconds to import."""


def are_whole(texts: Iterable[str]) -> bool:
    """Whether all texts are whole numbers of at least 1, such as units per layer."""
    return all(text.strip().isdigit() and int(text) > 0 for text in texts)


def as_text(settings: Mapping[str, Any]) -> str:
    """Settings as flags; what is not set is left out."""
    texts = {
        name: ",".join(map(str, value)) if isinstance(value, list) else str(value)
        for name, value in sorted(settings.items())
        if value is not None
    }
    return " ".join(f"--{name}={text}" for name, text in texts.items())
