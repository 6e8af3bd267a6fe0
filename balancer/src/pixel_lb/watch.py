"""The controller's loop: probe the backends, decide, apply.

Every `interval` seconds the drains that other balancers know are adopted, and each backend is probed:
`/readyz`, and `/metrics` for its host's CPU counters. Latencies come from Nginx's access log, and CPU credits
from CloudWatch if configured. The report contains the measurements of each backend and the reason for its
share; Nginx serves it as `/lb/status`.

If anything fails here, Nginx keeps the last valid configuration.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from concurrent.futures import Executor, ThreadPoolExecutor

from pixel_lb.access_log import LogTail
from pixel_lb.controller import Controller, Settings
from pixel_lb.credits import CreditMonitor
from pixel_lb.drain import adopt, apply_shares, latest
from pixel_lb.errors import Refused
from pixel_lb.files import Paths, exclusive
from pixel_lb.fleet import Fleet
from pixel_lb.nginx import Nginx
from pixel_lb.pauses import PauseRecord
from pixel_lb.peers import fetch_drains
from pixel_lb.probe import probe
from pixel_lb.state import Drain, State
from pixel_lb.weights import Share

# Maximum number of concurrent probes.
PROBES = 32
# Seconds between rounds until the inventory's facts have been read.
FIRST_INTERVAL = 2.0


class Watch:
    """The loop around a `Controller`."""

    def __init__(self, paths: Paths, *, dry_run: bool = False) -> None:
        """Set up the loop.

        Args:
            paths: The agent's directories.
            dry_run: Log decisions instead of applying them, and write no report.
        """
        self.paths = paths
        self.dry_run = dry_run
        self.controller = Controller(Settings(), time.monotonic())
        self.credits = CreditMonitor("", {}, self.log)
        self._state = State(paths)
        self._fleet: Fleet | None = None
        self._facts_read: tuple[int, int] | None = None
        self._names: dict[str, str] = {}
        self._log_tail: LogTail | None = None
        self._failed_at = 0.0
        self._error = ""
        self._adopt_error = ""

    def run(self) -> None:
        """Run until the process is stopped."""
        if not self.dry_run:
            PauseRecord(self.paths.pauses).start()
        with ThreadPoolExecutor(PROBES) as pool:
            while True:
                began = time.monotonic()
                try:
                    self.tick(pool)
                except (OSError, ValueError, KeyError, Refused) as error:
                    self.log(f"no change: {error!r}")
                interval = self._fleet.interval if self._fleet else FIRST_INTERVAL
                time.sleep(max(0.1, began + interval - time.monotonic()))

    def tick(self, pool: Executor) -> None:
        """Run one round."""
        fleet = self.read_facts()
        others = pool.map(fetch_drains, fleet.peers.values())
        samples = pool.map(lambda server: probe(server.address, fleet.timeout), fleet.servers)
        for server, sample in zip(fleet.servers, samples, strict=True):
            self.controller.observe(server.name, sample)
        self._adopt(list(others))
        now = time.monotonic()
        self.poll_credits(pool, now)
        for address, (count, seconds) in (self._log_tail.read() if self._log_tail else {}).items():
            self.controller.observe_requests(now, self._names.get(address, ""), count, seconds)
        shares = self.controller.decide(now, self._state.drained(), self._state.canary())
        while self.controller.notes:
            self.log(self.controller.notes.pop(0))
        if shares is None:
            self._error = ""  # The shares that could not be applied are no longer wanted.
        else:
            self._apply(shares)
        if not self.dry_run:
            self._write_report(fleet)

    def read_facts(self) -> Fleet:
        """Read the inventory's facts if Ansible has written new ones."""
        path = self.paths.facts
        facts = path.stat()
        read = (facts.st_mtime_ns, facts.st_ino)
        if self._fleet and self._facts_read == read:
            return self._fleet
        fleet = Fleet.load(path)
        # With consistent hashing a server may have another address.
        self._names = {
            server.address: server.name for upstream in fleet.upstreams for server in upstream.servers
        }
        hosts = {server.name: server.host for server in fleet.servers}
        self.controller.configure(hosts, self._state.shares(), fleet.settings)
        self.controller.set_credits({})
        self.credits = CreditMonitor(fleet.credit_region, fleet.credits, self.log)
        self._log_tail = LogTail(fleet.access_log) if fleet.access_log else None
        self._fleet, self._facts_read = fleet, read
        return fleet

    def poll_credits(self, pool: Executor, now: float) -> None:
        """Pass new CPU credits to the controller."""
        known = self.credits.poll(pool, now)
        if known is not None:
            self.controller.set_credits(known)

    def log(self, text: str) -> None:
        """Write a message to the journal."""
        print(text, file=sys.stderr, flush=True)

    def _adopt(self, others: list[dict[str, Drain]]) -> None:
        known = self._state.drains()
        # Without the lock, which a drain holds for seconds.
        if self.dry_run or latest([known, *others]) == known:
            self._adopt_error = ""
            return
        try:
            with exclusive(self.paths.lock):
                changed = adopt(self.paths, Nginx(self.paths), others)
        except (OSError, Refused) as error:
            if str(error) != self._adopt_error:
                self.log(f"drains of other balancers are not adopted: {error}")
            self._adopt_error = str(error)
            return
        self._adopt_error = ""
        if changed:
            drained = ", ".join(sorted(self._state.drained())) or "none"
            self.log(f"adopted from another balancer: {', '.join(changed)}; drained hosts: {drained}")

    def _apply(self, shares: Mapping[str, Share]) -> None:
        now = time.monotonic()
        if now - self._failed_at < self.controller.settings.reload_interval and self._error:
            return
        description = ", ".join(self._describe(name, share) for name, share in shares.items())
        if self.dry_run:
            self.log(f"would set {description}")
        else:
            try:
                with exclusive(self.paths.lock):
                    apply_shares(self.paths, Nginx(self.paths), shares)
            except (OSError, Refused) as error:
                self._failed_at, self._error = now, str(error)
                self.log(f"the last good configuration is kept: {error}")
                return
            self.log(f"set {description}")
        self._error = ""
        self.controller.mark_applied(time.monotonic(), shares)

    def _describe(self, name: str, share: Share) -> str:
        value = "down" if share.down else f"to {share.factor:.0%}"
        return f"{name} {value} ({self.controller.explain(self.controller.backends[name], time.monotonic())})"

    def _write_report(self, fleet: Fleet) -> None:
        drained = self._state.drained()
        backends = self.controller.report(time.monotonic())
        for backend in backends:
            if backend["host"] in drained:
                backend["why"] = "drained by an operator; " + backend["why"]
        self._state.write_report(
            {
                "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
                "weights": fleet.weight_source,
                "method": fleet.method,
                "health_checks": fleet.settings.health,
                "alarm": "no backend is ready; no further one is marked down"
                if self.controller.none_ready
                else "",
                "error": self._error or self._adopt_error,
                "drained": sorted(drained),
                "backends": backends,
            }
        )
