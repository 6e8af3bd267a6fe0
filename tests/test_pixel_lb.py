"""pixel-lb's own logic; what it does to a running Nginx is tested on hosts."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import pixel_lb
import pytest


def server(name: str, weight: int) -> dict[str, Any]:
    return {
        "name": name,
        "address": {"a": "10.0.0.1:8000", "b": "10.0.0.2:8000"}[name],
        "weight": weight,
        "max_fails": 3,
        "fail_timeout": "5s",
    }


@pytest.fixture
def balancer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> pixel_lb.Balancer:
    """A balancer whose Nginx doesn't run."""
    monkeypatch.setattr(pixel_lb, "master_pid", lambda: None)
    for folder in ("nginx/pixel", "state/drained", "run"):
        (tmp_path / folder).mkdir(parents=True)
    spec = {
        "upstreams": {
            "pixel": {
                "lines": {"first": ["zone pixel 256k"], "last": ["keepalive 64"]},
                "servers": [server("a", 3), server("b", 2)],
            }
        }
    }
    (tmp_path / "nginx/nginx.conf").write_text("")
    (tmp_path / "nginx/pixel/backends.json").write_text(json.dumps(spec))
    return pixel_lb.Balancer(tmp_path / "nginx", tmp_path / "state", tmp_path / "run")


def upstreams(balancer: pixel_lb.Balancer) -> str:
    return (balancer.nginx / "pixel" / "upstreams.conf").read_text()


def test_zone_comes_first_and_keepalive_last(balancer: pixel_lb.Balancer) -> None:
    text = balancer.render(balancer.backends(balancer.nginx))
    assert text.splitlines()[1:] == [
        "upstream pixel {",
        "    zone pixel 256k;",
        "    server 10.0.0.1:8000 weight=3 max_fails=3 fail_timeout=5s; # a",
        "    server 10.0.0.2:8000 weight=2 max_fails=3 fail_timeout=5s; # b",
        "    keepalive 64;",
        "}",
    ]


def test_a_drain_marks_down_and_an_undrain_takes_it_back(balancer: pixel_lb.Balancer) -> None:
    balancer.undrain("b")
    before = upstreams(balancer)
    balancer.drain("b")
    assert "fail_timeout=5s down; # b" in upstreams(balancer)
    assert balancer.status()["backends"]["b"]["state"] == "drained"
    balancer.undrain("b")
    assert upstreams(balancer) == before


def test_the_last_one_is_drained_by_force_only(balancer: pixel_lb.Balancer) -> None:
    balancer.drain("a")
    with pytest.raises(pixel_lb.LastBackend, match="last backend"):
        balancer.drain("b")
    assert balancer.drained() == ["a"]
    balancer.drain("b", force=True)
    assert balancer.drained() == ["a", "b"]


def test_a_wrong_name_changes_nothing(balancer: pixel_lb.Balancer) -> None:
    with pytest.raises(pixel_lb.Refused, match="there are a, b"):
        balancer.drain("c")
    assert balancer.drained() == []


def test_open_connections_are_counted(balancer: pixel_lb.Balancer, tmp_path: Path) -> None:
    path = str(tmp_path / "s")
    for family, where in ((socket.AF_INET, ("127.0.0.1", 0)), (socket.AF_UNIX, path)):
        with socket.socket(family) as server, socket.socket(family) as client:
            server.bind(where)
            server.listen()
            name = server.getsockname()
            address = f"unix:{path}" if family == socket.AF_UNIX else f"{name[0]}:{name[1]}"
            assert pixel_lb.connections(address) == 0
            client.connect(name)
            with server.accept()[0]:
                assert pixel_lb.connections(address) == 1
