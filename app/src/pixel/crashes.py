"""Counts crashes of the service, and delays its restart if they are frequent.

The unit runs ``python -m pixel.crashes`` each time the service has ended. A crash is recorded in
the runtime directory, which systemd keeps when it restarts the service and removes when it is
stopped. The more crashes there were within a minute, the longer the next start is delayed.
Times are seconds since boot: they don't change when the clock is set.
"""

import os
import time
from pathlib import Path

LATELY = 600.0
"""Seconds for which a crash is reported."""

MINUTE = 60.0
PATIENCE = 5
"""Crashes within a minute that don't delay the next start."""

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
    """The number of crashes in the last ten minutes."""
    now = time.monotonic()
    return sum(now - then <= LATELY for then in _times())


def note() -> float:
    """Record a crash; returns the seconds to wait before the next start."""
    now = time.monotonic()
    times = [then for then in _times() if now - then <= LATELY] + [now]
    file = _file()
    if file is not None:
        file.write_text("".join(f"{then:.3f}\n" for then in times))
    many = sum(now - then <= MINUTE for then in times)
    return 0.0 if many <= PATIENCE else min(2.0 ** (many - PATIENCE - 1), LONGEST_DELAY)


if __name__ == "__main__" and os.environ.get("SERVICE_RESULT", "success") != "success":
    time.sleep(note())
