"""Pictures of the canvas: concurrent requests for the same picture share one read and one encoding.

The work is bounded (see docs/security.md): one thread encodes, few pictures are read or encoded at a
time, and bytes count until they are sent. A request beyond a bound is refused with 503 at once. The
picture of the whole canvas, which every page loads, is always cached and needs no slot.
"""

import asyncio
import weakref
from collections import OrderedDict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from hashlib import blake2b
from http import HTTPStatus
from typing import Self

from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from pixel.canvas import Region, encode_png
from pixel.problems import Problem
from pixel.store import Store
from pixel.stream import EventId

KEPT_PICTURES = 4
KEPT_BYTES = 32 * 1024 * 1024
"""Most pictures, and most bytes, in a worker's cache."""

MAKING = 4
"""Most pictures of regions that are read or encoded at the same time."""

HELD_BYTES = 64 * 1024 * 1024
"""Most bytes of pictures in the cache or being sent; three times the canvas if that is more."""

CHUNK_BYTES = 256 * 1024
STALL_SECONDS = 20.0
"""A client that doesn't read the next chunk of a picture within this time is disconnected."""


class Picture:
    """A region of the canvas as of an event; ``raw`` has three bytes (R, G, B) per pixel.

    ``digest`` identifies the pixels: it changes if and only if they do.
    """

    def __init__(self, region: Region, event: EventId, raw: bytes, digest: str) -> None:
        self.region = region
        self.event = event
        self.raw = raw
        self.digest = digest
        self.pngs: dict[int, asyncio.Future[bytes]] = {}

    @property
    def size(self) -> int:
        """Bytes of the picture in memory."""
        pngs = [png.result() for png in self.pngs.values() if png.done() and not png.exception()]
        return len(self.raw) + sum(map(len, pngs))


class PictureResponse(Response):
    """A 200 that sends a picture in chunks. The picture counts as held until all are sent.

    Args:
        picture: the picture.
        content: the picture as raw bytes or as a PNG.
        headers: further headers of the response.
        kind: the media type of ``content``.
    """

    def __init__(self, picture: Picture, content: bytes, headers: dict[str, str], kind: str) -> None:
        super().__init__(content, headers=headers, media_type=kind)
        self._picture = picture

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        head = {"type": "http.response.start", "status": HTTPStatus.OK, "headers": self.raw_headers}
        await send(head)
        body = memoryview(self.body)
        for start in range(0, len(body), CHUNK_BYTES):
            end = start + CHUNK_BYTES
            chunk = {"body": bytes(body[start:end]), "more_body": end < len(body)}
            try:
                async with asyncio.timeout(STALL_SECONDS):
                    await send({"type": "http.response.body", **chunk})
            except TimeoutError:
                raise ClientDisconnect from None


class _Frame:
    """The newest picture of a region."""

    def __init__(self) -> None:
        self.lock = asyncio.Lock()
        self.checked = 0.0
        self.picture: Picture | None = None


class PictureCache:
    """A worker's cache of the most recently requested pictures."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._whole = Region(0, 0, store.canvas.width, store.canvas.height)
        self._limit = max(HELD_BYTES, 3 * 3 * self._whole.w * self._whole.h)
        self._frames: OrderedDict[Region, _Frame] = OrderedDict()
        self._held: weakref.WeakSet[Picture] = weakref.WeakSet()
        self._making = 0
        # A separate pool: small work must not wait for a picture.
        self._pool = ThreadPoolExecutor(1, "pictures")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    async def picture(self, region: Region) -> Picture:
        """The current picture of a region. Raises a 503 ``Problem``."""
        asked = asyncio.get_running_loop().time()
        frame = self._frames.setdefault(region, _Frame())
        self._frames.move_to_end(region)
        try:
            async with frame.lock:
                # A check that began after this request arrived is recent enough.
                if frame.picture is None or frame.checked < asked:
                    checked = asyncio.get_running_loop().time()
                    with self._slot(region):
                        frame.picture = await self._refresh(region, frame.picture)
                    frame.checked = checked
                return frame.picture
        finally:
            # Refused or failed: an empty frame must not evict a picture.
            unmade = frame.picture is None and not frame.lock.locked()
            if unmade and self._frames.get(region) is frame:
                del self._frames[region]
            self._evict()

    async def png(self, picture: Picture, scale: int) -> bytes:
        """A picture as a PNG, each pixel a square of ``scale`` x ``scale``.

        Raises a 503 ``Problem``.
        """
        if scale not in picture.pngs:
            picture.pngs[scale] = asyncio.ensure_future(self._encode(picture, scale))
            picture.pngs[scale].add_done_callback(lambda _: self._forget_failure(picture, scale))
        # A client that disconnects must not cancel the encoding for other clients.
        return await asyncio.shield(picture.pngs[scale])

    async def _encode(self, picture: Picture, scale: int) -> bytes:
        region = picture.region
        with self._slot(region):
            return await asyncio.get_running_loop().run_in_executor(
                self._pool, encode_png, picture.raw, region.w, region.h, scale
            )

    def _forget_failure(self, picture: Picture, scale: int) -> None:
        if picture.pngs[scale].cancelled() or picture.pngs[scale].exception():
            del picture.pngs[scale]

    @contextmanager
    def _slot(self, region: Region) -> Iterator[None]:
        if sum(picture.size for picture in self._held) > self._limit:
            raise Problem.unavailable("Too many pictures are being sent.")
        if region == self._whole:
            yield
            return
        if self._making >= MAKING:
            raise Problem.unavailable("Too many pictures are being made.")
        self._making += 1
        try:
            yield
        finally:
            self._making -= 1

    async def _refresh(self, region: Region, known: Picture | None) -> Picture:
        if known and known.event == await self._store.last_event():
            return known
        event, tiles = await self._store.snapshot(region.tile_keys())
        raw, digest = await asyncio.get_running_loop().run_in_executor(self._pool, _assemble, region, tiles)
        if known and known.digest == digest:
            known.event = event
            return known
        picture = Picture(region, event, raw, digest)
        self._held.add(picture)
        return picture

    def _evict(self) -> None:
        """Drop the least recently requested pictures, except the whole canvas."""
        kept = sum(frame.picture.size for frame in self._frames.values() if frame.picture)
        for region, frame in list(self._frames.items())[:-1]:
            if len(self._frames) <= KEPT_PICTURES and kept <= KEPT_BYTES:
                return
            if region != self._whole and not frame.lock.locked():
                kept -= frame.picture.size if frame.picture else 0
                del self._frames[region]


def _assemble(region: Region, tiles: list[bytes | None]) -> tuple[bytes, str]:
    raw = region.assemble(tiles)
    return raw, blake2b(raw, digest_size=16).hexdigest()
