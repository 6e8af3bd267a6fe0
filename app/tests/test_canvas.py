"""Geometry, and the canvas as bytes and as a picture."""

import asyncio
from io import BytesIO

import pytest
from conftest import RedisServer
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from starlette.requests import ClientDisconnect
from starlette.testclient import TestClient

from pixel import pictures
from pixel.app import create_app
from pixel.canvas import TILE, TILE_BYTES, Region, locate
from pixel.names import tile_key
from pixel.pictures import PictureCache, PictureResponse
from pixel.pixel import Change
from pixel.problems import Problem
from pixel.store import Store

SWAGGER = "/docs/static/swagger-ui-bundle.js"
SIDE = st.integers(1, 600)


def test_pixels_lie_in_tiles() -> None:
    assert locate(0, 0) == ("pixel:{0}:tile:0:0", 0)
    assert locate(255, 0) == ("pixel:{0}:tile:0:0", 255 * 3)
    assert locate(256, 0) == ("pixel:{0}:tile:1:0", 0)
    assert locate(300, 700) == ("pixel:{0}:tile:1:2", ((700 - 512) * 256 + 44) * 3)
    assert locate(255, 255)[1] + 3 == TILE_BYTES


@given(st.builds(Region, st.integers(0, 600), st.integers(0, 600), SIDE, SIDE), st.data())
def test_a_region_is_put_together_from_its_tiles(region: Region, data: st.DataObject) -> None:
    cells = {
        (
            data.draw(st.integers(region.x, region.x + region.w - 1)),
            data.draw(st.integers(region.y, region.y + region.h - 1)),
        ): n
        for n in range(1, 9)
    }
    tiles: dict[str, bytearray] = {}
    for (x, y), value in cells.items():
        key, place = locate(x, y)
        tiles.setdefault(key, bytearray(TILE_BYTES))[place] = value
    found = [bytes(tiles[key]) if key in tiles else None for key in region.tile_keys()]
    expected = bytearray(region.w * region.h * 3)
    for (x, y), value in cells.items():
        expected[((y - region.y) * region.w + x - region.x) * 3] = value
    assert region.assemble(found) == expected


def test_a_tile_that_is_too_short_is_black_at_its_end() -> None:
    raw = Region(0, 0, TILE, TILE).assemble([b"\1\2\3"])
    assert raw == b"\1\2\3".ljust(TILE_BYTES, b"\0")
    assert tile_key(0, 0) == "pixel:{0}:tile:0:0"


def paint(client: TestClient, x: int, y: int, red: int) -> None:
    assert client.put(f"/pixel/{x}/{y}", json={"R": red, "G": 2, "B": 3}).status_code == 200


def test_the_canvas_is_served_raw(client: TestClient) -> None:
    empty = client.get("/canvas.rgb")
    assert empty.content == bytes(1024 * 1024 * 3)
    assert empty.headers["x-pixel-event"] == "0-0"
    assert empty.headers["content-type"] == "application/octet-stream"
    assert empty.headers["cache-control"] == "max-age=1, stale-while-revalidate=2"
    paint(client, 700, 300, 9)
    answer = client.get("/canvas.rgb?after=1-0")
    place = (300 * 1024 + 700) * 3
    assert answer.content[place : place + 3] == bytes([9, 2, 3])
    assert sum(answer.content) == 14
    assert answer.headers["x-pixel-event"] != "0-0"
    part = client.get("/canvas.rgb?x=699&y=299&w=2&h=3")
    assert part.content == bytes(9) + bytes([9, 2, 3]) + bytes(6)
    assert (part.headers["x-pixel-width"], part.headers["x-pixel-height"]) == ("2", "3")


