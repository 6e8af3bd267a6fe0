"""Users for Locust: most view the canvas, some paint, a few follow the event stream.

    locust --locustfile bench/load/locustfile.py --host http://127.0.0.1:8080

The content of answers is checked. These are failures: an acknowledgement of another write, a picture
without the user's last pixel, an event stream without a painted pixel.
"""

from __future__ import annotations

import json
import random
import re
import struct
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import Any

from locust import HttpUser, between, task
from locust.clients import ResponseContextManager
from locust.exception import RescheduleTask
from requests import RequestException

PATCH = 24  # pixels, side of the area that a user paints
STROKE = 8
SILENCE = 10.0  # seconds without a message; a stream has one at least every two seconds
CHANNELS = "RGB"
SIDES = ("Width", "Height")


class WrongError(Exception):
    """An answer is wrong. The message is constant, because failures are counted by message."""


def expect(true: bool, otherwise: str) -> None:
    if not true:
        raise WrongError(otherwise)


def moment(event: str) -> tuple[int, int]:
    """Parses an event id such as 1795225898442-0; later ids are greater."""
    milliseconds, number, *_ = event.split("-")
    return int(milliseconds), int(number)


def messages(answer: ResponseContextManager) -> Iterator[dict[str, str]]:
    """Yields the fields of each message of a stream."""
    fields: dict[str, str] = {}
    for line in answer.iter_lines():
        if line:
            name, _, value = line.decode().partition(": ")
            fields[name] = value
        else:
            yield fields
            fields = {}


class Person(HttpUser):
    """A user who has opened the live page."""

    abstract = True
    width = height = 0

    def on_start(self) -> None:
        self.tags: dict[str, str] = {}
        self.events: dict[str, str] = {}  # newest event of each picture, and of the writes
        self.parts: set[str] = set()
        while True:
            try:
                return self.open_page()
            except RescheduleTask:
                time.sleep(1)

    def open_page(self) -> None:
        """Requests the page, its parts and the whole canvas, as a browser does."""
        with self.get("/") as answer:
            if answer.status_code == 200:
                self.parts = set(re.findall(r'(?:src|href)="(live/[^"]+)"', answer.text))
                expect(len(self.parts) > 0, "no page")
        for part in self.parts:
            with self.get("/live/{name}", f"/{part}"):
                pass
        with self.get("/canvas.rgb") as answer:
            self.width, self.height = (int(answer.headers[f"X-Pixel-{side}"]) for side in SIDES)
            if answer.status_code == 200:
                size = self.width * self.height * 3
                expect(len(answer.content) == size, "not three bytes per pixel")
            self.note_event("/canvas.rgb", answer)

    @contextmanager
    def ask(
        self, method: str, name: str, path: str | None = None, **options: Any
    ) -> Iterator[ResponseContextManager]:
        """Sends a request and yields its answer; `name` is its row in the statistics.

        A wrong answer is counted as a failure and ends the current task.
        """
        options = {"timeout": SILENCE, "catch_response": True} | options
        with self.client.request(method, path or name, name=name, **options) as answer:
            try:
                if answer.error:
                    raise answer.error
                expect(answer.status_code in (200, 304), f"status {answer.status_code}")
                yield answer
            except (WrongError, KeyError, ValueError, RequestException) as error:
                answer.failure(error)
                raise RescheduleTask from error

    @contextmanager
    def get(self, name: str, path: str | None = None) -> Iterator[ResponseContextManager]:
        """Sends a GET with If-None-Match if the ETag is known, as a browser's cache does."""
        path = path or name
        known = self.tags.get(path)
        again, headers = (" (again)", {"If-None-Match": known}) if known else ("", {})
        with self.ask("GET", name + again, path, headers=headers) as answer:
            tag = answer.headers["ETag"]
            expect((answer.status_code == 304) == (tag == known), "ETag and status contradict")
            self.tags[path] = tag
            yield answer

    def note_event(self, what: str, answer: ResponseContextManager) -> None:
        """Stores the answer's event; a later answer of the same kind must not have an older one.

        A picture may be older than a write: the balancer's cache keeps it for some seconds.
        """
        event = answer.headers["X-Pixel-Event"]
        expect(moment(event) >= moment(self.events.get(what, "0-0")), "older than an answer before it")
        self.events[what] = event

    def place(self, side: int) -> tuple[int, int]:
        """Chooses a position, more often in the middle."""
        x, y = (random.triangular(0, size - side) for size in (self.width, self.height))
        return int(x), int(y)

    def look(self, x: int, y: int, side: int, scale: int) -> None:
        path = f"/canvas.png?x={x}&y={y}&w={side}&h={side}&scale={scale}"
        with self.get("/canvas.png", path) as answer:
            self.note_event(path, answer)
            if answer.status_code == 200:
                size = struct.pack(">II", side * scale, side * scale)
                expect(answer.content[:8] == b"\x89PNG\r\n\x1a\n", "not a PNG")
                expect(answer.content[16:24] == size, "wrong size")

    def put(self, x: int, y: int) -> None:
        colour = {channel: random.randrange(256) for channel in CHANNELS}
        with self.ask("PUT", "/pixel/{x}/{y}", f"/pixel/{x}/{y}", json=colour) as answer:
            expect(answer.json() == {"x": x, "y": y} | colour, "another pixel is acknowledged")
            self.note_event("writes", answer)


