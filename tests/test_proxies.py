"""Requests to the fleet ignore the proxies of the environment."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
TASKS = sorted(path for place in ("roles", "playbooks") for path in (ROOT / place).rglob("*.yml"))
PROGRAMS = sorted(
    path
    for place in ("roles", "balancer", "fleet", "bench")
    for path in (ROOT / place).rglob("*.py")
    if "tests" not in path.parts
)


def requests(value: Any) -> Iterator[dict[str, Any]]:
    """The arguments of every uri task in a YAML document."""
    if isinstance(value, dict):
        if "ansible.builtin.uri" in value:
            yield value["ansible.builtin.uri"]
        value = list(value.values())
    if isinstance(value, list):
        for inner in value:
            yield from requests(inner)


@pytest.mark.parametrize("path", TASKS, ids=lambda path: str(path.relative_to(ROOT)))
def test_tasks_use_no_proxy(path: Path) -> None:
    to_fleet = [
        task for task in requests(yaml.safe_load(path.read_text())) if "amazonaws.com" not in task["url"]
    ]
    assert [task["url"] for task in to_fleet if task.get("use_proxy") is not False] == []


@pytest.mark.parametrize("path", PROGRAMS, ids=lambda path: str(path.relative_to(ROOT)))
def test_programs_do_not_use_urlopen_which_reads_the_environment(path: Path) -> None:
    assert "request.urlopen(" not in path.read_text()


class Ping(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("X-Pixel-Instance", "c5")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Print nothing."""


def test_pixel_lb_reaches_a_backend_despite_a_dead_proxy() -> None:
    with HTTPServer(("127.0.0.1", 0), Ping) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        program = f"from pixel_lb.drain import answering_instance; print(answering_instance('http://127.0.0.1:{server.server_port}/ping'))"
        environment = os.environ | {"http_proxy": "http://127.0.0.1:9", "no_proxy": ""}
        folder = ROOT / "balancer" / "src"
        done = subprocess.run(
            [sys.executable, "-c", program],
            cwd=folder,
            env=environment,
            text=True,
            capture_output=True,
            check=True,
        )
        server.shutdown()
    assert done.stdout.strip() == "c5"
