"""The live page in a real browser: its functions, and failures of network, service and Redis."""

import asyncio
import contextlib
import os
import re
import shutil
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest
from conftest import RedisServer, Service, history_service, wait_until, worker_pids
from playwright.sync_api import Browser, BrowserContext, Page, Route, expect, sync_playwright
from starlette.testclient import TestClient

from pixel import keys
from pixel.cluster import Redis
from pixel.maintenance import Maintenance
from pixel.names import EVENTS, KEYS, KEYS_VERSION, MAINTENANCE
from pixel.routes import live

PARTS = sorted(f"/live/{name}" for name in live._FILES)

RED, BLUE, WHITE = (229, 38, 58), (37, 99, 235), (255, 255, 255)

# The browser must send no requests of its own.
FLAGS = [
    "--no-sandbox",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-gpu",
    "--disable-quic",
    "--disable-sync",
    "--no-first-run",
]


def test_the_page_is_revalidated_each_time_and_sent_only_if_changed(
    client: TestClient,
) -> None:
    for path in ("/", *PARTS):
        answer = client.get(path)
        assert answer.status_code == 200
        assert answer.headers["cache-control"] == "no-cache"
        tag = answer.headers["etag"]
        again = client.get(path, headers={"If-None-Match": tag})
        assert (again.status_code, again.content) == (304, b"")
        assert again.headers["content-security-policy"]
    assert client.get("/live/nothing.js").status_code == 404
    assert client.get("/live/..%2Fapp.py").status_code == 404


def test_the_page_needs_nothing_from_outside_and_nothing_inline(client: TestClient) -> None:
    policy = client.get("/").headers["content-security-policy"]
    assert "unsafe" not in policy
    assert "default-src 'none'" in policy
    for path in ("/", *PARTS):
        text = client.get(path).text.replace("http://www.w3.org/2000/svg", "")
        assert not re.search(r"https?://|//[a-z]+\.[a-z]+|\bstyle=|\son[a-z]+=|<style", text), path
        assert not re.search(r"<script(?![^>]*\ssrc=)", text), path


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    # For this module only: Playwright keeps an event loop in the thread, which other tests need.
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def faults() -> Iterator[list[str]]:
    """Errors that a page reports; a test fails if there are any."""
    faults: list[str] = []
    yield faults
    assert faults == []


@pytest.fixture
def open_page(browser: Browser, faults: list[str]) -> Iterator[Callable[..., Page]]:
    """Opens the page of a service in a new profile, or in a tab ``beside`` another page.

    It waits until the page shows the state ``until``.
    """
    contexts: list[BrowserContext] = []
    desktop = {"viewport": {"width": 1000, "height": 700}}

    def open_one(
        url: str, beside: Page | None = None, script: str = "", until: str = "Live", **options: Any
    ) -> Page:
        if beside is None:
            contexts.append(browser.new_context(**desktop | options))
        page = (beside.context if beside else contexts[-1]).new_page()
        page.add_init_script(script)
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on(
            "console",
            # The browser itself reports each answer that is not a success.
            lambda message: (
                message.type == "error"
                and "Failed to load resource" not in message.text
                and faults.append(message.text)
            ),
        )
        page.goto(url)
        expect(page.locator("#connection")).to_have_text(until, timeout=20_000)
        return page

    yield open_one
    for context in contexts:
        context.close()


@pytest.fixture
def canvas(service: Service, redis_server: RedisServer) -> str:
    """The address of a service with an empty canvas."""
    return service.url


def becomes(page: Page, script: str) -> None:
    """Wait until a script returns true. (The page's policy forbids ``page.wait_for_function``.)"""
    wait_until(lambda: page.evaluate(script))


def is_live(page: Page) -> None:
    expect(page.locator("#connection")).to_have_text("Live", timeout=20_000)


def put(url: str, x: int, y: int, rgb: tuple[int, int, int]) -> None:
    answer = httpx.put(f"{url}/pixel/{x}/{y}", json=dict(zip("RGB", rgb, strict=True)))
    assert answer.status_code == 200


def stored(url: str, x: int, y: int) -> tuple[int, ...]:
    answer = httpx.get(f"{url}/pixel/{x}/{y}").json()
    return tuple(answer[channel] for channel in "RGB")


def shown(page: Page, x: int, y: int) -> tuple[int, ...]:
    """The colour that a page shows, read from what it has drawn."""
    script = "([x, y]) => [...board.getContext('2d').getImageData(x, y, 1, 1).data.slice(0, 3)]"
    return tuple(page.evaluate(script, [x, y]))


def sees(page: Page, x: int, y: int, rgb: tuple[int, int, int]) -> None:
    """Wait until the page shows a pixel in a colour."""
    wait_until(lambda: shown(page, x, y) == rgb)


