"""The public description of the agent's state, `pixel-lb status`; balancer/README.md documents it."""

from __future__ import annotations

from typing import Any

from pixel_lb.files import Paths
from pixel_lb.fleet import Fleet
from pixel_lb.nginx import Nginx, connections
from pixel_lb.peers import holds
from pixel_lb.state import State
from pixel_lb.weights import FULL, effective_weights

# The controller counts as stopped after this many seconds, or two rounds, without a report.
REPORT_SECONDS = 60.0
# Measurements of a running controller: the key in the status and the key in the controller's report.
MEASURED = {
    "ready": "ready",
    "cpu_busy": "cpu_busy",
    "cpu_steal": "cpu_steal",
    "cpu_credits": "cpu_credits",
    "latency_ms": "latency_ms",
    "requests_per_second": "requests_per_second",
    "in_flight": "in_flight",
    "probe_age_s": "age_s",
}


def describe(paths: Paths, nginx: Nginx) -> dict[str, Any]:
    """Describe backends, controller and Nginx.

    Returns:
        A document with the keys `address`, `backends`, `controller`, `running` and `loaded`.

    Raises:
        FileNotFoundError, Refused: The inventory's facts are missing or invalid.
    """
    fleet, state = Fleet.load(paths.facts), State(paths)
    drained, shares = state.drained(), state.shares()
    report, age = state.report()
    reported = {backend["name"]: backend for backend in report.get("backends", [])}
    if age is not None and age <= max(REPORT_SECONDS, 2 * (fleet.interval + fleet.timeout)):
        controller_state = "running"
    else:
        controller_state = "stopped" if fleet.is_controlled else "disabled"
    servers = fleet.servers
    given = [shares.get(server.name, FULL) for server in servers]
    weights = effective_weights([server.weight for server in servers], given)
    backends = {}
    for server, share, weight in zip(servers, given, weights, strict=True):
        is_drained = server.host in drained
        known = reported.get(server.name, {})
        measured = known if controller_state == "running" else {}
        backends[server.name] = {
            "host": server.host,
            "address": server.address,
            "base": server.weight,
            "weight": weight,
            "share": share.factor,
            "state": "drained" if is_drained else "down" if share.down else "up",
            "why": "drained by an operator" if is_drained else known.get("why", ""),
            "connections": connections(server.address),
            **{name: measured.get(key) for name, key in MEASURED.items()},
        }
    return {
        "address": {"ip": fleet.address, "held": holds(fleet.address)} if fleet.address else None,
        "backends": backends,
        "controller": {
            "state": controller_state,
            "age_s": None if age is None else round(age),
            "alarm": report.get("alarm", ""),
            "error": report.get("error", ""),
        },
        "running": nginx.is_running(),
        "loaded": nginx.is_current(),
    }
