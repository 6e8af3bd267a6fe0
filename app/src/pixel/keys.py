"""Keys: who may use the service. ``python -m pixel.keys`` creates, lists, revokes and rotates them.

A key is a random token of 256 bits. Redis stores only its SHA-256: a token that long can't be
guessed, so a slow or salted hash would add nothing. A revoked key stays in the list, because changes
in the history keep its name.
"""

import argparse
import asyncio
import logging
import re
import secrets
import sys
import time
from collections.abc import Callable, Coroutine, Sequence
from hashlib import sha256
from typing import Any, Literal, get_args

import msgspec

from pixel.cluster import Redis
from pixel.names import KEYS, KEYS_VERSION
from pixel.problems import Problem
from pixel.resp import Connection, ReplyError
from pixel.settings import MAX_BUDGET, Budget, load

PREFIX = "pixel_"
"""Start of every token, by which secret scanners find it."""

KeyScope = Literal["paint", "batch", "moderate"]
SCOPES: tuple[KeyScope, ...] = get_args(KeyScope)

TIMEOUT = 5.0
"""Seconds that Redis has to answer a command."""

log = logging.getLogger(__name__)

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,31}")
_PERIOD = re.compile(r"([1-9][0-9]{0,5})([mhd])")
_UNITS = {"m": 60, "h": 3600, "d": 86_400}


class Key(msgspec.Struct, frozen=True, omit_defaults=True):
    """A key as stored in Redis. Times are in seconds since the epoch."""

    hash: str
    """SHA-256 of the token, in hexadecimal."""

    scopes: tuple[str, ...]
    created: int
    expires: int | None = None
    revoked: int | None = None
    budget: Budget | None = None

    def state(self, now: float) -> str:
        """Whether the key can be used: ``valid``, ``revoked`` or ``expired``."""
        if self.revoked is not None:
            return "revoked"
        return "expired" if self.expires is not None and self.expires <= now else "valid"


class CommandError(Exception):
    """A command can't be executed; the message says why, and what to do."""


def hash_token(token: bytes) -> str:
    """The hash by which a token is found."""
    return sha256(token).hexdigest()


def decode(pairs: Sequence[bytes]) -> dict[str, Key]:
    """The keys by name, from Redis's reply to HGETALL; without those that this release can't read."""
    decoder = msgspec.json.Decoder(Key)
    keys = {}
    for name, value in zip(pairs[::2], pairs[1::2], strict=True):
        try:
            keys[name.decode()] = decoder.decode(value)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            log.warning("key %s can't be read: %s", name.decode(errors="replace"), error)
    return keys


def create(arguments: argparse.Namespace, keys: dict[str, Key], now: int) -> tuple[Key, str]:
    """A new key, and its token."""
    if arguments.name in keys:
        raise CommandError(f"there is a key {arguments.name} already; rotate it, or choose another name")
    token = _new_token()
    expires = now + arguments.expires if arguments.expires else None
    return Key(hash_token(token.encode()), arguments.scopes, now, expires, None, arguments.budget), token


def rotate(arguments: argparse.Namespace, keys: dict[str, Key], now: int) -> tuple[Key, str]:
    """The same key with a new token; the former one is no longer valid."""
    key = _find(arguments.name, keys)
    if (state := key.state(now)) != "valid":
        raise CommandError(f"key {arguments.name} is {state}; create another one")
    token = _new_token()
    return msgspec.structs.replace(key, hash=hash_token(token.encode())), token


def revoke(arguments: argparse.Namespace, keys: dict[str, Key], now: int) -> tuple[Key, str]:
    """The key, no longer valid."""
    key = _find(arguments.name, keys)
    return key if key.revoked else msgspec.structs.replace(key, revoked=now), ""


def table(keys: dict[str, Key], now: int) -> str:
    """The keys, one a line."""
    rows = [("NAME", "STATE", "SCOPES", "BUDGET", "CREATED", "EXPIRES")]
    for name, key in sorted(keys.items()):
        budget = f"{key.budget.per_minute}/min, {key.budget.burst} at once" if key.budget else "none"
        expires = _date(key.expires) if key.expires else "never"
        rows.append((name, key.state(now), ",".join(key.scopes), budget, _date(key.created), expires))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


Change = Callable[[argparse.Namespace, dict[str, Key], int], tuple[Key, str]]
"""A command that changes a key: from the arguments, the keys and the time, the key and what to print."""


