"""Latencies from Nginx's access log.

They include the time that a request waits in the socket of a throttled host, which the app cannot measure.
"""

from __future__ import annotations

import os
import re
from collections import defaultdict
from pathlib import Path

# Limit of a read. If the log has grown by more, only its end is read and scaled up.
READ_BYTES = 128 * 1024
# Requests for one pixel: their cost is constant, unlike that of pictures, streams and batches.
PIXEL_LINE = re.compile(
    rb'"uri":"/(?:cluster/[^/"]+/)?pixel[/?"][^\n]*?"upstream":"([^"]+)"[^\n]*?"upstream_seconds":"([^"]+)"'
)
SEPARATOR = re.compile(", | : ")
# Cap, so that one slow request does not dominate a mean.
MAX_SECONDS = 1.0


class LogTail:
    """Follows the access log, also across rotations."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._inode = 0
        self._offset = 0

    def read(self) -> dict[str, tuple[float, float]]:
        """Return count and total seconds of pixel requests since the last call, by backend address."""
        try:
            with self._path.open("rb") as log:
                facts = os.fstat(log.fileno())
                if self._inode == 0:
                    self._offset = facts.st_size  # Skip lines written before the first call.
                elif facts.st_ino != self._inode or facts.st_size < self._offset:
                    self._offset = 0
                self._inode = facts.st_ino
                new = facts.st_size - self._offset
                log.seek(facts.st_size - min(new, READ_BYTES))
                text = log.read(min(new, READ_BYTES))
                self._offset = facts.st_size
        except OSError:
            return {}
        return parse(text, new / len(text) if text else 0.0)


def parse(lines: bytes, multiplier: float = 1.0) -> dict[str, tuple[float, float]]:
    """Sum up pixel requests.

    Args:
        lines: A part of the log; an incomplete first line is ignored.
        multiplier: Number of requests that each line represents.

    Returns:
        Count and total seconds by the backend's address.
    """
    counts: dict[str, float] = defaultdict(float)
    seconds: dict[str, float] = defaultdict(float)
    for upstreams, took in PIXEL_LINE.findall(lines):
        # A retried request lists both backends: "a, b" or "a : b", and "2.001 : 0.004".
        fields = (SEPARATOR.split(each.decode()) for each in (upstreams, took))
        for address, text in zip(*fields, strict=False):
            if text != "-":
                counts[address] += multiplier
                seconds[address] += min(float(text), MAX_SECONDS) * multiplier
    return {address: (counts[address], seconds[address]) for address in counts}
