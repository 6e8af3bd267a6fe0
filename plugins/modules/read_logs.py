#!/usr/bin/python
"""Ansible module: lines of a host's journal and access log, by unit, status, request and time."""

from __future__ import annotations

DOCUMENTATION = r"""
module: read_logs
short_description: Read the journal and Nginx's access log of a host
description:
  - >-
    Returns lines of the journal and of C(/var/log/nginx/access.log), rotated files included, in the order of
    their times. It changes nothing.
  - >-
    With O(follow), the action plugin of this name prints new lines every second until it is interrupted. In
    check mode it prints once.
options:
  unit:
    description:
      - Unit whose lines are returned, without C(.service). V(pixel) includes all instances of the app, and
        V(nginx) the access log.
      - The default is all of V(pixel), V(nginx), V(redis-server) and V(pixel-lb).
    type: str
    default: ""
  status:
    description: Return only lines about answers with this status, such as V(503), V(5xx) or V(4xx).
    type: str
    default: ""
  id:
    description: Return only lines with this request ID.
    type: str
    default: ""
  since:
    description: >-
      Age of the oldest line, such as V(30s), V(10m), V(2h) or V(1day), with or without a leading minus, or a
      time in ISO 8601.
    type: str
    default: 10m
  lines:
    description: Number of lines that are returned, the latest ones.
    type: int
    default: 500
  follow:
    description: Print new lines until the run is interrupted.
    type: bool
    default: false
  seconds:
    description: With O(follow), end after this time; 0 for never.
    type: float
    default: 0
  position:
    description: The return value C(position) of an earlier run, whose lines are left out.
    type: dict
    default: {}
attributes:
  check_mode: {support: full}
author: Pixel Endpoint contributors
"""

EXAMPLES = r"""
- name: Read what was answered with 5xx in the last hour
  pixel.endpoint.read_logs:
    status: 5xx
    since: 1h
  register: __logs
"""

RETURN = r"""
entries:
  description: Lines, each with C(time) in seconds since 1970, C(unit) and C(text).
  type: list
  elements: dict
  returned: always
position:
  description: Where these lines end.
  type: dict
  returned: always
"""

import datetime
import gzip
import heapq
import json
import os
import re
import subprocess
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from ansible.module_utils.basic import AnsibleModule  # type: ignore[import-untyped]

ACCESS_LOG = Path("/var/log/nginx/access.log")
UNITS = ("pixel", "nginx", "redis-server", "pixel-lb")
# Sizes of time units by their first letters, as journalctl knows them.
SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}
AGE = re.compile(r"-?(\d+) ?(s|sec|seconds?|m|min|minutes?|h|hours?|d|days?|w|weeks?)")
STATUS = re.compile(r"[1-5](xx|\d\d)")
REQUEST_ID = re.compile(r"[0-9A-Za-z-]{8,64}")
UNIT = re.compile(r"[A-Za-z0-9@_.-]+")
# In lines of Nginx and of the app.
STATUS_FIELD = re.compile(r'(?:"status": ?|was answered )(\d{3})')
TIME_FIELD = re.compile(r'"time":"([^"]+)"')

Entry = dict[str, Any]


def oldest(since: str, now: float) -> float:
    """Return the time of the oldest wanted line, in seconds since 1970.

    Raises ValueError if the text is neither an age nor a time.
    """
    if matched := AGE.fullmatch(since):
        return now - int(matched[1]) * SECONDS[matched[2][0]]
    return datetime.datetime.fromisoformat(since).timestamp()


def matcher(option: dict[str, Any]) -> Callable[[str], bool]:
    """Return a function that tells whether a line has the wanted request ID and status."""
    status = re.compile(option["status"].replace("x", r"\d")) if option["status"] else None

    def matches(line: str) -> bool:
        if option["id"] and option["id"] not in line:
            return False
        if status is None:
            return True
        found = STATUS_FIELD.search(line)
        return found is not None and status.fullmatch(found[1]) is not None

    return matches


def journal_command(option: dict[str, Any], start: float) -> list[str]:
    """Return the command that prints the journal's entries, one JSON object a line, and the cursor."""
    chosen = [option["unit"]] if option["unit"] else UNITS
    units = [f"--unit={unit}" for unit in chosen] + (["--unit=pixel@*"] if "pixel" in chosen else [])
    cursor = option["position"].get("cursor")
    begin = f"--after-cursor={cursor}" if cursor else f"--since=@{start:.0f}"
    fields = "--output-fields=MESSAGE,_SYSTEMD_UNIT,UNIT"
    return ["journalctl", *units, begin, "--quiet", "--no-pager", "--output=json", fields, "--show-cursor"]


