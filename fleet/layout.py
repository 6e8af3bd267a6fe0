"""The plan of a fleet, derived from its name: container names, ports, addresses, state directory."""

from __future__ import annotations

import dataclasses
import ipaddress
import re
import zlib
from collections.abc import Mapping
from pathlib import Path

from bootstrap import ROOT, Problem

# Hosts by inventory: inventory/local and inventory/ha.
HOSTS = {"local": ["c5", "t2"], "ha": ["c5", "t2", "m5"]}
DEFAULT_SUITE = "bookworm"
# The ratio of the clock speeds of c5.xlarge and t2.xlarge.
CPU_SHARES = {"c5": 1536, "t2": 1024}
BALANCER = "c5"


@dataclasses.dataclass(frozen=True)
class Host:
    """One host. `address` is on the fleet's network, the ports are on the loopback interface."""

    name: str
    suite: str
    address: str
    ssh_port: int
    http_port: int | None
    cpu_shares: int


@dataclasses.dataclass(frozen=True)
class Fleet:
    """A fleet and its hosts."""

    name: str
    subnet: ipaddress.IPv4Network
    hosts: tuple[Host, ...]
    inventory: str = "local"
    data: str = ""  # directory of this machine for Redis data; empty: the data is in the containers

    @property
    def state(self) -> Path:
        return state_directory(self.name)

    @property
    def label(self) -> str:
        return f"pixel.fleet={self.name}"

    @property
    def address(self) -> str:
        """An address for the balancers of `inventory/ha`, which no host has as its own, with its prefix."""
        return f"{self.subnet[-2]}/{self.subnet.prefixlen}"

    @property
    def url(self) -> str | None:
        if self.inventory == "ha":
            return f"http://{self.subnet[-2]}"
        ports = [host.http_port for host in self.hosts if host.http_port]
        return f"http://127.0.0.1:{ports[0]}" if ports else None

    def container(self, host: Host) -> str:
        return f"{self.name}-{host.name}"

    def host(self, name: str) -> Host:
        """Return the host with this name; raise `Problem` if there is none."""
        hosts = {host.name: host for host in self.hosts}
        if name not in hosts:
            raise Problem(f"fleet {self.name} has no host {name!r}; its hosts are {', '.join(hosts)}.")
        return hosts[name]


def state_directory(name: str) -> Path:
    """Return the directory of a fleet's key, ssh_config and fleet.json."""
    return ROOT / ".fleet" / name


def plan(name: str, host_specs: list[str], environ: Mapping[str, str], inventory: str = "local") -> Fleet:
    """Derive a fleet from its name. The same name gives the same ports, so a second run finds the fleet."""
    if not re.fullmatch(r"[a-z][a-z0-9_-]{0,30}", name):
        raise Problem(
            f"PIXEL_FLEET={name!r} is not a valid name: use at most 31 lower-case letters, digits, - and _,"
            " beginning with a letter."
        )
    # The default fleet has the ports in the README. Those of other fleets follow from a hash of the name.
    number = 0 if name == "pixel" else 1 + zlib.crc32(name.encode()) % 199
    http_port = environ.get("PIXEL_FLEET_PORT") or str(8080 + number * 10)
    if not http_port.isdecimal() or not 1024 <= int(http_port) <= 65535:
        raise Problem(f"PIXEL_FLEET_PORT={http_port!r} is not a port: write a number from 1024 to 65535.")
    subnet_text = environ.get("PIXEL_FLEET_SUBNET") or f"172.29.{number}.0/24"
    try:
        subnet = ipaddress.IPv4Network(subnet_text)
        if subnet.prefixlen > 28:
            raise ValueError("it has fewer than 14 host addresses")
    except ValueError as error:
        raise Problem(
            f"PIXEL_FLEET_SUBNET={subnet_text!r} is not a usable network ({error});"
            " write one like 172.29.40.0/24."
        ) from error
    data = environ.get("PIXEL_FLEET_DATA", "")
    if data and not Path(data).is_absolute():
        raise Problem(f"PIXEL_FLEET_DATA={data!r} is not an absolute path: write one like /dev/shm.")
    hosts = []
    for index, spec in enumerate(host_specs):
        host, _, suite = spec.partition(":")
        hosts.append(
            Host(
                name=host,
                suite=suite or DEFAULT_SUITE,
                address=str(subnet[10 + index]),
                ssh_port=22000 + number * 10 + index,
                http_port=int(http_port) if host == BALANCER else None,
                cpu_shares=CPU_SHARES.get(host, 1024),
            )
        )
    return Fleet(name=name, subnet=subnet, hosts=tuple(hosts), inventory=inventory, data=data)
