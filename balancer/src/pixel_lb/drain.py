"""Which hosts receive requests: operators drain hosts, the controller sets shares.

Balancers share their drains: each adopts the latest command about a host that any of them knows. So a drain
also holds on a balancer that was away.
"""

from __future__ import annotations

import time
import urllib.error
import urllib.request
from collections.abc import Collection, Iterable, Mapping

from pixel_lb.errors import LastBackend, WaitTimeout
from pixel_lb.files import Paths, write
from pixel_lb.fleet import KEYED_METHODS, Fleet
from pixel_lb.install import apply
from pixel_lb.nginx import Nginx, connections
from pixel_lb.state import NEVER, Drain, State
from pixel_lb.upstreams import render
from pixel_lb.weights import FULL, Share

# Requests to the fleet never go through a proxy of the environment.
DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def drain(paths: Paths, nginx: Nginx, host: str, *, force: bool = False) -> bool:
    """Stop sending new requests to a host.

    Args:
        paths: The agent's directories.
        nginx: The Nginx that reads the upstreams.
        host: The host, with all its instances.
        force: Drain the host even if it is the last one that receives requests.

    Returns:
        Whether anything changed.

    Raises:
        LastBackend: The host is the last one that receives requests.
        Refused: There is no such host, or Nginx rejects the change; nothing was changed.
    """
    fleet = Fleet.load(paths.facts)
    fleet.require(host)
    state = State(paths)
    if not force and not receiving(fleet, state.drained(), state.shares()) - {host}:
        raise LastBackend(
            f"{host} is the last backend that receives requests; use --force to drain it anyway"
        )
    return _mark(paths, nginx, fleet, host, drained=True)


def undrain(paths: Paths, nginx: Nginx, host: str) -> bool:
    """Send requests to a host again.

    Returns:
        Whether anything changed.

    Raises:
        Refused: There is no such host, or Nginx rejects the change; nothing was changed.
    """
    fleet = Fleet.load(paths.facts)
    fleet.require(host)
    return _mark(paths, nginx, fleet, host, drained=False)


def _mark(paths: Paths, nginx: Nginx, fleet: Fleet, host: str, *, drained: bool) -> bool:
    state = State(paths)
    former = state.drains()
    known = former.get(host, NEVER)
    # Later than the command that it replaces, although another balancer's clock may be ahead.
    drains = former | {host: Drain(drained, max(time.time(), known.time + 0.001))}
    upstreams = {paths.upstreams: _render(fleet, state, drains)}
    if known.drained != drained:
        return apply(nginx, {paths.drains: State.encode_drains(drains), **upstreams})
    # The command changes nothing here, but may on another balancer.
    changed = apply(nginx, upstreams)
    write(paths.drains, State.encode_drains(drains))
    return changed


def adopt(paths: Paths, nginx: Nginx, others: Iterable[Mapping[str, Drain]]) -> list[str]:
    """Adopt the commands of other balancers that are later than those known here.

    Args:
        paths: The agent's directories.
        nginx: The Nginx that reads the upstreams.
        others: The drains of each other balancer.

    Returns:
        The hosts that are drained or undrained by that, sorted.

    Raises:
        LastBackend: No host would be left that receives requests; nothing was changed.
        Refused: Nginx rejects the change; nothing was changed.
    """
    state = State(paths)
    former = state.drains()
    drains = latest([former, *others])
    fleet, shares = Fleet.load(paths.facts), state.shares()
    changed = sorted(
        host for host, drain in drains.items() if drain.drained != former.get(host, NEVER).drained
    )
    if (
        changed
        and receiving(fleet, _drained(former), shares)
        and not receiving(fleet, _drained(drains), shares)
    ):
        raise LastBackend(
            f"other balancers have drained {', '.join(changed)}, and no other backend receives requests here"
        )
    apply(
        nginx,
        {paths.drains: State.encode_drains(drains), paths.upstreams: _render(fleet, state, drains)},
    )
    return changed


def latest(known: Iterable[Mapping[str, Drain]]) -> dict[str, Drain]:
    """Return the latest command about each host."""
    drains: dict[str, Drain] = {}
    for each in known:
        drains |= {host: drain for host, drain in each.items() if drain.time > drains.get(host, NEVER).time}
    return drains


def _drained(drains: Mapping[str, Drain]) -> set[str]:
    return {host for host, drain in drains.items() if drain.drained}


def _render(fleet: Fleet, state: State, drains: Mapping[str, Drain]) -> bytes:
    return render(fleet, _drained(drains), state.shares()).encode()


def apply_shares(paths: Paths, nginx: Nginx, shares: Mapping[str, Share]) -> None:
    """Apply the controller's shares.

    Raises:
        Refused: Nginx rejects the change; the former shares are kept.
    """
    text = render(Fleet.load(paths.facts), State(paths).drained(), shares)
    apply(nginx, {paths.shares: State.encode_shares(shares), paths.upstreams: text.encode()})


def receiving(fleet: Fleet, drained: Collection[str], shares: Mapping[str, Share]) -> set[str]:
    """Return the hosts that receive requests: those not drained, with at least one server not down."""
    up = {server.host for server in fleet.servers if not shares.get(server.name, FULL).down}
    return up - set(drained)


def wait_until_idle(paths: Paths, host: str, seconds: float) -> None:
    """Wait until Nginx has no request in flight at a host.

    New workers do not connect to a server that is down, and old workers close idle connections, so each
    remaining connection is a request in flight.

    Raises:
        WaitTimeout: Requests are still in flight after `seconds`.
    """
    addresses = Fleet.load(paths.facts).addresses(host)
    deadline = time.monotonic() + seconds
    while left := sum(map(connections, addresses)):
        if time.monotonic() > deadline:
            raise WaitTimeout(f"{host} still has {left} requests in flight after {seconds:.0f} s")
        time.sleep(0.05)


def wait_until_seen(paths: Paths, host: str, seconds: float) -> None:
    """Wait until a host has answered a request through Nginx.

    Returns at once with methods that use a key or if the host is a backup, because it may receive no request.

    Raises:
        WaitTimeout: The host has answered no request after `seconds`.
    """
    fleet = Fleet.load(paths.facts)
    servers = {server.name for server in fleet.servers if server.host == host and not server.backup}
    if not servers or fleet.method in KEYED_METHODS:
        return
    deadline = time.monotonic() + seconds
    while answering_instance(fleet.probe_url) not in servers:
        if time.monotonic() > deadline:
            raise WaitTimeout(
                f"{host} answered none of the requests to {fleet.probe_url} within {seconds:.0f} s"
            )
        time.sleep(0.02)


def answering_instance(url: str) -> str | None:
    """Return the name of the instance that answers a GET, or None if none does."""
    try:
        with DIRECT.open(url, timeout=2) as answer:
            name: str | None = answer.headers["X-Pixel-Instance"]
            return name
    except (OSError, urllib.error.URLError):
        return None
