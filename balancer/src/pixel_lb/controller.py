"""The controller's decisions about backends, without input or output.

A `Controller` receives observations (`observe`, `observe_requests`, `set_credits`), and computes the share of
its base weight that each backend should have (`decide`). Times are seconds on a monotonic clock that the
caller supplies, so that tests can simulate it.

Health: `fails` consecutive failed probes mark a backend down if another one is ready; `passes` consecutive
successful ones bring it back, with a weight that increases in steps. If no backend is ready, none is marked
down: requests may still succeed, and the controller raises an alarm.

Load (mode adaptive): a share is a backend's free CPU relative to that of the backend with most free CPU,
times a correction for latency. Stolen CPU time (steal) is not free, so a throttled host that looks idle gets
less, not more. CPU credits, if known, limit a host's free CPU to what they sustain. They arrive minutes late,
so they only reduce a share.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from pixel_lb.state import Canary
from pixel_lb.weights import FULL, Share

# Minimum of a host's free CPU in the computation. Below it, ratios overstate differences: a backend at 90 %
# load does not have half the capacity of one at 80 %.
LEAST_LEFT = 0.2
# Exponent of a share's step towards its target. Larger values oscillate: at 80 % load, a tenth more requests
# to one of two hosts reduce its free CPU by four tenths.
DAMPING = 0.35
# Tolerated latency above that of the fastest backend, in seconds.
TOLERANCE = 0.005
# Minimum number of requests for a mean.
ENOUGH_REQUESTS = 20
# Factor of each recovery step of a latency correction.
RECOVERY = 1.15
LEAST_SHARE = 0.01
# Minutes that CPU credits should last, and the maximum age of credit data.
CREDIT_MINUTES = 15


class Cpu(NamedTuple):
    """Counters of a host's CPU, in seconds since its boot, over all processors."""

    busy: float
    steal: float
    total: float

    @classmethod
    def of_modes(cls, modes: Mapping[str, float]) -> Cpu:
        """Compute the counters from seconds by mode of /proc/stat (where guest time is included in user)."""
        total = sum(modes.values())
        steal = modes.get("steal", 0.0)
        return cls(total - steal - modes.get("idle", 0.0) - modes.get("iowait", 0.0), steal, total)


class Credits(NamedTuple):
    """CPU credits of a host at a time; one credit runs a processor for a minute.

    `baseline` is the fraction of its CPU, 0 to 1, that the host may use without credits.
    """

    at: float
    balance: float
    processors: int
    baseline: float

    @property
    def sustainable(self) -> float:
        """The fraction of its CPU, 0 to 1, that the host can use for CREDIT_MINUTES."""
        return min(1.0, self.baseline + self.balance / (self.processors * CREDIT_MINUTES))


class Sample(NamedTuple):
    """One probe of a backend. `why` is the reason if it is not ready; `cpu` may be unknown."""

    at: float
    ready: bool
    why: str = ""
    cpu: Cpu | None = None


@dataclass(frozen=True)
class Settings:
    """Settings of the controller, named like the role's variables. `dead_band` and `step` are fractions."""

    health: bool = True
    adaptive: bool = False
    fails: int = 3
    passes: int = 2
    slow_start: float = 45.0
    reload_interval: float = 15.0
    dead_band: float = 0.1
    step: float = 0.5
    stale: float = 30.0


@dataclass
class Backend:
    """The state of one server. A host may have several; draining the host drains all of them."""

    name: str
    host: str
    up: bool = True
    fails: int = 0
    passes: int = 0
    why: str = ""
    recovered_at: float = -math.inf
    adapted: float = 1.0  # share in force because of the load
    target: float = 1.0  # damped target of that share, before dead band and step
    correction: float = 1.0
    busy: float | None = None
    steal: float | None = None
    latency: float | None = None
    rate: float = 0.0
    in_flight: float = 0.0
    last: Sample | None = None
    credits: Credits | None = None
    cpus: deque[tuple[float, Cpu]] = field(default_factory=deque)
    requests: deque[tuple[float, float, float]] = field(default_factory=deque)

    @property
    def ready(self) -> bool:
        """Whether the latest probe succeeded; true before the first one."""
        return self.last is None or self.last.ready

    def forget(self, before: float) -> None:
        """Drop measurements from before a time."""
        while self.cpus and self.cpus[0][0] < before:
            self.cpus.popleft()
        while self.requests and self.requests[0][0] < before:
            self.requests.popleft()

    def measure(self, now: float, window: float) -> None:
        """Compute means over the last `window` seconds."""
        self.forget(now - window)
        self.busy = self.steal = self.latency = None
        if len(self.cpus) > 1:
            first, last = self.cpus[0][1], self.cpus[-1][1]
            passed = last.total - first.total
            if passed > 0 and last.busy >= first.busy and last.steal >= first.steal:
                self.busy = (last.busy - first.busy) / passed
                self.steal = (last.steal - first.steal) / passed
        count = sum(each[1] for each in self.requests)
        seconds = sum(each[2] for each in self.requests)
        self.rate, self.in_flight = count / window, seconds / window
        if count >= ENOUGH_REQUESTS:
            self.latency = seconds / count


