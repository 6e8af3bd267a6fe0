"""State kept between runs: drains of hosts, the controller's shares and its latest report."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

from pixel_lb.files import Paths, read, write
from pixel_lb.weights import Share


class Drain(NamedTuple):
    """The latest command about a host: whether it drained the host, and its time in seconds since 1970."""

    drained: bool
    time: float


NEVER = Drain(drained=False, time=0.0)


class Canary(NamedTuple):
    """A host whose weight is limited, so that few requests meet a new release.

    `factor` multiplies its base weight, 0 to 1; `until` is the end in seconds since 1970.
    """

    host: str
    factor: float
    until: float


class State:
    """Reads and encodes the agent's state."""

    def __init__(self, paths: Paths) -> None:
        self._paths = paths

    def drains(self) -> dict[str, Drain]:
        """Return the latest command about each host that was ever drained."""
        content = read(self._paths.drains)
        if content is None:
            return {
                path.name: Drain(True, path.stat().st_mtime) for path in self._paths.former_drains.glob("*")
            }
        return self.decode_drains(content)

    def drained(self) -> set[str]:
        """Return the hosts that an operator has drained."""
        return {host for host, drain in self.drains().items() if drain.drained}

    @staticmethod
    def encode_drains(drains: Mapping[str, Drain]) -> bytes:
        """Encode drains in the format that `decode_drains` reads."""
        return json.dumps({host: drain._asdict() for host, drain in drains.items()}, indent=1).encode()

    @staticmethod
    def decode_drains(content: bytes) -> dict[str, Drain]:
        """Decode drains.

        Raises:
            ValueError, TypeError, AttributeError: The content has another format.
        """
        return {host: Drain(**drain) for host, drain in json.loads(content).items()}

    def shares(self) -> dict[str, Share]:
        """Return the shares that the controller has set, by server."""
        content = read(self._paths.shares)
        return {name: Share(*share) for name, share in json.loads(content or b"{}").items()}

    @staticmethod
    def encode_shares(shares: Mapping[str, Share]) -> bytes:
        """Encode shares in the format that `shares()` reads."""
        return json.dumps(shares, indent=1).encode()

    def canary(self) -> Canary | None:
        """Return the host whose weight is limited now, if there is one."""
        content = read(self._paths.canary)
        canary = Canary(**json.loads(content)) if content else None
        return canary if canary and time.time() < canary.until else None

    @staticmethod
    def encode_canary(canary: Canary) -> bytes:
        """Encode a canary in the format that `canary()` reads."""
        return json.dumps(canary._asdict(), indent=1).encode()

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
