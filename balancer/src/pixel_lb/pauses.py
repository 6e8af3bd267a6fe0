"""The pauses of this host: times in which its processes were stopped.

Requests that arrive meanwhile wait in Nginx's sockets, and another balancer takes the address. App hosts read
this record as `/lb/pauses`, and refuse requests that may have waited (docs/adr/0048-stopped-balancers.md).
"""

from __future__ import annotations

import contextlib
import time
from pathlib import Path
from threading import Thread

from pixel_lb.files import write

# Seconds between two updates of the record.
INTERVAL = 0.2
# A longer time without an update is a pause. Another balancer takes the address after 1.1 s at the earliest.
PAUSE = 0.9
# Seconds that Nginx has after a pause to send what has waited.
SETTLE = 1.0


class PauseRecord:
    """A file with two times: of the end of the latest pause, and of the latest update."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._since = 0.0
        self._updated: float | None = None

    def update(self) -> None:
        """Write the record. This clock also runs while the host is suspended."""
        now = time.clock_gettime(time.CLOCK_BOOTTIME)
        if self._updated is not None and now - self._updated > PAUSE:
            self._since = time.time() + SETTLE
        self._updated = now
        write(self._path, f"{self._since:.3f} {time.time():.3f}\n".encode())

    def start(self) -> None:
        """Update the record in a thread of its own until the process ends."""
        Thread(target=self._run, name="pauses", daemon=True).start()

    def _run(self) -> None:
        while True:
            # After an error, app hosts find an old record, and refuse requests.
            with contextlib.suppress(OSError):
                self.update()
            time.sleep(INTERVAL)
