"""Measures how long a viewer waits for pictures of the canvas and for pixels on the live page.

    python -m bench.report.viewer --url http://127.0.0.1:8080

The canvas is filled with noise, which does not compress, and is not restored. A browser (Chromium
with Playwright) shows the live page while the generator of `bench.load` writes. Exit status: 0;
1 if the page did not show every acknowledged write; 2 if the run was not possible.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import shutil
import sys
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import httpx2 as httpx
from playwright.async_api import Error, Page, async_playwright

from bench.load.figures import Spread
from bench.load.http1 import BadAnswerError, Target
from bench.load.ledger import Ledger
from bench.load.openloop import Plan, Sample, run
from bench.load.options import ImpossibleError, positive
from bench.load.readback import read_canvas

BATCH = 10_000
FETCHES = 15
CONNECTIONS = 64
SETTLE = 3.0
JSON = {"Content-Type": "application/json"}

# Disable the browser's own network requests.
FLAGS = ["--no-sandbox", "--disable-background-networking", "--disable-component-update"]
FLAGS += ["--disable-gpu", "--disable-quic", "--disable-sync", "--no-first-run"]

# Runs beside the page's code: records when a change arrived, and when it was drawn.
WATCH = """(() => {
  const now = () => performance.timeOrigin + performance.now();
  const seen = (window.seen = { changes: [], frames: [] });
  let pending = [];
  window.EventSource = class extends EventSource {
    constructor(...all) {
      super(...all);
      this.addEventListener("message", ({ data }) => {
        const received = now();
        for (const change of JSON.parse(data)) pending.push([change.join(), received]);
      });
    }
  };
  const { prototype } = CanvasRenderingContext2D;
  const put = prototype.putImageData;
  prototype.putImageData = function (...all) {
    put.apply(this, all);
    queueMicrotask(() => {
      const drawn = now();
      for (const change of pending) seen.changes.push([...change, drawn]);
      pending = [];
    });
  };
  const frame = (at) => {
    seen.frames.push(at);
    requestAnimationFrame(frame);
  };
  requestAnimationFrame(frame);
})()"""


class Answer(NamedTuple):
    seconds: float
    length: int


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.report.viewer",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--url", required=True, help="the service's root, e.g. http://127.0.0.1:8080")
    add("--seconds", type=positive, default=30.0, help="at each rate (default 30)")
    add("--rates", default="500,1000", help="writes per second (default 500,1000)")
    add("--json", type=Path, metavar="FILE", help="write the results to FILE")
    options = parser.parse_args(arguments)
    try:
        options.target = Target.parse(options.url)
        options.rates = [positive(rate) for rate in options.rates.split(",")]
    except (ValueError, argparse.ArgumentTypeError) as error:
        parser.error(str(error))
    return options


# Pictures


def fetch(client: httpx.Client, path: str) -> Answer:
    begun = time.perf_counter()
    answer = client.get(path).raise_for_status()
    return Answer(time.perf_counter() - begun, len(answer.content))


def noise(width: int, height: int) -> Iterator[bytes]:
    """Yields bodies for POST /pixels that set every channel of every pixel."""
    values = random.Random(1)  # noqa: S311 - only noise
    cells = [(x, y, c) for y in range(height) for x in range(width) for c in "RGB"]
    for start in range(0, len(cells), BATCH):
        yield json.dumps(
            [
                {"x": x, "y": y, "channel": c, "value": values.randrange(256)}
                for x, y, c in cells[start : start + BATCH]
            ]
        ).encode()


def measure_picture(client: httpx.Client, path: str) -> dict[str, Any]:
    """Fetches a picture right after a change, and again without a change."""
    pixel = {"x": 0, "y": 0, "channel": "R"}
    fresh, known = [], []
    for number in range(FETCHES):
        client.post("/pixel", json=pixel | {"value": number}).raise_for_status()
        fresh.append(fetch(client, path))
        known.append(fetch(client, path))
    return {
        "bytes": fresh[-1].length,
        "after_a_change_ms": Spread.of_seconds(each.seconds for each in fresh).as_json(),
        "again_ms": Spread.of_seconds(each.seconds for each in known).as_json(),
    }


# The live page


async def watch(page: Page, options: argparse.Namespace, rate: float) -> dict[str, Any]:
    """Measures the delay from each write's due time until the page shows it, at a constant rate."""
    target: Target = options.target
    width, height = await page.evaluate("[board.width, board.height]")
    ledger = Ledger(width, height, await read_canvas(target, width, height, cells=[]))
    await page.evaluate("seen.changes = [], seen.frames = []")
    samples: list[Sample] = []
    to_wall = time.time() - time.monotonic()
    report = await run(target, Plan(rate, options.seconds, CONNECTIONS), ledger, watch=samples.append)
    await asyncio.sleep(SETTLE)
    seen = await page.evaluate("seen")
    # Writes are issued in the order in which they are due.
    due = {
        ",".join(map(str, ledger.write(number))): (sample.due + to_wall) * 1000
        for number, sample in enumerate(sorted(samples, key=lambda sample: sample.due))
        if sample.error is None
    }
    shown = {change: (received, drawn) for change, received, drawn in seen["changes"] if change in due}
    frames = [after - before for before, after in pairwise(seen["frames"])]
    return {
        "rate": rate,
        "acknowledged": report.acknowledged,
        "failed": report.failed,
        "not_shown": len(due) - len(shown),
        "acknowledged_ms": report.latency.as_json(),
        "received_ms": Spread.of_seconds((shown[one][0] - due[one]) / 1000 for one in shown).as_json(),
        "drawn_ms": Spread.of_seconds((shown[one][1] - due[one]) / 1000 for one in shown).as_json(),
        "frame_ms": Spread.of_seconds(each / 1000 for each in frames).as_json(),
        "generator_lag_ms": report.lag.as_json(),
    }