def differences(page: Page) -> int:
    """The number of bytes in which the page differs from the stored canvas."""
    return int(
        page.evaluate(
            """async () => {
              const answer = await fetch("canvas.rgb", { cache: "no-store" });
              const stored = new Uint8Array(await answer.arrayBuffer());
              const { width, height } = board;
              const shown = board.getContext("2d").getImageData(0, 0, width, height).data;
              let found = width * height * 3 - stored.length;
              for (let i = 0; i < width * height; i++)
                for (let c = 0; c < 3; c++) found += shown[i * 4 + c] !== stored[i * 3 + c];
              return found;
            }"""
        )
    )


def point(page: Page, x: int, y: int) -> tuple[float, float]:
    """Where on the screen a pixel lies."""
    script = """([x, y]) => {
      const { left, top, width } = board.getBoundingClientRect();
      const zoom = width / board.width;
      return [left + (x + 0.5) * zoom, top + (y + 0.5) * zoom];
    }"""
    across, down = page.evaluate(script, [x, y])
    return across, down


def zoom_of(page: Page) -> float:
    return float(page.evaluate("board.getBoundingClientRect().width / board.width"))


def zoom_until(page: Page, least: float) -> None:
    """Turn the wheel over the middle until the zoom is at least ``least``."""
    box = page.locator("#stage").bounding_box()
    assert box
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    for _ in range(30):
        if zoom_of(page) >= least:
            return
        page.mouse.wheel(0, -120)
        page.wait_for_timeout(30)
    raise AssertionError("the wheel doesn't zoom")


def test_a_pixel_painted_in_one_window_appears_in_another(
    canvas: str, open_page: Callable[..., Page]
) -> None:
    asked: list[str] = []
    one, other = open_page(canvas), open_page(canvas)
    one.on("request", lambda request: asked.append(request.url))
    zoom_until(one, 8)
    one.get_by_label("blue").click()
    one.mouse.click(*point(one, 512, 510))
    sees(other, 512, 510, BLUE)
    sees(one, 512, 510, BLUE)
    assert stored(canvas, 512, 510) == BLUE
    put(canvas, 0, 1023, WHITE)
    sees(one, 0, 1023, WHITE)
    sees(other, 0, 1023, WHITE)
    assert all(url.startswith(canvas) for url in asked)
    expect(one.locator("#viewers")).to_have_text("2")
    assert int(one.locator("#writes").inner_text()) >= 0


def test_the_pointer_shows_the_pixel_under_it_and_moves_the_view(
    canvas: str, open_page: Callable[..., Page]
) -> None:
    put(canvas, 500, 512, RED)
    page = open_page(canvas)
    zoom_until(page, 12)
    page.mouse.move(*point(page, 500, 512))
    expect(page.locator("#place")).to_have_text("500, 512")
    expect(page.locator("#colour")).to_have_text("#e5263a")
    put(canvas, 500, 512, BLUE)
    expect(page.locator("#colour")).to_have_text("#2563eb")
    before = point(page, 500, 512)
    page.mouse.down()
    page.mouse.move(before[0] + 60, before[1] - 40, steps=4)
    page.mouse.up()
    moved = pytest.approx((before[0] + 60, before[1] - 40), abs=1)
    wait_until(lambda: point(page, 500, 512) == moved)
    after = point(page, 500, 512)
    assert stored(canvas, 500, 512) == BLUE  # a drag is no click
    page.mouse.click(*point(page, 500, 512), button="right")
    expect(page.locator("#picker")).to_have_value("#2563eb")
    becomes(page, "/^#[0-9]+,[0-9]+,[0-9]+$/.test(location.hash)")
    again = open_page(page.url)
    wait_until(lambda: point(again, 500, 512) == pytest.approx(after, abs=zoom_of(page)))
    again.get_by_label("Show all").click()
    becomes(again, "board.getBoundingClientRect().top >= stage.getBoundingClientRect().top")


def test_every_function_can_be_used_by_keyboard(canvas: str, open_page: Callable[..., Page]) -> None:
    page = open_page(canvas)
    keys = page.keyboard
    for _ in range(8):
        keys.press("+")
    becomes(page, "board.getBoundingClientRect().width > 5 * board.width")
    keys.press("ArrowRight")  # the cursor appears, in the middle
    expect(page.locator("#place")).to_have_text("512, 512")
    keys.press("ArrowRight")
    keys.press("ArrowUp")
    keys.press("Space")
    wait_until(lambda: stored(canvas, 513, 511) == RED)
    expect(page.locator("#announcement")).to_have_text("Painted 513, 511")
    for _ in range(150):  # the view follows
        keys.press("ArrowLeft")
    expect(page.locator("#place")).to_have_text("363, 511")
    wait_until(lambda: point(page, 363, 511)[0] > 0)
    keys.press("Shift+ArrowLeft")
    keys.press("Tab")  # the colours
    while page.evaluate("document.activeElement.type") != "radio":
        keys.press("Tab")
    keys.press("ArrowRight")
    expect(page.locator("#picker")).to_have_value("#ff8c1a")
    keys.press("Escape")
    keys.press("Enter")
    wait_until(lambda: stored(canvas, 363, 511) == (255, 140, 26))
    keys.press("?")
    expect(page.get_by_role("dialog")).to_be_visible()
    keys.press("Enter")
    expect(page.get_by_role("dialog")).not_to_be_visible()
    keys.press("0")
    becomes(page, "board.getBoundingClientRect().width < board.width")


