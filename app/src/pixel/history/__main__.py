"""Commands of the history, for its service and for operators.

Every command reads the settings of the service (``PIXEL_…``, ``HISTORY_…``) from the environment.
"""

import argparse
import asyncio
import getpass
import json
import logging.config
import os
import sqlite3
import sys
from collections.abc import Sequence
from contextlib import closing

import msgspec
import uvicorn

from pixel import logs
from pixel.canvas import Canvas, Region
from pixel.cluster import Redis
from pixel.history import queries, settings
from pixel.history.parameters import moment, show_time
from pixel.history.service import create_app
from pixel.history.timelapse import Film
from pixel.history.undo import Outcome, Undo
from pixel.moderation import TIMEOUT
from pixel.resp import Connection, ReplyError
from pixel.settings import Settings
from pixel.settings import load as load_pixel


def serve(arguments: argparse.Namespace, pixel: Settings, history: settings.HistorySettings) -> None:
    """Follow the event stream, and answer questions over HTTP."""
    logging.config.dictConfig(logs.config(pixel))
    uvicorn.run(
        create_app(pixel, history),
        host=history.address,
        port=history.port,
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        ws="none",
        headers=[("X-Pixel-Instance", pixel.instance)],
        timeout_graceful_shutdown=5,
    )


def show(arguments: argparse.Namespace, pixel: Settings, history: settings.HistorySettings) -> None:
    """Print selected changes, the newest first, with the full addresses of anonymous painters."""
    selection, after, left = _selection(arguments, pixel), None, arguments.limit
    while left > 0:
        page = queries.page(history.path, selection, after, min(left, 1000))
        for event, _, x, y, channel, value, author in page.records:
            print(f"{show_time(event.milliseconds)} {x},{y} {channel} {value} {author or 'unknown'}")
        left -= len(page.records)
        after = page.next
        if after is None:
            return


def undo(arguments: argparse.Namespace, pixel: Settings, history: settings.HistorySettings) -> None:
    """Undo selected changes, or count them."""
    selection = _selection(arguments, pixel)
    if selection == queries.Selection():
        raise SystemExit("undo: choose changes with --author, --area, --since or --until")
    try:
        outcome = asyncio.run(_undo(arguments, pixel, history, selection))
    except (OSError, ReplyError) as error:
        raise SystemExit(f"undo: {error or 'Redis did not answer in time'}; run it again") from None
    print(json.dumps({"applied": arguments.apply} | msgspec.structs.asdict(outcome)))


async def _undo(
    arguments: argparse.Namespace,
    pixel: Settings,
    history: settings.HistorySettings,
    selection: queries.Selection,
) -> Outcome:
    redis = Redis(pixel)
    async with asyncio.timeout(TIMEOUT):
        connection = await redis.open(Connection)
    try:
        canvas = Canvas(pixel.canvas_width, pixel.canvas_height)
        author = f"operator:{arguments.user}"
        task = Undo(history.path, connection, canvas, selection, author, pixel.events_maxlen)
        outcome = await task.run(apply=arguments.apply)
        await redis.confirm(connection)
        return outcome
    finally:
        connection.close()


def backup(arguments: argparse.Namespace, pixel: Settings, history: settings.HistorySettings) -> None:
    """Write a copy of the history, as it is at one moment, while the service runs."""
    with queries.reading(history.path) as source, closing(sqlite3.connect(arguments.file)) as copy:
        source.backup(copy)


def timelapse(arguments: argparse.Namespace, pixel: Settings, history: settings.HistorySettings) -> None:
    """Write a film of the canvas to standard output."""
    region, _, since, until = _selection(arguments, pixel)
    whole = Region(0, 0, pixel.canvas_width, pixel.canvas_height)
    film = Film(region or whole, since, until, arguments.seconds, arguments.scale)
    try:
        write = film.write_mp4 if arguments.format == "mp4" else film.write_webp
        write(history.path, sys.stdout.buffer)
    except ValueError as error:
        raise SystemExit(f"timelapse: {error}") from None


def _selection(arguments: argparse.Namespace, pixel: Settings) -> queries.Selection:
    try:
        return queries.Selection(
            Canvas(pixel.canvas_width, pixel.canvas_height).parse_area(arguments.area)
            if arguments.area
            else None,
            arguments.author.split(",") if arguments.author else None,
            moment(arguments.since or None),
            moment(arguments.until or None),
        )
    except ValueError as error:
        raise SystemExit(f"{arguments.command}: {error}") from None


def main(words: Sequence[str] | None = None) -> None:
    """Run a command."""
    parser = argparse.ArgumentParser(prog="pixel-history", description="The history of the canvas.")
    commands = parser.add_subparsers(dest="command", required=True)
    for command in (serve, show, undo, backup, timelapse):
        sub = commands.add_parser(command.__name__, help=command.__doc__, description=command.__doc__)
        sub.set_defaults(run=command)
        if command in (show, undo, timelapse):
            sub.add_argument("--area", help="x,y,width,height")
            sub.add_argument("--since", help="as in 2026-11-21T02:31:38Z")
            sub.add_argument("--until", help="as --since; excluded")
        if command in (show, undo):
            sub.add_argument("--author", help="key:NAME, operator:NAME or addr:ADDRESS; several with commas")
        if command is show:
            sub.add_argument("--limit", type=int, default=100, help="most changes to print (100)")
        if command is undo:
            sub.add_argument("--apply", action="store_true", help="without it, changes are only counted")
            operator = os.environ.get("OPERATOR") or getpass.getuser()
            sub.add_argument("--user", default=operator, help="the operator who is recorded as author")
        if command is timelapse:
            sub.set_defaults(author=None)
            sub.add_argument(
                "--format", choices=("webp", "mp4"), default="webp", help="webp has no loss; mp4 needs ffmpeg"
            )
            sub.add_argument("--seconds", type=float, default=20, help="length of the film (20)")
            sub.add_argument("--scale", type=int, choices=range(1, 17), default=1, help="size of a pixel (1)")
        if command is backup:
            sub.add_argument("file", help="the copy; it must not exist")
    arguments = parser.parse_args(words)
    arguments.run(arguments, load_pixel(), settings.load())


if __name__ == "__main__":
    main()
