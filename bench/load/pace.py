"""A precise timer for asyncio.

The event loop rounds delays up to whole milliseconds, which is longer than a fast answer takes. A
timerfd wakes the loop within tens of microseconds.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
from collections.abc import Callable

_LIBC = ctypes.CDLL(None, use_errno=True)
_CLOCK_MONOTONIC = 1  # the clock behind loop.time()
_ABSOLUTE = 1


class _TimeSpec(ctypes.Structure):
    _fields_ = [("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long)]


class _TimerSpec(ctypes.Structure):
    _fields_ = [("interval", _TimeSpec), ("first", _TimeSpec)]


class Timer:
    """Calls a function at given times of the loop's clock; one time is set at once."""

    def __init__(self, callback: Callable[[], None]) -> None:
        self._callback = callback
        self._loop = asyncio.get_running_loop()
        self._fd: int = _LIBC.timerfd_create(_CLOCK_MONOTONIC, os.O_NONBLOCK | os.O_CLOEXEC)
        if self._fd < 0:
            raise OSError(ctypes.get_errno(), "timerfd_create")
        self._loop.add_reader(self._fd, self._ring)

    def at(self, when: float) -> None:
        """Sets the time of the next call; if it is past, the call is made immediately."""
        seconds, fraction = divmod(max(when, 0.000001), 1)
        spec = _TimerSpec(_TimeSpec(0, 0), _TimeSpec(int(seconds), int(fraction * 1e9)))
        if _LIBC.timerfd_settime(self._fd, _ABSOLUTE, ctypes.byref(spec), None) != 0:
            raise OSError(ctypes.get_errno(), "timerfd_settime")

    def _ring(self) -> None:
        os.read(self._fd, 8)
        self._callback()

    def close(self) -> None:
        self._loop.remove_reader(self._fd)
        os.close(self._fd)
