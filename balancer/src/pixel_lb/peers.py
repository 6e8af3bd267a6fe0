"""The other balancers: the drains that they know, and the address that moves between them."""

from __future__ import annotations

import socket
import urllib.error
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

from pixel_lb.drain import DIRECT
from pixel_lb.state import Drain, State

TIMEOUT_SECONDS = 1.0


def fetch_drains(url: str) -> dict[str, Drain]:
    """Return the drains that a balancer knows; none if it does not answer, as while it is off."""
    try:
        with DIRECT.open(f"{url}/lb/drains", timeout=TIMEOUT_SECONDS) as answer:
            return State.decode_drains(answer.read())
    except (OSError, urllib.error.URLError, ValueError, TypeError, AttributeError):
        return {}


def fetch_all(peers: Mapping[str, str]) -> list[dict[str, Drain]]:
    """Return the drains that each balancer knows, given their URLs by name."""
    with ThreadPoolExecutor(max(1, len(peers))) as pool:
        return list(pool.map(fetch_drains, peers.values()))


def holds(address: str) -> bool:
    """Return whether this host has an IP address now."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.bind((address, 0))
        except OSError:
            return False
    return True
