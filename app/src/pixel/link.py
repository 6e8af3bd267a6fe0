"""Questions to Redis: a connection that is opened when it is needed, and again after a loss."""

import asyncio
import logging
from time import perf_counter
from typing import Any

from pixel import metrics
from pixel.problems import Problem
from pixel.resp import Command, Connection, ReplyError, Server

log = logging.getLogger(__name__)


class Health:
    """Logs when something begins to fail and when it works again, and nothing in between."""

    def __init__(self, operation: str) -> None:
        self._what = {"read": "reading from Redis", "write": "writing to Redis"}[operation]
        self._failing = False
        self._errors = metrics.REDIS_ERRORS.labels(operation)

    def fails(self, reason: object) -> None:
        """It has failed."""
        self._errors.inc()
        if not self._failing:
            log.warning("%s fails: %s", self._what, str(reason) or "no answer")
        self._failing = True

    def works(self) -> None:
        """It has worked."""
        if self._failing:
            log.info("%s works again", self._what)
        self._failing = False


class Link:
    """A connection for questions, opened when there is one, and anew after it was lost."""

    def __init__(self, server: Server, timeout: float) -> None:
        self._server = server
        self._timeout = timeout
        self._health = Health("read")
        self._connection: Connection | None = None
        self._opening = asyncio.Lock()
        self._closed = False

    async def ask(self, *commands: Command, patience: float = 0) -> list[Any]:
        """The replies; ``patience`` is for commands that wait by themselves, in seconds.

        Raises a 503 ``Problem`` if Redis doesn't answer all of it in time.
        """
        try:
            async with asyncio.timeout(self._timeout + patience):
                connection = await self._connected()
                started = perf_counter()
                replies: list[Any] = await connection.execute(commands)
        except (OSError, ReplyError) as error:
            self._drop()
            self._health.fails(error)
            raise Problem.unavailable("Redis can't be read.") from error
        if not patience:
            metrics.READ_SECONDS.observe(perf_counter() - started)
        for reply in replies:
            if isinstance(reply, ReplyError):
                self._health.fails(reply)
                raise Problem.unavailable("Redis refuses to be read.")
        self._health.works()
        return replies

    async def ask_at_once(self, *commands: Command) -> list[Any]:
        """The replies to commands between which nothing changes; errors are among them."""
        *_, results = await self.ask(("MULTI",), *commands, ("EXEC",))
        return list(results)

    def close(self) -> None:
        """Let go of the connection, for good."""
        self._closed = True
        self._drop()

    def _drop(self) -> None:
        if self._connection:
            self._connection.close()

    async def _connected(self) -> Connection:
        if self._closed:
            raise ConnectionError("closed")
        async with self._opening:
            if self._connection is None or self._connection.closed:
                anew = self._connection is not None
                self._connection = await Connection.open(self._server)
                metrics.RECONNECTS.inc(anew)
            return self._connection
