#!/usr/bin/python3
"""The balancer's controller at work: it looks at the backends, and keeps their shares up to date.

    watch.py            run until stopped (pixel-lb.service does)
    watch.py --dry-run  print what would be decided, and change nothing

Every `interval` seconds each backend is asked for `/readyz`, and for `/metrics`, which has the host's
CPU counters. Latency is read from Nginx' access log: what a client
waits for includes the time that a request lies in a throttled host's socket, of which the app
doesn't know. Where the inventory says so, `credits.py` asks CloudWatch every five minutes what CPU
credits the hosts have left. What is thought and why is written to `status.json`, which Nginx serves
as `/lb/status`.

Whatever goes wrong here, Nginx keeps the last configuration that was good.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import math
import os
import re
import socket
import subprocess
import sys
import time
from collections import defaultdict
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from controller import Controller, Cpu, Credits, Sample, Settings, Share
from pixel_lb import Balancer, Refused, alone, replace

# At most so much of the log is read at a time; of more, only the end, which stands for the rest.
LOG_BYTES = 128 * 1024
ANSWER_BYTES = 1024 * 1024
# A pixel's request is always the same work; a picture, a stream or a batch is not.
PIXEL_LINE = re.compile(
    rb'"uri":"/(?:cluster/[^/"]+/)?pixel[/?"][^\n]*?"upstream":"([^"]+)"[^\n]*?"upstream_seconds":"([^"]+)"'
)
CPU_LINE = re.compile(r'^pixel_host_cpu_seconds_total\{mode="(\w+)"\} (\S+)$', re.M)
# How often credits are counted, and how long an answer may take.
CREDIT_SECONDS = 300.0
CREDIT_TIMEOUT = 60.0
# One request that took long must not speak for all.
MOST_SECONDS = 1.0


class UnixConnection(http.client.HTTPConnection):
    """HTTP over a unix socket."""

    def __init__(self, path: str, timeout: float) -> None:
        super().__init__("localhost", timeout=timeout)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


def look(address: str, timeout: float) -> Sample:
    """Ask a backend, `unix:/path` or `a.b.c.d:port`, how it is."""
    connection: http.client.HTTPConnection
    if address.startswith("unix:"):
        connection = UnixConnection(address.removeprefix("unix:"), timeout)
    else:
        connection = http.client.HTTPConnection(address, timeout=timeout)
    cpu = None
    try:
        status, _ = _get(connection, "/readyz")
        if status != 200:
            return Sample(time.monotonic(), False, f"/readyz answers {status}")
        # It is ready, whatever becomes of this; that there is no word of its CPU is seen by itself.
        with contextlib.suppress(OSError, http.client.HTTPException, ValueError):
            status, body = _get(connection, "/metrics")
            modes = {mode: float(seconds) for mode, seconds in CPU_LINE.findall(body.decode())}
            cpu = Cpu.of_modes(modes) if status == 200 and modes else None
    except TimeoutError:
        return Sample(time.monotonic(), False, f"/readyz has no answer within {timeout:g} s")
    except (OSError, http.client.HTTPException, ValueError) as error:
        return Sample(time.monotonic(), False, f"/readyz can't be asked: {error or type(error).__name__}")
    finally:
        connection.close()
    return Sample(time.monotonic(), True, cpu=cpu)


def _get(connection: http.client.HTTPConnection, path: str) -> tuple[int, bytes]:
    connection.request("GET", path)
    answer = connection.getresponse()
    return answer.status, answer.read(ANSWER_BYTES)


class LogTail:
    """The access log's new lines, also after it was rotated."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._inode = 0
        self._offset = 0

    def read(self) -> dict[str, tuple[float, float]]:
        """Requests for pixels since the last call: how many, and seconds together, by backend."""
        try:
            with self._path.open("rb") as log:
                facts = os.fstat(log.fileno())
                if self._inode == 0:
                    self._offset = facts.st_size  # What was before us is no news.
                elif facts.st_ino != self._inode or facts.st_size < self._offset:
                    self._offset = 0
                self._inode = facts.st_ino
                new = facts.st_size - self._offset
                log.seek(facts.st_size - min(new, LOG_BYTES))
                text = log.read(min(new, LOG_BYTES))
                self._offset = facts.st_size
        except OSError:
            return {}
        return requests_of(text, new / len(text) if text else 0.0)


def requests_of(lines: bytes, times: float = 1.0) -> dict[str, tuple[float, float]]:
    """Counts and seconds by backend; each line stands for `times` as many."""
    counts: dict[str, float] = defaultdict(float)
    seconds: dict[str, float] = defaultdict(float)
    for upstreams, took in PIXEL_LINE.findall(lines):
        # A request that was sent to a second backend has both: "a, b" and "2.001, 0.004".
        for address, text in zip(upstreams.decode().split(", "), took.decode().split(", "), strict=False):
            if text != "-":
                counts[address] += times
                seconds[address] += min(float(text), MOST_SECONDS) * times
    return {address: (counts[address], seconds[address]) for address in counts}


