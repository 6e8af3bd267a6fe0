"""Access: what a request may do, by its key or as an anonymous one. ``protocol`` and the routes ask here.

Each worker keeps all keys and restrictions (``moderation``) in memory, and follows their version in Redis;
no request asks Redis. Protected areas are checked by the store, and only if there are any. A key
is found by the hash of its token: the time that this takes says nothing about the stored hashes.
"""

import asyncio
import logging
from collections.abc import Mapping
from functools import lru_cache
from http import HTTPStatus
from ipaddress import ip_network
from math import inf
from time import monotonic
from typing import Literal, NamedTuple

import msgspec

from pixel import addresses
from pixel.budgets import Writer
from pixel.keys import Key, KeyScope, hash_token
from pixel.moderation import Block, Protection, Restrictions
from pixel.names import budget_key
from pixel.problems import Problem, Refusal
from pixel.settings import Settings
from pixel.store import Store

FOLLOW_PAUSE = 0.5
"""Seconds between two reads of the keys' version."""

OUTDATED = 5.0
"""Seconds without a successful read after which no key is accepted, as it may have been revoked."""

ADDRESSES = 4096
"""Most client addresses whose names a worker remembers."""

_LOOPBACK = (ip_network("127.0.0.0/8"), ip_network("::1/128"))

Peer = tuple[str, int] | None
"""Address and port of a connection; None for a Unix socket."""

log = logging.getLogger(__name__)


class Rights(msgspec.Struct, frozen=True):
    """The author of a client's changes, null without a key, and the client's scopes."""

    author: str | None
    scopes: tuple[str, ...]


class _Holder(NamedTuple):
    """A key, and its holder as a writer."""

    key: Key
    writer: Writer


class _Client(NamedTuple):
    """The name of a client without a key, and the client as a writer."""

    name: str
    writer: Writer | None


