"""Filters for facts of the fleet: the app's instances on a host, and ports.

    hostvars[host] | pixel_instances            the app's instances on a host, first one first
    hostvars[host] | pixel_instance_template    the same for the systemd template of further instances
    hostvars[host] | fleet_ports                TCP ports that a host opens to the fleet
    hostvars[host] | redis_bus_ports            TCP ports that a host opens to the other Redis hosts only
    hostvars.values() | write_lifetime          seconds that an attempt at a write can last on these hosts
    hostvars.values() | vrrp_peers(host)        addresses of the balancers that exchange VRRP with a host
    hostvars[host] | public_url                 where clients reach a balancer
    hostvars[host] | host_variable(name, 0)     a variable of another host, or 0 if it isn't set
    'redis' | exporter_port                     TCP port of an exporter, of Prometheus or of Alertmanager

A host runs one or more instances of the app. The first has plain names; names of further ones include the
port, because a systemd template unit can insert its instance name but cannot compute a number:

    name      unit         port   socket                  address          url
    t2        pixel        8000   /run/pixel.sock         10.0.0.2:8000    http://10.0.0.2:8000
    t2-8001   pixel@8001   8001   /run/pixel-8001.sock    10.0.0.2:8001    http://10.0.0.2:8001
"""

from __future__ import annotations

import os.path
from collections.abc import Callable, Iterable, Mapping
from typing import Any

# Defaults of roles pixel_app, history and redis. hostvars contains a variable only if the inventory sets it.
APP_PORT = 8000
APP_INSTANCES = 1
APP_SOCKET = "/run/pixel.sock"
APP_START_LIMIT = 0.8
APP_REDIS_TIMEOUT = 0.8
REDIS_PORT = 6379
VOTER_PORT = 6380
# The bus of a Redis Cluster is above the port of the process by this number.
REDIS_BUS = 10000
HISTORY_PORT = 8100
LISTEN_PORT = 80
TLS_PORT = 443
EXPORTER_PORTS = {"node": 9100, "nginx": 9113, "blackbox": 9115, "redis": 9121} | {
    "prometheus": 9090,
    "alertmanager": 9093,
}
# systemd's specifier for a unit's name between `@` and the suffix.
SPECIFIER = "%i"


def pixel_instances(
    variables: Mapping[str, Any],
    port: int | str | None = None,
    count: int | str | None = None,
    socket: str | None = None,
    name: str | None = None,
) -> list[dict[str, Any]]:
    """List the app's instances on a host.

    Args:
        variables: The host's variables, `hostvars[host]`.
        port: Port of the first instance, instead of its `pixel_app_port`.
        count: Number of instances, instead of its `pixel_app_instances`.
        socket: Path of the first instance's Unix socket, instead of `pixel_app_socket`; empty for none.
        name: Name of the first instance, instead of the host's name.

    Returns:
        For each instance `name`, `unit` (without a suffix), `port`, `socket`, `address` and `url`.
    """
    first = int(variables.get("pixel_app_port", APP_PORT) if port is None else port)
    number = int(variables.get("pixel_app_instances", APP_INSTANCES) if count is None else count)
    return [
        _instance(variables, first + offset, socket, name, is_first=offset == 0) for offset in range(number)
    ]


def pixel_instance_template(
    variables: Mapping[str, Any], socket: str | None = None, name: str | None = None
) -> dict[str, Any]:
    """Describe the template of a host's further instances, with systemd's specifier `%i` for the port.

    Args:
        variables: The host's variables, `hostvars[host]`.
        socket: As for `pixel_instances`.
        name: As for `pixel_instances`.

    Returns:
        The same keys as one item of `pixel_instances`.
    """
    return _instance(variables, SPECIFIER, socket, name, is_first=False)


def exporter_port(service: str) -> int:
    """Return the TCP port of an exporter, of `prometheus` or of `alertmanager`."""
    return EXPORTER_PORTS[service]


def fleet_ports(variables: Mapping[str, Any]) -> list[int]:
    """List the TCP ports that a host opens to the fleet: the app's instances, Redis, the history, exporters.

    Args:
        variables: The host's variables, `hostvars[host]`.

    Returns:
        The ports, whether something listens there on this host or not.
    """
    instances = [instance["port"] for instance in pixel_instances(variables)]
    return [
        *instances,
        *(redis_ports(variables) or [int(variables.get("redis_port", REDIS_PORT))]),
        int(variables.get("history_port", HISTORY_PORT)),
        *EXPORTER_PORTS.values(),
    ]


