#!/usr/bin/python3
"""Cut an unfinished transaction off the end of Redis' log, before Redis starts.

A power cut may leave a part of the last transaction, which was therefore never acknowledged. Redis
itself cuts off the last command only, and leaves `MULTI` without `EXEC`: what is appended later is
then taken for a part of it by `redis-check-aof`, whose repair would drop it. Only what follows the
last `MULTI` is looked at, and only if no `EXEC` follows; damage elsewhere is left for Redis to refuse.

Usage: redis-trim-log FOLDER, the one with the manifest. Says what it cut, if anything.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

MULTI = b"*1\r\n$5\r\nMULTI\r\n"
EXEC = b"*1\r\n$4\r\nEXEC\r\n"
CHUNK = 1024 * 1024


def last_log(folder: Path) -> Path | None:
    """The file that Redis appends to, by its manifest; None if there is none yet."""
    manifests = sorted(folder.glob("*.manifest"))
    lines = manifests[0].read_text().splitlines() if manifests else []
    # `file NAME seq 7 type i`, and from Redis 8 on further pairs.
    entries = [dict(zip(words[::2], words[1::2], strict=False)) for words in map(str.split, lines)]
    names = [entry["file"] for entry in entries if entry.get("type") == "i"]
    return folder / names[-1] if names else None


def unfinished(log: Path) -> int | None:
    """Where a transaction begins that has no end; None if there is none."""
    with log.open("rb") as file:
        place = size = file.seek(0, os.SEEK_END)
        tail = b""
        # Backwards, so that a long log costs no more than its last transaction.
        while place > 0 and MULTI not in tail:
            place = max(0, place - max(len(tail), CHUNK))
            file.seek(place)
            tail = file.read(size - place)
    start = tail.rfind(MULTI)
    return None if start < 0 or EXEC in tail[start:] else place + start


def trim(folder: Path) -> int:
    """Cut it off; the number of bytes that were."""
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