async def browse(options: argparse.Namespace) -> list[dict[str, Any]]:
    async with async_playwright() as playwright:
        path = shutil.which("chromium")
        browser = await playwright.chromium.launch(executable_path=path, args=FLAGS)
        try:
            page = await browser.new_page(viewport={"width": 1200, "height": 900})
            await page.add_init_script(WATCH)
            await page.goto(options.url)
            await page.locator("#board.loaded").wait_for()
            await asyncio.sleep(SETTLE)
            return [await watch(page, options, rate) for rate in options.rates]
        finally:
            await browser.close()


def describe(found: dict[str, Any]) -> str:
    def spread(of: dict[str, float]) -> str:
        return f"p50 {of['p50']:.1f}, p99 {of['p99']:.1f}, largest {of['max']:.1f} ms"

    lines = []
    for path, picture in found["pictures"].items():
        lines.append(f"GET {path}: {picture['bytes']} bytes")
        lines.append(f"  after a change  {spread(picture['after_a_change_ms'])}")
        lines.append(f"  again           {spread(picture['again_ms'])}")
    for seen in found["viewer"]:
        lines.append(
            f"{seen['rate']:g} writes/s: {seen['acknowledged']} acknowledged,"
            f" {seen['failed']} failed, {seen['not_shown']} not shown; delays from the due time:"
        )
        lines += [
            f"  {name:<14}{spread(seen[f'{name}_ms'])}"
            for name in ("acknowledged", "received", "drawn", "frame")
        ]
    return "\n".join(lines)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    # Pictures as the app makes them, not as the balancer's cache has them.
    fresh = {"Cache-Control": "no-cache"}
    with httpx.Client(base_url=options.target.url, headers=fresh, timeout=60, trust_env=False) as client:
        canvas = client.get("/canvas.rgb").raise_for_status()
        width, height = (int(canvas.headers[f"X-Pixel-{side}"]) for side in ("Width", "Height"))
        for body in noise(width, height):
            client.post("/pixels", content=body, headers=JSON).raise_for_status()
        pictures = {path: measure_picture(client, path) for path in ("/canvas.rgb", "/canvas.png")}
    return {
        "date": time.strftime("%Y-%m-%d %H:%M:%S"),
        "canvas": [width, height],
        "pictures": pictures,
        "viewer": asyncio.run(browse(options)),
    }


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    try:
        found = measure(options)
    except (ImpossibleError, BadAnswerError, OSError, httpx.HTTPError, Error) as error:
        print(f"bench.report.viewer: {error}", file=sys.stderr)
        return 2
    print(describe(found))
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    return int(any(seen["not_shown"] for seen in found["viewer"]))


if __name__ == "__main__":
    sys.exit(main())
