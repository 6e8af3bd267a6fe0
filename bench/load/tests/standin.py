"""A small pixel service with faults that the tests select."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from enum import Enum, auto
from typing import Any

WIDTH, HEIGHT = 64, 32


class Deed(Enum):
    """The behaviour of the service for one write."""

    STORE = auto()
    LIE = auto()  # acknowledges, and stores nothing
    GARBLE = auto()  # acknowledges, and stores something else
    DROP = auto()  # closes the connection without an answer
    STORE_AND_DROP = auto()
    STALL = auto()  # answers after the timeout
    BUSY = auto()  # 429
    BUSY_YET_STORE = auto()
    BROKEN = auto()  # 503
    ECHO_ANOTHER = auto()  # 200, but acknowledges another write
    REPEAT_LATER = auto()  # stores and acknowledges, and stores the same again later
    BROKEN_YET_STORE_LATER = auto()  # 503, and stores it later
    PROMISE_NOTHING_YET_STORE = auto()  # 503 "nothing was written", and stores it


STORING = {
    *(Deed.STORE, Deed.STORE_AND_DROP, Deed.BUSY_YET_STORE, Deed.REPEAT_LATER),
    Deed.PROMISE_NOTHING_YET_STORE,
}


class StandIn:
    """Serves on its own port, in its own thread."""

    def __init__(self, deed: Callable[[int], Deed] = lambda _: Deed.STORE, whole_canvas: bool = True) -> None:
        self.canvas = bytearray(WIDTH * HEIGHT * 3)
        self.deed = deed
        self.whole_canvas = whole_canvas
        self.close_each = False
        self.delay = 0.0
        self.broken_from_row = HEIGHT  # writes to this row and those below it are answered 503
        self.later = 0.2  # seconds until a late write is executed
        self.writes = 0
        self.port = 0
        self.changes: list[list[Any]] = []  # of the event stream; a change's ID is its number
        self.silent_changes = 0  # the next ones are not in the stream
        self.false_changes = 0  # the next ones are followed by another value in the stream only

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @contextlib.contextmanager
    def serving(self) -> Iterator[StandIn]:
        ready = threading.Event()
        stopped = asyncio.Event()
        loop = asyncio.new_event_loop()

        async def serve() -> None:
            server = await asyncio.start_server(self._converse, "127.0.0.1", 0)
            self.port = server.sockets[0].getsockname()[1]
            ready.set()
            await stopped.wait()
            server.close()
            others = asyncio.all_tasks() - {asyncio.current_task()}
            for task in others:
                task.cancel()
            await asyncio.gather(*others, return_exceptions=True)
            await asyncio.sleep(0.01)  # for the last callbacks of the transports

        def in_thread() -> None:
            loop.run_until_complete(serve())
            loop.close()

        thread = threading.Thread(target=in_thread)
        thread.start()
        assert ready.wait(5)
        try:
            yield self
        finally:
            loop.call_soon_threadsafe(stopped.set)
            thread.join(5)

    async def _converse(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                method, path, _ = head.split(b"\r\n")[0].decode().split(" ")
                found = re.search(rb"(?i)content-length: (\d+)", head)
                body = await reader.readexactly(int(found[1]) if found else 0)
                last = self.close_each or b"\r\nconnection: close\r\n" in head.lower()
                if path == "/events":
                    await self._stream(head, writer)
                answer = await self._answer(method, path, body)
                if answer is None:
                    break
                writer.write(answer)
                if last:
                    break
        writer.close()

    async def _stream(self, head: bytes, writer: asyncio.StreamWriter) -> None:
        found = re.search(rb"(?i)last-event-id: (\d+)", head)
        sent = int(found[1]) if found else len(self.changes)
        writer.write(b"HTTP/1.1 200 X\r\nX-Pixel-Instance: stand-in\r\nConnection: close\r\n\r\n")
        while True:
            changes = self.changes[sent:]
            sent += len(changes)
            data = f"id: {sent}\ndata: {json.dumps(changes)}\n\n" if changes else ":\n\n"
            writer.write(data.encode())
            await writer.drain()
            await asyncio.sleep(0.1)

    async def _answer(self, method: str, path: str, body: bytes) -> bytes | None:
        if path == "/canvas.rgb" and self.whole_canvas:
            position = f"X-Pixel-Width: {WIDTH}\r\nX-Pixel-Event: {len(self.changes)}\r\n"
            return self._message(200, bytes(self.canvas), chunked=True, fields=position)
        if found := re.fullmatch(r"/pixel/(\d+)/(\d+)", path):
            x, y = int(found[1]), int(found[2])
            at = (y * WIDTH + x) * 3
            if method == "PUT":
                colour = json.loads(body)
                said = {"x": x, "y": y, **colour}
                return await self._write(at, bytes(colour[c] for c in "RGB"), said, said | {"x": -1})
            pixel = dict(zip("RGB", self.canvas[at : at + 3], strict=True))
            return self._message(200, json.dumps(pixel).encode())
        if path == "/pixel":
            pixel = json.loads(body)
            at = (pixel["y"] * WIDTH + pixel["x"]) * 3 + "RGB".index(pixel["channel"])
            said = {"status": "ok", "received": pixel}
            another = {"status": "ok", "received": {**pixel, "x": pixel["x"] + 1}}
            return await self._write(at, bytes([pixel["value"]]), said, another)
        return self._message(404, b"{}")

    async def _write(
        self, at: int, value: bytes, said: dict[str, Any], another: dict[str, Any]
    ) -> bytes | None:
        deed = self.deed(self.writes)
        self.writes += 1
        if at >= self.broken_from_row * WIDTH * 3:
            deed = Deed.BROKEN
        await asyncio.sleep(60 if deed is Deed.STALL else self.delay)
        if deed in STORING:
            self._store(at, value)
        if deed in (Deed.REPEAT_LATER, Deed.BROKEN_YET_STORE_LATER):
            asyncio.get_running_loop().call_later(self.later, self._store, at, value)
        match deed:
            case Deed.GARBLE:
                self._store(at, bytes((byte + 1) % 256 for byte in value))
            case Deed.DROP | Deed.STORE_AND_DROP:
                return None
            case Deed.BUSY | Deed.BUSY_YET_STORE:
                return self._message(429, b"{}")
            case Deed.BROKEN | Deed.BROKEN_YET_STORE_LATER:
                return self._message(503, b"{}")
            case Deed.PROMISE_NOTHING_YET_STORE:
                return self._message(503, b'{"detail":"Redis is away; nothing was written."}')
            case Deed.ECHO_ANOTHER:
                said = another
        return self._message(200, json.dumps(said).encode())

    def _store(self, at: int, value: bytes) -> None:
        self.canvas[at : at + len(value)] = value
        cell, first = divmod(at, 3)
        changes = [[cell % WIDTH, cell // WIDTH, "RGB"[first + n], byte] for n, byte in enumerate(value)]
        if self.silent_changes:
            self.silent_changes -= 1
            return
        self.changes += changes
        if self.false_changes:
            self.false_changes -= 1
            self.changes.append([*changes[0][:3], (value[0] + 1) % 256])

    def _message(self, status: int, body: bytes, chunked: bool = False, fields: str = "") -> bytes:
        head = f"HTTP/1.1 {status} X\r\nX-Pixel-Instance: stand-in\r\n{fields}"
        if self.close_each:
            head += "Connection: close\r\n"
        if chunked:
            parts = [body[at : at + 1000] for at in range(0, len(body), 1000)]
            body = b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in [*parts, b""])
            return (head + "Transfer-Encoding: chunked\r\n\r\n").encode() + body
        return (head + f"Content-Length: {len(body)}\r\n\r\n").encode() + body
