"""A user of the fleet."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from typing import Any

import pytest


class Client:
    """Asks over HTTP, and takes refusals as answers."""

    def __init__(self, url: str) -> None:
        self.url = url

    def ask(self, path: str, body: bytes | None = None) -> tuple[int, Any, str]:
        """Status, headers and body; POST if there is a body."""
        request = urllib.request.Request(
            self.url + path, data=body, headers={"Content-Type": "application/json"} if body else {}
        )
        try:
            with urllib.request.urlopen(request, timeout=10) as answer:
                return answer.status, answer.headers, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.headers, error.read().decode()

    def read_from(self, instance: str, path: str) -> Any:
        """What this instance answers; the balancer gives everyone a turn."""
        for _ in range(20):
            status, headers, body = self.ask(path)
            if headers["X-Pixel-Instance"] == instance:
                assert status == 200
                return json.loads(body)
        raise AssertionError(f"20 requests in a row, and none was answered by {instance}")


@pytest.fixture(scope="session")
def client(fleet: dict[str, Any]) -> Client:
    """A user somewhere outside, who knows the balancer's address only."""
    return Client(fleet["url"])
