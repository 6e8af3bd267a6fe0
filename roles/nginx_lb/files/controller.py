"""What the balancer thinks of its backends, and why: logic without input or output.

A `Controller` is told what was seen of each backend (`see`, `see_requests`), and says at any time
which share of its base weight each should have (`decide`). Times are in seconds on one clock that
only goes forward; the caller has it, so that tests can have their own.

Health: `fails` looks in a row that found a backend not ready take it out, if another one is ready;
`passes` in a row bring it back, with a weight that rises in steps. Where nobody is ready, nobody is
taken out: requests have a chance, and an operator is told.

Load (mode adaptive): a share is what is left of the CPU, compared with the backend that has most
left, times a correction for latency. What is stolen from a virtual machine is not left to it, so a
throttled host that looks idle gets less, not more. Nor is what its CPU credits won't last for, where
they are known: word of them is minutes old, so it makes a share smaller and never larger.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any, NamedTuple

# Of the CPU that a host has; below it, differences say little and would be answered too strongly:
# a backend at 90 % is not half of one at 80 %.
LEAST_LEFT = 0.2
# The part of the way to where a share should be that is gone at a time. More swings: at 80 % busy,
# a tenth more requests to one of two hosts take away four tenths of what it has left.
DAMPING = 0.35
# Latency over the fastest backend's that is nobody's fault, in seconds.
TOLERANCE = 0.005
# Requests that must have been seen before a mean says anything.
ENOUGH_REQUESTS = 20
# What a correction gets back at a time when all is well.
RECOVERY = 1.15
LEAST_SHARE = 0.01
# Minutes that CPU credits should last; what is known of them is up to that old.
CREDIT_MINUTES = 15


class Cpu(NamedTuple):
    """Counters of a host's CPU, in seconds since its boot, over all processors."""

    busy: float
    steal: float
    total: float

    @classmethod
    def of_modes(cls, modes: dict[str, float]) -> Cpu:
        """From seconds by mode, as /proc/stat names them (guests are part of user there)."""
        total = sum(modes.values())
        steal = modes.get("steal", 0.0)
        return cls(total - steal - modes.get("idle", 0.0) - modes.get("iowait", 0.0), steal, total)


class Credits(NamedTuple):
    """What a host that is slowed down without them had left; one runs a processor for a minute."""

    at: float
    balance: float
    processors: int
    baseline: float  # the part of its CPU that it has all the same

    @property
    def lasting(self) -> float:
        """The part of its CPU that it can go on using for a while."""
        return min(1.0, self.baseline + self.balance / (self.processors * CREDIT_MINUTES))


class Sample(NamedTuple):
    """One look at a backend. `why` says what was wrong if it isn't ready; `cpu` may be unknown."""

    at: float
    ready: bool
    why: str = ""
    cpu: Cpu | None = None


@dataclass(frozen=True)
class Settings:
    """How to judge; see the role's variables of these names."""

    health: bool = True
    adaptive: bool = False
    fails: int = 3
    passes: int = 2
    slow_start: float = 45.0
    reload_interval: float = 15.0
    dead_band: float = 0.1
    step: float = 0.5
    stale: float = 30.0


class Share(NamedTuple):
    """What a backend should get: a part of its base weight, or nothing."""

    factor: float
    down: bool