def test_the_last_line_shows_the_state_and_the_instance(
    fragile_redis: RedisServer,
    start_service: Callable[..., Service],
    open_page: Callable[..., Page],
) -> None:
    service = start_service(fragile_redis.url, PIXEL_INSTANCE="t2", PIXEL_RELEASE="1.0.0-3fa9c1d2")
    page = open_page(service.url)
    line, none = page.locator("footer #state"), "\N{EN DASH}"
    expect(line).to_have_text("Live 1 viewer 0 writes/s t2 1.0.0-3fa9c1d2")
    fragile_redis.kill()
    away = f"Storage is unavailable {none} viewers {none} writes/s t2 1.0.0-3fa9c1d2"
    expect(line).to_have_text(away, timeout=10_000)
    service.stop()
    lost = f"Reconnecting {none} viewers {none} writes/s {none} {none}"
    expect(line).to_have_text(lost, timeout=10_000)


def test_the_page_works_on_a_phone(canvas: str, open_page: Callable[..., Page]) -> None:
    page = open_page(
        canvas,
        viewport={"width": 390, "height": 800},
        has_touch=True,
        is_mobile=True,
        device_scale_factor=3,
        color_scheme="dark",
    )
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(25, 27, 34)"
    touch = page.context.new_cdp_session(page)

    def fingers(kind: str, *places: tuple[float, float]) -> None:
        points = [{"x": x, "y": y, "id": n} for n, (x, y) in enumerate(places)]
        touch.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})

    x, y = point(page, 512, 512)
    before = zoom_of(page)
    fingers("touchStart", (x - 10, y))
    fingers("touchStart", (x - 10, y), (x + 10, y))
    for spread in range(20, 121, 10):
        fingers("touchMove", (x - spread, y), (x + spread, y))
    fingers("touchEnd")
    wait_until(lambda: zoom_of(page) == pytest.approx(12 * before, rel=0.1))
    assert point(page, 512, 512) == pytest.approx((x, y), abs=zoom_of(page))
    assert stored(canvas, 512, 512) == (0, 0, 0)  # a pinch is no tap

    page.touchscreen.tap(*point(page, 500, 500))
    sees(page, 500, 500, RED)
    wait_until(lambda: stored(canvas, 500, 500) == RED)

    page.get_by_label("Show all").tap()
    becomes(page, "board.getBoundingClientRect().width <= 390")
    page.touchscreen.tap(*point(page, 700, 300))  # a closer look first
    becomes(page, "board.getBoundingClientRect().width > 9000")
    page.touchscreen.tap(195, 400)
    assert stored(canvas, 700, 300) == (0, 0, 0)


def test_a_refused_pixel_is_taken_back(
    fragile_redis: RedisServer,
    start_service: Callable[..., Service],
    open_page: Callable[..., Page],
) -> None:
    service = start_service(fragile_redis.url, PIXEL_WORKERS="1")
    page = open_page(service.url)
    put(service.url, 512, 512, BLUE)
    sees(page, 512, 512, BLUE)
    zoom_until(page, 8)
    fragile_redis.pause()
    page.mouse.click(*point(page, 512, 512))
    sees(page, 512, 512, RED)  # at once
    expect(page.locator("#toast")).to_contain_text("Not painted: Redis")
    sees(page, 512, 512, BLUE)
    expect(page.locator("#connection")).not_to_have_text("Live", timeout=10_000)
    fragile_redis.resume()
    is_live(page)
    page.mouse.click(*point(page, 513, 512))
    wait_until(lambda: stored(service.url, 513, 512) == RED)
    wait_until(lambda: differences(page) == 0)


def test_a_painted_pixel_stays_visible_until_its_write_is_answered(
    canvas: str, open_page: Callable[..., Page]
) -> None:
    page = open_page(canvas)
    zoom_until(page, 8)
    held: list[Route] = []
    page.route("**/pixel/*/*", lambda route: held.append(route))
    page.mouse.click(*point(page, 512, 512))
    page.get_by_label("blue").click()
    page.mouse.click(*point(page, 512, 512))
    wait_until(lambda: page.wait_for_timeout(10) or held)
    put(canvas, 512, 512, WHITE)  # by another client, and made first
    put(canvas, 400, 400, WHITE)
    sees(page, 400, 400, WHITE)
    assert shown(page, 512, 512) == BLUE
    held.pop().continue_()
    wait_until(lambda: page.wait_for_timeout(10) or held)  # the second waits for the first
    held.pop().continue_()
    wait_until(lambda: stored(canvas, 512, 512) == BLUE)
    assert shown(page, 512, 512) == BLUE
    put(canvas, 512, 512, WHITE)
    sees(page, 512, 512, WHITE)
    wait_until(lambda: differences(page) == 0)


