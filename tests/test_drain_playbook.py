"""drain.yml and undrain.yml with a balancer that is down, or that serves but is unreachable for Ansible."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread

import pytest

ROOT = Path(__file__).resolve().parents[1]
Played = tuple[int, str]


@pytest.fixture
def drain(tmp_path: Path) -> Callable[..., Played]:
    """Run drain.yml. Balancer b0 has no SSH; b1 is this machine, with a stub for pixel-lb."""
    stub = tmp_path / "pixel-lb"
    stub.write_text("#!/bin/sh\necho changed\n")
    stub.chmod(0o755)
    shutil.copytree(ROOT / "playbooks", tmp_path / "playbooks", symlinks=True)
    tasks = tmp_path / "playbooks" / "tasks" / "balancers.yml"
    text = tasks.read_text().replace("/usr/local/sbin/pixel-lb", str(stub))
    # The pause between two attempts.
    tasks.write_text(text.replace("delay: 1\n", "delay: 0.1\n"))

    def run(*arguments: str, port: int = 9) -> Played:
        away = {"ansible_host": "127.0.0.1", "ansible_port": 9, "ansible_ssh_retries": 0}
        here = {"ansible_connection": "local", "ansible_python_interpreter": sys.executable}
        balancers = {
            "b0": away | {"private_address": "127.0.0.1", "nginx_lb_listen_port": port},
            "b1": here | {"private_address": "127.0.0.1"},
        }
        groups = {"nginx_lb": {"hosts": balancers}, "pixel_app": {"hosts": {"c5": {}, "t2": {}}}}
        (tmp_path / "hosts.json").write_text(json.dumps(groups))
        (tmp_path / "hosts.json").rename(tmp_path / "hosts.yml")
        playbook = Path(sys.prefix, "bin", "ansible-playbook")
        done = subprocess.run(
            [playbook, "-i", tmp_path / "hosts.yml", tmp_path / "playbooks" / "drain.yml", *arguments],
            env=os.environ | {"ANSIBLE_CONFIG": str(ROOT / "ansible.cfg"), "ANSIBLE_NOCOLOR": "1"},
            text=True,
            capture_output=True,
            check=False,
        )
        return done.returncode, " ".join((done.stdout + done.stderr).split())

    return run


def test_a_balancer_that_is_down_is_reported_without_an_error(drain: Callable[..., Played]) -> None:
    status, words = drain("-e", "host=t2")
    assert status == 0
    assert "t2: drain is in force on b1. b0 is down and was not changed: it adopts it" in words


class Peer(BaseHTTPRequestHandler):
    """A balancer that knows nothing at first, and has adopted the drain at the second request."""

    asked = 0

    def do_GET(self) -> None:
        Peer.asked += 1
        content = json.dumps({"t2": {"drained": True, "time": 7.0}} if Peer.asked > 1 else {}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


@contextmanager
def serving(handler: type[BaseHTTPRequestHandler]) -> Iterator[int]:
    """Serve on loopback; yield the port."""
    with HTTPServer(("127.0.0.1", 0), handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_port
        server.shutdown()


def test_an_unreachable_balancer_that_has_adopted_the_drain_is_no_error(drain: Callable[..., Played]) -> None:
    with serving(Peer) as port:
        status, words = drain("-e", "host=t2", port=port)
    assert status == 0
    assert "t2: drain is in force on b1, b0." in words


def test_an_unreachable_balancer_that_still_serves_is_an_error(drain: Callable[..., Played]) -> None:
    with serving(BaseHTTPRequestHandler) as port:
        status, words = drain("-e", "host=t2", port=port)
    assert status != 0
    assert "t2: drain is in force on b1. b0 serves requests, can" in words


def test_the_drain_fails_if_no_balancer_is_reachable(drain: Callable[..., Played]) -> None:
    status, words = drain("-e", "host=t2", "--limit", "b0")
    assert status != 0
    assert "No balancer could be reached; nothing was changed." in words


def test_the_error_for_an_unknown_host_repeats_its_name(drain: Callable[..., Played]) -> None:
    status, words = drain("-e", "host=t3")
    assert status != 0
    assert "There is no app host" in words
    assert "t3" in words
