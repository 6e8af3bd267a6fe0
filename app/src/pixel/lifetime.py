"""The lifetime of a write: Redis's clock, and the time until which a write may begin.

All times are in seconds of Redis's clock, since the epoch, unless stated otherwise. The reasons are
in docs/adr/0026-lifetime-of-a-write.md.
"""

import asyncio
import logging
import re
from collections.abc import Callable
from dataclasses import dataclass
from math import inf
from time import monotonic, time

import h11

from pixel.client import AnswerError, get
from pixel.problems import Problem
from pixel.settings import Settings

MEASURE_TIMEOUT = 0.3
"""Seconds that a balancer has to answer with its time."""

MEASURE_PAUSE = 1.0
"""Seconds between two measurements of one balancer's clock."""

ASSUME_AFTER = 10.0
"""Seconds without an answer after which a balancer's clock is assumed to equal Redis's."""

MOST_BALANCERS = 100
"""Largest number of balancers whose clocks are stored; beyond it, all are measured again."""

PAUSE = 0.9
"""Seconds for which a balancer may stop: another one takes its address after 1.1 s at the earliest."""

SETBACK = 0.02
"""Seconds by which Redis's clock must be behind what was known to count as set back: it also drifts."""

WAIT = b"wait"
"""Mark of a retry whose previous attempt may still reach Redis."""

_ADDRESS = re.compile(rb"[0-9]{1,3}(\.[0-9]{1,3}){3}:[0-9]{1,5}")

log = logging.getLogger(__name__)


class RedisClock:
    """Redis's clock, as an offset from this process's monotonic clock.

    Redis reads its clock between the request and the reply, so each reply gives a lower and an upper
    bound of the offset; further replies narrow them. If a new reply contradicts a bound, the bound
    moves by the least amount: clocks drift, are set, and stop while a host is suspended.
    """

    def __init__(self) -> None:
        self._known = False
        # Until Redis's first answer: this host's clock.
        self._low = time() - monotonic()
        self._high = inf
        self.on_setback: list[Callable[[], None]] = []
        """Called when Redis's clock was set back, or is that of another host: ages by it are too low."""

    def learn(self, sent: float, redis_time: float, received: float) -> None:
        """Update the bounds from ``redis_time``, requested and received at these monotonic times."""
        low, high = redis_time - received, redis_time - sent
        if not self._known or low > self._high:
            self._known, self._low, self._high = True, low, high
            return
        setback = self._low - high
        # A slow reply is inaccurate: it must not move the time back.
        self._high = min(high, self._high)
        self._low = min(max(low, self._low), self._high)
        if setback > SETBACK:
            for act in self.on_setback:
                act()

    def now(self) -> float:
        """A lower bound of Redis's time. It exceeds Redis's time only if Redis's clock was set back."""
        return monotonic() + self._low


@dataclass
class Running:
    """A period in which a balancer was not stopped, by its own clock."""

    since: float
    until: float


