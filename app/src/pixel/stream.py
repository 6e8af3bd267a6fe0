"""The event stream in Redis: its entries and their IDs.

Field ``c`` of an entry holds changes, encoded by ``pixel.pack``.

If an author of a change is known, field ``a`` holds the authors: a JSON array of ``[author, number of
changes]`` in the order of the changes, where neighbours differ. An author is ``key:NAME``, ``addr:``
with an IPv4 address or an IPv6 /64, or empty if unknown.

In a cluster, the last field is ``e``, the configuration epoch of the master: a deposed master may
have written events that nobody acknowledged, with IDs that events of the new master have too.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

EVENT_PATTERN = "[0-9]{1,15}-[0-9]{1,15}(?:-[0-9]{1,15})?"
"""Regular expression of an event ID in a query, without anchors."""

EVENT_CHANGES = 1024
"""Most changes in one entry. With the stream's length, it bounds the stream's memory."""


class EventId(NamedTuple):
    """ID of an event. It also names the state of the canvas after that event."""

    milliseconds: int
    sequence: int
    epoch: int = 0
    """Configuration epoch of the master that wrote it; 0 outside clusters."""

    @classmethod
    def parse(cls, text: bytes) -> "EventId":
        """Parse an ID as in 1795225898442-0, or 1795225898442-0-7 in a cluster. Raises ValueError."""
        numbers = text.split(b"-")
        if len(numbers) not in (2, 3) or len(text) > 62 or not all(map(bytes.isdigit, numbers)):
            raise ValueError("an event id looks like 1795225898442-0")
        return cls(*map(int, numbers))

    @classmethod
    def of(cls, entry: Sequence[Any]) -> "EventId":
        """The ID of an entry of the stream, as Redis returns it: its ID in Redis, and its fields."""
        event, fields = entry
        milliseconds, sequence = map(int, event.split(b"-"))
        return cls(milliseconds, sequence, int(fields[-1]) if fields[-2] == b"e" else 0)

    def text(self) -> bytes:
        """The ID as text, as in 1795225898442-0, or 1795225898442-0-7 in a cluster."""
        return b"%d-%d-%d" % self if self.epoch else b"%d-%d" % self[:2]

    def in_redis(self) -> bytes:
        """The ID of the event's entry in Redis."""
        return b"%d-%d" % self[:2]


NO_EVENT = EventId(0, 0)


def epoch_fields(epoch: int) -> tuple[str | int, ...]:
    """The last fields of an entry that is written by a master with this configuration epoch."""
    return ("e", epoch) if epoch else ()


def known_event(text: bytes) -> EventId | None:
    """Parse the event ID that a client sent; ``NO_EVENT`` if it is invalid, None if there is none."""
    try:
        return EventId.parse(text) if text else None
    except ValueError:
        return NO_EVENT
