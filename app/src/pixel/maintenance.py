"""Maintenance: the fleet refuses writes, or all requests for the canvas, until an operator ends it.

The state is a key in Redis, so it survives restarts, and new hosts obey it. Every worker reads it once
a second, and keeps the last known state while Redis can't be read. A worker that doesn't know the state
yet refuses writes.

    python -m pixel.maintenance                        print the state as JSON
    python -m pixel.maintenance read-only [MESSAGE]    refuse writes
    python -m pixel.maintenance on [MESSAGE]           refuse all requests for the canvas
    python -m pixel.maintenance off                    accept all requests again
"""

import argparse
import asyncio
import logging
import sys
import time
from collections.abc import Sequence
from http import HTTPStatus
from typing import Literal, Self

import msgspec

from pixel import metrics
from pixel.budgets import Writer
from pixel.cluster import Redis
from pixel.events import Hub
from pixel.names import MAINTENANCE
from pixel.pixel import Change
from pixel.problems import Problem
from pixel.resp import Connection, ReplyError
from pixel.settings import Settings, load
from pixel.store import Store

State = Literal["off", "read-only", "on"]
STATES: tuple[State, ...] = ("off", "read-only", "on")

POLL = 1.0
"""Seconds between two reads of the state."""

FIRST_POLL = 0.1
"""Seconds between two reads until the state is known."""

RETRY_AFTER = 10
"""Seconds after which a client should try again."""

LONGEST_MESSAGE = 200

_DEFAULT = {
    "read-only": "The canvas is read-only during maintenance.",
    "on": "The service is in maintenance.",
}

log = logging.getLogger(__name__)


class Maintenance(msgspec.Struct, frozen=True):
    """The state, the operator's message to clients, and since when (UTC)."""

    state: State = "off"
    message: str = ""
    since: str = ""

    @classmethod
    def decode(cls, text: bytes | None) -> Self:
        """Decode the key's value; without the key, maintenance is off. Raises msgspec.DecodeError."""
        return msgspec.json.decode(text, type=cls) if text else cls()

    def encode(self) -> bytes:
        """The key's value: empty if maintenance is off, as backups count keys with content."""
        return b"" if self.state == "off" else msgspec.json.encode(self)

    @property
    def notice(self) -> str | None:
        """The message to clients; None if maintenance is off."""
        return None if self.state == "off" else self.message or _DEFAULT[self.state]

    def refuses(self, method: str) -> bool:
        """Whether requests for the canvas with this HTTP method are refused."""
        return self.state == "on" or (self.state == "read-only" and method not in ("GET", "HEAD"))

    def problem(self, method: str) -> Problem:
        """The answer to a request that is refused."""
        detail = self.notice or ""
        is_read = method in ("GET", "HEAD")
        return Problem(
            HTTPStatus.SERVICE_UNAVAILABLE,
            detail if is_read else detail.rstrip("."),
            headers={"Retry-After": str(RETRY_AFTER)},
            members={"maintenance": self.state},
            written=None if is_read else "no",
        )


class Gate:
    """Follows the maintenance state and refuses requests accordingly.

    Writes are checked only while they are refused (``Store.check_writes``).
    """

    def __init__(self, store: Store, hub: Hub) -> None:
        self._store = store
        self._hub = hub
        self._known = False
        self.maintenance = Maintenance()
        self.refuses_reads = False
        store.check_writes("maintenance", self._check_write)

    def check(self, method: str) -> None:
        """Raise a 503 ``Problem`` if a request for the canvas with this HTTP method is refused."""
        if self.maintenance.refuses(method):
            raise self.maintenance.problem(method)

    async def follow(self) -> None:
        """Read the state again and again."""
        while True:
            await asyncio.sleep(POLL if self._known else FIRST_POLL)
            await self.read()

    async def read(self) -> None:
        """Read the state and apply it; keep the former one if Redis can't be read."""
        try:
            maintenance = Maintenance.decode(await self._store.maintenance())
        except Problem:
            return
        except msgspec.DecodeError:
            if self._known:
                return
            log.exception("the maintenance state in Redis is invalid, and counts as off")
            maintenance = Maintenance()
        if not self._known or maintenance != self.maintenance:
            self._known = True
            self._apply(maintenance)

    def _apply(self, maintenance: Maintenance) -> None:
        if maintenance.state != self.maintenance.state:
            log.warning("maintenance is %s", maintenance.state)
        self.maintenance = maintenance
        self.refuses_reads = maintenance.refuses("GET")
        self._store.check_writes("maintenance", self._check_write if maintenance.refuses("POST") else None)
        self._hub.notice = maintenance.notice
        if self.refuses_reads:
            self._hub.close()
        else:
            self._hub.reopen()
        for state in STATES[1:]:
            metrics.MAINTENANCE_WORKERS.labels(state).set(state == maintenance.state)

    def _check_write(self, changes: Sequence[Change], _: Writer | None) -> None:
        """Refuse a write; readiness probes, which change nothing, are not refused."""
        if not self._known:
            raise Problem.not_written("Redis has not been read since this worker started")
        if changes:
            raise self.maintenance.problem("POST")


async def change(settings: Settings, wanted: Maintenance | None) -> tuple[Maintenance, bool]:
    """Set the state, or only read it.

    Args:
        settings: of the service.
        wanted: the new state; None to read it.

    Returns:
        The state, and whether it was changed.

    Raises:
        OSError: Redis can't be reached.
        ReplyError: Redis refuses.
    """
    async with asyncio.timeout(5):
        redis = Redis(settings)
        connection = await redis.open(Connection)
        try:
            [value] = await connection.ask(("GET", MAINTENANCE))
            try:
                current = Maintenance.decode(value)
            except msgspec.DecodeError:
                current = None
            if wanted is None or (
                current and (current.state, current.message) == (wanted.state, wanted.message)
            ):
                return current or Maintenance(), False
            # Redis answers when the change is on its disk.
            await connection.ask(("SET", MAINTENANCE, wanted.encode()))
            await redis.confirm(connection)
            return wanted, True
        finally:
            connection.close()


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="pixel.maintenance", description="The fleet's maintenance state.")
    parser.add_argument("state", nargs="?", choices=STATES)
    parser.add_argument("message", nargs="?", default="", help="shown to clients and on the page")
    args = parser.parse_args()
    if len(args.message) > LONGEST_MESSAGE or not args.message.isprintable():
        parser.error(f"the message must be one line of at most {LONGEST_MESSAGE} characters")
    if args.message and args.state == "off":
        parser.error("a message is shown during maintenance only; leave it out with off")
    since = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    wanted = Maintenance(args.state, args.message, since) if args.state else None
    try:
        maintenance, changed = asyncio.run(change(load(), wanted))
    except (OSError, ReplyError) as error:
        sys.exit(f"pixel.maintenance: Redis can't be used: {error or type(error).__name__}")
    print(msgspec.json.encode(msgspec.structs.asdict(maintenance) | {"changed": changed}).decode())


if __name__ == "__main__":
    main()