class StartLimit:
    """Refuses writes that arrive late, by the balancer's stamp.

    A stamp is ``TIME ADDRESS`` or, on a retry, ``TIME ADDRESS MARK``: the balancer's time when it
    sent the request, and the address at which its clock can be read. Its clock may differ from
    Redis's by any amount. The difference is measured when a balancer is new, and again when its
    requests seem to be late. It is never overestimated, so no request is assumed to be younger than
    it is.

    ``+`` before the time means that clients reach another balancer when this one stops. Requests that
    it had received before are stamped only when it runs again; so after ``PAUSE`` seconds without a
    stamp, its pauses are read first. A retry has the request's age after its time (``+TIME/AGE``). See
    docs/adr/0048-stopped-balancers.md.
    """

    def __init__(self, clock: RedisClock, settings: Settings) -> None:
        self._clock = clock
        self._limit = settings.start_limit
        self.wait = settings.start_limit + settings.redis_timeout
        """Seconds after which an attempt that the balancer has sent can't be executed."""
        self._differences: dict[bytes, float] = {}
        # Monotonic times: of the last measurement, and of the first of a series of failures.
        self._measured: dict[bytes, float] = {}
        self._silent: dict[bytes, float] = {}
        self._running: dict[bytes, Running] = {}
        self._unread: dict[bytes, float] = {}
        self._reading: dict[bytes, asyncio.Task[str]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        # By the former differences, requests that were sent before would count as just sent.
        clock.on_setback.append(self._differences.clear)

    def begin_by(self, stamp: bytes | None, waited: float = 0) -> float:
        """The time until which the write may begin; without a stamp, it counts as just sent.

        Args:
            stamp: the request's header X-Request-Start.
            waited: seconds for which the request was delayed on purpose, which don't count.

        Raises:
            Problem: 503, if the request is too late; nothing was written.
            UnknownClockError: the balancer's clock has to be measured first.
            UnknownPausesError: the balancer's pauses have to be read first.
            MustWaitError: the request has to be delayed first.
        """
        now = self._clock.now()
        if stamp is None:
            return now + self._limit
        text, _, balancer = stamp.partition(b" ")
        least = self._differences.get(balancer)
        if least is None:
            return self._judge_unusual(text, balancer, now, waited)
        stamped, retried, age = text.partition(b"/")
        try:
            sent = float(stamped)
            received = sent - float(age) if retried else sent
        except ValueError:
            return now + self._limit  # No balancer stamps like this.
        difference = now - sent
        if difference < least:
            # Less than any before: the balancer's clock was set forward, or Redis's back.
            if difference == -inf:
                return now + self._limit
            self._differences[balancer] = least = difference
        if text.startswith(b"+"):
            self._check_pauses(balancer, sent, received)
        left = self._limit + waited + least - difference
        if left < 0:
            self._measure_soon(balancer)
            raise Problem.not_written(
                f"The request came {self._limit - left:.1f} s after the balancer had sent it"
                f" (limit {self._limit:g} s)"
            )
        return now + left

    def _judge_unusual(self, text: bytes, balancer: bytes, now: float, waited: float) -> float:
        """``begin_by`` for a request that is marked as a retry, or comes from a new balancer."""
        balancer, _, mark = balancer.partition(b" ")
        if not _ADDRESS.fullmatch(balancer):
            return now + self._limit  # No balancer stamps like this.
        if balancer not in self._differences:
            raise UnknownClockError(balancer)
        if mark == WAIT and not waited:
            raise MustWaitError
        return self.begin_by(b"%b %b" % (text, balancer), waited)

    def _check_pauses(self, balancer: bytes, sent: float, received: float) -> None:
        known = self._running.get(balancer)
        if known is None or sent > known.until:
            raise UnknownPausesError(balancer)
        if received < known.since:
            # Another host would refuse it too.
            raise Problem.unavailable("The balancer was stopped, so the request may be too old", "no")
        known.until = sent + PAUSE

    async def read_pauses(self, balancer: bytes) -> None:
        """Read whether a balancer was stopped.

        Raises:
            Problem: 503, if this can't be read. After ten seconds without an answer, the balancer counts
                as running.
        """
        task = self._reading.get(balancer)
        if task is None:
            task = asyncio.get_running_loop().create_task(self._read_pauses(balancer))
            self._reading[balancer] = task
            task.add_done_callback(lambda _: self._reading.pop(balancer, None))
        if reason := await asyncio.shield(task):
            name = balancer.decode()
            raise Problem.not_written(f"Whether balancer {name} was stopped is unknown ({reason})")

    async def _read_pauses(self, balancer: bytes) -> str:
        try:
            async with asyncio.timeout(MEASURE_TIMEOUT):
                status, body = await get(f"http://{balancer.decode()}/lb/pauses")
            if status not in (200, 404):
                raise AnswerError(f"answered with status {status}")
            now = self._time_at(balancer)
            # While its controller doesn't run, there is no record.
            since, beat = map(float, body.split()) if status == 200 else (-inf, now)
            if now - beat > PAUSE:
                raise AnswerError(f"its controller last ran {now - beat:.1f} s ago")
        except (OSError, h11.RemoteProtocolError, AnswerError, ValueError) as error:
            if monotonic() - self._unread.setdefault(balancer, monotonic()) < ASSUME_AFTER:
                return str(error) or "no answer in time"
            since, beat = -inf, self._time_at(balancer)
        else:
            self._unread.pop(balancer, None)
        self._running[balancer] = Running(since, beat + PAUSE)
        return ""

    def _time_at(self, balancer: bytes) -> float:
        """The time by a balancer's clock, which is not too early."""
        return self._clock.now() - self._differences.get(balancer, 0.0)

    async def measure(self, balancer: bytes) -> None:
        """Measure the difference between Redis's clock and a balancer's.

        Raises:
            Problem: 503, if the clock can't be read and has never been measured. After ten seconds
                without an answer, the balancer's clock is assumed to equal Redis's.
        """
        if len(self._differences) > MOST_BALANCERS:
            self._differences.clear()
        self._measured[balancer] = asked = monotonic()
        try:
            async with asyncio.timeout(MEASURE_TIMEOUT):
                status, body = await get(f"http://{balancer.decode()}/lb/clock")
            if status != 200:
                raise AnswerError(f"answered with status {status}")
            # Redis's clock may have been set back meanwhile.
            self._differences[balancer] = self._clock.now() - (monotonic() - asked) - float(body)
            self._silent.pop(balancer, None)
        except (OSError, h11.RemoteProtocolError, AnswerError, ValueError) as error:
            if balancer not in self._differences:
                self._assume(balancer, str(error) or "no answer in time")

    def _assume(self, balancer: bytes, reason: str) -> None:
        name = balancer.decode()
        silent_since = self._silent.setdefault(balancer, monotonic())
        if monotonic() - silent_since < ASSUME_AFTER:
            raise Problem.not_written(f"The clock of balancer {name} can't be read ({reason})")
        log.warning("the clock of balancer %s can't be read; it is assumed to equal Redis's", name)
        self._differences[balancer] = 0.0

    def _measure_soon(self, balancer: bytes) -> None:
        if monotonic() - self._measured.get(balancer, -inf) > MEASURE_PAUSE:
            self._measured[balancer] = monotonic()
            task = asyncio.get_running_loop().create_task(self.measure(balancer))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)


class UnknownBalancerError(Exception):
    """Something has to be learned of this balancer before its requests can be judged."""

    def __init__(self, balancer: bytes) -> None:
        super().__init__(balancer)
        self.balancer = balancer


class UnknownClockError(UnknownBalancerError):
    """The balancer's clock has to be measured."""


class UnknownPausesError(UnknownBalancerError):
    """Whether the balancer was stopped has to be read."""


class MustWaitError(Exception):
    """The request has to be delayed by ``StartLimit.wait`` seconds and judged after that."""
