"""Starts programs pinned to processors, and reads their CPU time and memory."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import subprocess
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")
GRACE_SECONDS = 5.0


class StartError(Exception):
    """A program ended, or did not become ready in time."""


class Memory(NamedTuple):
    """Memory of one process in MB: resident, and proportional (shared pages divided)."""

    rss: float
    pss: float


class Program:
    """A program in its own session, with all processes that it starts."""

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        processors: Iterable[int],
        log: Path,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.name = name
        self._log = log
        pinned = ["taskset", "--cpu-list", ",".join(map(str, sorted(processors))), *command]
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                pinned,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )

    def running(self) -> bool:
        return self._process.poll() is None

    def log_tail(self) -> str:
        """Returns the last lines of the program's output."""
        lines = self._log.read_text(errors="replace").splitlines()[-15:]
        return "\n".join(line[-500:] for line in lines)

    def pids(self) -> list[int]:
        """Returns the program's first process, then the others of its session."""
        leader = self._process.pid
        others = [
            pid
            for pid in (int(entry) for entry in os.listdir("/proc") if entry.isdigit())
            if pid != leader and _session(pid) == leader
        ]
        return [leader, *sorted(others)]

    def workers(self) -> list[int]:
        """Returns all processes except the first; the first if there are no others."""
        leader, *others = self.pids()
        return others or [leader]

    def cpu_seconds(self) -> float:
        """Returns the CPU time of all the program's processes, including ended ones."""
        return sum(map(_ticks, self.pids())) / TICKS_PER_SECOND

    def memory(self) -> list[Memory]:
        return [memory for pid in self.workers() if (memory := _memory(pid)) is not None]

    def stop(self) -> None:
        """Stops the session's processes: SIGTERM first, then SIGKILL."""
        leader = self._process.pid
        for number, patience in ((signal.SIGTERM, GRACE_SECONDS), (signal.SIGKILL, GRACE_SECONDS)):
            if self.running():
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(leader, number)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self._process.wait(patience)
        for pid in self.pids()[1:]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def _fields(pid: int) -> list[str]:
    """Returns the fields of /proc/PID/stat after the name, which may contain spaces."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return []


def _session(pid: int) -> int:
    fields = _fields(pid)
    return int(fields[3]) if fields else 0


def _ticks(pid: int) -> int:
    fields = _fields(pid)
    return sum(map(int, fields[11:15])) if fields else 0


def _memory(pid: int) -> Memory | None:
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
    except (FileNotFoundError, ProcessLookupError):
        return None
    sizes = {line.split(":")[0]: int(line.split()[1]) / 1024 for line in lines if "kB" in line}
    return Memory(sizes["Rss"], sizes["Pss"])


def free_port() -> int:
    """Return a port that no connection gets by itself before a program binds it: these begin at 32768."""
    while True:
        port = random.randrange(10_000, 32_000)  # noqa: S311 (no secret)
        with contextlib.suppress(OSError), socket.create_server(("", port)):
            return port


def wait_for_port(program: Program, port: int, seconds: float = 15.0) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if not program.running():
            break
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return
        time.sleep(0.02)
    raise StartError(f"{program.name} did not start:\n{program.log_tail()}")