class Watch:
    """The loop around a controller."""

    def __init__(self, balancer: Balancer, dry_run: bool) -> None:
        self.balancer = balancer
        self.dry_run = dry_run
        self.spec: dict[str, Any] = {}
        self.addresses: dict[str, str] = {}
        self.names: dict[str, str] = {}
        self.read_spec: tuple[int, int] | None = None
        self.controller = Controller(Settings(), time.monotonic())
        self.log: LogTail | None = None
        self.failed_at = 0.0
        self.error = ""
        self.asked: Future[subprocess.CompletedProcess[str]] | None = None
        self.asked_at = -math.inf

    def run(self) -> None:
        with ThreadPoolExecutor(32) as pool:
            while True:
                began = time.monotonic()
                try:
                    self.tick(pool)
                except (OSError, ValueError, KeyError) as error:
                    self.say(f"nothing is changed: {error!r}")
                time.sleep(max(0.1, began + self.spec.get("interval", 2) - time.monotonic()))

    def tick(self, pool: ThreadPoolExecutor) -> None:
        self.learn()
        backends = list(self.controller.backends.values())
        looks = pool.map(lambda each: look(self.addresses[each.name], self.spec["timeout"]), backends)
        for backend, sample in zip(backends, looks, strict=True):
            self.controller.see(backend.name, sample)
        now = time.monotonic()
        if self.spec.get("credits"):
            self.ask_credits(pool, now)
        for address, (count, seconds) in (self.log.read() if self.log else {}).items():
            self.controller.see_requests(now, self.names.get(address, ""), count, seconds)
        shares = self.controller.decide(now, self.balancer.drained())
        while self.controller.notes:
            self.say(self.controller.notes.pop(0))
        if shares is None:
            self.error = ""  # What could not be put in force is no longer wanted.
        else:
            self.put_in_force(shares)
        self.write_status()

    def learn(self) -> None:
        """Read backends.json, if it is new; Ansible writes it."""
        facts = (self.balancer.nginx / "pixel" / "backends.json").stat()
        if self.read_spec == (facts.st_mtime_ns, facts.st_ino):
            return
        backends = self.balancer.backends(self.balancer.nginx)
        self.spec = backends["watch"]
        servers = backends["upstreams"]["pixel"]["servers"]
        self.addresses = {each["name"]: each["address"] for each in servers}
        # On a ring, a server may have another address.
        everywhere = (each for upstream in backends["upstreams"].values() for each in upstream["servers"])
        self.names = {each["address"]: each["name"] for each in everywhere}
        settings = {name: self.spec[name] for name in Settings.__dataclass_fields__ if name in self.spec}
        hosts = {each["name"]: each["host"] for each in servers}
        self.controller.know(hosts, self.balancer.shares(), Settings(**settings))
        # Whom to ask may be new.
        self.controller.see_credits({})
        self.asked_at = -math.inf
        self.log = LogTail(Path(self.spec["log"])) if self.spec["log"] else None
        self.read_spec = (facts.st_mtime_ns, facts.st_ino)

    def ask_credits(self, pool: ThreadPoolExecutor, now: float) -> None:
        """Hear what CloudWatch has answered by now, and ask anew when it is time. Nobody waits for it."""
        hosts = self.spec["credits"]["hosts"]
        if self.asked and self.asked.done():
            answer, self.asked = self.asked, None
            try:
                done = answer.result()
                if done.returncode != 0:
                    raise OSError((done.stderr.strip() or str(done.returncode)).splitlines()[-1])
                found = json.loads(done.stdout)
            except (OSError, ValueError, subprocess.TimeoutExpired) as error:
                self.say(f"no word of CPU credits: {error}")
                return
            known = {}
            for name, host in hosts.items():
                if host["instance"] in found:
                    until, balance = found[host["instance"]]
                    at = now - max(0.0, time.time() - until)
                    known[name] = Credits(at, balance, host["processors"], host["baseline"])
            self.controller.see_credits(known)
        elif not self.asked and now - self.asked_at >= CREDIT_SECONDS:
            self.asked_at = now
            command = [sys.executable, str(Path(__file__).resolve().with_name("credits.py"))]
            command += [self.spec["credits"]["region"], *(host["instance"] for host in hosts.values())]
            self.asked = pool.submit(
                subprocess.run, command, capture_output=True, text=True, timeout=CREDIT_TIMEOUT, check=False
            )

    def put_in_force(self, shares: dict[str, Share]) -> None:
        now = time.monotonic()
        if now - self.failed_at < self.controller.settings.reload_interval and self.error:
            return
        words = ", ".join(self.words(name, share) for name, share in shares.items())
        if self.dry_run:
            self.say(f"would give {words}")
        else:
            try:
                with alone(self.balancer.lock):
                    self.balancer.give(shares)
            except (OSError, Refused) as error:
                self.failed_at, self.error = now, str(error)
                self.say(f"the last good configuration stays: {error}")
                return
            self.say(f"gave {words}")
        self.error = ""
        self.controller.wrote(time.monotonic(), shares)

    def words(self, name: str, share: Share) -> str:
        backend = self.controller.backends[name]
        part = "nothing" if share.down else f"{share.factor:.0%}"
        return f"{name} {part} ({self.controller.explain(backend, time.monotonic())})"

    def write_status(self) -> None:
        if self.dry_run:
            return
        drained = self.balancer.drained()
        report = self.controller.report(time.monotonic())
        for each in report:
            if each["host"] in drained:
                each["why"] = "taken out by hand; " + each["why"]
        status = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "weights": self.spec["weights"],
            "method": self.spec["method"],
            "health_checks": self.controller.settings.health,
            "alarm": "no backend is ready; none more is taken out" if self.controller.open else "",
            "error": self.error,
            "drained": drained,
            "backends": report,
        }
        replace(self.balancer.status_file, json.dumps(status, indent=1).encode())

    def say(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(prog="pixel-lb watch", description="The balancer's controller.")
    parser.add_argument("--dry-run", action="store_true", help="say what it would do, and do nothing")
    options = parser.parse_args()
    Watch(Balancer(), options.dry_run).run()


if __name__ == "__main__":
    main()