class Access:
    """Decides what a request may do. Create it inside the event loop that uses it."""

    def __init__(self, store: Store, settings: Settings) -> None:
        self._store = store
        self._anonymous = settings.anonymous
        self._budget = settings.anonymous_budget
        self._exempt = (*_LOOPBACK, *settings.budget_exempt)
        self._records_addresses = settings.record_addresses
        # Whether clients without a key are all the same.
        self._is_uniform = self._anonymous == "paint" and not (self._budget or self._records_addresses)
        # Nothing is to be found out about a request without a key.
        self._is_open = self._is_uniform
        self.is_private = self._anonymous == "none"
        """Whether reading needs a key too."""
        self._holders: dict[str, _Holder] = {}
        # Headers with valid keys, which need not be hashed again until these times (monotonic).
        self._accepted: dict[bytes, tuple[_Holder, float]] = {}
        self._blocks: dict[str, Block] = {}
        self._version: bytes | None = None
        self._read = -inf
        self._client = lru_cache(ADDRESSES)(self._anonymous_client)
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Read the keys and the restrictions, and follow their changes from now on."""
        await self._refresh()
        self._task = asyncio.get_running_loop().create_task(self._follow(), name="keys")

    def close(self) -> None:
        """Stop following."""
        if self._task:
            self._task.cancel()

    def writer(self, headers: Mapping[bytes, bytes], peer: Peer, scope: KeyScope) -> Writer | None:
        """Who sends this request, which needs this scope; None if it is neither recorded nor counted.

        Raises a ``Problem``: 401 or 403; 503 if the keys can't be read.
        """
        authorization = headers.get(b"authorization")
        holder = None if authorization is None else self._holder(authorization)
        if holder is None:
            if self._anonymous != "paint" or scope == "moderate":
                raise _unauthorized("This request needs a key.", "no_key")
            if self._is_open:
                return None
            # The balancer replaces a client's own header. A Unix socket is used by this host only.
            client = self._client(
                headers.get(b"x-forwarded-for") or (peer[0].encode() if peer else b"127.0.0.1")
            )
            if self._blocks and client.name in self._blocks:
                self._blocks[client.name].check(self._store.now())
            return client.writer
        if self._blocks and holder.writer.author in self._blocks:
            self._blocks[holder.writer.author].check(self._store.now())
        if scope not in holder.key.scopes:
            raise Refusal(
                HTTPStatus.FORBIDDEN,
                f"This request needs a key with scope {scope}.",
                "scope",
                challenge=f', error="insufficient_scope", scope="{scope}"',
            )
        return holder.writer

    def rights(self, headers: Mapping[bytes, bytes]) -> Rights:
        """What a request may do. Raises a ``Problem``: 401; 503 if the keys can't be read."""
        holder = self._holder(headers.get(b"authorization", b""))
        if holder is not None:
            return Rights(holder.writer.author, holder.key.scopes)
        return Rights(None, ("paint", "batch") if self._anonymous == "paint" else ())

    def check_reader(self, headers: Mapping[bytes, bytes]) -> None:
        """Raise a ``Problem`` unless a request may read; a key of any scope may."""
        if self.is_private and self._holder(headers.get(b"authorization", b"")) is None:
            raise _unauthorized("Reading needs a key.", "no_key")

    def _holder(self, authorization: bytes) -> _Holder | None:
        """The holder of the key in this header; None if the header is for somebody else."""
        accepted = self._accepted.get(authorization)
        if accepted is not None and monotonic() < accepted[1]:
            return accepted[0]
        scheme, _, token = authorization.partition(b" ")
        if scheme.lower() != b"bearer":
            return None
        now = monotonic()
        until = self._read + OUTDATED
        if now > until:
            raise Problem.not_written("The keys can't be read")
        holder = self._holders.get(hash_token(token))
        state = holder.key.state(self._store.now()) if holder else "unknown"
        if holder is None or state != "valid":
            raise _unauthorized(f"The key is {state}.", "bad_key", ', error="invalid_token"')
        if holder.key.expires is not None:
            until = min(until, now + holder.key.expires - self._store.now())
        self._accepted[authorization] = holder, until
        return holder

    def _anonymous_client(self, text: bytes) -> _Client:
        """The client at an address."""
        try:
            address = addresses.parse(text.decode("latin-1"))
        except ValueError:
            # No balancer sends this. All such clients share a budget.
            return _Client("", Writer("", budget_key("addr:unknown"), self._budget))
        exempt = any(address in network for network in self._exempt)
        name = addresses.name(address)
        budget = None if exempt else self._budget
        author = name if self._records_addresses else ""
        return _Client(name, Writer(author, budget_key(name), budget) if author or budget else None)

    async def _follow(self) -> None:
        while True:
            await asyncio.sleep(FOLLOW_PAUSE)
            await self._refresh()

    async def _refresh(self) -> None:
        """Read the keys and the restrictions if their version has changed."""
        asked = monotonic()
        try:
            version = await self._store.keys_version()
            if version != self._version:
                version, keys, restrictions = await self._store.keys()
                self._holders = {
                    key.hash: _Holder(
                        key,
                        Writer(
                            f"key:{name}", budget_key(f"key:{name}"), key.budget, "moderate" in key.scopes
                        ),
                    )
                    for name, key in keys.items()
                }
                self._accepted = {}
                self._restrict(restrictions)
                self._version = version
            self._read = asked
        except Problem:
            # It may be restored to an earlier state, in which the version stands for other keys.
            self._version = None
        except Exception:
            log.exception("the keys could not be read")

    def _restrict(self, text: bytes | None) -> None:
        """Apply the restrictions in Redis."""
        try:
            restrictions = Restrictions.decode(text)
        except msgspec.DecodeError:
            log.exception("the restrictions in Redis are invalid; the former ones stay in force")
            return
        self._blocks = {block.client: block for block in restrictions.blocks}
        self._is_open = self._is_uniform and not self._blocks
        areas = restrictions.areas
        check = Protection(areas, self._store.canvas).check if areas else None
        self._store.check_writes("protection", check)


def _unauthorized(detail: str, reason: Literal["no_key", "bad_key"], challenge: str = "") -> Refusal:
    return Refusal(HTTPStatus.UNAUTHORIZED, detail, reason, challenge=challenge)
