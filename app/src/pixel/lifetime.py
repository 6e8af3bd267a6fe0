"""The lifetime of a write: by which clock it is judged, and until when it may begin.

All times are in seconds of Redis's clock, since the epoch, unless said otherwise. The reasons are
in docs/adr.
"""

import asyncio
import logging
import re
from math import inf
from time import monotonic, time

import h11

from pixel.client import AnswerError, get
from pixel.problems import Problem
from pixel.settings import Settings

MEASURE_TIMEOUT = 0.3
"""Seconds that a balancer may take to say its time."""

MEASURE_PAUSE = 1.0
"""Seconds between two measurements of one balancer's clock."""

ASSUME_AFTER = 10.0
"""Seconds after which a balancer that never says its time is taken to have Redis's."""

MOST_BALANCERS = 100
"""Balancers that are remembered; more can only be a mistake."""

WAIT = b"wait"
"""Mark of a retry whose earlier attempt may still be on its way to Redis."""

_ADDRESS = re.compile(rb"[0-9]{1,3}(\.[0-9]{1,3}){3}:[0-9]{1,5}")

log = logging.getLogger(__name__)


class RedisClock:
    """Redis's clock, as an offset from this process's monotonic clock.

    Redis said its time somewhere between question and answer, so the offset is known within
    bounds, which further answers narrow. A bound that a new answer contradicts moves as far as
    that answer demands: clocks drift, are set, and stand still while a host is suspended.
    """

    def __init__(self) -> None:
        self._known = False
        # Until Redis has said its time: this host's clock.
        self._low = time() - monotonic()
        self._high = inf

    def learn(self, sent: float, said: float, received: float) -> None:
        """Redis said its time to a question sent and answered at these monotonic times."""
        low, high = said - received, said - sent
        if not self._known or low > self._high:
            self._known, self._low, self._high = True, low, high
        else:
            # An answer that was long on its way says little: it must not make the time late.
            self._high = min(high, self._high)
            self._low = min(max(low, self._low), self._high)

    def now(self) -> float:
        """Redis's time, not early but where Redis's clock was set back, and hardly late."""
        return monotonic() + self._low


class StartLimit:
    """Refuses writes that come late, by the balancer's stamp.

    A stamp is ``TIME ADDRESS`` or, on a retry, ``TIME ADDRESS MARK``: the balancer's clock when it
    sent the request, and where it says its time. Its clock may differ from Redis's by anything. The
    difference is measured when a balancer is new, and again when its requests seem to come late. It
    is never taken to be larger than it is, so a request is never taken to be younger than it is.
    """

    def __init__(self, clock: RedisClock, settings: Settings) -> None:
        self._clock = clock
        self._limit = settings.start_limit
        self.wait = settings.start_limit + settings.redis_timeout
        """Seconds after which an attempt that was sent can't be made any more."""
        self._differences: dict[bytes, float] = {}
        # Monotonic times: of the last measurement, and since when all of them have failed.
        self._measured: dict[bytes, float] = {}
        self._silent: dict[bytes, float] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    def begin_by(self, stamp: bytes | None, waited: float = 0) -> float:
        """Until when the write may begin; without a stamp, it has just been sent.

        Args:
            stamp: the request's header X-Request-Start.
            waited: seconds that the request was held back on purpose, which don't count.

        Raises:
            Problem: 503, if it came too late; nothing was written.
            UnknownClockError: the balancer's clock has to be measured first.
            MustWaitError: the request has to be held back first.
        """
        now = self._clock.now()
        if stamp is None:
            return now + self._limit
        text, _, balancer = stamp.partition(b" ")
        least = self._differences.get(balancer)
        if least is None:
            return self._judge_unusual(text, balancer, now, waited)
        try:
            difference = now - float(text)
        except ValueError:
            return now + self._limit  # No balancer stamps like this.
        if difference < least:
            # Less than any before: the balancer's clock was set forward, or Redis's back.
            if difference == -inf:
                return now + self._limit
            self._differences[balancer] = least = difference
        left = self._limit + waited + least - difference
        if left < 0:
            self._measure_soon(balancer)
            raise Problem.not_written(
                f"The request came {self._limit - left:.1f} s after the balancer had sent it"
                f" (limit {self._limit:g} s)"
            )
        return now + left

    def _judge_unusual(self, text: bytes, balancer: bytes, now: float, waited: float) -> float:
        """Judge a request that is marked as a retry, or of a balancer that isn't known yet."""
        balancer, _, mark = balancer.partition(b" ")
        if not _ADDRESS.fullmatch(balancer):
            return now + self._limit  # No balancer stamps like this.
        if balancer not in self._differences:
            raise UnknownClockError(balancer)
        if mark == WAIT and not waited:
            raise MustWaitError
        return self.begin_by(b"%b %b" % (text, balancer), waited)

    async def measure(self, balancer: bytes) -> None:
        """Measure the difference between Redis's clock and a balancer's.

        Raises:
            Problem: 503, if it has never been measured and can't be now. A balancer that has not
                said its time for ten seconds is taken to have Redis's.
        """
        if len(self._differences) > MOST_BALANCERS:
            self._differences.clear()
        self._measured[balancer] = monotonic()
        asked = self._clock.now()
        try:
            async with asyncio.timeout(MEASURE_TIMEOUT):
                status, body = await get(f"http://{balancer.decode()}/lb/clock")
            if status != 200:
                raise AnswerError(f"answered with status {status}")
            self._differences[balancer] = asked - float(body)
            self._silent.pop(balancer, None)
        except (OSError, h11.RemoteProtocolError, AnswerError, ValueError) as error:
            if balancer not in self._differences:
                self._assume(balancer, str(error) or "no answer in time")

    def _assume(self, balancer: bytes, reason: str) -> None:
        name = balancer.decode()
        silent_since = self._silent.setdefault(balancer, monotonic())
        if monotonic() - silent_since < ASSUME_AFTER:
            raise Problem.not_written(f"Balancer {name} doesn't say its time ({reason})")
        log.warning("balancer %s doesn't say its time, which is taken to be Redis's", name)
        self._differences[balancer] = 0.0

    def _measure_soon(self, balancer: bytes) -> None:
        if monotonic() - self._measured.get(balancer, -inf) > MEASURE_PAUSE:
            self._measured[balancer] = monotonic()
            task = asyncio.get_running_loop().create_task(self.measure(balancer))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)


class UnknownClockError(Exception):
    """The clock of this balancer has to be measured before its requests can be judged."""

    def __init__(self, balancer: bytes) -> None:
        super().__init__(balancer)
        self.balancer = balancer


class MustWaitError(Exception):
    """The request has to be held back for ``StartLimit.wait`` seconds, and is judged then."""
