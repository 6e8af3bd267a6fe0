"""The text of `upstreams.conf`."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from pixel_lb.fleet import Fleet, Upstream
from pixel_lb.weights import FULL, Share, effective_weights


def render(fleet: Fleet, drained: Collection[str], shares: Mapping[str, Share]) -> str:
    """Render all upstreams.

    Args:
        fleet: The inventory's facts.
        drained: Hosts that receive no requests.
        shares: The controller's share of each server; a server without one has all of its weight.

    Returns:
        A configuration for Nginx' `http` block.
    """
    parts = ["# Written by pixel-lb from backends.json; drained and unready servers are marked down.\n"]
    parts += [_render_one(fleet, upstream, drained, shares) for upstream in fleet.upstreams]
    return "".join(parts)


def _render_one(
    fleet: Fleet, upstream: Upstream, drained: Collection[str], shares: Mapping[str, Share]
) -> str:
    servers = upstream.servers
    given = [shares.get(server.name, FULL) for server in servers]
    # On a ring, a weight is a number of keys; they stay where they are.
    weights = effective_weights(
        [server.weight for server in servers], [FULL] * len(servers) if upstream.is_ring else given
    )
    # If no server would be left, those that are not drained stay in.
    none_left = all(
        share.down or server.host in drained for server, share in zip(servers, given, strict=True)
    )
    downs = [
        server.host in drained or (share.down and not none_left)
        for server, share in zip(servers, given, strict=True)
    ]
    # Nginx sees the last server as the only one. It then asks it again if it closed a kept connection just as
    # a request was sent on it (with several servers, it would ask another one), and never marks it failed.
    is_alone = downs.count(False) == 1
    lines = [f"zone {upstream.name} 256k;"]
    if upstream.method:
        lines.append(f"{upstream.method};")
    for server, weight, down in zip(servers, weights, downs, strict=True):
        flags = " backup" * (server.backup and not is_alone) + " down" * down
        lines.append(
            f"{'# ' * (is_alone and down)}server {server.address} weight={weight}"
            f" max_fails={fleet.max_fails} fail_timeout={fleet.fail_timeout}s{flags};"
            f" # {server.name}"
        )
    lines += [f"keepalive {fleet.keepalive};", "keepalive_requests 100000;", "keepalive_timeout 60s;"]
    body = "".join(f"    {line}\n" for line in lines)
    return f"upstream {upstream.name} {{\n{body}}}\n"
