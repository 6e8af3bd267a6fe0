"""The whole API against a dictionary: two workers, one canvas, any order of calls."""

import json
from collections.abc import Iterator
from io import BytesIO
from typing import Any

import httpx2 as httpx
import pytest
from conftest import RedisServer, Service
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)
from PIL import Image

WIDTH, HEIGHT = 300, 260
X, Y = st.integers(0, WIDTH - 1), st.integers(0, HEIGHT - 1)
# Few cells, so that they are written to again, on both sides of the tiles' edges.
CELL = st.tuples(st.sampled_from([0, 255, 256, 299]), st.sampled_from([0, 255, 256, 259]))
CHANNEL = st.sampled_from("RGB")
VALUE = st.integers(0, 255)
WRITE = st.tuples(CELL, CHANNEL, VALUE)


def pixel(write: tuple[tuple[int, int], str, int]) -> dict[str, Any]:
    (x, y), channel, value = write
    return {"x": x, "y": y, "channel": channel, "value": value}


class Canvas:
    """The model: a dictionary of cells. Missing cells are 0."""

    def __init__(self) -> None:
        self.cells: dict[tuple[int, int, str], int] = {}

    def raw(self, x: int = 0, y: int = 0, w: int = WIDTH, h: int = HEIGHT) -> bytes:
        raw = bytearray(w * h * 3)
        for (column, row, channel), value in self.cells.items():
            if x <= column < x + w and y <= row < y + h:
                raw[((row - y) * w + column - x) * 3 + "RGB".index(channel)] = value
        return bytes(raw)


class Api(RuleBasedStateMachine):
    client: httpx.Client
    redis: RedisServer

    @initialize()
    def begin(self) -> None:
        with self.redis.admin() as admin:
            admin.flushall()
        self.model = Canvas()
        self.remembered: tuple[str, bytes] = ("0-0", self.model.raw())

    def call(self, method: str, path: str, **options: Any) -> httpx.Response:
        """Send a request on a new connection, so that either worker may answer it."""
        answer = self.client.request(method, path, **options)
        assert answer.headers["x-pixel-instance"] == "c5"
        return answer

    @rule(write=WRITE)
    def write_one(self, write: tuple[tuple[int, int], str, int]) -> None:
        answer = self.call("POST", "/pixel", json=pixel(write))
        assert answer.json() == {"status": "ok", "received": pixel(write)}
        cell, channel, value = write
        self.model.cells[*cell, channel] = value

    @rule(cell=CELL, colour=st.tuples(VALUE, VALUE, VALUE))
    def write_whole(self, cell: tuple[int, int], colour: tuple[int, int, int]) -> None:
        body = dict(zip("RGB", colour, strict=True))
        answer = self.call("PUT", "/pixel/{}/{}".format(*cell), json=body)
        assert answer.json() == {"x": cell[0], "y": cell[1], **body}
        self.model.cells |= {(*cell, channel): value for channel, value in body.items()}

    @rule(writes=st.lists(WRITE, min_size=1, max_size=30))
    def write_batch(self, writes: list[tuple[tuple[int, int], str, int]]) -> None:
        answer = self.call("POST", "/pixels", json=[pixel(write) for write in writes])
        assert answer.json() == {"status": "ok", "written": len(writes)}
        self.model.cells |= {(*cell, channel): value for cell, channel, value in writes}

    @rule(
        writes=st.lists(WRITE, max_size=5),
        bad=st.sampled_from([{"x": WIDTH}, {"y": -1}, {"channel": "r"}, {"value": 256}, {"z": 1}]),
    )
    def write_badly(self, writes: list[tuple[tuple[int, int], str, int]], bad: dict[str, Any]) -> None:
        wrong = pixel(((0, 0), "R", 1)) | bad
        assert self.call("POST", "/pixel", json=wrong).status_code == 422
        batch = [*(pixel(write) for write in writes), wrong]
        assert self.call("POST", "/pixels", json=batch).status_code == 422

    @rule(cell=CELL)
    def read_one(self, cell: tuple[int, int]) -> None:
        answer = self.call("GET", "/pixel/{}/{}".format(*cell)).json()
        assert (answer["x"], answer["y"]) == cell
        for channel in "RGB":
            assert answer[channel] == self.model.cells.get((*cell, channel), 0)

    @rule(x=X, y=Y, data=st.data())
    def look_at_a_part(self, x: int, y: int, data: st.DataObject) -> None:
        w, h = data.draw(st.integers(1, WIDTH - x)), data.draw(st.integers(1, HEIGHT - y))
        query = f"?x={x}&y={y}&w={w}&h={h}"
        assert self.call("GET", f"/canvas.rgb{query}").content == self.model.raw(x, y, w, h)
        image = Image.open(BytesIO(self.call("GET", f"/canvas.png{query}&scale=2").content))
        assert image.resize((w, h), Image.Resampling.NEAREST).tobytes() == (self.model.raw(x, y, w, h))

    @rule()
    def remember(self) -> None:
        answer = self.call("GET", "/canvas.rgb")
        self.remembered = (answer.headers["x-pixel-event"], answer.content)

    @rule(by_header=st.booleans())
    def resume(self, by_header: bool) -> None:
        """The remembered canvas and the events after it give the current canvas."""
        now = self.call("HEAD", "/canvas.rgb").headers["x-pixel-event"]
        event, content = self.remembered
        raw = bytearray(content)
        headers = {"Last-Event-ID": event} if by_header else {}
        params = {"after": "0-0" if by_header else event}
        with self.client.stream("GET", "/events", params=params, headers=headers) as stream:
            lines = stream.iter_lines()
            while event != now:
                line = next(lines)
                assert "resync" not in line
                if line.startswith("id: "):
                    event = line[4:]
                    for x, y, channel, value in json.loads(next(lines)[6:]):
                        raw[(y * WIDTH + x) * 3 + "RGB".index(channel)] = value
        assert raw == self.model.raw()

    @invariant()
    def the_canvas_is_the_model(self) -> None:
        assert self.call("GET", "/canvas.rgb").content == self.model.raw()


@pytest.fixture
def small(shared_redis: RedisServer) -> Iterator[Service]:
    service = Service(shared_redis.url, PIXEL_CANVAS_WIDTH=str(WIDTH), PIXEL_CANVAS_HEIGHT=str(HEIGHT))
    assert httpx.get(f"{service.url}/readyz", timeout=20).status_code == 200
    yield service
    service.remove()


def test_the_api_behaves_like_a_dictionary(small: Service, shared_redis: RedisServer) -> None:
    with httpx.Client(
        base_url=small.url, timeout=10, limits=httpx.Limits(max_keepalive_connections=0)
    ) as connections:

        class Bound(Api):
            client = connections
            redis = shared_redis

        run_state_machine_as_test(
            Bound,
            settings=settings(max_examples=20, stateful_step_count=30),
        )