@pytest.mark.parametrize(("width", "height"), [(1, 1), (300, 7), (256, 257), (1000, 600)])
def test_a_canvas_of_any_size_works(redis_server: RedisServer, width: int, height: int) -> None:
    settings = redis_server.settings(canvas_width=width, canvas_height=height)
    with TestClient(create_app(settings)) as client:
        paint(client, width - 1, height - 1, 200)
        raw = client.get("/canvas.rgb").content
        assert len(raw) == width * height * 3
        assert raw[-3:] == bytes([200, 2, 3])
        image = Image.open(BytesIO(client.get("/canvas.png").content))
        assert image.size == (width, height)
        assert image.tobytes() == raw
        assert client.put(f"/pixel/{width}/0", json={"R": 1, "G": 1, "B": 1}).status_code == 404
        assert client.get(f"/canvas.png?w={width + 1}").status_code == 422


def test_a_picture_can_be_cropped_and_scaled(client: TestClient) -> None:
    paint(client, 11, 21, 90)
    answer = client.get("/canvas.png?x=10&y=20&w=3&h=2&scale=16")
    assert answer.headers["content-type"] == "image/png"
    image = Image.open(BytesIO(answer.content))
    assert image.size == (48, 32)
    assert {image.getpixel((x, y)) for x in range(16, 32) for y in range(16, 32)} == {(90, 2, 3)}
    assert image.getpixel((15, 16)) == image.getpixel((16, 15)) == (0, 0, 0)


@pytest.mark.parametrize(
    ("query", "field"),
    [("x=1024", "w"), ("x=1000&w=25", "w"), ("y=1&h=1024", "h"), ("w=0", "w"), ("x=-1", "x"),
     ("x=a", "x"), ("after=never", "after"), ("scale=0", "scale"), ("scale=17", "scale"), ("scale=5", "w"),
     ("w=513&h=512&scale=4", "w")],
)  # fmt: skip
def test_an_invalid_region_is_named(client: TestClient, query: str, field: str) -> None:
    answer = client.get(f"/canvas.png?{query}")
    assert answer.status_code == 422
    assert answer.json()["errors"][0]["field"] == field


def test_the_tag_changes_if_and_only_if_the_canvas_does(client: TestClient) -> None:
    for path in ("/canvas.rgb", "/canvas.png", "/canvas.png?w=10&scale=2"):
        paint(client, 5, 5, 1)
        first = client.get(path)
        tag = first.headers["etag"]
        assert client.get(path, headers={"If-None-Match": "*"}).status_code == 304
        for known in (tag, f"W/{tag}", f'"other", {tag}'):
            answer = client.get(path, headers={"If-None-Match": known})
            assert answer.status_code == 304
            assert answer.content == b""
            assert answer.headers["etag"] == tag
        paint(client, 5, 5, 1)  # an event, but no change
        again = client.get(path, headers={"If-None-Match": tag})
        assert again.status_code == 304
        assert again.headers["x-pixel-event"] > first.headers["x-pixel-event"]
        paint(client, 5, 5, 2)
        answer = client.get(path, headers={"If-None-Match": tag})
        assert answer.status_code == 200
        assert answer.headers["etag"] != tag


def test_head_is_get_without_the_body(client: TestClient) -> None:
    for path in ("/canvas.rgb", "/canvas.png", "/ping", "/pixel/1/1", "/", "/docs", SWAGGER):
        got, head = client.get(path), client.head(path)
        assert head.status_code == 200
        assert head.content == b""
        assert {**head.headers} == {**got.headers}


