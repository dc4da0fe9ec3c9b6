"""Errors that a user can mend, said in one line instead of a traceback."""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Iterator

from absl import flags, logging

INTERRUPTED = 130
TERMINATED = 143


@contextlib.contextmanager
def in_words(program: str) -> Iterator[None]:
    """Ends the program with the message of an error about its settings, files or packages.

    Args:
      program: its name, before the message.
    """
    try:
        yield
    except (ValueError, ImportError, OSError) as error:
        sys.exit(f"{program}: {error}")


def quiet_logs() -> None:
    """Shows warnings of the libraries, not their notes, unless `--verbosity` says otherwise."""
    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)


@contextlib.contextmanager
def stopped_cleanly(program: str) -> Iterator[None]:
    """Lets Ctrl-C and SIGTERM end the program in one line, after what it began was cleared away."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(TERMINATED))
    try:
        yield
    except KeyboardInterrupt:
        print(f"\n{program}: interrupted; nothing was written", file=sys.stderr)
        sys.exit(INTERRUPTED)
