"""The stream of events in Redis: its key, what an entry holds, and the ids of its entries."""

from typing import NamedTuple

EVENTS = "pixel:events"
"""The stream of changes. Field ``c`` of an entry holds changes, as ``pixel.pack`` makes them."""

EVENT_CHANGES = 1024
"""Most changes in one entry, so that the stream's length bounds its memory."""


class EventId(NamedTuple):
    """The name of an event, and the moment at which the canvas stood as it left it."""

    milliseconds: int
    sequence: int

    @classmethod
    def parse(cls, text: bytes) -> "EventId":
        """From its text, as in 1795225898442-0. Raises ValueError."""
        milliseconds, dash, sequence = text.partition(b"-")
        if not dash or len(text) > 41 or not (milliseconds + sequence).isdigit():
            raise ValueError("an event id looks like 1795225898442-0")
        return cls(int(milliseconds), int(sequence))

    def text(self) -> bytes:
        """As Redis, and a viewer, write it."""
        return b"%d-%d" % self


NO_EVENT = EventId(0, 0)
