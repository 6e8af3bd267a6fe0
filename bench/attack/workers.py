"""The app's workers: which there are, and how much memory each has."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Protocol

from bench.drill.faults import WORKERS
from bench.drill.hosts import Fleet

Memory = dict[str, int]  # by worker, in bytes
PAGE = os.sysconf("SC_PAGE_SIZE")


class Workers(Protocol):
    """Where they are asked for."""

    async def memory(self) -> Memory: ...


class OfMaster:
    """The workers of one Gunicorn on this machine."""

    def __init__(self, master: int) -> None:
        self._children = Path(f"/proc/{master}/task/{master}/children")

    async def memory(self) -> Memory:
        """What each has in memory. Raises OSError if the master is gone."""
        return {pid: _resident(pid) for pid in self._children.read_text().split()}


def _resident(pid: str) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * PAGE


class OfFleet:
    """The workers of all hosts of the local fleet."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet

    async def memory(self) -> Memory:
        """What each has in memory. Raises FleetError if a host can't be asked."""
        script = f'{WORKERS}; for worker; do echo "$worker $(cut -d " " -f 2 "/proc/$worker/statm")"; done'
        return {
            f"{host}/{pid}": int(pages) * PAGE
            for host in self._fleet.addresses
            for pid, pages in map(str.split, (await self._fleet.ssh(host, script)).splitlines())
        }
