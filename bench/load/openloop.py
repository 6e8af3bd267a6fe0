"""An open loop: sends requests at a constant rate, whatever the latency of the service.

A slow answer does not delay later requests, because users don't wait for each other. Latency is
measured from the time when a request was *due*, so it includes waiting for a free connection and
delays of this program. Requests are not retried.
"""

from __future__ import annotations

import asyncio
import gc
import json
import time
from array import array
from collections import Counter, deque
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from multiprocessing import get_context
from typing import Any, NamedTuple

from bench.load.figures import Spread
from bench.load.http1 import Answer, Connection, Target
from bench.load.ledger import Fate, Ledger, Write, fate_of_failure
from bench.load.pace import Timer

OPENING_AT_ONCE = 64
SWEEP_SECONDS = 0.05


@dataclass(frozen=True)
class Plan:
    """What to send.

    Attributes:
        rate: requests per second.
        seconds: duration.
        connections: number of connections that are opened first.
        timeout: seconds until a request is given up.
        reads: whether to read cells instead of writing them.
        spare: number of further connections, each opened for one request while all others wait for an
            answer.
    """

    rate: float
    seconds: float
    connections: int = 64
    timeout: float = 10.0
    reads: bool = False
    spare: int = 0

    @property
    def total(self) -> int:
        return round(self.rate * self.seconds)


class Sample(NamedTuple):
    """One request that was answered, failed or timed out."""

    due: float  # on the clock of time.monotonic()
    seconds: float  # from due until done
    error: str | None
    instance: str  # X-Pixel-Instance of the answer, or empty


@dataclass
class Second:
    """The requests that were due in one second of the run, and their results."""

    due: int = 0
    acknowledged: int = 0
    failed: int = 0
    latencies: array[float] = field(default_factory=lambda: array("d"))

    def as_json(self) -> dict[str, Any]:
        return {
            "due": self.due,
            "acknowledged": self.acknowledged,
            "failed": self.failed,
            "latency_ms": Spread.of_seconds(self.latencies).as_json(),
        }


@dataclass
class Report:
    """The result of a run. Latencies are of acknowledged requests and of timeouts."""

    plan: Plan
    statuses: Counter[int] = field(default_factory=Counter)
    errors: Counter[str] = field(default_factory=Counter)
    timeline: list[Second] = field(default_factory=list)
    lags: array[float] = field(default_factory=lambda: array("d"))
    connections_opened: int = 0
    connections_closed_by_service: int = 0
    started_at: float = 0.0
    wall_seconds: float = 0.0
    cpu_seconds: float = 0.0
    interrupted: bool = False

    @property
    def sent(self) -> int:
        return sum(second.due for second in self.timeline)

    @property
    def acknowledged(self) -> int:
        return sum(second.acknowledged for second in self.timeline)

    @property
    def failed(self) -> int:
        return sum(second.failed for second in self.timeline)

    @property
    def latency(self) -> Spread:
        return Spread.of_seconds(value for row in self.timeline for value in row.latencies)

    @property
    def lag(self) -> Spread:
        """The delays with which this program sent requests."""
        return Spread.of_seconds(self.lags)

    @property
    def cpu_share(self) -> float:
        return self.cpu_seconds / self.wall_seconds if self.wall_seconds else 0.0

    @classmethod
    def of_parts(cls, plan: Plan, parts: Sequence[Report]) -> Report:
        """Merges the reports of processes that each ran a part of the plan."""
        seconds = max(len(part.timeline) for part in parts)
        whole = cls(
            plan,
            timeline=[Second() for _ in range(seconds)],
            connections_opened=sum(part.connections_opened for part in parts),
            connections_closed_by_service=sum(part.connections_closed_by_service for part in parts),
            started_at=min(part.started_at for part in parts),
            wall_seconds=max(part.wall_seconds for part in parts),
            cpu_seconds=sum(part.cpu_seconds for part in parts),
            interrupted=any(part.interrupted for part in parts),
        )
        for part in parts:
            whole.statuses.update(part.statuses)
            whole.errors.update(part.errors)
            whole.lags.extend(part.lags)
            for second, more in zip(whole.timeline, part.timeline, strict=False):
                second.due += more.due
                second.acknowledged += more.acknowledged
                second.failed += more.failed
                second.latencies.extend(more.latencies)
        return whole

    def as_json(self) -> dict[str, Any]:
        return {
            "rate": self.plan.rate,
            "seconds": self.plan.seconds,
            "connections": self.plan.connections,
            "timeout": self.plan.timeout,
            "started_at": round(self.started_at, 3),
            "interrupted": self.interrupted,
            "sent": self.sent,
            "acknowledged": self.acknowledged,
            "failed": self.failed,
            "statuses": {str(status): count for status, count in sorted(self.statuses.items())},
            "errors": dict(self.errors),
            "latency_ms": self.latency.as_json(),
            "generator": {"lag_ms": self.lag.as_json(), "cpu_share": round(self.cpu_share, 3)},
            "connections_opened": self.connections_opened,
            "connections_closed_by_service": self.connections_closed_by_service,
            "timeline": [second.as_json() for second in self.timeline],
        }


