"""State kept between runs: drained hosts, the controller's shares and its latest report."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from typing import Any

from pixel_lb.files import Paths, read, write
from pixel_lb.weights import Share


class State:
    """Reads and encodes the agent's state."""

    def __init__(self, paths: Paths) -> None:
        self._paths = paths

    def drained(self) -> set[str]:
        """Return the hosts that an operator has drained."""
        return {path.name for path in self._paths.drained.glob("*")}

    def shares(self) -> dict[str, Share]:
        """Return the shares that the controller has set, by server."""
        content = read(self._paths.shares)
        return {name: Share(*share) for name, share in json.loads(content or b"{}").items()}

    @staticmethod
    def encode_shares(shares: Mapping[str, Share]) -> bytes:
        """Encode shares in the format that `shares()` reads."""
        return json.dumps(shares, indent=1).encode()

    def write_report(self, report: dict[str, Any]) -> None:
        """Write the controller's report."""
        write(self._paths.report, json.dumps(report, indent=1).encode())

    def report(self) -> tuple[dict[str, Any], float | None]:
        """Return the controller's latest report and its age in seconds; ({}, None) if there is none."""
        content = read(self._paths.report)
        if content is None:
            return {}, None
        report: dict[str, Any] = json.loads(content)
        return report, time.time() - self._paths.report.stat().st_mtime
