"""The text of `upstreams.conf`."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

from pixel_lb.fleet import Fleet, Upstream
from pixel_lb.weights import FULL, Share, effective_weights


def render(fleet: Fleet, drained: Collection[str], shares: Mapping[str, Share]) -> str:
    """Render all upstreams.

    Args:
        fleet: The inventory's facts.
        drained: Hosts that receive no requests.
        shares: The controller's share of each server; a server without one has its full weight.

    Returns:
        A configuration for Nginx' `http` block. Event streams use the upstreams `<name>_streams`.
        `$pixel_drained` is 1 if the balancer's own host is drained.
    """
    parts = ["# Written by pixel-lb from backends.json; drained and unready servers are marked down.\n"]
    parts += [_render_one(fleet, upstream, drained, shares) for upstream in fleet.upstreams]
    retries = _retry_upstreams(fleet, drained, shares)
    parts += [_render_one(fleet, upstream, drained, shares) for upstream in retries.values()]
    # Open event streams are connections that last. With least_conn they would decide where other requests go.
    streams = [Upstream(f"{each.name}_streams", each.method, each.servers) for each in fleet.upstreams]
    parts += [_render_one(fleet, upstream, drained, shares) for upstream in streams]
    parts.append(_render_map(fleet, retries))
    parts.append(f"geo $pixel_drained {{\n    default {int(fleet.balancer in drained)};\n}}\n")
    return "".join(parts)


def _retry_upstreams(
    fleet: Fleet, drained: Collection[str], shares: Mapping[str, Share]
) -> dict[tuple[str, str], Upstream]:
    """Return the upstream for retries by upstream and failed host: the same upstream without that host.

    If no other host is up, there is none, and the retry goes to the same upstream.
    """
    retries = {}
    for upstream in fleet.upstreams:
        for host in dict.fromkeys(server.host for server in upstream.servers):
            others = [server for server in upstream.servers if server.host != host]
            if any(
                not shares.get(server.name, FULL).down and server.host not in drained for server in others
            ):
                name = f"{upstream.name}_without_{host}"
                retries[upstream.name, host] = Upstream(name, upstream.method, others)
    return retries


def _render_map(fleet: Fleet, retries: Mapping[tuple[str, str], Upstream]) -> str:
    """Render `$pixel_other`: the upstream of a retry, by upstream and failed address."""
    lines = ["volatile;", "default $pixel_upstream;"]
    for upstream in fleet.upstreams:
        for server in upstream.servers:
            retry = retries.get((upstream.name, server.host))
            if retry is not None:
                last = re.escape(server.address)
                lines.append(f'"~^{re.escape(upstream.name)} (.*[ ,])?{last}$" {retry.name};')
    body = "".join(f"    {line}\n" for line in lines)
    return f'map "$pixel_upstream $upstream_addr" $pixel_other {{\n{body}}}\n'


def _render_one(
    fleet: Fleet, upstream: Upstream, drained: Collection[str], shares: Mapping[str, Share]
) -> str:
    servers = upstream.servers
    given = [shares.get(server.name, FULL) for server in servers]
    # With consistent hashing, weights determine the placement of keys, so shares do not change them.
    weights = effective_weights(
        [server.weight for server in servers], [FULL] * len(servers) if upstream.is_ring else given
    )
    # If no server would be left, servers that are not drained stay up.
    none_left = all(
        share.down or server.host in drained for server, share in zip(servers, given, strict=True)
    )
    downs = [
        server.host in drained or (share.down and not none_left)
        for server, share in zip(servers, given, strict=True)
    ]
    # A single remaining server is the only line that Nginx sees. Nginx then retries it if it closed a
    # keep-alive connection as a request was sent (with several servers it would try another one), and never
    # marks it failed.
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
