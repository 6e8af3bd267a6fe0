"""Releases under requests: a good one, a bad one, the way back, and two operators at once."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[3]

testinfra_hosts = ["c5"]


def play(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["ansible-playbook", f"playbooks/{name}.yml", *arguments],
        cwd=ROOT,
        text=True,
        capture_output=True,
        check=False,
    )


@pytest.fixture
def releases(client: Any) -> Any:
    """What both hosts say that they run."""
    return lambda: {host: client.read_from(host, "/ping")["release"] for host in ("c5", "t2")}


@contextmanager
def requests(fleet: dict[str, Any], tmp_path: Path) -> Iterator[None]:
    """A constant rate of writes meanwhile, none of which may fail or be lost."""
    report = tmp_path / "load.json"
    load = subprocess.Popen(
        [
            *(sys.executable, str(ROOT / "bench" / "load.py"), "--url", fleet["url"], "--strict"),
            *("--rate", "200", "--seconds", "900", "--json", str(report)),
        ],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        yield
    finally:
        # It ends the sending, reads the canvas and judges, as after its time.
        load.send_signal(2)
        output, _ = load.communicate(timeout=60)
    assert load.returncode == 0, output
    assert re.search(r"failed +0\b", output), output


def test_a_deploy_a_bad_one_and_a_rollback_fail_no_request(
    host: Any, fleet: dict[str, Any], releases: Any, tmp_path: Path
) -> None:
    before = releases()
    assert len(set(before.values())) == 1
    broken = tmp_path / "app"
    shutil.copytree(ROOT / "app", broken, ignore=shutil.ignore_patterns(".*", "__pycache__"))
    health = broken / "src/pixel/routes/health.py"
    text = health.read_text()
    start = text.index("async def readyz")
    body = text.index(":\n", text.index(")", start)) + 2
    health.write_text(text[:body] + '    raise RuntimeError("broken for a test")\n' + text[body:])

    with requests(fleet, tmp_path):
        good = play("pixel_app", "-e", "pixel_app_release=next")
        after_good = releases()
        arguments = ("-e", f"pixel_app_source={broken}", "-e", "pixel_app_ready_timeout=5")
        bad = play("pixel_app", *arguments, "-e", "pixel_app_release=broken")
        after_bad = releases()
        again = play("pixel_app", *arguments, "-e", "pixel_app_release=broken")
        back = play("rollback")
        after_back = releases()

    assert good.returncode == 0, good.stdout
    assert set(after_good.values()) == {"next"}
    assert bad.returncode != 0
    assert "Release broken failed when it was tried on" in bad.stdout
    assert set(after_bad.values()) == {"next"}
    assert again.returncode != 0
    assert "Release broken failed on" in again.stdout
    assert back.returncode == 0, back.stdout
    assert after_back == before
    # What the rollback undid is not what the sources say.
    assert play("status").returncode == 0


def test_a_second_operator_is_told_of_the_first(host: Any, shell: Any) -> None:
    holder = {"node": "elsewhere", "user": "somebody", "process": "42", "since": "2026-01-01T00:00:00Z"}
    shell(f"cat >/run/pixel-deploy.lock <<'END'\n{json.dumps(holder)}\nEND\n")
    try:
        refused = play("pixel_app")
        assert refused.returncode != 0
        words = " ".join(refused.stdout.split())
        assert "somebody on elsewhere (process 42) has been deploying since 2026-01-01T00:00:00Z" in words
        shell("touch -d '1 hour ago' /run/pixel-deploy.lock")
        assert play("pixel_app").returncode == 0
        assert not host.file("/run/pixel-deploy.lock").exists
    finally:
        shell("rm -f /run/pixel-deploy.lock")


def test_a_host_is_drained_and_returned_by_name(client: Any, host: Any) -> None:
    assert play("drain", "-e", "host=t2").returncode == 0
    assert {client.ask("/ping")[1]["X-Pixel-Instance"] for _ in range(20)} == {"c5"}
    assert play("drain", "-e", "host=c5").returncode != 0
    assert play("undrain", "-e", "host=t2").returncode == 0
    assert {client.ask("/ping")[1]["X-Pixel-Instance"] for _ in range(20)} == {"c5", "t2"}
    wrong = play("drain", "-e", "host=t3")
    assert "Name one of c5, t2" in wrong.stdout
