"""How crashes are counted, and how the service backs off."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pixel import crashes


@pytest.fixture
def clock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time since boot, to be set; and a runtime directory."""
    monkeypatch.setenv("RUNTIME_DIRECTORY", f"{tmp_path}:{tmp_path / 'metrics'}")
    now = [1000.0]
    monkeypatch.setattr(crashes.time, "monotonic", lambda: now[0])
    return now


def test_restart_delays_grow_and_old_crashes_expire(clock: list[float]) -> None:
    assert crashes.lately() == 0
    delays = []
    for _ in range(12):
        delays.append(crashes.note())
        clock[0] += 1
    assert delays == [0, 0, 0, 0, 0, 1, 2, 4, 8, 10, 10, 10]
    assert crashes.lately() == 12
    clock[0] += 60
    assert crashes.note() == 0
    clock[0] += 599
    assert crashes.lately() == 1
    clock[0] += 2
    assert crashes.lately() == 0


def test_without_a_runtime_directory_nothing_is_counted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("RUNTIME_DIRECTORY", raising=False)
    assert crashes.note() == 0
    assert crashes.lately() == 0


@pytest.mark.parametrize(("result", "noted"), [("success", 0), ("signal", 1), ("oom-kill", 1)])
def test_a_requested_stop_is_not_a_crash(tmp_path: Path, result: str, noted: int) -> None:
    env = os.environ | {
        "PYTHONPATH": str(Path(crashes.__file__).parents[1]),
        "RUNTIME_DIRECTORY": str(tmp_path),
        "SERVICE_RESULT": result,
    }
    subprocess.run([sys.executable, "-m", "pixel.crashes"], env=env, check=True)
    file = tmp_path / "crashes"
    assert (len(file.read_text().split()) if file.exists() else 0) == noted
