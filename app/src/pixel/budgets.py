"""Budgets: how many channels a client may write, counted in Redis for the whole fleet.

The algorithm is GCRA: for each client, Redis stores the time at which its budget will be full again.
A write moves this time on by one interval, and is refused if it would lie further ahead than a full
burst takes. Redis's clock counts. See docs/adr/0031-keys-and-budgets.md.
"""

from collections.abc import Sequence
from functools import cache
from http import HTTPStatus
from math import ceil
from typing import Any, NamedTuple

from pixel import metrics
from pixel.lifetime import RedisClock
from pixel.link import Health
from pixel.problems import Problem
from pixel.resp import Command, ReplyError
from pixel.settings import Budget

MOST_ACCOUNTS = 10_000
"""Most accounts that a worker remembers."""

# Keys: the lease, and the accounts. Arguments: the time at which the lease ends (milliseconds); for each
# account its interval (microseconds), its burst, and the number of its groups of requests; for each group
# the cost of a request and the number of requests. Creates the lease if all requests are allowed. Returns,
# for each account, when it is full again (microseconds), and how many requests of each group are allowed.
_SCRIPT = """
local time = redis.call('TIME')
local now = time[1] * 1000000 + time[2]
local replies, refused, at = {}, false, 2
for i = 2, #KEYS do
  local interval, latest = ARGV[at], now + ARGV[at] * ARGV[at + 1]
  -- An account that is further ahead is of a larger budget, or Redis's clock was set back.
  local full = math.min(math.max(tonumber(redis.call('GET', KEYS[i]) or now), now), latest)
  local before, reply = full, #replies + 1
  for j = at + 3, at + 1 + 2 * ARGV[at + 2], 2 do
    local cost, count = interval * ARGV[j], tonumber(ARGV[j + 1])
    -- The stored time is rounded to microseconds, so it may be one too late.
    local allowed = math.min(math.floor((latest + 1 - full) / cost), count)
    full, refused = full + allowed * cost, refused or allowed < count
    replies[reply + (j - at - 1) / 2] = allowed
  end
  replies[reply] = full
  if full > before then
    redis.call('SET', KEYS[i], string.format('%.0f', full), 'PX', math.ceil((full - now) / 1000))
  end
  at = at + 3 + 2 * ARGV[at + 2]
end
if not refused then redis.call('SET', KEYS[1], 1, 'PXAT', ARGV[1]) end
return replies
"""


class Writer(NamedTuple):
    """Who writes: a key or a client's address."""

    author: str
    """As recorded in the event stream; empty if it isn't."""

    account: str = ""
    """The Redis key of the budget's state."""

    budget: Budget | None = None

    moderates: bool = False
    """Whether it may write in protected areas."""


class _Account:
    """The requests of a batch that are charged to one account, in groups of equal cost."""

    def __init__(self, writer: Writer, budget: Budget) -> None:
        self.writer = writer
        self.budget = budget
        self.groups: list[tuple[int, list[int]]] = []  # the cost, and the requests' positions in the batch

    def add(self, cost: int, position: int) -> None:
        """Add a request."""
        if not self.groups or self.groups[-1][0] != cost:
            self.groups.append((cost, []))
        self.groups[-1][1].append(position)