async def execute(arguments: argparse.Namespace, redis: Redis) -> str:
    """Execute a command, and return what it prints."""
    async with asyncio.timeout(TIMEOUT):
        connection = await redis.open(Connection)
        try:
            _, pairs, redis_time = await connection.ask(("WATCH", KEYS), ("HGETALL", KEYS), ("TIME",))
            keys, now = decode(pairs), int(redis_time[0])
            if arguments.change is None:
                return table(keys, now)
            change: Change = arguments.change
            key, token = change(arguments, keys, now)
            hset = ("HSET", KEYS, arguments.name, msgspec.json.encode(key))
            *_, results = await connection.ask(("MULTI",), hset, ("INCR", KEYS_VERSION), ("EXEC",))
            if results is None:
                raise CommandError("another command changed a key at the same time; run this one again")
            await redis.confirm(connection)
            return token
        finally:
            connection.close()


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse the command line; exits with 2 and a message if it is invalid."""
    parser = argparse.ArgumentParser(prog="python -m pixel.keys", description="Manage keys.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    one = commands.add_parser("create", help="create a key, and print its token: it is shown only once")
    one.set_defaults(change=create)
    one.add_argument("name", type=_name)
    one.add_argument("--scopes", type=_scopes, required=True, help=f"one or more of {','.join(SCOPES)}")
    one.add_argument("--per-minute", type=_count, help="budget: channel writes a minute (default: no budget)")
    one.add_argument("--burst", type=_count, help="budget: channel writes at once (default: per minute)")
    one.add_argument("--expires", type=period, help="time until it expires: 90m, 12h, 30d (default: never)")
    for change, text in ((rotate, "replace a key's token, and print the new one"), (revoke, "revoke a key")):
        one = commands.add_parser(change.__name__, help=text)
        one.set_defaults(change=change)
        one.add_argument("name", type=_name)
    commands.add_parser("list", help="list all keys").set_defaults(change=None)
    parsed = parser.parse_args(arguments)
    if parsed.change is create:
        if parsed.burst and not parsed.per_minute:
            parser.error("--burst needs --per-minute")
        per_minute, burst = parsed.per_minute, parsed.burst or parsed.per_minute
        parsed.budget = Budget(per_minute, burst) if per_minute else None
    return parsed


def _new_token() -> str:
    return PREFIX + secrets.token_urlsafe(32)


def _find(name: str, keys: dict[str, Key]) -> Key:
    if name not in keys:
        raise CommandError(f"there is no key {name}; the keys are {', '.join(sorted(keys)) or 'none'}")
    return keys[name]


def _date(seconds: int) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.gmtime(seconds)) + "Z"


def _name(text: str) -> str:
    if not _NAME.fullmatch(text):
        raise argparse.ArgumentTypeError("1 to 32 letters, digits or . _ -, beginning with a letter or digit")
    return text


def _scopes(text: str) -> tuple[KeyScope, ...]:
    named = text.replace(" ", "").split(",")
    if unknown := [name for name in named if name not in SCOPES]:
        raise argparse.ArgumentTypeError(f"unknown scope {unknown[0]!r}; the scopes are {', '.join(SCOPES)}")
    return tuple(scope for scope in SCOPES if scope in named)


def _count(text: str) -> int:
    if not (text.isascii() and text.isdigit() and 1 <= int(text) <= MAX_BUDGET):
        raise argparse.ArgumentTypeError(f"an integer from 1 to {MAX_BUDGET}")
    return int(text)


def period(text: str) -> int:
    """Seconds of a time as in 90m, 12h or 30d. Raises ArgumentTypeError."""
    if not (match := _PERIOD.fullmatch(text)):
        raise argparse.ArgumentTypeError("a number of minutes, hours or days, as in 90m, 12h or 30d")
    return int(match[1]) * _UNITS[match[2]]


def run_command(program: str, command: Callable[[], Coroutine[Any, Any, str]]) -> int:
    """Run an operator's command, and print its output or why it failed; returns the exit status."""
    try:
        output = asyncio.run(command())
    except (CommandError, Problem, OSError, ReplyError) as error:
        print(f"{program}: {str(error) or 'Redis does not answer'}", file=sys.stderr)
        return 1
    if output:
        print(output)
    return 0


def main() -> int:
    """Execute the command line's command."""
    arguments = parse(sys.argv[1:])
    return run_command("pixel.keys", lambda: execute(arguments, Redis(load())))


if __name__ == "__main__":
    sys.exit(main())
