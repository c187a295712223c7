"""Native libraries that print to the process's standard output behind Python's back."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

_STDOUT = 1


@contextmanager
def no_stray_output() -> Iterator[None]:
    """What native code prints to standard output goes nowhere. Not for threads: the descriptor is the process's.

    HiGHS prints a line about its own sub-solver now and then, whatever its options say; standard output is for results.
    """
    try:
        kept = os.dup(_STDOUT)
    except OSError:  # it is closed: nothing can be printed
        yield
        return
    _flush()
    sink = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(sink, _STDOUT)
        yield
    finally:
        _flush()
        os.dup2(kept, _STDOUT)
        os.close(kept)
        os.close(sink)


def _flush() -> None:
    """Python's buffer and, where there is a C library to ask, that of the native code."""
    if sys.stdout is not None:
        sys.stdout.flush()
    if os.name == "posix":
        ctypes.CDLL(None).fflush(None)
