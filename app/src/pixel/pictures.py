"""Pictures of the canvas, each read and encoded once, however many ask for it."""

import asyncio
from collections import OrderedDict
from hashlib import blake2b

from pixel.canvas import Region, encode_png
from pixel.store import Store
from pixel.stream import EventId

KEPT_PICTURES = 4
KEPT_BYTES = 32 * 1024 * 1024
"""What a worker keeps of the pictures that it was asked for last."""


class Picture:
    """A region of the canvas as it stood after an event; ``raw`` is three bytes (R, G, B) a pixel.

    ``digest`` stands for the pixels: it changes if and only if they do.
    """

    def __init__(self, region: Region, event: EventId, raw: bytes, digest: str) -> None:
        self.region = region
        self.event = event
        self.raw = raw
        self.digest = digest
        self._pngs: dict[int, asyncio.Task[bytes]] = {}

    async def png(self, scale: int) -> bytes:
        """As a PNG, each pixel a square of ``scale`` x ``scale``."""
        if scale not in self._pngs:
            work = asyncio.to_thread(encode_png, self.raw, self.region.w, self.region.h, scale)
            self._pngs[scale] = asyncio.create_task(work)
        # Whoever goes away takes nobody else's picture along.
        return await asyncio.shield(self._pngs[scale])


class _Frame:
    """Where the newest picture of a region hangs."""

    def __init__(self) -> None:
        self.lock = asyncio.Lock()
        self.checked = 0.0
        self.picture: Picture | None = None


class Gallery:
    """The pictures that this worker was asked for last."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._frames: OrderedDict[Region, _Frame] = OrderedDict()

    async def picture(self, region: Region) -> Picture:
        """The region as it stands now. Raises a 503 ``Problem``."""
        asked = asyncio.get_running_loop().time()
        frame = self._frames.setdefault(region, _Frame())
        self._frames.move_to_end(region)
        async with frame.lock:
            # What somebody else began to look at after we had asked is new enough.
            if frame.picture is None or frame.checked < asked:
                checked = asyncio.get_running_loop().time()
                frame.picture = await self._look(region, frame.picture)
                frame.checked = checked
                self._forget()
            return frame.picture

    async def _look(self, region: Region, known: Picture | None) -> Picture:
        if known and known.event == await self._store.last_event():
            return known
        event, tiles = await self._store.snapshot(region.tile_keys())
        raw, digest = await asyncio.to_thread(_assemble, region, tiles)
        if known and known.digest == digest:
            known.event = event
            return known
        return Picture(region, event, raw, digest)

    def _forget(self) -> None:
        kept = sum(len(frame.picture.raw) for frame in self._frames.values() if frame.picture)
        while len(self._frames) > KEPT_PICTURES or (len(self._frames) > 1 and kept > KEPT_BYTES):
            _, frame = self._frames.popitem(last=False)
            kept -= len(frame.picture.raw) if frame.picture else 0


def _assemble(region: Region, tiles: list[bytes | None]) -> tuple[bytes, str]:
    raw = region.assemble(tiles)
    return raw, blake2b(raw, digest_size=16).hexdigest()
