"""Calibration: measure a host, and use the result for weights."""

from __future__ import annotations

import datetime
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[3]

testinfra_hosts = ["c5"]

P99_MS = 250


@pytest.fixture
def inventory_copy(tmp_path: Path) -> Path:
    """A copy of the inventory that the playbook may write to."""
    copy = tmp_path / "inventory"
    shutil.copytree(ROOT / "inventory" / "local", copy)
    return copy


@pytest.fixture
def throttled() -> Iterator[None]:
    """Limit t2's CPU, so that it saturates long before the load generator does.

    The quota is granted in periods of 100 ms, hence the high limit for p99.
    """

    def cpus(number: str) -> None:
        fleet = str(ROOT / "fleet" / "fleet.py")
        subprocess.run([sys.executable, fleet, "cpus", "t2", number], check=True, env=os.environ)

    cpus("0.2")
    yield
    cpus("all")


def test_a_host_is_measured_and_then_undrained(
    host: Any, play: Any, client: Any, inventory_copy: Path, throttled: None
) -> None:
    done = play("playbooks/calibrate.yml", hosts=str(inventory_copy), host="t2", seconds=1, p99=P99_MS)
    assert done.returncode == 0, done.stdout + done.stderr
    written = yaml.safe_load((inventory_copy / "host_vars" / "t2" / "measured.yml").read_text())
    measured = written["nginx_lb_measured"]
    # Fewer than the highest rate that is tried.
    assert 50 < measured["requests_per_second"] < 20_000
    assert 0 < measured["p99_ms"] <= P99_MS
    assert measured["date"] == datetime.datetime.now(datetime.UTC).date().isoformat()
    assert f"t2 {measured['requests_per_second']} {measured['p99_ms']} 100 150" in done.words
    # The host is back in the upstream, and the measurement left nothing behind.
    assert client.read_from("t2", "/ping")["instance"] == "t2"
    assert host.run("systemctl list-timers --all | grep undrain").stdout == ""
    assert not host.file("/var/tmp/pixel-calibrate").exists
    # Measured weights need the figures of all hosts.
    refused = play("playbooks/nginx_lb.yml", hosts=str(inventory_copy), nginx_lb_weights="measured")
    assert refused.returncode != 0
    assert "run playbooks/calibrate.yml" in refused.words


def test_measuring_the_last_active_host_is_refused(host: Any, play: Any, inventory_copy: Path) -> None:
    assert play("playbooks/drain.yml", host="c5").returncode == 0
    try:
        refused = play("playbooks/calibrate.yml", hosts=str(inventory_copy), host="t2")
    finally:
        assert play("playbooks/undrain.yml", host="c5").returncode == 0
    assert refused.returncode != 0
    assert "t2 is the last host that takes requests" in refused.words
    assert not (inventory_copy / "host_vars").exists()
