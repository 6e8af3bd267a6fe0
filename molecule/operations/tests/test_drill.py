"""The quick drill, checked against the ledger of acknowledged writes, and the quick attacks."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[3]


def test_faults_stay_within_the_drills_limits(fleet: dict[str, Any], tmp_path: Path) -> None:
    must_succeed("bench.drill", "--json", str(tmp_path / "drill.json"))


def test_one_client_cannot_harm_another(fleet: dict[str, Any], tmp_path: Path) -> None:
    """Its p99 may be a second, however busy the machine is that runs these hosts."""
    must_succeed("bench.attack", "--least", "1", "--json", str(tmp_path / "attack.json"))


def must_succeed(program: str, *options: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", program, "--quick", *options],
        cwd=ROOT,
        text=True,
        capture_output=True,
        check=False,
    )
    print(done.stdout)
    assert done.returncode == 0, done.stderr