class _Request:
    __slots__ = ("body", "done", "due", "lane", "number", "second")

    def __init__(self, number: int, due: float, second: Second, body: bytes) -> None:
        self.number = number
        self.due = due
        self.second = second
        self.body = body
        self.done = False
        self.lane: _Lane | None = None


class _Lane:
    """One connection and its request in flight."""

    __slots__ = ("connecting", "connection", "request")

    def __init__(self) -> None:
        self.connection: Connection | None = None
        self.connecting: asyncio.Task[None] | None = None
        self.request: _Request | None = None


def body_of(write: Write) -> bytes:
    x, y, channel, value = write
    return b'{"x":%d,"y":%d,"channel":"%s","value":%d}' % (x, y, channel.encode(), value)


def acknowledges(answer: bytes, body: bytes) -> bool:
    """Returns whether the answer acknowledges exactly this write."""
    if answer == b'{"status":"ok","received":' + body + b"}":
        return True
    try:
        said = json.loads(answer)
        return bool(said == {"status": "ok", "received": json.loads(body)})
    except ValueError:
        return False


class _Run:
    def __init__(
        self, target: Target, plan: Plan, ledger: Ledger, watch: Callable[[Sample], None] | None
    ) -> None:
        self.report = Report(plan)
        self._watch = watch
        self._target = target
        self._plan = plan
        self._ledger = ledger
        self._head = target.head("POST", "/pixel") + b"Content-Type: application/json\r\n"
        self._get = target.head("GET", "/pixel/\0").split(b"\0")
        self._loop = asyncio.get_running_loop()
        self._lanes = [_Lane() for _ in range(plan.connections)]
        self._spare: set[_Lane] = set()
        self._free: deque[_Lane] = deque()
        self._backlog: deque[_Request] = deque()
        self._open: deque[_Request] = deque()  # in order of due time
        self._unfinished = 0
        self._sent = 0
        self._start = 0.0
        self._all_sent = asyncio.Event()
        self._all_done = asyncio.Event()

    # Connections

    async def open_connections(self) -> None:
        gate = asyncio.Semaphore(OPENING_AT_ONCE)

        async def opening(lane: _Lane) -> None:
            async with gate, asyncio.timeout(self._plan.timeout):
                await self._connect(lane)

        try:
            async with asyncio.TaskGroup() as group:
                for lane in self._lanes:
                    group.create_task(opening(lane))
        except ExceptionGroup as several:
            self.close_connections()
            opened = self.report.connections_opened
            raise ConnectionError(
                f"only {opened} of {len(self._lanes)} connections opened: "
                f"{several.exceptions[0] or 'no answer in time'}"
            ) from several.exceptions[0]
        self._free.extend(self._lanes)

    async def _connect(self, lane: _Lane) -> Connection:
        def answered(connection: Connection, answer: Answer) -> None:
            if lane.connection is connection:
                self._answered(lane, answer)

        def lost(connection: Connection, error: Exception | None) -> None:
            if lane.connection is connection:
                self._lost(lane, error)

        lane.connection = connection = await self._target.connect(answered, lost)
        self.report.connections_opened += 1
        return connection

    def close_connections(self) -> None:
        for lane in (*self._lanes, *self._spare):
            self._drop(lane)

    def _drop(self, lane: _Lane) -> None:
        if lane.connecting is not None:
            lane.connecting.cancel()
            lane.connecting = None
        if lane.connection is not None:
            lane.connection.close()
            lane.connection = None

    # Requests

    async def send_all(self, stop: asyncio.Event | None) -> None:
        self._start = self._loop.time() + 0.05
        timer = Timer(lambda: self._tick(timer))
        stopping = asyncio.create_task(stop.wait()) if stop else None
        sweeping = asyncio.create_task(self._sweep())
        timer.at(self._start)
        sending = asyncio.create_task(self._all_sent.wait())
        try:
            await asyncio.wait(
                [sending, *([stopping] if stopping else [])],
                return_when=asyncio.FIRST_COMPLETED,
            )
            timer.close()
            self.report.interrupted = not self._all_sent.is_set()
            self._all_sent.set()
            if self._unfinished:
                await self._all_done.wait()
        finally:
            for task in (sweeping, stopping, sending):
                if task is not None:
                    task.cancel()

    def _tick(self, timer: Timer) -> None:
        """Sends all requests that are due, and sets the timer for the next one."""
        while self._sent < self._plan.total:
            due = self._start + self._sent / self._plan.rate
            now = self._loop.time()
            if due > now:
                timer.at(due)
                return
            self._sent += 1
            self.report.lags.append(now - due)
            self._begin(due)
        self._all_sent.set()

    def _begin(self, due: float) -> None:
        index = int(due - self._start)
        while len(self.report.timeline) <= index:
            self.report.timeline.append(Second())
        second = self.report.timeline[index]
        second.due += 1
        number = self._ledger.open()
        request = _Request(number, due, second, body_of(self._ledger.write(number)))
        self._open.append(request)
        self._unfinished += 1
        if self._free:
            self._give(self._free.popleft(), request)
        elif len(self._spare) < self._plan.spare:
            lane = _Lane()
            self._spare.add(lane)
            self._give(lane, request)
        else:
            self._backlog.append(request)

    def _give(self, lane: _Lane, request: _Request) -> None:
        lane.request = request
        request.lane = lane
        if lane.connection is not None:
            self._send(lane.connection, request)
        else:
            lane.connecting = asyncio.create_task(self._connect_and_send(lane, request))

    def _send(self, connection: Connection, request: _Request) -> None:
        self._ledger.close(request.number, Fate.UNKNOWN)  # until there is an answer
        if self._plan.reads:
            x, y, _, _ = self._ledger.write(request.number)
            connection.send((b"%d/%d" % (x, y)).join(self._get) + b"\r\n")
            return
        length = b"Content-Length: %d\r\n\r\n" % len(request.body)
        connection.send(self._head + length + request.body)

    async def _connect_and_send(self, lane: _Lane, request: _Request) -> None:
        try:
            connection = await self._connect(lane)
        except OSError:
            lane.connecting = None
            self._finish(request, "cannot connect")
            self._release(lane)
            return
        lane.connecting = None
        self._send(connection, request)

    def _answered(self, lane: _Lane, answer: Answer) -> None:
        request = lane.request
        if not answer.reusable:
            self._drop(lane)
            self.report.connections_closed_by_service += 1
        if request is None:
            return
        self.report.statuses[answer.status] += 1
        if 200 <= answer.status < 300:
            if self._plan.reads or acknowledges(answer.body, request.body):
                self._ledger.close(request.number, Fate.ACKNOWLEDGED)
                self._finish(request, instance=answer.instance)
            else:
                self._finish(request, "answer is not an acknowledgement")
        else:
            self._ledger.close(request.number, fate_of_failure(answer.status, answer.body))
            self._finish(request, f"status {answer.status}")
        self._release(lane)

    def _lost(self, lane: _Lane, error: Exception | None) -> None:
        lane.connection = None
        self.report.connections_closed_by_service += 1
        if lane.request is not None:
            broken = isinstance(error, OSError) or error is None
            self._finish(lane.request, "connection lost" if broken else f"not HTTP: {error}")
            self._release(lane)

    def _finish(
        self, request: _Request, error: str | None = None, late: bool = False, instance: str = ""
    ) -> None:
        request.done = True
        seconds = self._loop.time() - request.due
        if error is None:
            request.second.acknowledged += 1
        else:
            request.second.failed += 1
            self.report.errors[error] += 1
        if error is None or late:
            request.second.latencies.append(seconds)
        if self._watch is not None:
            self._watch(Sample(request.due, seconds, error, instance))
        self._unfinished -= 1
        if self._unfinished == 0 and self._all_sent.is_set():
            self._all_done.set()

    def _release(self, lane: _Lane) -> None:
        lane.request = None
        if lane in self._spare:
            self._spare.remove(lane)
            self._drop(lane)
            return
        while self._backlog:
            request = self._backlog.popleft()
            if not request.done:
                self._give(lane, request)
                return
        self._free.append(lane)

    async def _sweep(self) -> None:
        """Fails requests that have timed out, and closes their connections: an answer may still arrive."""
        while True:
            await asyncio.sleep(SWEEP_SECONDS)
            horizon = self._loop.time() - self._plan.timeout
            freed = []
            while self._open and (self._open[0].done or self._open[0].due < horizon):
                request = self._open.popleft()
                if request.done:
                    continue
                if request.lane is not None:
                    freed.append(request.lane)
                self._finish(request, self._reason_of_delay(request), late=True)
            for lane in freed:
                self._drop(lane)
                self._release(lane)

    def _reason_of_delay(self, request: _Request) -> str:
        if request.lane is None:
            return "no free connection in time"
        if self._ledger.fate(request.number) is Fate.UNSENT:
            return "cannot connect"
        return "no answer in time"


