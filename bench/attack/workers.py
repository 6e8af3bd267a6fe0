"""What is under attack: its workers with their memory, and the disk under its Redis."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from bench.drill.faults import WORKERS
from bench.drill.hosts import Fleet
from bench.load.disk import Flush

Memory = dict[str, int]  # by worker, in bytes
PAGE = os.sysconf("SC_PAGE_SIZE")


class Service(Protocol):
    """What an attack may harm."""

    async def memory(self) -> Memory:
        """What each worker has in memory."""

    async def slow_flushes(self) -> Sequence[Flush]:
        """Flushes that took long; a write that waits for one is late, whatever clients do."""


class OneInstance:
    """One Gunicorn on this machine."""

    def __init__(self, master: int) -> None:
        self._children = Path(f"/proc/{master}/task/{master}/children")

    async def memory(self) -> Memory:
        """What each has in memory. Raises OSError if the master is gone."""
        return {pid: _resident(pid) for pid in self._children.read_text().split()}

    async def slow_flushes(self) -> Sequence[Flush]:
        """Nobody records them."""
        return ()


def _resident(pid: str) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * PAGE


class LocalFleet:
    """The local fleet, with all its hosts."""

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

    async def slow_flushes(self) -> Sequence[Flush]:
        """What Redis has recorded."""
        return await self._fleet.slow_flushes()
