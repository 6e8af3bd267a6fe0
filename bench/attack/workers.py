"""The services under attack: memory of their workers, slow flushes of their Redis."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from bench.drill.faults import WORKERS
from bench.drill.hosts import Fleet
from bench.load.disk import Flush

Memory = dict[str, int]  # bytes by worker
PAGE = os.sysconf("SC_PAGE_SIZE")


class Service(Protocol):
    """A service under attack."""

    async def memory(self) -> Memory:
        """Returns the memory of each worker."""

    async def slow_flushes(self) -> Sequence[Flush]:
        """Returns slow flushes; they delay writes independently of the attack."""


class OneInstance:
    """One Gunicorn master on this machine."""

    def __init__(self, master: int) -> None:
        self._children = Path(f"/proc/{master}/task/{master}/children")

    async def memory(self) -> Memory:
        """Returns the memory of each worker. Raises OSError if the master does not exist."""
        return {pid: _resident(pid) for pid in self._children.read_text().split()}

    async def slow_flushes(self) -> Sequence[Flush]:
        """Returns nothing: flushes are not recorded here."""
        return ()


def _resident(pid: str) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * PAGE


class LocalFleet:
    """The local fleet with all its hosts."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet

    async def memory(self) -> Memory:
        """Returns the memory of each worker. Raises FleetError if a host can't be reached."""
        script = f'{WORKERS}; for worker; do echo "$worker $(cut -d " " -f 2 "/proc/$worker/statm")"; done'
        return {
            f"{host}/{pid}": int(pages) * PAGE
            for host in self._fleet.addresses
            for pid, pages in map(str.split, (await self._fleet.ssh(host, script)).splitlines())
        }

    async def slow_flushes(self) -> Sequence[Flush]:
        """Returns the flushes that Redis has recorded."""
        return await self._fleet.slow_flushes()