@dataclass
class Backend:
    """What is known of one server. A host may have several; an operator drains them together."""

    name: str
    host: str
    up: bool = True
    fails: int = 0
    passes: int = 0
    why: str = ""
    back_since: float = -math.inf
    adapted: float = 1.0  # the share that its load is worth, in force
    wanted: float = 1.0  # the same, damped, before dead band and step
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
        """What the latest look said; one that was never seen may well be."""
        return self.last is None or self.last.ready

    def forget(self, before: float) -> None:
        while self.cpus and self.cpus[0][0] < before:
            self.cpus.popleft()
        while self.requests and self.requests[0][0] < before:
            self.requests.popleft()

    def measure(self, now: float, window: float) -> None:
        """Means over the last `window` seconds."""
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
    """Judges backends by what it is told of them."""

    def __init__(self, settings: Settings, now: float) -> None:
        self.settings = settings
        self.backends: dict[str, Backend] = {}
        self.notes: list[str] = []  # what an operator should hear, until it is fetched
        self.open = False  # nobody is ready, and so nobody is out
        self._written: dict[str, Share] = {}
        self._written_at = self._judged_at = now

    # --- what is known ---------------------------------------------------------------------

    def know(self, servers: dict[str, str], in_force: dict[str, Share], settings: Settings) -> None:
        """The servers that there are, their hosts by their names, and what is in force of each.

        What is known of a server stays known while it stays.
        """
        self.settings = settings
        former = self.backends
        self.backends = {}
        for name, host in servers.items():
            share = in_force.get(name, Share(1.0, False))
            backend = former.get(name) or Backend(
                name, host, up=not share.down, adapted=share.factor, wanted=share.factor
            )
            self.backends[name] = backend
        self._written = {name: in_force.get(name, Share(1.0, False)) for name in servers}

    def see(self, name: str, sample: Sample) -> None:
        """One look at a backend."""
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

    def see_requests(self, at: float, name: str, count: float, seconds: float) -> None:
        """So many requests were answered by a backend, in so many seconds together."""
        if name in self.backends:
            self.backends[name].requests.append((at, count, seconds))

    def see_credits(self, known: dict[str, Credits]) -> None:
        """All that is known of CPU credits, by host."""
        for backend in self.backends.values():
            backend.credits = known.get(backend.host)

    # --- what follows ----------------------------------------------------------------------

    def decide(self, now: float, drained: Collection[str] = ()) -> dict[str, Share] | None:
        """What should be in force, by name, if that is something else than what is."""
        self._judge_health(now, [each for each in self.backends.values() if each.host not in drained])
        rested = now - self._written_at >= self.settings.reload_interval
        if rested and now - self._judged_at >= self.settings.reload_interval:
            self._judged_at = now
            for backend in self.backends.values():
                backend.measure(now, min(self.settings.reload_interval, now - self._written_at))
            self._judge_load(now)
        wanted = {name: self._share(backend, now) for name, backend in self.backends.items()}
        if wanted == self._written:
            return None
        worse = any(wanted[each].down and not share.down for each, share in self._written.items())
        if worse and not rested:
            # It can't wait; the rest can, and stays as it is.
            return {name: share if share.down else self._written[name] for name, share in wanted.items()}
        return wanted if worse or rested else None

    def wrote(self, now: float, shares: dict[str, Share]) -> None:
        """These are in force now."""
        self._written = dict(shares)
        self._written_at = now
        # What was seen before says nothing of these weights.
        for backend in self.backends.values():
            backend.cpus = deque(list(backend.cpus)[-1:])
            backend.requests.clear()

    def _judge_health(self, now: float, there: list[Backend]) -> None:
        settings = self.settings
        if not settings.health:
            for backend in self.backends.values():
                backend.up = True
            return
        for backend in self.backends.values():
            if not backend.up and backend.passes >= settings.passes:
                backend.up, backend.back_since = True, now
                self.notes.append(f"{backend.name} is ready again and comes back in steps")
        failing = [each for each in there if each.up and each.fails >= settings.fails]
        for backend in failing:
            if any(other.up and other.ready for other in there if other is not backend):
                backend.up = False
                self.notes.append(f"{backend.name} is taken out: {backend.why}")
        open_now = bool(there) and not any(each.up and each.fails < settings.fails for each in there)
        if open_now and not self.open:
            self.notes.append(
                "NO BACKEND IS READY; none more is taken out, and requests go to them all the same: "
                + "; ".join(f"{each.name}: {each.why}" for each in there)
            )
        if self.open and not open_now:
            self.notes.append("there is a backend that is ready again")
        self.open = open_now

    def _judge_load(self, now: float) -> None:
        settings = self.settings
        if not settings.adaptive:
            for backend in self.backends.values():
                backend.adapted = backend.wanted = backend.correction = 1.0
            return
        fresh = [each for each in self.backends.values() if each.up and not self.is_stale(each, now)]
        left = {each.name: part for each in fresh if (part := self._left(each, now)) is not None}
        most = max(left.values(), default=1.0)
        known = [each.latency for each in fresh if each.latency is not None]
        bearable = min(known, default=0.0) + TOLERANCE
        for backend in self.backends.values():
            if backend not in fresh:
                backend.adapted = backend.wanted = backend.correction = 1.0
                continue
            if backend.latency is not None and backend.latency > bearable:
                backend.correction *= max(1 - settings.step, bearable / backend.latency)
            else:
                backend.correction = min(1.0, backend.correction * RECOVERY)
            backend.correction = max(backend.correction, LEAST_SHARE)
            if backend.name in left:
                backend.wanted *= (left[backend.name] / most / backend.wanted) ** DAMPING
            share = max(LEAST_SHARE, backend.wanted * backend.correction)
            if abs(share / backend.adapted - 1) >= settings.dead_band:
                low, high = 1 - settings.step, 1 + settings.step
                backend.adapted = min(max(share, backend.adapted * low), backend.adapted * high, 1.0)

    def is_stale(self, backend: Backend, now: float) -> bool:
        """Whether there has been no word of its CPU for too long."""
        return not backend.cpus or now - backend.cpus[-1][0] > self.settings.stale

    def _left(self, backend: Backend, now: float) -> float | None:
        """What is left of its CPU, 0 to 1, if that is known: what isn't stolen, and of that what is idle."""
        if backend.busy is None or backend.steal is None or backend.steal >= 1:
            return None
        owned = 1 - backend.steal
        if known := self._credits(backend, now):
            owned = min(owned, known.lasting)
        return owned * max(LEAST_LEFT, 1 - backend.busy / owned)

    def _credits(self, backend: Backend, now: float) -> Credits | None:
        """Its credits, if they are known and word of them isn't too old."""
        known = backend.credits
        return known if known and now - known.at <= CREDIT_MINUTES * 60 else None

    def _share(self, backend: Backend, now: float) -> Share:
        if not backend.up:
            return Share(1.0, True)
        return Share(round(backend.adapted * self._warmth(backend, now), 4), False)

    def _warmth(self, backend: Backend, now: float) -> float:
        """The part of its weight that a backend has again since it came back, in steps."""
        settings = self.settings
        away = now - backend.back_since
        if not settings.health or away >= settings.slow_start:
            return 1.0
        steps = math.floor(away / settings.reload_interval) + 1
        return min(1.0, steps * settings.reload_interval / settings.slow_start)

    # --- what an operator sees -------------------------------------------------------------

    def explain(self, backend: Backend, now: float) -> str:
        """Why a backend has the share that it has."""
        if not backend.up:
            return f"out: {backend.why or 'was not ready'}; {backend.passes} good looks since"
        reasons = []
        if backend.fails:
            last = self.open and backend.fails >= self.settings.fails
            reasons.append(
                f"{backend.fails} bad looks: {backend.why}" + ("; in because nobody is ready" if last else "")
            )
        if self._warmth(backend, now) < 1:
            reasons.append(f"back since {now - backend.back_since:.0f} s, its weight rises in steps")
        if self.settings.adaptive and self.is_stale(backend, now):
            reasons.append(f"no word of its CPU for {self.settings.stale:.0f} s: base weight")
        elif backend.adapted < 1:
            said = []
            if backend.busy is not None and backend.steal is not None:
                said.append(f"CPU {backend.busy:.0%} busy, {backend.steal:.0%} stolen")
            if (known := self._credits(backend, now)) and known.lasting < 1:
                said.append(f"{known.balance:.0f} CPU credits left, {known.lasting:.0%} of its CPU lasts")
            if backend.correction < 1:
                said.append(f"corrected by latency to {backend.correction:.0%}")
            reasons.append(f"{backend.adapted:.0%} of its base weight: {', '.join(said) or 'for its load'}")
        return "; ".join(reasons) or "base weight"

    def report(self, now: float) -> list[dict[str, Any]]:
        """What is thought of each backend."""
        return [
            {
                "name": backend.name,
                "host": backend.host,
                "ready": backend.ready,
                "up": backend.up,
                "share": self._written[backend.name].factor,
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
