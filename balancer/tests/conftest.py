"""A balancer in a temporary directory, without a running Nginx."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pixel_lb import drain, nginx, status
from pixel_lb.files import Paths
from pixel_lb.fleet import Fleet
from pixel_lb.nginx import Nginx
from pixel_lb.state import State
from pixel_lb.weights import Share


def instance(host: str, address: str, number: int = 0) -> dict[str, Any]:
    """An instance in the format of the filter `pixel_instances`."""
    suffix = f"-{8000 + number}" if number else ""
    return {
        "name": host + suffix,
        "address": f"{address}:{8000 + number}",
        "socket": f"/run/pixel{suffix}.sock",
    }


def host_facts(name: str, address: str = "10.0.0.1", instances: int = 1, **facts: Any) -> dict[str, Any]:
    """The facts of one host in `backends.json`."""
    return {
        "name": name,
        "instances": [instance(name, address, number) for number in range(instances)],
        "vcpus": 4,
        "instance_type": "",
        "groups": ["pixel_app"],
        "weight": 0,
        "measured": 0.0,
        "backup": False,
        "instance_id": "",
    } | facts


def fleet_facts(*hosts: dict[str, Any], **facts: Any) -> dict[str, Any]:
    """The content of `backends.json`, close to the role's defaults."""
    controller = {
        "health_checks": True,
        "interval": 2,
        "timeout": 2,
        "fails": 3,
        "passes": 2,
        "slow_start": 45,
        "reload_interval": 15,
        "dead_band_percent": 10,
        "step_percent": 50,
        "credit_region": "",
    }
    return {
        "balancer": "elsewhere",
        "peers": {},
        "address": "",
        "probe_url": "http://127.0.0.1:9/ping",
        "access_log": "",
        "max_fails": 3,
        "fail_timeout": 5,
        "keepalive": 64,
        "method": "least_conn",
        "hash_key": "$request_uri",
        "hash_consistent": True,
        "sticky": False,
        "clusters": {},
        "weights": "capacity",
        "factors": {"c5": 3, "t2": 2},
        "factor_default": 2,
        "controller": controller,
        "hosts": list(hosts),
    } | facts


class Balancer:
    """The agent on one host, with two backends `a` and `b` of weights 3 and 2."""

    def __init__(self, root: Path) -> None:
        self.paths = Paths(root / "nginx", root / "state", root / "run")
        self.nginx = Nginx(self.paths)
        self.state = State(self.paths)
        for directory in (self.paths.facts.parent, self.paths.state, self.paths.run):
            directory.mkdir(parents=True)
        (self.paths.nginx / "nginx.conf").write_text("")
        self.facts = fleet_facts(host_facts("a", weight=3), host_facts("b", "10.0.0.2", weight=2))
        self.write_facts()

    def write_facts(self, **facts: Any) -> None:
        """Change the given facts and write `self.facts`."""
        self.facts |= facts
        self.paths.facts.write_text(json.dumps(self.facts))

    @property
    def fleet(self) -> Fleet:
        return Fleet.load(self.paths.facts)

    def drain(self, host: str, *, force: bool = False) -> bool:
        return drain.drain(self.paths, self.nginx, host, force=force)

    def undrain(self, host: str) -> bool:
        return drain.undrain(self.paths, self.nginx, host)

    def apply_shares(self, **shares: Share) -> None:
        drain.apply_shares(self.paths, self.nginx, shares)

    def status(self) -> dict[str, Any]:
        return status.describe(self.paths, self.nginx)

    @property
    def upstreams(self) -> str:
        return self.paths.upstreams.read_text()

    @property
    def server_parameters(self) -> list[str]:
        """The parameters of each server line, commented out or not, of upstreams for requests."""
        others = ("_without_", "_streams")
        upstreams = [
            text for text in self.upstreams.split("\n}\n") if not any(name in text for name in others)
        ]
        lines = [line.strip().removeprefix("# ") for text in upstreams for line in text.splitlines()]
        return [line.split(" ", 2)[2] for line in lines if line.startswith("server")]

    @property
    def weights(self) -> list[str]:
        return [line.split()[0] for line in self.server_parameters]

    @property
    def downs(self) -> list[bool]:
        return [" down;" in line for line in self.server_parameters]


@pytest.fixture
def balancer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Balancer:
    monkeypatch.setattr(nginx, "master_pid", lambda: None)
    return Balancer(tmp_path)


@pytest.fixture
def make_fleet() -> Any:
    """Build a fleet from hosts' facts: `make_fleet({"name": "a", …}, …, weights="measured")`."""
    return lambda *hosts, **facts: Fleet.parse(fleet_facts(*(host_facts(**host) for host in hosts), **facts))
