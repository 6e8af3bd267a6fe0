"""A host's weight, limited while a new release on it is compared with the other hosts'."""

from __future__ import annotations

import time

from pixel_lb.errors import Refused, WaitTimeout
from pixel_lb.files import Paths, write
from pixel_lb.fleet import Fleet
from pixel_lb.state import Canary, State
from pixel_lb.weights import FULL


def begin(paths: Paths, host: str, percent: int, seconds: float) -> bool:
    """Limit a host's weight; the controller applies the limit, and ends it after some seconds.

    Args:
        paths: The agent's directories.
        host: The host, with all its instances. A former canary has its full weight again.
        percent: The limit in percent of the host's weight.
        seconds: The time after which the limit ends by itself.

    Returns:
        Whether anything changed, as the end of the limit does.

    Raises:
        Refused: There is no such host, or no controller, or weights place keys; nothing was changed.
    """
    fleet = Fleet.load(paths.facts)
    fleet.require(host)
    if not fleet.is_controlled:
        raise Refused("the controller is disabled: set nginx_lb_health_checks or nginx_lb_weights: adaptive")
    if any(upstream.is_ring for upstream in fleet.upstreams):
        raise Refused("with nginx_lb_method: hash, weights decide where keys are, and are not changed")
    return write(paths.canary, State.encode_canary(Canary(host, percent / 100, time.time() + seconds)))


def end(paths: Paths) -> bool:
    """End the limit; the controller restores the host's weight.

    Returns:
        Whether there was one.
    """
    return write(paths.canary, None)


def wait_until_limited(paths: Paths, host: str, percent: int, seconds: float) -> None:
    """Wait until the limit of a host's weight is in force.

    Raises:
        WaitTimeout: It is not after `seconds`.
    """
    servers = [server.name for server in Fleet.load(paths.facts).servers if server.host == host]
    deadline = time.monotonic() + seconds
    while True:
        shares = State(paths).shares()
        given = [shares.get(name, FULL) for name in servers]
        if all(share.down or share.factor <= percent / 100 for share in given):
            return
        if time.monotonic() > deadline:
            raise WaitTimeout(f"the weight of {host} was not limited within {seconds:.0f} s")
        time.sleep(0.1)
