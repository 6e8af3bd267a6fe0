"""Copies of the app with a fault, for deploys that must be given up."""

from __future__ import annotations

import shutil
from pathlib import Path

from bench.drill.hosts import ROOT

REFUSAL = "This release is never ready."
# Appended to the app's module: everything works except the answer that a deploy waits for.
NEVER_READY = f'''

_ready_app = app


async def app(scope, receive, send):
    """A release that its gate must refuse."""
    if scope.get("path") != "/readyz":
        await _ready_app(scope, receive, send)
        return
    await send({{"type": "http.response.start", "status": 503, "headers": []}})
    await send({{"type": "http.response.body", "body": b"{REFUSAL}"}})
'''
# Statements of `GroupCommit`, and what is inserted before them.
LATE_FAULTS = {
    "errors": (
        "        depth = ",
        'if changes and perf_counter() > _BAD:\n            raise Problem.not_written("bad")',
    ),
    "slow": (
        "            size = batch.size",
        "if perf_counter() > _BAD:\n                await asyncio.sleep(0.15)",
    ),
}


def copy(folder: Path) -> Path:
    """Copies the app's source into a folder."""
    source = folder / "app"
    junk = shutil.ignore_patterns("__pycache__", "*.egg-info", "build", "tests", ".*")
    shutil.copytree(ROOT / "app", source, ignore=junk)
    return source


def never_ready(folder: Path) -> Path:
    """Makes a copy of the app that works but is never ready."""
    source = copy(folder)
    module = source / "src" / "pixel" / "app.py"
    module.write_text(module.read_text() + NEVER_READY)
    return source


def bad_after(folder: Path, fault: str, seconds: float) -> Path:
    """Makes a copy of the app whose writes fail or are slow, some seconds after a worker's start.

    Args:
        folder: the copy's parent.
        fault: a key of `LATE_FAULTS`.
        seconds: time from the import of the module until the fault begins.
    """
    source = copy(folder)
    module = source / "src" / "pixel" / "commit.py"
    text = module.read_text()
    place, inserted = LATE_FAULTS[fault]
    if text.count(place) != 1:
        raise ValueError(f"{module} has no single {place!r}")
    indent = " " * (len(place) - len(place.lstrip()))
    text = text.replace(place, f"{indent}{inserted}\n{place}")
    module.write_text(text.replace("\nlog = ", f"\n_BAD = perf_counter() + {seconds}\nlog = ", 1))
    return source
