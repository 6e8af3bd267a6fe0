"""The health probe: one backend's readiness and its host's CPU counters."""

from __future__ import annotations

import contextlib
import http.client
import re
import socket
import time

from pixel_lb.controller import Cpu, Sample

# Limit of an answer's size.
ANSWER_BYTES = 1024 * 1024
CPU_LINE = re.compile(r'^pixel_host_cpu_seconds_total\{mode="(\w+)"\} (\S+)$', re.M)


class UnixConnection(http.client.HTTPConnection):
    """HTTP over a Unix socket."""

    def __init__(self, path: str, timeout: float) -> None:
        super().__init__("localhost", timeout=timeout)
        self._path = path

    def connect(self) -> None:
        """Connect to the socket."""
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


def probe(address: str, timeout: float) -> Sample:
    """GET `/readyz` from a backend, and `/metrics` if it is ready.

    Args:
        address: `unix:/path` or `a.b.c.d:port`.
        timeout: Seconds that each step may take.

    Returns:
        Whether the backend is ready, or the reason if not, and its host's CPU counters if they are known.
    """
    connection: http.client.HTTPConnection
    if address.startswith("unix:"):
        connection = UnixConnection(address.removeprefix("unix:"), timeout)
    else:
        connection = http.client.HTTPConnection(address, timeout=timeout)
    cpu = None
    try:
        status, _ = _get(connection, "/readyz")
        if status != 200:
            return Sample(time.monotonic(), False, f"/readyz returned {status}")
        # A failure from here on does not affect readiness; the controller handles missing CPU data.
        with contextlib.suppress(OSError, http.client.HTTPException, ValueError):
            status, body = _get(connection, "/metrics")
            modes = {mode: float(seconds) for mode, seconds in CPU_LINE.findall(body.decode())}
            cpu = Cpu.of_modes(modes) if status == 200 and modes else None
    except TimeoutError:
        return Sample(time.monotonic(), False, f"/readyz timed out after {timeout:g} s")
    except (OSError, http.client.HTTPException, ValueError) as error:
        return Sample(time.monotonic(), False, f"/readyz request failed: {error or type(error).__name__}")
    finally:
        connection.close()
    return Sample(time.monotonic(), True, cpu=cpu)


def _get(connection: http.client.HTTPConnection, path: str) -> tuple[int, bytes]:
    connection.request("GET", path)
    answer = connection.getresponse()
    return answer.status, answer.read(ANSWER_BYTES)