def journal_entries(lines: Iterable[str], matches: Callable[[str], bool]) -> tuple[list[Entry], str]:
    """Parse the journal's output; return the entries that match, and the cursor behind the last one."""
    entries, cursor = [], ""
    for line in lines:
        if line.startswith("-- cursor: "):
            cursor = line.removeprefix("-- cursor: ").strip()
        elif line.startswith("{"):
            found = json.loads(line)
            text = found.get("MESSAGE") or ""
            # A message that isn't valid UTF-8 is a list of bytes.
            text = bytes(text).decode(errors="replace") if isinstance(text, list) else text
            cursor = found["__CURSOR"]
            if matches(text):
                # systemd's own messages about a unit have it in UNIT.
                unit = (found.get("UNIT") or found.get("_SYSTEMD_UNIT") or "").removesuffix(".service")
                entries.append({"time": int(found["__REALTIME_TIMESTAMP"]) / 1e6, "unit": unit, "text": text})
    return entries, cursor


def access_lines(log: Path, start: float, position: dict[str, Any]) -> tuple[Iterator[str], dict[str, Any]]:
    """Return the access log's lines since a time or a position, and the position of its end.

    Args:
        log: The current file; rotated ones are beside it.
        start: Time of the oldest line; it only decides which files are read.
        position: Inode and offset up to which the log was read; empty at first.
    """
    try:
        state = log.stat()
    except OSError:
        return iter(()), position
    end = {"inode": state.st_ino, "offset": state.st_size}
    if not position:
        rotated = sorted(log.parent.glob(f"{log.name}.*"), key=lambda path: path.stat().st_mtime)
        wanted = [(path, 0) for path in [*rotated, log] if path.stat().st_mtime >= start]
    elif position["inode"] == state.st_ino:
        wanted = [(log, position["offset"] if position["offset"] <= state.st_size else 0)]
    else:
        # Rotated since: the rest of the former file, and the new one.
        former = [
            path for path in log.parent.glob(f"{log.name}.*") if path.stat().st_ino == position["inode"]
        ]
        wanted = [*((path, position["offset"]) for path in former), (log, 0)]
    return (line for path, offset in wanted for line in file_lines(path, offset)), end


def file_lines(path: Path, offset: int) -> Iterator[str]:
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
        file.seek(offset)
        for line in file:
            yield line.decode(errors="replace").rstrip("\n")


def access_entries(lines: Iterable[str], start: float, matches: Callable[[str], bool]) -> Iterator[Entry]:
    """Parse lines of the access log; yield those that match and are not older than `start`."""
    for line in lines:
        found = TIME_FIELD.search(line)
        if found and matches(line):
            moment = datetime.datetime.fromisoformat(found[1]).timestamp()
            if moment >= start:
                yield {"time": moment, "unit": "nginx", "text": line}


def read(option: dict[str, Any], start: float) -> dict[str, Any]:
    """Read the logs.

    Args:
        option: The module's options.
        start: Time of the oldest line, in seconds since 1970. That of the first run holds for those that
            follow it, or lines would be lost between two runs that lie further apart than `since`.
    """
    matches = matcher(option)
    position = option["position"]
    start = position.get("start", start)
    done = subprocess.run(journal_command(option, start), text=True, capture_output=True, check=False)
    entries, cursor = journal_entries(done.stdout.splitlines(), matches)
    result = {"start": start, "cursor": cursor or position.get("cursor", "")}
    if option["unit"] in ("", "nginx"):
        lines, end = access_lines(ACCESS_LOG, start, position.get("access", {}))
        latest = deque(access_entries(lines, start, matches), maxlen=option["lines"])
        entries = list(heapq.merge(entries, latest, key=lambda entry: entry["time"]))
        result["access"] = end
    return {"entries": entries[-option["lines"] :], "position": result}


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "unit": {"default": ""},
            "status": {"default": ""},
            "id": {"default": ""},
            "since": {"default": "10m"},
            "lines": {"type": "int", "default": 500},
            "follow": {"type": "bool", "default": False},
            "seconds": {"type": "float", "default": 0},
            "position": {"type": "dict", "default": {}},
        },
        supports_check_mode=True,
    )
    option = module.params
    os.environ["LC_ALL"] = "C.UTF-8"
    for name, pattern, example in (
        ("status", STATUS, "503, 5xx or 4xx"),
        ("id", REQUEST_ID, "the X-Request-ID of an answer"),
        ("unit", UNIT, "pixel, nginx or redis-server"),
    ):
        if option[name] and not pattern.fullmatch(option[name]):
            module.fail_json(msg=f"{name} '{option[name]}' is invalid: {example}.")
    try:
        start = oldest(option["since"], time.time())
    except ValueError:
        module.fail_json(msg=f"since '{option['since']}' is invalid: 30s, 10m, 2h, 1day or 2026-11-27T20:00.")
    module.exit_json(changed=False, **read(option, start))


if __name__ == "__main__":
    main()
