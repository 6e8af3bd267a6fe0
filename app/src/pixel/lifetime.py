"""The lifetime of a write: by which clock it is judged, and until when it may begin.

All times are in seconds of Redis's clock, since the epoch. See docs/adr for the reasons.
"""

from math import inf
from time import monotonic, time

from pixel.problems import Problem
from pixel.settings import Settings

PERIOD = 5
"""Seconds in which workers collect the least difference between a balancer's clock and Redis's."""

_MOST_NAMES = 100  # balancers that are remembered; more can only be a mistake
_SURE = 0.05  # seconds; a worker that knows Redis's clock less exactly reports no difference
_MOST_APART = 1e10  # seconds between two clocks; more is no clock

WAIT = b"wait"
"""Mark of a retry whose earlier attempt may still be on its way to Redis."""


class RedisClock:
    """Redis's clock, as an offset from this process's monotonic clock.

    Redis said ``time`` somewhere between question and answer, so the offset is known within
    bounds, which further answers narrow. Bounds that contradict each other mean that a clock was
    set, or that this process was suspended: the newest answer then counts alone.
    """

    def __init__(self) -> None:
        self._known = False
        # Until Redis has said its time: this host's clock.
        self._low = time() - monotonic()
        self._high = inf

    def learn(self, sent: float, said: float, received: float) -> None:
        """Redis said its time to a question sent and answered at these monotonic times."""
        low, high = said - received, said - sent
        if self._known and low <= self._high and high >= self._low:
            low, high = max(low, self._low), min(high, self._high)
        self._known, self._low, self._high = True, low, high

    def now(self) -> float:
        """Redis's time. It may be late, but is never early, unless Redis's clock was set back."""
        return monotonic() + self._low

    @property
    def sure(self) -> bool:
        """Whether the time is exact enough to compare other clocks with."""
        return self._known and self._high - self._low < _SURE


class _Balancer:
    """The difference between Redis's clock and a balancer's, in seconds."""

    __slots__ = ("least", "seen")

    def __init__(self, least: float, seen: float = inf) -> None:
        self.least = least  # lately, in any worker
        self.seen = seen  # in this worker, since it last reported


class StartLimit:
    """Refuses writes that come late, by the balancer's stamp.

    A stamp is ``TIME NAME`` or, on a retry, ``TIME NAME MARK``: the balancer's clock when it sent
    the request. Clocks differ, so what counts is how much larger the difference to Redis's clock
    is than the least one that any worker has seen lately: that request came at once.
    """

    def __init__(self, clock: RedisClock, settings: Settings) -> None:
        self._clock = clock
        self._limit = settings.start_limit
        self.wait = settings.start_limit + settings.redis_timeout
        """Seconds after which an attempt that was sent can't be made any more."""
        self._balancers: dict[bytes, _Balancer] = {}
        self._strangers: dict[bytes, _Balancer] = {}

    def begin_by(self, stamp: bytes | None, waited: float = 0) -> float:
        """Until when the write may begin; without a stamp, it has just been sent.

        Args:
            stamp: the request's header X-Request-Start.
            waited: seconds that the request was held back on purpose, which don't count.

        Raises:
            Problem: 503, if it came too late; nothing was written.
        """
        now = self._clock.now()
        if stamp is None:
            return now + self._limit
        text, _, name = stamp.partition(b" ")
        try:
            difference = now - float(text)
        except ValueError:
            return now + self._limit  # No balancer stamps like this.
        balancer = self._balancers.get(name)
        if balancer is None:
            return self._judge_stranger(difference, name, now, waited)
        if balancer.seen > difference > -_MOST_APART:
            balancer.seen = difference
            if difference < balancer.least:
                balancer.least = difference
        left = self._limit + waited + balancer.least - difference
        if left < 0:
            raise Problem.not_written(
                f"The request came {self._limit - left:.1f} s after the balancer had sent it"
                f" (limit {self._limit:g} s)"
            )
        return now + left

    def _judge_stranger(self, difference: float, name: bytes, now: float, waited: float) -> float:
        """Judge a request that is marked as a retry, or of a balancer that isn't known yet."""
        name, marked, mark = name.partition(b" ")
        if marked:
            if mark == WAIT and not waited:
                raise MustWaitError
            return self.begin_by(b"%f %b" % (now - difference, name), waited)
        if not abs(difference) < _MOST_APART:
            return now + self._limit
        if len(self._strangers) > _MOST_NAMES:
            self._strangers.clear()
        stranger = self._strangers.setdefault(name, _Balancer(0))
        stranger.seen = min(stranger.seen, difference)
        # Until more is known, its clock is taken to be Redis's.
        if abs(difference) > self._limit + waited:
            raise Problem.not_written(
                f"The clock of balancer {name.decode('latin-1')} is not known yet: it is"
                f" {difference:+.1f} s behind Redis's, or its request came late"
            )
        return now + self._limit + waited - max(difference, 0)

    def report(self) -> dict[bytes, float]:
        """The least difference seen since the last report, by balancer; none if unsure."""
        if not self._clock.sure:
            return {}
        everyone = [*self._balancers.items(), *self._strangers.items()]
        seen = {name: balancer.seen for name, balancer in everyone if balancer.seen < inf}
        for _, balancer in everyone:
            balancer.seen = inf
        return seen

    def period(self) -> int:
        """The number of the current period."""
        return int(self._clock.now() // PERIOD)

    def learn(
        self, last: dict[bytes, float], former: dict[bytes, float], current: dict[bytes, float]
    ) -> dict[bytes, float]:
        """Take over what all workers have reported, by balancer.

        A difference that is new or has become larger counts once a whole period has seen no
        smaller one: late requests, or a worker that stood still, don't move it.

        Args:
            last: what was known when last it changed.
            former: the least of the former period.
            current: the least of the current period, until now.

        Returns:
            What is known now and differs from ``last``.
        """
        for name in last | former | current:
            known = self._balancers.get(name)
            lately = min(former.get(name, inf), current.get(name, inf))
            if known is None and (name in former or name in last):
                self._strangers.pop(name, None)
                least = lately if name in former else min(lately, last[name])
                self._balancers[name] = _Balancer(least)
            elif known is not None and (name in former or lately < known.least):
                known.least = lately
        return {
            name: known.least
            for name, known in self._balancers.items()
            if abs(known.least - last.get(name, inf)) > _SURE
        }


class MustWaitError(Exception):
    """The request has to be held back for ``StartLimit.wait`` seconds, and is judged then."""
