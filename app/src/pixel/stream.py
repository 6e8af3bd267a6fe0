"""The event stream in Redis: its entries and their IDs.

Field ``c`` of an entry holds changes, encoded by ``pixel.pack``.

If an author of a change is known, field ``a`` holds the authors: a JSON array of ``[author, number of
changes]`` in the order of the changes, where neighbours differ. An author is ``key:NAME``, ``addr:``
with an IPv4 address or an IPv6 /64, or empty if unknown.
"""

from typing import NamedTuple

EVENT_PATTERN = "[0-9]{1,15}-[0-9]{1,15}"
"""Regular expression of an event ID in a query, without anchors."""

EVENT_CHANGES = 1024
"""Most changes in one entry. With the stream's length, it bounds the stream's memory."""


class EventId(NamedTuple):
    """ID of an event. It also names the state of the canvas after that event."""

    milliseconds: int
    sequence: int

    @classmethod
    def parse(cls, text: bytes) -> "EventId":
        """Parse an ID as in 1795225898442-0. Raises ValueError."""
        milliseconds, dash, sequence = text.partition(b"-")
        if not dash or len(text) > 41 or not (milliseconds + sequence).isdigit():
            raise ValueError("an event id looks like 1795225898442-0")
        return cls(int(milliseconds), int(sequence))

    def text(self) -> bytes:
        """The ID as text, as in 1795225898442-0."""
        return b"%d-%d" % self


NO_EVENT = EventId(0, 0)


def known_event(text: bytes) -> EventId | None:
    """Parse the event ID that a client sent; ``NO_EVENT`` if it is invalid, None if there is none."""
    try:
        return EventId.parse(text) if text else None
    except ValueError:
        return NO_EVENT
