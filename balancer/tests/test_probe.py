"""The health probe."""

from __future__ import annotations

import socket
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from pixel_lb.controller import Cpu
from pixel_lb.probe import probe

MODES = ("user", "nice", "system", "idle", "iowait", "irq", "softirq", "steal")


class Standin(BaseHTTPRequestHandler):
    """A stub that answers /readyz and /metrics with these statuses; 0 closes the connection."""

    ready = 200
    metrics = 200

    def do_GET(self) -> None:
        if self.path == "/metrics" and self.metrics == 0:
            return
        cpu = "\n".join(f'pixel_host_cpu_seconds_total{{mode="{mode}"}} {n}' for n, mode in enumerate(MODES))
        content = f"# HELP x\n{cpu}\npixel_workers 4.0\n".encode() if self.path == "/metrics" else b"{}"
        self.send_response(self.ready if self.path == "/readyz" else self.metrics)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


def test_a_probe_returns_readiness_and_cpu_counters(monkeypatch: pytest.MonkeyPatch) -> None:
    with HTTPServer(("127.0.0.1", 0), Standin) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"127.0.0.1:{server.server_port}"
        seen = probe(address, 2)
        assert (seen.ready, seen.cpu) == (True, Cpu(busy=14, steal=7, total=28))
        for broken in (0, 500):
            monkeypatch.setattr(Standin, "metrics", broken)
            assert probe(address, 2)[1:] == (True, "", None)
        monkeypatch.setattr(Standin, "ready", 503)
        seen = probe(address, 2)
        assert (seen.ready, seen.why, seen.cpu) == (False, "/readyz returned 503", None)
        server.shutdown()
    assert "refused" in probe(address, 2).why
    with socket.create_server(("127.0.0.1", 0)) as silent:
        seen = probe(f"127.0.0.1:{silent.getsockname()[1]}", 0.1)
        assert seen.why == "/readyz timed out after 0.1 s"
    assert "No such file" in probe("unix:/nonexistent", 1).why