async def run(
    target: Target,
    plan: Plan,
    ledger: Ledger,
    progress: Callable[[Report], None] | None = None,
    stop: asyncio.Event | None = None,
    watch: Callable[[Sample], None] | None = None,
) -> Report:
    """Sends the plan's requests on time, and waits until each is answered, failed or timed out.

    Args:
        progress: called once a second.
        stop: when set, no more requests are sent.
        watch: called with every request that is done.

    Raises:
        OSError: the connections could not be opened.
    """
    state = _Run(target, plan, ledger, watch)
    await state.open_connections()
    report = state.report
    gc.collect()
    gc.freeze()
    cpu, wall = time.process_time(), time.monotonic()
    report.started_at = time.time()
    showing = asyncio.create_task(_show(report, progress)) if progress else None
    try:
        await state.send_all(stop)
    finally:
        if showing is not None:
            showing.cancel()
        report.wall_seconds = time.monotonic() - wall
        report.cpu_seconds = time.process_time() - cpu
        state.close_connections()
        gc.unfreeze()
    return report


async def _show(report: Report, progress: Callable[[Report], None]) -> None:
    while True:
        await asyncio.sleep(1)
        progress(report)


async def run_together(urls: Sequence[str], plan: Plan, processes: int) -> list[Report]:
    """Runs the plan on all addresses concurrently, divided among processes; one report per address.

    For reads only: each process has its own ledger, so the processes would write to the same cells.
    """
    if processes == 1:
        return await _run_each(urls, plan)
    part = replace(plan, rate=plan.rate / processes, connections=max(1, plan.connections // processes))
    loop = asyncio.get_running_loop()
    # Spawned: a fork would inherit this loop and its sockets.
    with ProcessPoolExecutor(processes, get_context("spawn")) as pool:
        parts = await asyncio.gather(
            *(loop.run_in_executor(pool, _run_apart, urls, part) for _ in range(processes))
        )
    return [Report.of_parts(plan, reports) for reports in zip(*parts, strict=True)]


def _run_apart(urls: Sequence[str], plan: Plan) -> list[Report]:
    return asyncio.run(_run_each(urls, plan))


async def _run_each(urls: Sequence[str], plan: Plan) -> list[Report]:
    return await asyncio.gather(*(run(Target.parse(url), plan, Ledger()) for url in urls))
