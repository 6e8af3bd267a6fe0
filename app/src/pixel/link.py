"""Links to Redis for reads: each is one connection, opened when needed and after a loss."""

import asyncio
import logging
from time import perf_counter
from typing import Any

from pixel import metrics
from pixel.cluster import Redis
from pixel.problems import Problem
from pixel.resp import Command, Connection, NotMasterError, ReplyError

_PAUSE = 0.05
"""Seconds until a read that a node has refused is sent to the new master."""

log = logging.getLogger(__name__)


class Health:
    """Logs when an operation begins to fail and when it works again, but no failure in between."""

    def __init__(self, operation: str) -> None:
        self._what = {
            "read": "reading from Redis",
            "write": "writing to Redis",
            "budget": "charging budgets in Redis",
            "keys": "reading keys from Redis",
        }[operation]
        self._failing = False
        self._errors = metrics.REDIS_ERRORS.labels(operation)

    def fails(self, reason: object) -> None:
        """Record a failure."""
        self._errors.inc()
        if not self._failing:
            log.warning("%s fails: %s", self._what, str(reason) or "no answer")
        self._failing = True

    def works(self) -> None:
        """Record a success."""
        if self._failing:
            log.info("%s works again", self._what)
        self._failing = False


class _Connection(Connection):
    """A connection that records when it last received data."""

    received = 0.0

    def data_received(self, data: bytes) -> None:
        self.received = perf_counter()
        super().data_received(data)


class Link:
    """A connection for reads: opened at the first one, and again after it was lost.

    Args:
        redis: where it connects to.
        timeout: seconds that Redis has to answer.
        operation: the reads' name in logs and metrics (see ``Health``).
    """

    def __init__(self, redis: Redis, timeout: float, operation: str = "read") -> None:
        self._redis = redis
        self._timeout = timeout
        self._is_timed = operation == "read"
        self._is_repeatable = operation in {"read", "keys"}
        self._health = Health(operation)
        self._connection: _Connection | None = None
        self._opening = asyncio.Lock()
        self._closed = False

    async def ask(self, *commands: Command, blocking: float = 0) -> list[Any]:
        """Send commands and return their replies.

        Args:
            commands: they are sent together, and answered in their order.
            blocking: for how many seconds the commands may block by themselves.

        Raises a 503 ``Problem`` if Redis refuses one, or doesn't answer all of them in time.
        """
        replies = await self.ask_each(*commands, blocking=blocking)
        if any(isinstance(reply, ReplyError) for reply in replies):
            raise Problem.unavailable("Redis refuses to be read.")
        return replies

    async def ask_each(self, *commands: Command, blocking: float = 0) -> list[Any]:
        """As ``ask``, with the errors of single commands among the replies."""
        started = perf_counter()
        try:
            async with asyncio.timeout(self._timeout + blocking):
                while True:
                    used = self._connection
                    connection = await self._connected()
                    started = perf_counter()
                    try:
                        replies: list[Any] = await connection.execute(commands)
                    except ConnectionError:
                        # Redis's host may have lost power since the last read, which shows only now.
                        if connection is not used or not self._is_repeatable:
                            raise
                        continue
                    refusal = next((reply for reply in replies if isinstance(reply, ReplyError)), None)
                    if not isinstance(refusal, NotMasterError):
                        break
                    # The next one is to the new master. Others may still wait for their refusals here.
                    if self._connection is connection:
                        self._connection = None
                        asyncio.get_running_loop().call_later(_PAUSE, connection.close)
                    await asyncio.sleep(_PAUSE)
        except (OSError, ReplyError) as error:
            self._drop(started, error)
            self._health.fails(error)
            raise Problem.unavailable("Redis can't be read.", elsewhere=True) from error
        if self._is_timed and not blocking:
            metrics.READ_SECONDS.observe(perf_counter() - started)
        if refusal is None:
            self._health.works()
        else:
            self._health.fails(refusal)
        return replies

    async def ask_at_once(self, *commands: Command) -> list[Any]:
        """Execute commands in one transaction; errors are among the returned replies."""
        *_, results = await self.ask(("MULTI",), *commands, ("EXEC",))
        return list(results)

    def close(self) -> None:
        """Close the connection for good."""
        self._closed = True
        if self._connection:
            self._connection.close()

    def _drop(self, started: float, error: Exception) -> None:
        """Close a connection that failed.

        If a read timed out behind large replies to others, the connection stays open for them: as
        long as data arrives, it works. The late reply is discarded.
        """
        connection = self._connection
        if connection and not (isinstance(error, TimeoutError) and connection.received > started):
            connection.close()

    async def _connected(self) -> Connection:
        if self._closed:
            raise ConnectionError("closed")
        async with self._opening:
            if self._connection is None or self._connection.closed:
                reconnecting = self._connection is not None
                self._connection = await self._redis.open(_Connection)
                metrics.RECONNECTS.inc(reconnecting)
            return self._connection
