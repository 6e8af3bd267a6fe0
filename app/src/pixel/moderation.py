"""Moderation: protected areas, blocked clients, and the record of what moderators did.

Areas and blocks are one value in Redis, which ``access`` follows with the keys and applies. Moderators
change them over HTTP (``routes.moderation``), operators with this module's command:

    python -m pixel.moderation list
    python -m pixel.moderation acts
    python -m pixel.moderation protect 0,0,64,64 [--reason TEXT]
    python -m pixel.moderation block key:alice|addr:192.0.2.7 --for 12h [--reason TEXT]
    python -m pixel.moderation remove ID
"""

import argparse
import asyncio
import getpass
import os
import secrets
import sys
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from http import HTTPStatus
from typing import Annotated, Any, Literal, NamedTuple

import msgspec

from pixel import addresses
from pixel.budgets import Writer
from pixel.canvas import Canvas, Region
from pixel.cluster import Redis
from pixel.keys import Key, decode, period, run_command
from pixel.names import ACTS, KEYS, KEYS_VERSION, RESTRICTIONS
from pixel.pixel import Change
from pixel.problems import Problem, Refusal
from pixel.resp import Command, Connection
from pixel.settings import Settings, load

MOST = 500
"""Most areas, and most blocks."""

MOST_ACTS = 1000
"""Acts that are kept."""

LONGEST_BLOCK = 366 * 24 * 60
"""Minutes."""

TIMEOUT = 5.0
"""Seconds that Redis has to answer."""

Reason = Annotated[str, msgspec.Meta(max_length=200)]


class Area(msgspec.Struct, frozen=True):
    """A protected area (x, y, width and height): only moderators may write in it."""

    id: str
    area: str
    reason: str
    by: str
    since: datetime


class Block(msgspec.Struct, frozen=True):
    """A client (``key:NAME``, or ``addr:`` with an IPv4 address or an IPv6 /64) that may not write."""

    id: str
    client: str
    until: datetime
    reason: str
    by: str
    since: datetime

    def check(self, now: float) -> None:
        """Raise a ``Refusal`` until the block's end; ``now`` is Redis's time."""
        if now < self.until.timestamp():
            until = self.until.isoformat(timespec="seconds").replace("+00:00", "Z")
            raise Refusal(
                HTTPStatus.FORBIDDEN,
                f"This client is blocked until {until}{_because(self.reason)}.",
                "blocked",
                members={"blocked_until": until},
            )


class Restrictions(msgspec.Struct, frozen=True):
    """All protected areas and all blocks."""

    areas: tuple[Area, ...] = ()
    blocks: tuple[Block, ...] = ()

    @classmethod
    def decode(cls, text: bytes | None) -> "Restrictions":
        """Decode the key's value. Raises msgspec.DecodeError."""
        return msgspec.json.decode(text, type=cls) if text else cls()

    def encode(self) -> bytes:
        """The key's value: empty without restrictions, as backups count keys with content."""
        return msgspec.json.encode(self) if self.areas or self.blocks else b""

    def at(self, now: datetime) -> "Restrictions":
        """Without the blocks that have ended."""
        return Restrictions(self.areas, tuple(block for block in self.blocks if now < block.until))


