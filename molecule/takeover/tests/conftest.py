"""Clients of the address, and the balancer that holds it."""

from __future__ import annotations

import http.client
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[3]
BALANCERS = ("debian12", "debian13")
WRITES_PER_SECOND = 10
# The address has moved to a host that answers within this many seconds.
MOVED_SECONDS = 3.0


class Write(NamedTuple):
    """When a write began, and its status; 0 if there was no answer."""

    began: float
    status: int


class Clients:
    """Clients that write to the address at a constant rate, each over a new connection."""

    def __init__(self, ip: str) -> None:
        self._ip = ip
        self._pending: list[Future[Write]] = []
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Clients:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        self._thread.join()

    def _run(self) -> None:
        with ThreadPoolExecutor(64) as pool:
            while not self._stopping.wait(1 / WRITES_PER_SECOND):
                self._pending.append(pool.submit(self._write))

    def _write(self) -> Write:
        began = time.time()
        connection = http.client.HTTPConnection(self._ip, timeout=0.5)
        try:
            connection.connect()
            # Nginx may try a dead app host first.
            connection.sock.settimeout(10)
            connection.request("POST", "/pixel", "{}")
            return Write(began, connection.getresponse().status)
        except (OSError, http.client.HTTPException):
            return Write(began, 0)
        finally:
            connection.close()

    def check(self, *events: float) -> None:
        """Assert that writes succeed again soon after each event, and that none failed at other times."""
        writes = [future.result() for future in self._pending]
        succeeded = sorted(write.began for write in writes if write.status == 200)
        failed = [write for write in writes if write.status != 200]
        for write in failed:
            assert any(event - 0.5 <= write.began <= event + MOVED_SECONDS for event in events), failed
        gap = max(later - earlier for earlier, later in pairwise(succeeded))
        assert gap < MOVED_SECONDS
        print(f"{len(succeeded)} writes succeeded, {len(failed)} failed; longest gap {gap:.1f} s")


@pytest.fixture
def clients(fleet: dict[str, Any]) -> Callable[[], Clients]:
    return lambda: Clients(fleet["address"].partition("/")[0])


@pytest.fixture
def status(hosts: dict[str, Any]) -> Callable[[str], dict[str, Any]]:
    """Return `pixel-lb status` of a balancer."""

    def ask(name: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(hosts[name].check_output("pixel-lb status"))
        return found

    return ask


@pytest.fixture
def holders(status: Any) -> Callable[..., list[str]]:
    """Return the balancers that hold the address."""
    return lambda *names: [name for name in names or BALANCERS if status(name)["address"]["held"]]


@pytest.fixture
def holder(holders: Any) -> str:
    """The balancer that holds the address when the test begins."""
    [name] = holders()
    return str(name)


@pytest.fixture
def other(holder: str) -> str:
    return next(name for name in BALANCERS if name != holder)


@pytest.fixture
def power(hosts: dict[str, Any]) -> Iterator[Callable[[str, str], None]]:
    """Power a host off or on; afterwards all are on and serve."""

    def switch(name: str, action: str) -> None:
        program = [sys.executable, str(ROOT / "fleet" / "fleet.py"), "power", name, action]
        subprocess.run(program, env=os.environ, check=True)

    off: set[str] = set()

    def run(name: str, action: str) -> None:
        switch(name, action)
        (off.add if action == "off" else off.discard)(name)

    yield run
    for name in off:
        switch(name, "on")
