"""Users of all kinds at once: lookers, painters and watchers, and not one wrong answer."""

from __future__ import annotations

import csv
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[3]

# The tasks of bench/load/locustfile.py, named here so that a task that never runs is noticed.
DEEDS = {
    *("GET /", "GET /live/{name}", "GET /canvas.rgb", "GET /canvas.png", "GET /pixel/{x}/{y}"),
    *("GET / (again)", "GET /live/{name} (again)", "GET /canvas.rgb (again)", "GET /canvas.png (again)"),
    *("POST /pixel", "PUT /pixel/{x}/{y}", "POST /pixels", "GET /events", "GET /events (resumed)"),
}


def test_forty_users_see_no_failure(fleet: dict[str, Any], tmp_path: Path) -> None:
    # In a process of its own, as Locust exchanges parts of Python's library.
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
    assert {f"{row['Type']} {row['Name']}" for row in rows if int(row["Request Count"])} == DEEDS