class Painters:
    """A thread that writes batches continuously and ignores failures."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._paint)

    def __enter__(self) -> "Painters":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _paint(self) -> None:
        with httpx.Client() as client:
            number = 0
            while not self._stop.is_set():
                number += 1
                pixels = [
                    {"x": (number * 37 + n) % 1024, "y": n, "channel": "G", "value": number % 256}
                    for n in range(50)
                ]
                try:
                    client.post(f"{self._url}/pixels", json=pixels, timeout=5)
                except httpx.TransportError:
                    time.sleep(0.05)
                time.sleep(0.005)


def test_a_lost_connection_heals_without_a_reload_and_without_a_missing_pixel(
    fragile_redis: RedisServer,
    start_service: Callable[..., Service],
    open_page: Callable[..., Page],
) -> None:
    service = start_service(fragile_redis.url)
    pages = [open_page(service.url), open_page(service.url)]
    for page in pages:
        page.evaluate("window.same = true")

    def heal() -> None:
        answer = httpx.Response(503)
        while answer.status_code != 200:
            try:
                answer = httpx.put(f"{service.url}/pixel/9/999", json={"R": 1, "G": 2, "B": 3})
            except httpx.TransportError:
                time.sleep(0.05)
        for page in pages:
            is_live(page)
            sees(page, 9, 999, (1, 2, 3))
            wait_until(lambda page=page: differences(page) == 0)
        put(service.url, 9, 999, (0, 0, 0))

    with Painters(service.url):
        time.sleep(0.3)
        fragile_redis.kill()
        time.sleep(0.3)
        fragile_redis.start()
        time.sleep(0.3)
    heal()

    with Painters(service.url):
        for pid in worker_pids(service):
            os.kill(pid, signal.SIGKILL)
        time.sleep(0.5)
    heal()

    with Painters(service.url):
        service.stop()  # as in a deploy: the sockets stay
        service.start()
        time.sleep(0.5)
    heal()

    # Redis has lost the earlier events: the pages must load the canvas again, as of the resync or later.
    asked: list[str] = []
    pages[0].on("request", lambda request: asked.append(request.url))
    with fragile_redis.admin() as admin:
        admin.delete(EVENTS)
    fresh = re.compile(r"/canvas\.rgb\?after=[0-9]+-[0-9]+$")
    wait_until(lambda: pages[0].wait_for_timeout(10) or any(map(fresh.search, asked)))
    heal()
    assert all(page.evaluate("window.same") for page in pages)


def test_the_page_works_while_a_thousand_pixels_a_second_change(
    canvas: str, open_page: Callable[..., Page]
) -> None:
    page = open_page(canvas)
    stop = threading.Event()

    def write_on() -> None:
        with httpx.Client() as client:
            number = 0
            while not stop.is_set():
                number += 1
                pixels = [
                    {"x": (number * 613 + n * 97) % 1024, "y": (number * 31 + n * 61) % 1024,
                     "channel": "RGB"[n % 3], "value": number % 256}
                    for n in range(50)
                ]  # fmt: skip
                client.post(f"{canvas}/pixels", json=pixels)
                time.sleep(0.05)

    writer = threading.Thread(target=write_on)
    writer.start()
    try:
        expect(page.locator("#writes")).to_have_text(re.compile("[1-9]"))
        zoom_until(page, 8)
        page.mouse.click(*point(page, 512, 512))
        sees(page, 512, 512, RED)
    finally:
        stop.set()
        writer.join()
    wait_until(lambda: differences(page) == 0)


def streams(url: str) -> float:
    text = httpx.get(f"{url}/metrics").text
    return float(re.findall(r"^pixel_viewers (\S+)$", text, re.MULTILINE)[0])


def test_tabs_share_one_stream(canvas: str, open_page: Callable[..., Page]) -> None:
    wait_until(lambda: streams(canvas) == 0)
    first = open_page(canvas)
    # More tabs than a browser opens connections to one host.
    tabs = [first] + [open_page(canvas, beside=first) for _ in range(7)]
    assert streams(canvas) == 1
    put(canvas, 500, 500, BLUE)
    for tab in tabs:
        sees(tab, 500, 500, BLUE)
        expect(tab.locator("#viewers")).to_have_text("1")
    first.close()  # the tab that started the stream
    for tab in tabs[1:4]:
        tab.close()
    put(canvas, 500, 500, RED)
    for tab in tabs[4:]:
        sees(tab, 500, 500, RED)
        is_live(tab)
    for tab in tabs[4:]:
        tab.close()
    wait_until(lambda: streams(canvas) == 0)


def test_a_tab_that_joins_misses_nothing(canvas: str, open_page: Callable[..., Page]) -> None:
    with Painters(canvas):
        tabs = [open_page(canvas)]
        for _ in range(3):
            tabs.append(open_page(canvas, beside=tabs[0]))
            time.sleep(0.3)
    for tab in tabs:
        wait_until(lambda tab=tab: differences(tab) == 0)


def test_a_tab_with_an_event_of_an_earlier_epoch_begins_again(
    canvas: str, open_page: Callable[..., Page]
) -> None:
    """It may be the event of a deposed master, whose later changes nobody else has."""
    answers = open_page(canvas).evaluate(
        """async () => {
            const { Feed } = await import(new URL("live/feed.js", document.baseURI));
            const feed = new Feed();
            const url = new URL("events", document.baseURI).href;
            const join = (follow) =>
                new Promise((resolve) => {
                    const { port1, port2 } = new MessageChannel();
                    feed.attach(port1);
                    port2.onmessage = ({ data }) => resolve(data.resync ?? data.state);
                    port2.postMessage({ follow, part: null, subscription: 1, url, key: null });
                });
            join("5-0-7");
            return Promise.all(["5-0-7", "6-0-1", "6-0-8"].map(join));
        }"""
    )
    assert answers == ["lost", "5-0-7", "lost"]


def test_without_shared_workers_each_tab_has_its_stream(canvas: str, open_page: Callable[..., Page]) -> None:
    wait_until(lambda: streams(canvas) == 0)
    script = "delete globalThis.SharedWorker"
    page = open_page(canvas, script=script)
    other = open_page(canvas, beside=page, script=script)
    assert streams(canvas) == 2
    put(canvas, 500, 500, BLUE)
    sees(page, 500, 500, BLUE)
    sees(other, 500, 500, BLUE)


class BufferingProxy:
    """A proxy that forwards everything except the event stream."""

    def __init__(self, backend: tuple[str, int]) -> None:
        self._backend = backend
        self._server = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._server.getsockname()[1]}"
        self.holding = True
        self._sockets = [self._server]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._server.accept()
            except OSError:
                return
            server = socket.create_connection(self._backend)
            self._sockets += [client, server]
            held = threading.Event()
            for source, target in ((client, server), (server, client)):
                threading.Thread(
                    target=self._pass, args=(source, target, held, source is client), daemon=True
                ).start()

    def _pass(self, source: socket.socket, target: socket.socket, held: threading.Event, up: bool) -> None:
        try:
            while data := source.recv(65536):
                if up and data.startswith(b"GET /events") and self.holding:
                    held.set()
                if up or not held.is_set():
                    target.sendall(data)
        except OSError:
            pass
        for end in (source, target):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        for end in self._sockets:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()


@pytest.fixture
def proxy(service: Service, canvas: str) -> Iterator[BufferingProxy]:
    proxy = BufferingProxy(service.tcp.getsockname())
    yield proxy
    proxy.close()


def test_of_a_large_canvas_the_page_follows_what_it_shows(
    redis_server: RedisServer, start_service: Callable[..., Service], open_page: Callable[..., Page]
) -> None:
    url = start_service(redis_server.url, PIXEL_CANVAS_WIDTH="2048").url
    httpx.get(f"{url}/readyz", timeout=20)
    near, far = (100, 100), (2000, 1000)
    page = open_page(f"{url}/#100,100,16")
    page.wait_for_timeout(1500)  # until it follows this part
    put(url, *far, RED)
    put(url, *near, RED)
    sees(page, *near, RED)
    assert shown(page, *far) == (0, 0, 0)
    # Another tab is elsewhere, and the stream is of both.
    other = open_page(f"{url}/#2000,1000,16", beside=page)
    sees(other, *far, RED)
    other.wait_for_timeout(1500)
    for tab, place in ((page, near), (other, far)):
        put(url, *place, BLUE)
        sees(tab, *place, BLUE)
        is_live(tab)
    other.close()
    # It catches up where it moves.
    with Painters(url):
        page.evaluate("location.hash = '#2000,1000,16'")
        sees(page, *far, BLUE)
        put(url, *far, WHITE)
        sees(page, *far, WHITE)
        page.click("#fit")
        page.wait_for_timeout(1000)
    is_live(page)
    wait_until(lambda: differences(page) == 0)


def test_behind_a_proxy_that_holds_the_stream_back_the_page_polls(
    canvas: str, proxy: BufferingProxy, open_page: Callable[..., Page]
) -> None:
    page = open_page(proxy.url, until="Polling")
    assert "proxy" in (page.locator("#connection").get_attribute("title") or "")
    put(canvas, 500, 500, BLUE)
    sees(page, 500, 500, BLUE)
    answers: list[int] = []
    page.on("response", lambda response: answers.append(response.status))
    wait_until(lambda: page.wait_for_timeout(10) or 304 in answers)  # nothing has changed
    put(canvas, 500, 500, RED)
    sees(page, 500, 500, RED)
    expect(page.locator("#connection")).to_have_text("Polling")
    proxy.holding = False
    page.evaluate("dispatchEvent(new Event('online'))")
    is_live(page)
    assert page.locator("#connection").get_attribute("title") == ""
    put(canvas, 500, 500, BLUE)
    sees(page, 500, 500, BLUE)
    wait_until(lambda: differences(page) == 0)


def test_the_documentation_works_under_its_policy(canvas: str, browser: Browser) -> None:
    page = browser.new_page()
    complaints: list[str] = []
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.goto(f"{canvas}/docs")
    expect(page.locator(".opblock").first).to_be_visible()
    page.locator("#operations-instance-ping .opblock-summary").click()
    page.get_by_role("button", name="Try it out").click()
    page.get_by_role("button", name="Execute").click()
    expect(page.locator(".responses-table.live-responses-table")).to_contain_text('"c5"')
    page.close()
    assert complaints == []


def test_the_page_shows_maintenance_and_heals_when_it_ends(
    canvas: str, redis_server: RedisServer, open_page: Callable[..., Page]
) -> None:
    def maintain(state: str, message: str = "") -> None:
        with redis_server.admin() as admin:
            admin.set(MAINTENANCE, Maintenance(state, message).encode())  # type: ignore[arg-type]

    try:
        page = open_page(canvas)
        zoom_until(page, 8)
        notice = page.locator("#notice")
        expect(notice).to_be_hidden()
        maintain("read-only", "New disks until 22:00.")
        expect(page.locator("#connection")).to_have_text("Maintenance", timeout=10_000)
        expect(notice).to_have_text("New disks until 22:00.")
        page.mouse.click(*point(page, 512, 512))
        expect(page.locator("#toast")).to_contain_text("Not painted: New disks until 22:00; nothing was")
        sees(page, 512, 512, (0, 0, 0))
        maintain("off")
        is_live(page)
        expect(notice).to_be_hidden()
        # An open page, whose stream ends, and one that is opened meanwhile.
        maintain("on", "Moving to another city.")
        expect(notice).to_have_text("Moving to another city.", timeout=10_000)
        expect(notice).to_be_visible()
        late = open_page(canvas, until="Maintenance")
        expect(late.locator("#notice")).to_have_text("Moving to another city.")
        maintain("off")
        for tab in (page, late):
            is_live(tab)
            expect(tab.locator("#notice")).to_be_hidden()
        put(canvas, 512, 512, BLUE)
        sees(page, 512, 512, BLUE)
        sees(late, 512, 512, BLUE)
    finally:
        maintain("off")


@pytest.mark.parametrize(
    ("author", "ago", "text"),
    [
        ("key:alice", 330, "alice, 5 minutes ago"),
        ("operator:olga", 0.2, "operator olga, now"),
        ("anonymous", 90_000, "anonymous, yesterday"),
        (None, 2 * 3600 + 5, "unknown, 2 hours ago"),
    ],
)
def test_the_page_shows_who_painted_the_pixel_under_the_cursor(
    canvas: str, open_page: Callable[..., Page], author: str | None, ago: float, text: str
) -> None:
    page = open_page(canvas)
    when = datetime.fromtimestamp(time.time() - ago, UTC).isoformat()
    asked = []

    def answer(route: Route) -> None:
        asked.append(route.request.url)
        route.fulfill(json={"changes": [{"author": author, "time": when}], "next": None})

    page.route("**/history?limit=1", answer)
    page.locator("#stage").hover(position={"x": 500, "y": 300})
    expect(page.locator("#origin")).to_have_text(text)
    x, y = page.locator("#place").inner_text().split(", ")
    assert asked == [f"{canvas}/pixel/{x}/{y}/history?limit=1"]
    page.locator("#show-help").hover()
    expect(page.locator("#origin")).to_have_text("")


def test_the_page_asks_for_no_history_if_there_is_none(canvas: str, open_page: Callable[..., Page]) -> None:
    page = open_page(canvas)
    asked = []
    page.on("request", lambda request: "history" in request.url and asked.append(request.url))
    for x in (300, 400, 500):
        page.locator("#stage").hover(position={"x": x, "y": 300})
        page.wait_for_timeout(700)
    assert len(asked) == 1
    expect(page.locator("#origin")).to_have_text("")


async def _create_key(server: RedisServer, *words: str) -> str:
    return await keys.execute(keys.parse(["create", *words]), Redis(server.settings()))


def create_key(server: RedisServer, *words: str) -> str:
    """Create a key with this name and these options; returns its token."""
    # In a thread of its own: Playwright keeps an event loop in this one.
    with ThreadPoolExecutor() as pool:
        return pool.submit(asyncio.run, _create_key(server, *words)).result()


def sign_in(page: Page, token: str) -> None:
    page.get_by_role("button", name="Sign in").click()
    page.get_by_label("Your key").fill(token)
    page.keyboard.press("Enter")


def test_with_a_key_the_page_shows_a_private_canvas(
    redis_server: RedisServer, start_service: Callable[..., Service], open_page: Callable[..., Page]
) -> None:
    token = create_key(redis_server, "alice", "--scopes", "paint")
    service = start_service(redis_server.url, PIXEL_ANONYMOUS="none", PIXEL_WORKERS="1")
    page = open_page(service.url, until="Sign in to see the canvas")
    sign_in(page, "pixel_wrong")
    expect(page.locator("#sign-in-problem")).to_have_text("The key is unknown.")
    page.get_by_label("Your key").fill(token)
    page.keyboard.press("Enter")
    is_live(page)
    expect(page.locator("#account")).to_have_attribute("title", "Signed in as alice")
    expect(page.get_by_role("button", name="Moderate")).to_be_hidden()
    # The stream needs the key too.
    lines = {"Authorization": f"Bearer {token}"}
    httpx.put(f"{service.url}/pixel/7/8", json={"R": 1, "G": 2, "B": 3}, headers=lines)
    sees(page, 7, 8, (1, 2, 3))
    zoom_until(page, 8)
    page.mouse.click(*point(page, 512, 512))
    sees(page, 512, 512, RED)
    wait_until(lambda: httpx.get(f"{service.url}/pixel/512/512", headers=lines).json()["R"] == RED[0])
    # Tabs are signed in, and out, together; it outlasts the tab.
    other = open_page(service.url, beside=page)
    other.get_by_role("button", name="Sign out").click()
    for one in (page, other):
        expect(one.locator("#connection")).to_have_text("Sign in to see the canvas", timeout=10_000)
    assert page.evaluate("localStorage.getItem('pixel-key')") is None
    sign_in(other, token)
    is_live(page)
    is_live(other)
    assert token not in service.output()


def test_a_revoked_key_signs_out(
    redis_server: RedisServer, start_service: Callable[..., Service], open_page: Callable[..., Page]
) -> None:
    token = create_key(redis_server, "alice", "--scopes", "paint")
    service = start_service(redis_server.url, PIXEL_WORKERS="1")
    page = open_page(service.url)
    sign_in(page, token)
    expect(page.get_by_role("button", name="Sign out")).to_be_visible()
    with redis_server.admin() as admin:
        admin.delete(KEYS)
        admin.incr(KEYS_VERSION)
    time.sleep(1)
    page.reload()
    expect(page.locator("#toast")).to_have_text("Signed out: The key is unknown.")
    expect(page.get_by_role("button", name="Sign in")).to_be_visible()
    is_live(page)


def test_the_page_shows_what_is_left_of_the_budget(
    redis_server: RedisServer, start_service: Callable[..., Service], open_page: Callable[..., Page]
) -> None:
    token = create_key(redis_server, "alice", "--scopes", "paint", "--per-minute", "60", "--burst", "7")
    service = start_service(redis_server.url, PIXEL_WORKERS="1")
    page = open_page(service.url)
    budget = page.locator("#budget")
    expect(budget).to_be_hidden()
    sign_in(page, token)
    expect(page.get_by_role("button", name="Sign out")).to_be_visible()
    zoom_until(page, 8)
    page.mouse.click(*point(page, 512, 512))
    expect(budget).to_have_text("1 pixel left")
    page.mouse.click(*point(page, 513, 512))
    expect(budget).to_have_text(re.compile("Next pixel in [123] s"))
    page.mouse.click(*point(page, 514, 512))
    expect(page.locator("#toast")).to_contain_text("The budget is 60 channel writes a minute")
    expect(budget).to_have_text("1 pixel left", timeout=6_000)
    expect(budget).to_have_text("2 pixels left", timeout=8_000)


@pytest.fixture
def history_url(redis_server: RedisServer, tmp_path: Path) -> Iterator[str]:
    """The address of a history service of the same Redis."""
    with history_service(redis_server, tmp_path) as url:
        yield url


@pytest.fixture
def moderated(
    redis_server: RedisServer,
    start_service: Callable[..., Service],
    open_page: Callable[..., Page],
    history_url: str,
) -> Callable[..., tuple[str, Page]]:
    """Opens the page for a moderator; the canvas has a picture, partly painted over by a vandal."""

    def open_one(**options: Any) -> tuple[str, Page]:
        moderator = create_key(redis_server, "mod", "--scopes", "paint,moderate")
        service = start_service(redis_server.url, PIXEL_RECORD_ADDRESSES="true", PIXEL_WORKERS="1")
        assert httpx.get(f"{service.url}/readyz", timeout=20).status_code == 200
        lines = {"X-Forwarded-For": "198.51.100.4"}
        for x in range(500, 510):
            httpx.put(f"{service.url}/pixel/{x}/512", json=dict(zip("RGB", BLUE, strict=True)), headers=lines)
        lines = {"X-Forwarded-For": "192.0.2.7"}
        for x in range(503, 506):
            httpx.put(
                f"{service.url}/pixel/{x}/512", json=dict(zip("RGB", WHITE, strict=True)), headers=lines
            )
        wait_until(lambda: httpx.get(f"{history_url}/history/state").json()["changes"] == 39)
        page = open_page(service.url, **options)
        # The balancer does this.
        page.route(
            re.compile("/history"),
            lambda route: route.continue_(url=route.request.url.replace(service.url, history_url)),
        )
        sign_in(page, moderator)
        expect(page.get_by_role("button", name="Moderate")).to_be_visible()
        return service.url, page

    return open_one


def test_a_moderator_undoes_what_a_vandal_has_painted(moderated: Callable[..., tuple[str, Page]]) -> None:
    url, page = moderated()
    zoom_until(page, 10)
    page.keyboard.press("m")
    panel = page.get_by_role("complementary", name="Moderation")
    expect(panel).to_be_visible()
    page.mouse.move(*point(page, 498, 510))
    page.mouse.down()
    page.mouse.move(*point(page, 512, 514), steps=4)
    page.mouse.up()
    assert [panel.get_by_label(name, exact=True).input_value() for name in ("x", "y", "width", "height")] == [
        "498",
        "510",
        "15",
        "5",
    ]
    assert stored(url, 498, 510) == (0, 0, 0)  # a drag paints nothing
    expect(panel.locator("#authors li")).to_have_text(["198.51.100.430", "192.0.2.79"])
    expect(panel.get_by_role("button", name="Undo", exact=True)).to_be_disabled()
    panel.get_by_label("192.0.2.7").check()
    panel.get_by_role("button", name="Preview undo").click()
    expect(panel.locator("#outcome")).to_have_text("9 channels would change.")
    for x in range(503, 506):
        sees(page, x, 512, BLUE)
    assert stored(url, 504, 512) == WHITE
    panel.get_by_role("button", name="End the preview").click()
    sees(page, 504, 512, WHITE)
    panel.get_by_role("button", name="Undo", exact=True).click()
    expect(panel.locator("#outcome")).to_have_text("9 channels changed.")
    for x in range(503, 506):
        sees(page, x, 512, BLUE)
        assert stored(url, x, 512) == BLUE
    panel.get_by_role("button", name="Take the undo back").click()
    sees(page, 504, 512, WHITE)
    assert stored(url, 504, 512) == WHITE
    page.keyboard.press("Escape")
    page.keyboard.press("m")
    expect(panel).to_be_hidden()
    wait_until(lambda: differences(page) == 0)


def test_a_moderator_protects_and_blocks_by_keyboard(moderated: Callable[..., tuple[str, Page]]) -> None:
    url, page = moderated()
    keyboard = page.keyboard
    keyboard.press("m")
    for value in ("500", "512", "10", "1"):
        keyboard.type(value)
        keyboard.press("Tab")
    panel = page.get_by_role("complementary", name="Moderation")
    reason = panel.get_by_label("Reason")
    expect(panel.locator("#authors li")).to_have_count(2)
    panel.get_by_label("192.0.2.7").focus()
    keyboard.press("Space")
    reason.fill("Be kind")
    panel.get_by_role("button", name="Protect the area").focus()
    keyboard.press("Enter")
    in_force = panel.locator("#restrictions li")
    expect(in_force).to_contain_text(["500,512,10,1 is protected"])
    panel.get_by_role("button", name="Block", exact=True).focus()
    keyboard.press("Enter")
    expect(in_force).to_contain_text(["500,512,10,1 is protected", "192.0.2.7 until"])

    def status(x: int, address: str) -> int:
        lines = {"X-Forwarded-For": address}
        return int(
            httpx.put(f"{url}/pixel/{x}/512", json={"R": 1, "G": 2, "B": 3}, headers=lines).status_code
        )

    wait_until(lambda: status(1, "192.0.2.7") == 403)
    assert (status(1, "198.51.100.4"), status(500, "198.51.100.4")) == (200, 403)
    for left in (1, 0):
        panel.get_by_role("button", name="Remove").first.focus()
        keyboard.press("Enter")
        expect(panel.get_by_role("button", name="Remove")).to_have_count(left)
    wait_until(lambda: status(500, "192.0.2.7") == 200)


def test_a_moderator_works_on_a_phone(moderated: Callable[..., tuple[str, Page]]) -> None:
    url, page = moderated(
        viewport={"width": 390, "height": 800}, has_touch=True, is_mobile=True, device_scale_factor=2
    )
    page.get_by_role("button", name="Moderate").tap()
    panel = page.get_by_role("complementary", name="Moderation")
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    help_box = page.locator("#show-help").bounding_box()
    assert help_box is not None
    assert help_box["x"] + help_box["width"] < 390
    stage = page.locator("#stage").bounding_box()
    assert stage is not None
    assert stage["height"] > 150
    touch = page.context.new_cdp_session(page)
    for kind, places in (
        ("touchStart", [point(page, 480, 500)]),
        ("touchMove", [point(page, 500, 520)]),
        ("touchMove", [point(page, 540, 530)]),
        ("touchEnd", []),
    ):
        points = [{"x": x, "y": y} for x, y in places]
        touch.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})
    # Chromium takes a tap at once after a drag for the end of its momentum.
    page.wait_for_timeout(500)
    panel.get_by_label("192.0.2.7").tap()
    panel.get_by_role("button", name="Undo", exact=True).tap()
    expect(panel.locator("#outcome")).to_have_text("9 channels changed.")
    assert stored(url, 504, 512) == BLUE
