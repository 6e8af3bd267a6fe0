from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from bench.compare import processes
from bench.compare.processes import Program, StartError, free_port, wait_for_port

BUSY_WITH_A_CHILD = """
import os, time
os.fork()
end = time.process_time() + 0.2
while time.process_time() < end: pass
time.sleep(60)
"""
STUBBORN_WITH_A_CHILD = """
import os, signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
os.fork()
time.sleep(60)
"""


@contextlib.contextmanager
def python(code: str, log: Path) -> Iterator[Program]:
    first = min(os.sched_getaffinity(0))
    program = Program("snake", [sys.executable, "-c", code], [first], log / "log")
    try:
        yield program
    finally:
        program.stop()


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def alive(pid: int) -> bool:
    """Returns whether a process runs and is not a zombie."""
    try:
        return " Z " not in Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return False


def test_children_are_counted_and_pinned(tmp_path: Path) -> None:
    with python(BUSY_WITH_A_CHILD, tmp_path) as program:
        wait_until(lambda: program.cpu_seconds() >= 0.35)
        pids = program.pids()
        assert len(pids) == 2
        assert program.workers() == pids[1:]
        assert {len(os.sched_getaffinity(pid)) for pid in pids} == {1}
        (memory,) = program.memory()
        assert 0 < memory.pss < memory.rss < 100
        assert program.cpu_seconds() < 1


def test_processes_that_ignore_sigterm_are_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "GRACE_SECONDS", 0.3)
    with python(STUBBORN_WITH_A_CHILD, tmp_path) as program:
        wait_until(lambda: len(program.pids()) == 2)
        pids = program.pids()
    wait_until(lambda: not any(map(alive, pids)))
    assert os.getpid() not in pids


def test_the_error_of_a_failed_program_contains_its_output(tmp_path: Path) -> None:
    with (
        python("raise SystemExit('no such thing')", tmp_path) as program,
        pytest.raises(StartError, match=r"snake did not start:\nno such thing"),
    ):
        wait_for_port(program, free_port())


def test_a_program_that_listens_is_ready(tmp_path: Path) -> None:
    port = free_port()
    code = f"import socket, time; s = socket.create_server(('127.0.0.1', {port})); time.sleep(60)"
    with python(code, tmp_path) as program:
        wait_for_port(program, port)
        assert program.running()
    assert not program.running()