class WantedArea(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An area to protect: x, y, width and height."""

    area: Annotated[str, msgspec.Meta(pattern=r"^[0-9]{1,5}(,[0-9]{1,5}){3}$")]
    reason: Reason = ""


class WantedBlock(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A client to block for some minutes."""

    client: Annotated[str, msgspec.Meta(min_length=1, max_length=100)]
    minutes: Annotated[int, msgspec.Meta(ge=1, le=LONGEST_BLOCK)]
    reason: Reason = ""


Did = Literal["protect", "block", "remove", "undo"]


class Act(msgspec.Struct, frozen=True):
    """What a moderator or an operator did, and when; ``what`` are its details."""

    time: datetime
    by: str
    did: Did
    what: dict[str, Any]


class Protection:
    """The pixels that are protected, as a check of writes."""

    def __init__(self, areas: Sequence[Area], canvas: Canvas) -> None:
        self._width = canvas.width
        self._areas = [(Region(*map(int, area.area.split(","))), area.reason) for area in areas]
        # A byte a pixel: a write costs the same however many areas there are.
        self._pixels = bytearray(canvas.width * canvas.height)
        for (x, y, w, h), _ in self._areas:
            # The canvas may have been larger.
            length = max(min(w, canvas.width - x), 0)
            for row in range(y, min(y + h, canvas.height)):
                start = row * canvas.width + x
                self._pixels[start : start + length] = b"\1" * length

    def check(self, changes: Sequence[Change], writer: Writer | None) -> None:
        """Raise a ``Refusal`` if one of the changes is protected from the writer."""
        if writer is not None and writer.moderates:
            return
        pixels, width = self._pixels, self._width
        for x, y, _, _ in changes:
            if pixels[y * width + x]:
                raise self._refusal(x, y)

    def _refusal(self, x: int, y: int) -> Refusal:
        region, reason = next(
            (region, reason)
            for region, reason in self._areas
            if region.x <= x < region.x + region.w and region.y <= y < region.y + region.h
        )
        area = ",".join(map(str, region))
        refusal = Refusal(
            HTTPStatus.FORBIDDEN,
            f"The area {area} is protected{_because(reason)}.",
            "protected",
            members={"protected": area},
        )
        refusal.written = "no"
        return refusal


class _State(NamedTuple):
    """What an edit needs to know."""

    restrictions: Restrictions
    keys: dict[str, Key]
    now: datetime


class Edited(NamedTuple):
    """The restrictions after an edit, what was done, and the area or block that it concerns."""

    restrictions: Restrictions
    did: Did
    item: Area | Block


Edit = Callable[[_State], Edited]
"""Changes the restrictions. Raises a ``Problem`` if it can't."""


def protect(wanted: WantedArea, by: str, canvas: Canvas) -> Edit:
    """Protect an area."""

    def edit(state: _State) -> Edited:
        try:
            canvas.parse_area(wanted.area)
        except ValueError as error:
            raise Problem.invalid("area", str(error)) from None
        areas = state.restrictions.areas
        _check_number(len(areas), "protected areas")
        area = Area(_new_id(), wanted.area, _line(wanted.reason), by, state.now)
        return Edited(msgspec.structs.replace(state.restrictions, areas=(*areas, area)), "protect", area)

    return edit


def block(wanted: WantedBlock, by: str) -> Edit:
    """Block a client for a time. A former block of the client is replaced."""

    def edit(state: _State) -> Edited:
        client = _client(wanted.client, state.keys)
        others = tuple(one for one in state.restrictions.blocks if one.client != client)
        _check_number(len(others), "blocks")
        until = state.now + timedelta(minutes=wanted.minutes)
        new = Block(_new_id(), client, until, _line(wanted.reason), by, state.now)
        return Edited(msgspec.structs.replace(state.restrictions, blocks=(*others, new)), "block", new)

    return edit


def remove(wanted: str, kinds: tuple[type[Area] | type[Block], ...] = (Area, Block)) -> Edit:
    """Remove the area or the block with this ID, if it is of these kinds."""

    def edit(state: _State) -> Edited:
        areas, blocks = state.restrictions.areas, state.restrictions.blocks
        items: tuple[Area | Block, ...] = (*areas, *blocks)
        item = next((one for one in items if one.id == wanted and isinstance(one, kinds)), None)
        if item is None:
            raise Problem(HTTPStatus.NOT_FOUND, "There is no area or block with this ID.")
        left = Restrictions(
            tuple(area for area in areas if area is not item),
            tuple(block for block in blocks if block is not item),
        )
        return Edited(left, "remove", item)

    return edit


async def change(redis: Redis, by: str, edit: Edit) -> Area | Block:
    """Edit the restrictions, and record it; returns the area or block.

    Raises a ``Problem``: by the edit; 503 if others edit them at the same time. Raises OSError if Redis
    doesn't answer, ReplyError if it refuses.
    """
    async with asyncio.timeout(TIMEOUT):
        connection = await redis.open(Connection)
        try:
            _, text, pairs, time = await connection.ask(
                ("WATCH", RESTRICTIONS), ("GET", RESTRICTIONS), ("HGETALL", KEYS), ("TIME",)
            )
            now = datetime.fromtimestamp(int(time[0]), UTC)
            restrictions, did, item = edit(_State(Restrictions.decode(text).at(now), decode(pairs), now))
            *_, results = await connection.ask(
                ("MULTI",),
                ("SET", RESTRICTIONS, restrictions.encode()),
                ("INCR", KEYS_VERSION),
                record(by, did, msgspec.to_builtins(item)),
                ("EXEC",),
            )
            if results is None:
                raise Problem.unavailable("Others changed areas or blocks at the same time", "no")
            await redis.confirm(connection)
            return item
        finally:
            connection.close()


async def read(redis: Redis) -> Restrictions:
    """The restrictions. Raises OSError and ReplyError as ``change`` does."""
    async with asyncio.timeout(TIMEOUT):
        connection = await redis.open(Connection)
        try:
            text, time = await connection.ask(("GET", RESTRICTIONS), ("TIME",))
            return Restrictions.decode(text).at(datetime.fromtimestamp(int(time[0]), UTC))
        finally:
            connection.close()


async def acts(redis: Redis, limit: int) -> list[Act]:
    """The newest acts, the newest first. Raises OSError and ReplyError as ``change`` does."""
    async with asyncio.timeout(TIMEOUT):
        connection = await redis.open(Connection)
        try:
            [found] = await connection.ask(("XREVRANGE", ACTS, "+", "-", "COUNT", limit))
        finally:
            connection.close()
    return [
        Act(
            datetime.fromtimestamp(int(entry.partition(b"-")[0]) / 1000, UTC),
            fields[1].decode(),
            fields[3].decode(),
            msgspec.json.decode(fields[5]),
        )
        for entry, fields in found
    ]


def record(by: str, did: Did, what: dict[str, Any]) -> Command:
    """The command that records an act."""
    return ("XADD", ACTS, "MAXLEN", MOST_ACTS, "*", "by", by, "did", did, "what", msgspec.json.encode(what))


def _client(text: str, keys: dict[str, Key]) -> str:
    """A client's name, with an IPv6 address as its /64. Raises a 422 ``Problem``."""
    kind, _, rest = text.partition(":")
    if kind == "key" and rest in keys:
        return text
    if kind == "key":
        raise Problem.invalid("client", "must name a key that exists")
    if kind == "addr":
        try:
            return addresses.name(addresses.parse(rest))
        except ValueError:
            pass
    raise Problem.invalid("client", "must be key:NAME or addr:ADDRESS, as in addr:192.0.2.7")


def _check_number(number: int, what: str) -> None:
    if number >= MOST:
        raise Problem(HTTPStatus.CONFLICT, f"There are {MOST} {what} already: remove some.")


def _new_id() -> str:
    return secrets.token_hex(4)


def _line(text: str) -> str:
    """A text as one line without control characters."""
    return " ".join("".join(letter if letter.isprintable() else " " for letter in text).split())


def _because(reason: str) -> str:
    return f": {reason.rstrip('.')}" if reason else ""


def _shown(item: object) -> str:
    return msgspec.json.encode(item).decode()


async def execute(arguments: argparse.Namespace, settings: Settings) -> str:
    """Execute a command, and return what it prints: a line of JSON for each area, block or act."""
    redis = Redis(settings)
    if arguments.command == "list":
        restrictions = await read(redis)
        return "\n".join(map(_shown, (*restrictions.areas, *restrictions.blocks)))
    if arguments.command == "acts":
        return "\n".join(map(_shown, await acts(redis, MOST_ACTS)))
    by = f"operator:{arguments.user}"
    if arguments.command == "protect":
        canvas = Canvas(settings.canvas_width, settings.canvas_height)
        edit = protect(WantedArea(arguments.area, arguments.reason), by, canvas)
    elif arguments.command == "block":
        minutes = arguments.seconds // 60
        if minutes > LONGEST_BLOCK:
            raise Problem.invalid("--for", f"must be at most {LONGEST_BLOCK // 1440}d")
        edit = block(WantedBlock(arguments.client, minutes, arguments.reason), by)
    else:
        edit = remove(arguments.id)
    return _shown(await change(redis, by, edit))


def parse(words: Sequence[str]) -> argparse.Namespace:
    """Parse the command line; exits with 2 and a message if it is invalid."""
    parser = argparse.ArgumentParser(prog="python -m pixel.moderation", description="Areas and blocks.")
    parser.add_argument(
        "--user", default=os.environ.get("OPERATOR") or getpass.getuser(), help="the operator"
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands.add_parser("list", help="list the protected areas and the blocks")
    commands.add_parser("acts", help="list what moderators and operators did, the newest first")
    one = commands.add_parser("protect", help="protect an area: only moderators may write in it")
    one.add_argument("area", help="x,y,width,height")
    one.add_argument("--reason", default="", help="shown to clients that are refused")
    one = commands.add_parser("block", help="refuse the writes of a key or an address for a time")
    one.add_argument("client", help="key:NAME or addr:ADDRESS")
    one.add_argument("--for", dest="seconds", type=period, required=True, help="as in 90m, 12h or 30d")
    one.add_argument("--reason", default="", help="shown to the client")
    one = commands.add_parser("remove", help="remove an area or a block")
    one.add_argument("id", help="as in the list")
    parsed = parser.parse_args(words)
    if len(getattr(parsed, "reason", "")) > 200:
        parser.error("--reason: at most 200 characters")
    return parsed


def main() -> int:
    """Execute the command line's command."""
    arguments = parse(sys.argv[1:])
    return run_command("pixel.moderation", lambda: execute(arguments, load()))


if __name__ == "__main__":
    sys.exit(main())