class Controller:
    """Computes health and shares of the backends from observations."""

    def __init__(self, settings: Settings, now: float) -> None:
        self.settings = settings
        self.backends: dict[str, Backend] = {}
        self.notes: list[str] = []  # messages for the operator; the caller removes them
        self.none_ready = False  # no backend is ready, so none is marked down
        self._canary: Canary | None = None
        self._applied: dict[str, Share] = {}
        self._applied_at = self._load_updated_at = now

    # --- observations ----------------------------------------------------------------------

    def configure(self, servers: Mapping[str, str], applied: Mapping[str, Share], settings: Settings) -> None:
        """Set the servers and the settings. Servers that remain keep their observations.

        Args:
            servers: The host of each server.
            applied: The share in force of each server; servers without one have their full weight.
            settings: The new settings.
        """
        self.settings = settings
        former = self.backends
        self.backends = {}
        for name, host in servers.items():
            share = applied.get(name, FULL)
            self.backends[name] = former.get(name) or Backend(
                name, host, up=not share.down, adapted=share.factor, target=share.factor
            )
        self._applied = {name: applied.get(name, FULL) for name in servers}

    def observe(self, name: str, sample: Sample) -> None:
        """Record a probe of a backend."""
        backend = self.backends[name]
        backend.last = sample
        if sample.cpu is not None:
            if backend.cpus and sample.cpu.total < backend.cpus[-1][1].total:
                backend.cpus.clear()  # The host has booted.
            backend.cpus.append((sample.at, sample.cpu))
        if sample.ready:
            backend.fails, backend.passes = 0, backend.passes + 1
        else:
            backend.fails, backend.passes, backend.why = backend.fails + 1, 0, sample.why

    def observe_requests(self, at: float, name: str, count: float, seconds: float) -> None:
        """Record the number of requests that a backend has answered, and their total seconds."""
        if name in self.backends:
            self.backends[name].requests.append((at, count, seconds))

    def set_credits(self, known: Mapping[str, Credits]) -> None:
        """Replace the CPU credits, by host."""
        for backend in self.backends.values():
            backend.credits = known.get(backend.host)

    # --- decisions -------------------------------------------------------------------------

    def decide(
        self, now: float, drained: Collection[str] = (), canary: Canary | None = None
    ) -> dict[str, Share] | None:
        """Compute the shares that should be in force.

        Args:
            now: The time.
            drained: Hosts that an operator has drained.
            canary: The host whose weight is limited now.

        Returns:
            The share of each server, or None if nothing should change now.
        """
        self._canary = canary
        self._update_health(now, [each for each in self.backends.values() if each.host not in drained])
        rested = now - self._applied_at >= self.settings.reload_interval
        if rested and now - self._load_updated_at >= self.settings.reload_interval:
            self._load_updated_at = now
            for backend in self.backends.values():
                backend.measure(now, min(self.settings.reload_interval, now - self._applied_at))
            self._update_load(now)
        wanted = {name: self._share(backend, now) for name, backend in self.backends.items()}
        if wanted == self._applied:
            return None
        urgent = any(wanted[each].down and not share.down for each, share in self._applied.items())
        if urgent and not rested:
            # Before the interval has passed, only mark servers down.
            return {name: share if share.down else self._applied[name] for name, share in wanted.items()}
        return wanted if urgent or rested else None

    def mark_applied(self, now: float, shares: Mapping[str, Share]) -> None:
        """Record that these shares are in force."""
        self._applied = dict(shares)
        self._applied_at = now
        # Earlier measurements were made with other weights.
        for backend in self.backends.values():
            backend.cpus = deque(list(backend.cpus)[-1:])
            backend.requests.clear()

    def _update_health(self, now: float, candidates: list[Backend]) -> None:
        settings = self.settings
        if not settings.health:
            for backend in self.backends.values():
                backend.up = True
            return
        for backend in self.backends.values():
            if not backend.up and backend.passes >= settings.passes:
                backend.up, backend.recovered_at = True, now
                self.notes.append(f"{backend.name} is ready again; its weight increases in steps")
        failing = [each for each in candidates if each.up and each.fails >= settings.fails]
        for backend in failing:
            if any(other.up and other.ready for other in candidates if other is not backend):
                backend.up = False
                self.notes.append(f"{backend.name} is marked down: {backend.why}")
        none_ready = bool(candidates) and not any(
            each.up and each.fails < settings.fails for each in candidates
        )
        if none_ready and not self.none_ready:
            self.notes.append(
                "NO BACKEND IS READY; no further one is marked down: "
                + "; ".join(f"{each.name}: {each.why}" for each in candidates)
            )
        if self.none_ready and not none_ready:
            self.notes.append("a backend is ready again")
        self.none_ready = none_ready

    def _update_load(self, now: float) -> None:
        settings = self.settings
        if not settings.adaptive:
            for backend in self.backends.values():
                backend.adapted = backend.target = backend.correction = 1.0
            return
        fresh = [each for each in self.backends.values() if each.up and not self._is_stale(each, now)]
        left = {each.name: part for each in fresh if (part := self._cpu_left(each, now)) is not None}
        most = max(left.values(), default=1.0)
        latencies = [each.latency for each in fresh if each.latency is not None]
        tolerable = min(latencies, default=0.0) + TOLERANCE
        for backend in self.backends.values():
            if backend not in fresh:
                backend.adapted = backend.target = backend.correction = 1.0
                continue
            if backend.latency is not None and backend.latency > tolerable:
                backend.correction *= max(1 - settings.step, tolerable / backend.latency)
            else:
                backend.correction = min(1.0, backend.correction * RECOVERY)
            backend.correction = max(backend.correction, LEAST_SHARE)
            if backend.name in left:
                backend.target *= (left[backend.name] / most / backend.target) ** DAMPING
            share = max(LEAST_SHARE, backend.target * backend.correction)
            if abs(share / backend.adapted - 1) >= settings.dead_band:
                low, high = 1 - settings.step, 1 + settings.step
                backend.adapted = min(max(share, backend.adapted * low), backend.adapted * high, 1.0)

    def _is_stale(self, backend: Backend, now: float) -> bool:
        """Return whether a backend's CPU data are too old."""
        return not backend.cpus or now - backend.cpus[-1][0] > self.settings.stale

    def _cpu_left(self, backend: Backend, now: float) -> float | None:
        """Return the fraction of a backend's CPU that is neither stolen nor busy; None if unknown."""
        if backend.busy is None or backend.steal is None or backend.steal >= 1:
            return None
        owned = 1 - backend.steal
        if known := self._credits(backend, now):
            owned = min(owned, known.sustainable)
        return owned * max(LEAST_LEFT, 1 - backend.busy / owned)

    def _credits(self, backend: Backend, now: float) -> Credits | None:
        """Return a backend's CPU credits; None if they are unknown or too old."""
        known = backend.credits
        return known if known and now - known.at <= CREDIT_MINUTES * 60 else None

    def _share(self, backend: Backend, now: float) -> Share:
        if not backend.up:
            return Share(1.0, True)
        factor = backend.adapted * self._slow_start(backend, now)
        if self._canary and self._canary.host == backend.host:
            factor *= self._canary.factor
        return Share(round(factor, 4), False)

    def _slow_start(self, backend: Backend, now: float) -> float:
        """Return the factor of a backend's weight after its recovery, which increases in steps to 1."""
        settings = self.settings
        age = now - backend.recovered_at
        if not settings.health or age >= settings.slow_start:
            return 1.0
        steps = math.floor(age / settings.reload_interval) + 1
        return min(1.0, steps * settings.reload_interval / settings.slow_start)

    # --- for the operator ------------------------------------------------------------------

    def explain(self, backend: Backend, now: float) -> str:
        """Return the reason for a backend's share as text."""
        if not backend.up:
            return f"down: {backend.why or 'was not ready'}; {backend.passes} successful probes since"
        reasons = []
        if backend.fails:
            kept = self.none_ready and backend.fails >= self.settings.fails
            reasons.append(
                f"{backend.fails} failed probes: {backend.why}"
                + ("; still up because no backend is ready" if kept else "")
            )
        if self._slow_start(backend, now) < 1:
            reasons.append(f"recovered {now - backend.recovered_at:.0f} s ago, its weight increases in steps")
        if self._canary and self._canary.host == backend.host:
            reasons.append(f"canary: at most {self._canary.factor:.0%} of its weight")
        if self.settings.adaptive and self._is_stale(backend, now):
            reasons.append(f"no CPU data for {self.settings.stale:.0f} s: base weight")
        elif backend.adapted < 1:
            causes = []
            if backend.busy is not None and backend.steal is not None:
                causes.append(f"CPU {backend.busy:.0%} busy, {backend.steal:.0%} stolen")
            if (known := self._credits(backend, now)) and known.sustainable < 1:
                causes.append(
                    f"{known.balance:.0f} CPU credits left, enough for {known.sustainable:.0%} of its CPU"
                )
            if backend.correction < 1:
                causes.append(f"corrected by latency to {backend.correction:.0%}")
            reasons.append(f"{backend.adapted:.0%} of its base weight: {', '.join(causes) or 'for its load'}")
        return "; ".join(reasons) or "base weight"

    def report(self, now: float) -> list[dict[str, Any]]:
        """Describe the state of each backend."""
        return [
            {
                "name": backend.name,
                "host": backend.host,
                "ready": backend.ready,
                "up": backend.up,
                "share": self._applied[backend.name].factor,
                "why": self.explain(backend, now),
                "cpu_busy": _rounded(backend.busy, 3),
                "cpu_steal": _rounded(backend.steal, 3),
                "cpu_credits": _rounded((known := self._credits(backend, now)) and known.balance, 1),
                "latency_ms": _rounded(backend.latency and backend.latency * 1000, 2),
                "requests_per_second": _rounded(backend.rate, 1),
                "in_flight": _rounded(backend.in_flight, 2),
                "age_s": _rounded(backend.last and now - backend.last.at, 1),
            }
            for backend in self.backends.values()
        ]


def _rounded(value: float | None, digits: int) -> float | None:
    return None if value is None else round(value, digits)
