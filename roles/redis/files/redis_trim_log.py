#!/usr/bin/python3
"""Remove an incomplete transaction from the end of Redis's log before Redis starts.

A power cut may leave a part of the last transaction, which was never acknowledged. Redis itself removes
only an incomplete last command, and leaves `MULTI` without `EXEC`. `redis-check-aof` then counts later
commands as part of that transaction, and its repair would drop them. This program changes the log only
if no `EXEC` follows the last `MULTI`; other damage is left for Redis to refuse.

Usage: redis-trim-log DIRECTORY, which contains the manifest. Prints the number of bytes removed, if any.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

MULTI = b"*1\r\n$5\r\nMULTI\r\n"
EXEC = b"*1\r\n$4\r\nEXEC\r\n"
CHUNK = 1024 * 1024


def last_log(folder: Path) -> Path | None:
    """Return the file that Redis appends to, from the manifest; None if there is none yet."""
    manifests = sorted(folder.glob("*.manifest"))
    lines = manifests[0].read_text().splitlines() if manifests else []
    # Lines have the form `file NAME seq 7 type i`, with further pairs since Redis 8.
    entries = [dict(zip(words[::2], words[1::2], strict=False)) for words in map(str.split, lines)]
    names = [entry["file"] for entry in entries if entry.get("type") == "i"]
    return folder / names[-1] if names else None


def unfinished(log: Path) -> int | None:
    """Return the position of a last transaction without an end; None if there is none."""
    with log.open("rb") as file:
        place = size = file.seek(0, os.SEEK_END)
        tail = b""
        # Search backwards, so that the cost does not depend on the length of the log.
        while place > 0 and MULTI not in tail:
            place = max(0, place - max(len(tail), CHUNK))
            file.seek(place)
            tail = file.read(size - place)
    start = tail.rfind(MULTI)
    return None if start < 0 or EXEC in tail[start:] else place + start


def trim(folder: Path) -> int:
    """Remove an incomplete last transaction; return the number of bytes removed."""
    log = last_log(folder)
    if log is None or not log.exists():
        return 0
    start = unfinished(log)
    if start is None:
        return 0
    with log.open("r+b") as file:
        size = file.seek(0, os.SEEK_END)
        file.truncate(start)
        os.fsync(file.fileno())
    return size - start


if __name__ == "__main__":
    cut = trim(Path(sys.argv[1]))
    if cut:
        print(f"The log ended within a transaction, which was never acknowledged: {cut} bytes cut off.")
