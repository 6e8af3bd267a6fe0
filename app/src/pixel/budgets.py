"""Budgets: how many channels a client may write, counted in Redis for the whole fleet.

The algorithm is GCRA: for each client, Redis stores the time at which its budget will be full again.
A write moves this time on by one interval, and is refused if it would lie further ahead than a full
burst takes. Redis's clock counts. See docs/adr/0031-keys-and-budgets.md.
"""

from collections.abc import Sequence
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
# account its interval (microseconds), its burst, the number of its requests, and the cost of each.
# Creates the lease if all requests are allowed. Returns, for each account, when it is full again
# (microseconds), and "1" or "0" for each request: allowed or not.
_SCRIPT = """
local time = redis.call('TIME')
local now = time[1] * 1000000 + time[2]
local replies, refused, at = {}, false, 2
for i = 2, #KEYS do
  local interval, burst, count = tonumber(ARGV[at]), tonumber(ARGV[at + 1]), tonumber(ARGV[at + 2])
  local latest = now + interval * burst
  -- An account that is further ahead is of a larger budget, or Redis's clock was set back.
  local full = math.min(math.max(tonumber(redis.call('GET', KEYS[i]) or now), now), latest)
  local before, allowed = full, {}
  for j = 1, count do
    local after = full + interval * ARGV[at + 2 + j]
    -- The stored time is rounded to microseconds.
    if after < latest + 1 then
      full, allowed[j] = after, '1'
    else
      refused, allowed[j] = true, '0'
    end
  end
  if full > before then
    redis.call('SET', KEYS[i], string.format('%.0f', full), 'PX', math.ceil((full - now) / 1000))
  end
  replies[#replies + 1], replies[#replies + 2] = full, table.concat(allowed)
  at = at + 3 + count
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


class Spending(NamedTuple):
    """A request that counts against its writer's budget; its cost is its number of channel writes."""

    writer: Writer
    budget: Budget
    cost: int

    @classmethod
    def of(cls, writer: Writer | None, cost: int) -> "Spending | None":
        """The request of a writer; None if it has no budget."""
        return cls(writer, writer.budget, cost) if writer and writer.budget else None


class Charge:
    """The question to Redis whether the budgets allow the requests of a batch.

    Redis charges all that it allows. It creates the batch's lease only if it allows all of them; so
    the transaction that is sent with the question does nothing if a request is refused, or if the
    question fails.

    Args:
        requests: one for each request of the batch; None without a budget.
    """

    def __init__(self, requests: Sequence[Spending | None]) -> None:
        self._size = len(requests)
        # By account: the positions of its requests in the batch, and the requests.
        self._accounts: dict[str, list[tuple[int, Spending]]] = {}
        for position, request in enumerate(requests):
            if request is not None:
                self._accounts.setdefault(request.writer.account, []).append((position, request))

    def command(self, lease: str, lease_end: float) -> Command:
        """The command that charges the accounts and creates the lease, until ``lease_end``."""
        arguments: list[str | int] = []
        for numbered in self._accounts.values():
            budget = numbered[0][1].budget
            costs = [request.cost for _, request in numbered]
            arguments += (repr(_interval(budget) * 1e6), budget.burst, len(costs), *costs)
        keys = (lease, *self._accounts)
        return ("EVAL", _SCRIPT, len(keys), *keys, int(lease_end * 1000), *arguments)

    def outcomes(self, reply: Any, budgets: "Budgets") -> list[Problem | None]:
        """For each request of the batch, why it is refused; None if it isn't."""
        problems: list[Problem | None] = [None] * self._size
        if isinstance(reply, ReplyError):
            budgets.health.fails(reply)
            for position in (position for numbered in self._accounts.values() for position, _ in numbered):
                problems[position] = Problem.unavailable("Redis refuses to charge budgets", "no")
            return problems
        budgets.health.works()
        for numbered, full, allowed in zip(self._accounts.values(), reply[::2], reply[1::2], strict=True):
            budgets.learn(numbered[0][1].writer.account, full / 1e6)
            for (position, request), one in zip(numbered, allowed, strict=True):
                if one != ord("1"):
                    problems[position] = budgets.refusal(request)
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

    def exceeded(self, request: Spending) -> Problem | None:
        """Why a request is refused; None if Redis has to be asked."""
        if request.cost <= request.budget.burst and self._wait(request) <= 0:
            return None
        return self.refusal(request)

    def refusal(self, request: Spending) -> Problem:
        """The answer to a request that is over its budget."""
        metrics.REFUSALS.labels("budget").inc()
        budget = request.budget
        wait = max(ceil(self._wait(request)), 1)
        hint = (
            f"one request can write at most {budget.burst}"
            if request.cost > budget.burst
            else f"the next can be made in {wait} s"
        )
        return Problem(
            HTTPStatus.TOO_MANY_REQUESTS,
            f"The budget is {budget.per_minute} channel writes a minute, and {budget.burst} at once; {hint}",
            headers={"Retry-After": str(wait)} | self.fields(request.writer),
            written="no",
        )

    def fields(self, writer: Writer | None) -> dict[str, str]:
        """Headers that describe a writer's budget and what is left of it; empty if it has none."""
        if writer is None or writer.budget is None:
            return {}
        budget = writer.budget
        rest = max(self._until_full(writer), 0.0)
        left = max(int(budget.burst - rest / _interval(budget) + 1e-6), 0)
        window = ceil(budget.burst * _interval(budget))
        return {
            "RateLimit-Policy": f'"writes";q={budget.burst};w={window}',
            "RateLimit": f'"writes";r={left};t={ceil(rest)}',
        }

    def _until_full(self, writer: Writer) -> float:
        return self._full.get(writer.account, 0.0) - self._clock.now()

    def _wait(self, request: Spending) -> float:
        """Seconds until a request is allowed; until the budget is full, for one that exceeds the burst."""
        spare = max(request.budget.burst - request.cost, 0)
        return self._until_full(request.writer) - spare * _interval(request.budget)


def _interval(budget: Budget) -> float:
    """Seconds in which a budget regains one channel write."""
    return 60 / budget.per_minute