class Charge:
    """The question to Redis whether the budgets allow the requests of a batch.

    Redis charges all that it allows. It creates the batch's lease only if it allows all of them; so
    the transaction that is sent with the question does nothing if a request is refused, or if the
    question fails.

    Args:
        requests: the writer and the channel writes of each request of the batch.
    """

    def __init__(self, requests: Sequence[tuple[Writer | None, int]]) -> None:
        self._size = len(requests)
        self._accounts: dict[str, _Account] = {}
        for position, (writer, cost) in enumerate(requests):
            if writer is not None and writer.budget is not None:
                account = self._accounts.get(writer.account)
                if account is None:
                    account = self._accounts[writer.account] = _Account(writer, writer.budget)
                account.add(cost, position)

    def command(self, lease: str, lease_end: float) -> Command:
        """The command that charges the accounts and creates the lease, until ``lease_end``."""
        arguments: list[str | int] = []
        for account in self._accounts.values():
            budget, groups = account.budget, account.groups
            arguments += (repr(_interval(budget) * 1e6), budget.burst, len(groups))
            for cost, positions in groups:
                arguments += (cost, len(positions))
        keys = (lease, *self._accounts)
        return ("EVAL", _SCRIPT, len(keys), *keys, int(lease_end * 1000), *arguments)

    def problems(self, reply: Any, budgets: "Budgets") -> list[Problem | None]:
        """For each request of the batch, why it is refused; None if it isn't."""
        problems: list[Problem | None] = [None] * self._size
        if isinstance(reply, ReplyError):
            budgets.health.fails(reply)
            for account in self._accounts.values():
                for position in (position for _, positions in account.groups for position in positions):
                    problems[position] = Problem.unavailable("Redis refuses to charge budgets", "no")
            return problems
        budgets.health.works()
        numbers = iter(reply)
        for name, account in self._accounts.items():
            budgets.learn(name, next(numbers) / 1e6)
            for cost, positions in account.groups:
                for position in positions[next(numbers) :]:
                    problems[position] = budgets.refusal(account.writer, account.budget, cost)
        return problems


class Budgets:
    """What this worker knows of the accounts: the latest time at which each was known to be full again.

    Other workers can only have moved that time on. So a request that is over its budget by it is
    refused without a question to Redis.
    """

    def __init__(self, clock: RedisClock) -> None:
        self.health = Health("budget")
        self._clock = clock
        self._full: dict[str, float] = {}

    def learn(self, account: str, full: float) -> None:
        """Store when an account will be full again, by Redis's clock."""
        if account not in self._full and len(self._full) >= MOST_ACCOUNTS:
            now = self._clock.now()
            self._full = {name: time for name, time in self._full.items() if time > now}
            if len(self._full) >= MOST_ACCOUNTS:
                self._full.clear()
        self._full[account] = full

    def exceeded(self, writer: Writer, cost: int) -> Problem | None:
        """Why a request of ``cost`` channel writes is refused; None if Redis has to be asked."""
        budget = writer.budget
        if budget is None:
            return None
        # The same as ``_wait(…) <= 0``, in half the time: this is asked for every write.
        rest = self._full.get(writer.account, 0.0) - self._clock.now()
        if cost <= budget.burst and rest * budget.per_minute <= (budget.burst - cost) * 60:
            return None
        return self.refusal(writer, budget, cost)

    def refusal(self, writer: Writer, budget: Budget, cost: int) -> Problem:
        """The answer to a request that is over its writer's budget."""
        metrics.REFUSALS.labels("budget").inc()
        wait = max(ceil(self._wait(writer, budget, cost)), 1)
        hint = (
            f"one request can write at most {budget.burst}"
            if cost > budget.burst
            else f"the next can be made in {wait} s"
        )
        return Problem(
            HTTPStatus.TOO_MANY_REQUESTS,
            f"The budget is {budget.per_minute} channel writes a minute, and {budget.burst} at once; {hint}",
            headers={"Retry-After": str(wait)} | self.fields(writer),
            written="no",
        )

    def fields(self, writer: Writer | None) -> dict[str, str]:
        """Headers that describe a writer's budget and what is left of it; empty if it has none."""
        if writer is None or writer.budget is None:
            return {}
        budget = writer.budget
        rest = self._until_full(writer)
        left = int(budget.burst - rest * budget.per_minute / 60 + 1e-6)
        return {
            "RateLimit-Policy": _policy(budget),
            "RateLimit": f'"writes";r={max(left, 0)};t={ceil(rest)}',
        }

    def _until_full(self, writer: Writer) -> float:
        return max(self._full.get(writer.account, 0.0) - self._clock.now(), 0.0)

    def _wait(self, writer: Writer, budget: Budget, cost: int) -> float:
        """Seconds until a request is allowed; until the budget is full, for one that exceeds the burst."""
        return self._until_full(writer) - max(budget.burst - cost, 0) * _interval(budget)


@cache
def _policy(budget: Budget) -> str:
    return f'"writes";q={budget.burst};w={ceil(budget.burst * _interval(budget))}'


def _interval(budget: Budget) -> float:
    """Seconds in which a budget regains one channel write."""
    return 60 / budget.per_minute