class Looker(Person):
    """Views different areas, and the same area again."""

    weight = 5
    wait_time = between(1, 4)

    def on_start(self) -> None:
        super().on_start()
        self.turn()

    def turn(self) -> None:
        self.side = random.choice((64, 128, 256))
        self.at = self.place(self.side)

    @task(4)
    def look_elsewhere(self) -> None:
        self.turn()
        self.look_again()

    @task(4)
    def look_again(self) -> None:
        self.look(*self.at, self.side, scale=512 // self.side)

    @task(3)
    def pick_a_colour(self) -> None:
        x, y = self.place(1)
        with self.ask("GET", "/pixel/{x}/{y}", f"/pixel/{x}/{y}") as answer:
            colour = answer.json()
            expect((colour.pop("x"), colour.pop("y")) == (x, y), "another pixel")
            expect([*colour] == [*CHANNELS], "wrong channels")
            expect(all(value in range(256) for value in colour.values()), "not a byte")

    @task(1)
    def reload_the_page(self) -> None:
        self.open_page()


class Painter(Person):
    """Paints in one area, mostly pixel by pixel, and views it."""

    weight = 3
    wait_time = between(0.5, 2)

    def on_start(self) -> None:
        super().on_start()
        self.at = self.place(PATCH)

    def cell(self, margin: int = 0) -> tuple[int, int]:
        x, y = self.at
        return x + random.randrange(PATCH - margin), y + random.randrange(PATCH - margin)

    @task(8)
    def paint_a_channel(self) -> None:
        x, y = self.cell()
        pixel = {"x": x, "y": y, "channel": random.choice(CHANNELS), "value": random.randrange(256)}
        with self.ask("POST", "/pixel", json=pixel) as answer:
            echo = {"status": "ok", "received": pixel}
            expect(answer.json() == echo, "another write is acknowledged")

    @task(4)
    def paint_a_pixel(self) -> None:
        self.put(*self.cell())

    @task(2)
    def paint_a_square(self) -> None:
        left, top = self.cell(margin=STROKE)
        colour = {channel: random.randrange(256) for channel in CHANNELS}
        batch = [
            {"x": x, "y": y, "channel": channel, "value": value}
            for y in range(top, top + STROKE)
            for x in range(left, left + STROKE)
            for channel, value in colour.items()
        ]
        with self.ask("POST", "/pixels", json=batch) as answer:
            expect(answer.json() == {"status": "ok", "written": len(batch)}, "not all written")
            self.note_event("writes", answer)

    @task(3)
    def look_at_it(self) -> None:
        self.look(*self.at, PATCH, scale=16)


class Watcher(Person):
    """Follows the event stream, paints, and sometimes reconnects."""

    weight = 2
    wait_time = between(0.5, 2)

    @task
    def watch(self) -> None:
        self.open_page()
        opened_at = self.events["/canvas.rgb"]
        heard = self.follow(opened_at, "/events", f"/events?after={opened_at}")
        self.follow(heard, "/events (resumed)", "/events", {"Last-Event-ID": heard})

    def follow(self, after: str, name: str, path: str, headers: dict[str, str] | None = None) -> str:
        """Reads the stream for some seconds and returns the ID of its last event.

        The stream starts after a known event, so it must contain the pixels painted since then.
        """
        x, y = self.place(1)
        self.put(x, y)
        last, count = after, 0
        seen: set[tuple[int, int]] = set()
        until = time.monotonic() + random.uniform(3, 6)
        with self.ask("GET", name, path, headers=headers, stream=True) as answer, closing(answer):
            for message in messages(answer):
                count += 1
                expect(count > 1 or message.get("id") == after, "begins at another event")
                if "id" in message:
                    expect("event" not in message, "changes are missing")
                    expect(moment(message["id"]) >= moment(last), "goes back")
                    last = message["id"]
                    seen.update((change[0], change[1]) for change in json.loads(message["data"]))
                elif "event" in message:
                    status = json.loads(message["data"])
                    expect(None not in (status["viewers"], status["writes"]), "Redis is away")
                if time.monotonic() > until:
                    expect((x, y) in seen, "a pixel is missing")
                    break
            # The stream may end earlier, as in a deploy: the page then connects to another worker.
            expect(count > 1, "no message")
        return last
