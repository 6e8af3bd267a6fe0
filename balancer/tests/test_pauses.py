"""The record of a host's pauses."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from pixel_lb import pauses
from pixel_lb.files import Paths
from pixel_lb.pauses import PAUSE, SETTLE, PauseRecord


def read(path: Path) -> tuple[float, float]:
    since, updated = map(float, path.read_text().split())
    return since, updated


def test_a_long_time_between_two_updates_is_a_pause(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 5000.0
    monkeypatch.setattr(time, "clock_gettime", lambda _: now)
    monkeypatch.setattr(time, "time", lambda: now + 10**9)
    record = PauseRecord(tmp_path / "pauses")
    for _ in range(10):
        now += PAUSE - 0.05
        record.update()
        assert read(tmp_path / "pauses") == pytest.approx((0, now + 10**9))
    now += PAUSE + 0.05
    record.update()
    ended = now + 10**9 + SETTLE
    assert read(tmp_path / "pauses")[0] == pytest.approx(ended)
    now += 0.2
    record.update()
    assert read(tmp_path / "pauses") == pytest.approx((ended, now + 10**9))


def test_a_process_that_is_stopped_records_it(tmp_path: Path) -> None:
    program = (
        "import sys, time; from pathlib import Path; from pixel_lb.pauses import PauseRecord;"
        "PauseRecord(Path(sys.argv[1])).start(); time.sleep(60)"
    )
    path = Paths(run=tmp_path).pauses
    environment = os.environ | {"PYTHONPATH": str(Path(pauses.__file__).parents[1])}
    with subprocess.Popen([sys.executable, "-c", program, str(path)], env=environment) as running:
        try:
            deadline = time.monotonic() + 10
            while not path.exists():
                assert time.monotonic() < deadline
                time.sleep(0.05)
            os.kill(running.pid, signal.SIGSTOP)
            time.sleep(1.5)
            stopped = read(path)
            resumed = time.time()
            os.kill(running.pid, signal.SIGCONT)
            time.sleep(0.5)
            since, updated = read(path)
        finally:
            running.kill()
    assert resumed - stopped[1] > 1.2
    assert since == pytest.approx(resumed + SETTLE, abs=0.4)
    assert updated > resumed
