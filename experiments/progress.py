"""Progress with time left, for steps that take a while."""

from __future__ import annotations

import sys
import time
from typing import TextIO


class Progress:
    r"""Says how far a task is and how long it will still take.

    One line that is overwritten on a terminal; in a log, a line every ten seconds.

    Args:
      task: what is being done.
      file: where to say it, standard error by default.

    Example:

    >>> import io
    >>> log = io.StringIO()
    >>> progress = Progress("expanding", log)
    >>> progress(1, 2)
    >>> progress(2, 2)
    >>> log.getvalue()
    'expanding: 2/2, ... s\\n'
    """

    def __init__(self, task: str, file: TextIO | None = None):
        self._task = task
        self._file = sys.stderr if file is None else file
        self._started = self._said = time.perf_counter()

    def __call__(self, done: int, total: int) -> None:
        """Says that `done` of `total` equal steps are done."""
        now, terminal = time.perf_counter(), self._file.isatty()
        pause = 0.2 if terminal else 10.0
        if done < total and now - self._said < pause:
            return
        self._said = now
        spent = now - self._started
        left = f"{spent * (total - done) / done:.0f} s left" if done < total else f"{spent:.1f} s"
        text = f"{self._task}: {done}/{total}, {left}"
        start, end = ("\r", "" if done < total else "\n") if terminal else ("", "\n")
        print(f"{start}{text:<60}" if terminal else text, end=end, file=self._file, flush=True)
