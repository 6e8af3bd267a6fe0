"""A client on the balancer's own host."""

from __future__ import annotations

import json
from typing import Any

import pytest


@pytest.fixture
def curl(host: Any) -> Any:
    """Send a request to the balancer on its own host; returns status, headers (lower case) and body."""

    def run(path: str, *options: str) -> tuple[int, dict[str, str], str]:
        words = " ".join(f"'{word}'" for word in options)
        done = host.run(f"client one '{path}' {words}")
        assert done.rc == 0, done.stderr
        status, headers, body = json.loads(done.stdout)
        return status, headers, body

    return run
