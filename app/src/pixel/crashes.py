"""Crashes of the service: they are counted, and when they don't end it backs off.

The unit runs ``python -m pixel.crashes`` after every end of the service. An end that nobody asked
for is noted in the runtime directory, which systemd keeps over restarts of its own and removes
otherwise; and the more there were within a minute, the longer systemd is kept from the next try.
Times are in seconds since boot, which the clock's jumps don't touch.
"""

import os
import time
from pathlib import Path

LATELY = 600.0
"""Seconds for which a crash is reported."""

MINUTE = 60.0
PATIENCE = 5
"""Crashes within a minute that are answered at once."""

LONGEST_DELAY = 10.0


def _file() -> Path | None:
    directories = os.environ.get("RUNTIME_DIRECTORY", "")
    return Path(directories.split(":")[0]) / "crashes" if directories else None


def _times() -> list[float]:
    file = _file()
    if file is None or not file.exists():
        return []
    return [float(line) for line in file.read_text().split()]


def lately() -> int:
    """How often the service has crashed in the last ten minutes."""
    now = time.monotonic()
    return sum(now - then <= LATELY for then in _times())


def note() -> float:
    """Note a crash; the seconds to wait before the next try."""
    now = time.monotonic()
    times = [then for then in _times() if now - then <= LATELY] + [now]
    file = _file()
    if file is not None:
        file.write_text("".join(f"{then:.3f}\n" for then in times))
    many = sum(now - then <= MINUTE for then in times)
    return 0.0 if many <= PATIENCE else min(2.0 ** (many - PATIENCE - 1), LONGEST_DELAY)


if __name__ == "__main__" and os.environ.get("SERVICE_RESULT", "success") != "success":
    time.sleep(note())
