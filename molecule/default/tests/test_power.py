"""A reboot and a power cut of every host: all services recover without an operator."""

from __future__ import annotations

import json
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[3]


def power(host: str, state: str) -> None:
    subprocess.run([sys.executable, str(ROOT / "fleet/fleet.py"), "power", host, state], check=True)


def ask(url: str, body: dict[str, Any] | None = None) -> tuple[str, Any]:
    request = urllib.request.Request(
        url,
        data=json.dumps(body).encode() if body else None,
        headers={"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=5) as answer:
        return answer.headers["X-Pixel-Instance"], json.loads(answer.read())


@pytest.mark.parametrize("name", ["c5", "t2"])
@pytest.mark.parametrize("states", [("reboot",), ("off", "on")], ids=["reboot", "power cut"])
def test_services_recover_by_themselves(fleet: dict[str, Any], name: str, states: tuple[str, ...]) -> None:
    url = fleet["url"]
    # The value differs from the current one, so a lost write is detected.
    value = (ask(f"{url}/pixel/1/2")[1]["G"] + 1) % 256
    ask(f"{url}/pixel", {"x": 1, "y": 2, "channel": "G", "value": value})
    for state in states:
        power(name, state)
    deadline = time.monotonic() + 60
    answered: set[str] = set()
    while answered != {"c5", "t2"} and time.monotonic() < deadline:
        try:
            instance, pixel = ask(f"{url}/pixel/1/2")
        except OSError:
            time.sleep(0.5)
            continue
        assert pixel["G"] == value
        answered.add(instance)
    assert answered == {"c5", "t2"}
    ask(f"{url}/pixel", {"x": 1, "y": 3, "channel": "G", "value": value})