async def test_a_picture_is_read_and_encoded_once_for_all_requests(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded: list[int] = []

    def encode(raw: bytes, width: int, height: int, scale: int) -> bytes:
        encoded.append(scale)
        return b"png"

    monkeypatch.setattr(pictures, "encode_png", encode)
    cache = PictureCache(store)
    region = Region(0, 0, 64, 64)

    async def show(scale: int = 1) -> None:
        await cache.png(await cache.picture(region), scale)

    await asyncio.gather(*(show() for _ in range(50)), show(2))
    await show()
    assert sorted(encoded) == [1, 2]
    await store.write([Change(1000, 1000, 0, 1)])  # outside the region
    await show()
    assert sorted(encoded) == [1, 2]
    await store.write([Change(1, 1, 0, 1)])
    gone = asyncio.create_task(show())
    await asyncio.sleep(0)
    gone.cancel()
    await show()
    assert sorted(encoded) == [1, 1, 2]


async def test_a_picture_shows_what_was_written_before_it_was_asked_for(store: Store) -> None:
    cache = PictureCache(store)

    async def write_and_look(x: int) -> None:
        for value in range(1, 20):
            await store.write([Change(x, 0, 0, value)])
            picture = await cache.picture(Region(0, 0, 50, 1))
            assert picture.raw[3 * x] == value

    await asyncio.gather(*(write_and_look(x) for x in range(50)))


def test_if_none_match_any_is_answered_without_reading_the_canvas(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Store, "snapshot", None)
    for path in ("/canvas.rgb", "/canvas.png", "/canvas.png?x=5&w=9&scale=2"):
        answer = client.get(path, headers={"If-None-Match": "*"})
        assert (answer.status_code, answer.content) == (304, b"")
        assert answer.headers["cache-control"] == "max-age=1, stale-while-revalidate=2"
    assert client.get("/canvas.rgb?w=0", headers={"If-None-Match": "*"}).status_code == 422


async def test_the_number_of_pictures_in_preparation_is_bounded(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = store.snapshot
    go_on = asyncio.Event()

    async def read_slowly(keys: list[str]) -> object:
        await go_on.wait()
        return await read(keys)

    monkeypatch.setattr(store, "snapshot", read_slowly)
    whole = Region(0, 0, 1024, 1024)
    with PictureCache(store) as cache:
        regions = [Region(n // 2, 0, 5, 5) for n in range(2 * pictures.MAKING)]
        waiting = [asyncio.create_task(cache.picture(r)) for r in [*regions, whole, whole]]
        await asyncio.sleep(0.05)
        with pytest.raises(Problem, match="Too many pictures") as caught:
            await cache.picture(Region(100, 100, 5, 5))
        assert caught.value.status == 503
        assert caught.value.headers == {"Retry-After": "1"}
        assert Region(100, 100, 5, 5) not in cache._frames
        go_on.set()
        found = [picture.region for picture in await asyncio.gather(*waiting)]
        assert found == [*regions, whole, whole]
        await cache.picture(Region(100, 100, 5, 5))


async def test_the_whole_canvas_is_always_kept(store: Store) -> None:
    with PictureCache(store) as cache:
        whole = await cache.picture(Region(0, 0, 1024, 1024))
        for x in range(10):
            await cache.picture(Region(x, 0, 5, 5))
        assert await cache.picture(Region(0, 0, 1024, 1024)) is whole


async def test_pictures_count_towards_the_memory_bound_until_they_are_sent(store: Store) -> None:
    with PictureCache(store) as cache:
        cache._limit = 1000 * 1000
        responses = []
        for x in range(4):  # of 270 kB each
            picture = await cache.picture(Region(x, 0, 300, 300))
            responses.append(PictureResponse(picture, picture.raw, {}, "image/png"))
        with pytest.raises(Problem, match="Too many pictures are being sent"):
            await cache.picture(Region(4, 0, 300, 300))
        responses.clear()
        for _ in range(pictures.KEPT_PICTURES):
            cache._frames.popitem()
        del picture
        await cache.picture(Region(9, 9, 300, 300))


async def test_a_client_that_takes_no_bytes_is_disconnected(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pictures, "STALL_SECONDS", 0.05)
    sent: list[int] = []

    async def send(message: dict[str, object]) -> None:
        sent.append(len(message.get("body", b"")))  # type: ignore[arg-type]
        if len(sent) > 3:
            await asyncio.sleep(60)

    with PictureCache(store) as cache:
        picture = await cache.picture(Region(0, 0, 1024, 1024))
        response = PictureResponse(picture, picture.raw, {}, "image/png")
        with pytest.raises(ClientDisconnect):
            await response({}, None, send)  # type: ignore[arg-type]
    assert sent == [0, *[pictures.CHUNK_BYTES] * 3]


async def test_the_cache_keeps_a_bounded_number_of_pictures(store: Store) -> None:
    cache = PictureCache(store)
    for x in range(10):
        await cache.picture(Region(x, 0, 5, 5))
    assert len(cache._frames) == pictures.KEPT_PICTURES
