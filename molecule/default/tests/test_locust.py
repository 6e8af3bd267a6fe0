"""Locust's users (readers, writers and stream viewers) run at the same time without a failed request."""

from __future__ import annotations

import csv
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[3]

# The requests of bench/load/locustfile.py, listed here so that the test fails if a task never runs.
REQUESTS = {
    *("GET /", "GET /live/{name}", "GET /canvas.rgb", "GET /canvas.png", "GET /pixel/{x}/{y}"),
    *("GET / (again)", "GET /live/{name} (again)", "GET /canvas.rgb (again)", "GET /canvas.png (again)"),
    *("POST /pixel", "PUT /pixel/{x}/{y}", "POST /pixels", "GET /events", "GET /events (resumed)"),
}


def test_forty_users_see_no_failure(fleet: dict[str, Any], tmp_path: Path) -> None:
    # Locust (gevent) patches Python's library, so it runs in a separate process.
    command = [sys.executable, "-m", "locust", "--locustfile", "bench/load/locustfile.py", "--headless"]
    plan = ["--users", "40", "--spawn-rate", "10", "--run-time", "20s", "--only-summary"]
    done = subprocess.run(
        [*command, *plan, "--host", fleet["url"], "--csv", str(tmp_path / "locust")],
        cwd=ROOT,
        text=True,
        capture_output=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    with (tmp_path / "locust_stats.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["Name"] != "Aggregated"]
    assert {f"{row['Type']} {row['Name']}" for row in rows if int(row["Request Count"])} == REQUESTS
