"""Names of the keys in Redis.

All names have the same hash tag (in braces): a cluster stores them in one slot, so one master holds
them all, and a transaction may use any of them.
"""

from functools import cache

_PREFIX = "pixel:{0}:"

SLOT = 13_907
"""The hash slot of these names in a cluster: CRC-16 of the hash tag, modulo 16,384."""

EVENTS = _PREFIX + "events"
"""The event stream; see ``stream``."""

KEYS = _PREFIX + "keys"
"""A hash: the name of each client's key, and the key as JSON; see ``keys``."""

KEYS_VERSION = _PREFIX + "keys:version"
"""A counter, which each change of a client's key or of a restriction increments."""

MAINTENANCE = _PREFIX + "maintenance"
"""The maintenance state; see ``maintenance``."""

RESTRICTIONS = _PREFIX + "restrictions"
"""The protected areas and blocked clients; see ``moderation``."""

ACTS = _PREFIX + "moderation"
"""The stream of what moderators did; see ``moderation``."""


@cache
def tile_key(column: int, row: int) -> str:
    """A tile of the canvas; see ``canvas``."""
    return f"{_PREFIX}tile:{column}:{row}"


def budget_key(account: str) -> str:
    """The state of a client's budget; see ``budgets``."""
    return f"{_PREFIX}budget:{account}"


def lease_key(connection: str) -> str:
    """The lease of a worker's connection; see ``commit``."""
    return f"{_PREFIX}lease:{connection}"


def viewers_key(period: int) -> str:
    """A hash: the number of viewers of each worker in a period; see ``Store.count_viewers``."""
    return f"{_PREFIX}viewers:{period}"