def redis_ports(variables: Mapping[str, Any]) -> list[int]:
    """List the ports of a host's Redis processes: the data's, and the voter's on hosts of a cluster but one.

    Args:
        variables: The host's variables, `hostvars[host]`.
    """
    hosts = list(variables.get("redis_hosts") or variables.get("groups", {}).get("redis", []))
    if variables.get("inventory_hostname") not in hosts:
        return []
    port = int(variables.get("redis_port", REDIS_PORT))
    voter = int(variables.get("redis_voter_port", VOTER_PORT))
    return [port] if variables["inventory_hostname"] == hosts[0] else [port, voter]


def redis_bus_ports(variables: Mapping[str, Any]) -> list[int]:
    """List the ports of the cluster bus, which has no login, on a host; a single Redis has none.

    Args:
        variables: The host's variables, `hostvars[host]`.
    """
    hosts = variables.get("redis_hosts") or variables.get("groups", {}).get("redis", [])
    return [port + REDIS_BUS for port in redis_ports(variables)] if len(hosts) > 1 else []


def write_lifetime(hosts: Iterable[Mapping[str, Any]]) -> float:
    """Return how long an attempt at a write can last, from the balancer's stamp until the app gives it up.

    Args:
        hosts: The app hosts' variables.

    Returns:
        Seconds: the largest sum of `pixel_app_start_limit` and `pixel_app_redis_timeout`.
    """
    sums = [
        float(variables.get("pixel_app_start_limit", APP_START_LIMIT))
        + float(variables.get("pixel_app_redis_timeout", APP_REDIS_TIMEOUT))
        for variables in hosts
    ]
    return round(max(sums, default=APP_START_LIMIT + APP_REDIS_TIMEOUT), 3)


def vrrp_peers(balancers: Iterable[Mapping[str, Any]], name: str) -> list[str]:
    """List the balancers that exchange VRRP with a host.

    Args:
        balancers: The variables of all balancers.
        name: The host.

    Returns:
        The addresses of the other balancers; empty if the host is no balancer or has no `nginx_lb_address`.
    """
    hosts = {variables["inventory_hostname"]: variables for variables in balancers}
    if name not in hosts or not hosts[name].get("nginx_lb_address"):
        return []
    return [variables["private_address"] for host, variables in hosts.items() if host != name]


def public_url(variables: Mapping[str, Any]) -> str:
    """Return where clients reach a balancer.

    That is the first of its names with TLS, or else the address that moves between the balancers, or else its
    private address.

    Args:
        variables: The host's variables, `hostvars[host]`.
    """
    names = variables.get("nginx_lb_server_names") or []
    if names and str(variables.get("nginx_lb_tls", "off")) not in ("off", "False"):
        scheme, host, port = "https", names[0], int(variables.get("nginx_lb_tls_port", TLS_PORT))
    else:
        scheme, host = "http", _public_address(variables)
        port = int(variables.get("nginx_lb_listen_port", LISTEN_PORT))
    usual = {"http": LISTEN_PORT, "https": TLS_PORT}[scheme]
    return f"{scheme}://{host}" if port == usual else f"{scheme}://{host}:{port}"


def _public_address(variables: Mapping[str, Any]) -> str:
    moving = str(variables.get("nginx_lb_address") or "").partition("/")[0]
    return moving or str(variables.get("private_address", ""))


def host_variable(variables: Mapping[str, Any], name: str, default: Any = None) -> Any:
    """Return a variable of another host.

    Jinja's `default` and `defined` treat a variable that can't be evaluated there (one that refers to
    `hostvars` or to facts) as unset; the host would silently get the default.

    Args:
        variables: The host's variables, `hostvars[host]`.
        name: The variable.
        default: The value if the inventory doesn't set the variable.

    Raises:
        AnsibleUndefinedVariable: The variable can't be evaluated; the message names its inventory line.
    """
    return variables.get(name, default)


def _instance(
    variables: Mapping[str, Any], port: int | str, socket: str | None, name: str | None, *, is_first: bool
) -> dict[str, Any]:
    suffix = "" if is_first else f"-{port}"
    path = variables.get("pixel_app_socket", APP_SOCKET) if socket is None else socket
    root, extension = os.path.splitext(path)
    address = f"{variables.get('private_address', '')}:{port}"
    return {
        "name": f"{variables['inventory_hostname'] if name is None else name}{suffix}",
        "unit": "pixel" if is_first else f"pixel@{port}",
        "port": port,
        "socket": f"{root}{suffix}{extension}" if path else "",
        "address": address,
        "url": f"http://{address}",
    }


class FilterModule:
    """The filters of this file."""

    def filters(self) -> dict[str, Callable[..., Any]]:
        """Return the filters by name."""
        return {
            "pixel_instances": pixel_instances,
            "pixel_instance_template": pixel_instance_template,
            "exporter_port": exporter_port,
            "write_lifetime": write_lifetime,
            "fleet_ports": fleet_ports,
            "redis_bus_ports": redis_bus_ports,
            "host_variable": host_variable,
            "public_url": public_url,
            "vrrp_peers": vrrp_peers,
        }
