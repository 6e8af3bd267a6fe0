"""The inventory's facts: backends and upstreams.

Ansible writes them to `backends.json` (`roles/nginx_lb/templates/backends.json.j2`). Only this module depends
on that file's format.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pixel_lb.controller import Settings
from pixel_lb.errors import Refused
from pixel_lb.weights import Capacity, Policy, base_weights

# Methods that send all requests of one client, or with one key, to one server.
KEYED_METHODS = {"ip_hash", "hash"}
STICKY_METHOD = "hash $uri consistent"


@dataclass(frozen=True)
class Server:
    """One instance of the app in one upstream.

    `address` is `unix:/path` or `a.b.c.d:port`; `weight` is its base weight.
    """

    name: str
    host: str
    address: str
    weight: int
    backup: bool


@dataclass(frozen=True)
class Upstream:
    """A group of servers. `method` is Nginx's directive, empty for weighted round robin."""

    name: str
    method: str
    servers: list[Server]

    @property
    def is_ring(self) -> bool:
        """Whether the method is consistent hashing, where a weight determines the number of keys."""
        return self.method.endswith(" consistent")


@dataclass(frozen=True)
class CreditQuery:
    """A host whose CPU credits are queried."""

    instance_id: str
    instance_type: str
    vcpus: int


@dataclass(frozen=True)
class Fleet:
    """The backends from the inventory, and the agent's settings.

    The first of `upstreams` is `pixel`, with all servers. `max_fails`, `fail_timeout` (seconds) and
    `keepalive` are Nginx's parameters; `interval` and `timeout` (seconds) are those of the health probe.
    `credits` contains the hosts whose CPU credits are queried in `credit_region`. `access_log` is None if
    Nginx writes none. `balancer` is this host, `peers` contains the URLs of the other balancers by name, and
    `address` is the one that moves between them, empty if none does.
    """

    balancer: str
    peers: dict[str, str]
    address: str

    upstreams: list[Upstream]
    max_fails: int
    fail_timeout: int
    keepalive: int
    method: str
    weight_source: str
    probe_url: str
    access_log: Path | None
    interval: float
    timeout: float
    settings: Settings
    credit_region: str
    credits: dict[str, CreditQuery]

    @classmethod
    def load(cls, path: Path) -> Fleet:
        """Read the facts.

        Raises:
            FileNotFoundError: The file does not exist.
            Refused: The file has another format, such as that of an older release.
        """
        text = path.read_text()
        try:
            return cls.parse(json.loads(text))
        except (ValueError, KeyError, TypeError) as error:
            raise Refused(f"{path} is invalid ({error!r}): run playbooks/nginx_lb.yml") from error

    @classmethod
    def parse(cls, facts: dict[str, Any]) -> Fleet:
        """Compute upstreams and weights from the facts.

        Raises:
            KeyError, TypeError, ValueError: The facts have another format.
        """
        controller = facts["controller"]
        return cls(
            balancer=facts["balancer"],
            peers=facts["peers"],
            address=facts["address"],
            upstreams=_upstreams(facts),
            max_fails=facts["max_fails"],
            fail_timeout=facts["fail_timeout"],
            keepalive=facts["keepalive"],
            method=facts["method"],
            weight_source=facts["weights"],
            probe_url=facts["probe_url"],
            access_log=Path(facts["access_log"]) if facts["access_log"] else None,
            interval=controller["interval"],
            timeout=controller["timeout"],
            settings=Settings(
                health=controller["health_checks"],
                adaptive=facts["weights"] == "adaptive",
                fails=controller["fails"],
                passes=controller["passes"],
                slow_start=controller["slow_start"],
                reload_interval=controller["reload_interval"],
                dead_band=controller["dead_band_percent"] / 100,
                step=controller["step_percent"] / 100,
            ),
            credit_region=controller["credit_region"],
            credits={
                host["name"]: CreditQuery(host["instance_id"], host["instance_type"], host["vcpus"])
                for host in facts["hosts"]
                if host["instance_id"]
            },
        )

    @property
    def servers(self) -> list[Server]:
        """The servers of upstream `pixel`, which are all servers."""
        return self.upstreams[0].servers

    @property
    def hosts(self) -> list[str]:
        """The names of all hosts, sorted."""
        return sorted({server.host for server in self.servers})

    @property
    def is_controlled(self) -> bool:
        """Whether the controller has something to do."""
        return self.settings.health or self.settings.adaptive

    def addresses(self, host: str) -> set[str]:
        """Return all addresses of a host; with consistent hashing it has other ones."""
        servers = (server for upstream in self.upstreams for server in upstream.servers)
        return {server.address for server in servers if server.host == host}

    def require(self, host: str) -> None:
        """Raise Refused if there is no such host."""
        if host not in self.hosts:
            raise Refused(f"unknown backend {host!r}; known backends: {', '.join(self.hosts)}")


def _upstreams(facts: dict[str, Any]) -> list[Upstream]:
    """Compute upstream `pixel`, the sticky upstream and the clusters."""
    hosts = facts["hosts"]
    method = _directive(facts)
    capacities = [
        Capacity(
            len(host["instances"]), host["vcpus"], host["instance_type"], host["weight"], host["measured"]
        )
        for host in hosts
    ]
    policy = Policy(facts["weights"], facts["factors"], facts["factor_default"])
    weights = {
        host["name"]: weight for host, weight in zip(hosts, base_weights(capacities, policy), strict=True)
    }

    def upstream(name: str, members: list[dict[str, Any]], method: str, *, backups: bool) -> Upstream:
        made = Upstream(name, method, [])
        for host in members:
            # Consistent hashing hashes addresses, so all balancers must use the same ones.
            is_local = host["name"] == facts["balancer"] and not made.is_ring
            made.servers.extend(
                Server(
                    name=instance["name"],
                    host=host["name"],
                    address=f"unix:{instance['socket']}"
                    if is_local and instance["socket"]
                    else instance["address"],
                    weight=weights[host["name"]],
                    backup=backups and host["backup"],
                )
                for instance in host["instances"]
            )
        return made

    upstreams = [upstream("pixel", hosts, method, backups=True)]
    if facts["sticky"]:
        upstreams.append(upstream("pixel_sticky", hosts, STICKY_METHOD, backups=True))
    for name, what in facts["clusters"].items():
        # `what` is an inventory group, an instance type or its family.
        members = [
            host
            for host in hosts
            if what in (*host["groups"], host["instance_type"], host["instance_type"].split(".")[0])
        ]
        upstreams.append(upstream(f"cluster_{name}", members, method, backups=False))
    return upstreams


def _directive(facts: dict[str, Any]) -> str:
    """Return Nginx's directive for a balancing method."""
    method = str(facts["method"])
    if method == "hash":
        return f"hash {facts['hash_key']}{' consistent' if facts['hash_consistent'] else ''}"
    return {"round_robin": "", "random": "random two least_conn"}.get(method, method)
