"""The text of upstreams.conf."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

from pixel_lb.upstreams import render
from pixel_lb.weights import FULL, Share


def test_zone_comes_first_and_keepalive_last(balancer: Any) -> None:
    assert render(balancer.fleet, (), {}).splitlines()[1:10] == [
        "upstream pixel {",
        "    zone pixel 256k;",
        "    least_conn;",
        "    server 10.0.0.1:8000 weight=3 max_fails=3 fail_timeout=5s; # a",
        "    server 10.0.0.2:8000 weight=2 max_fails=3 fail_timeout=5s; # b",
        "    keepalive 64;",
        "    keepalive_requests 100000;",
        "    keepalive_timeout 60s;",
        "}",
    ]


def test_streams_have_upstreams_of_their_own(balancer: Any) -> None:
    balancer.write_facts(clusters={"few": "pixel_app"})
    balancer.drain("b")
    text = balancer.upstreams
    for name in ("pixel", "cluster_few"):
        requests, streams = (
            text.split(f"upstream {each} {{\n")[1].split("}")[0].splitlines()
            for each in (name, f"{name}_streams")
        )
        assert streams[0] == f"    zone {name}_streams 256k;"
        assert streams[1:] == requests[1:]


def test_weighted_round_robin_needs_no_directive(balancer: Any) -> None:
    balancer.write_facts(method="round_robin")
    assert render(balancer.fleet, (), {}).splitlines()[2:4] == [
        "    zone pixel 256k;",
        "    server 10.0.0.1:8000 weight=3 max_fails=3 fail_timeout=5s; # a",
    ]


def test_the_only_remaining_server_is_not_a_backup(balancer: Any) -> None:
    balancer.facts["hosts"][1]["backup"] = True
    balancer.write_facts()
    balancer.undrain("a")
    assert " backup;" in balancer.server_parameters[1]
    balancer.drain("a")
    # Nginx rejects an upstream that contains only backups.
    assert "backup" not in balancer.server_parameters[1]


def test_shares_scale_the_weights(balancer: Any) -> None:
    balancer.apply_shares(a=FULL, b=Share(0.5, False))
    assert balancer.weights == ["weight=3", "weight=1"]
    balancer.apply_shares(a=FULL, b=Share(0.001, False))
    assert balancer.weights == ["weight=300", "weight=1"]
    balancer.apply_shares(a=FULL, b=FULL)
    assert balancer.weights == ["weight=3", "weight=2"]


def test_consistent_hashing_keeps_base_weights(balancer: Any) -> None:
    balancer.write_facts(method="hash")
    balancer.apply_shares(a=Share(0.3, False), b=Share(1.0, True))
    assert "    hash $request_uri consistent;" in balancer.upstreams.splitlines()
    assert balancer.weights == ["weight=3", "weight=2"]
    assert " down;" in balancer.server_parameters[1]


def test_retries_go_to_another_host(balancer: Any) -> None:
    text = render(balancer.fleet, (), {})
    assert text.split("upstream pixel_without_a {")[1].split("}")[0].splitlines()[1:] == [
        "    zone pixel_without_a 256k;",
        "    least_conn;",
        "    server 10.0.0.2:8000 weight=2 max_fails=3 fail_timeout=5s; # b",
        "    keepalive 64;",
        "    keepalive_requests 100000;",
        "    keepalive_timeout 60s;",
    ]
    assert text.split("$pixel_other {\n")[1].split("geo ")[0].splitlines() == [
        "    volatile;",
        "    default $pixel_upstream;",
        r'    "~^pixel (.*[ ,])?10\.0\.0\.1:8000$" pixel_without_a;',
        r'    "~^pixel (.*[ ,])?10\.0\.0\.2:8000$" pixel_without_b;',
        "}",
    ]


def test_without_another_host_retries_go_to_the_same_upstream(balancer: Any) -> None:
    for text in (
        render(balancer.fleet, ("b",), {}),
        render(balancer.fleet, (), {"b": Share(1.0, True)}),
    ):
        assert "pixel_without_b {" in text
        assert "pixel_without_a" not in text


def test_nginx_takes_whatever_hosts_are_called(make_fleet: Any, tmp_path: Path) -> None:
    """Names in an inventory are often addresses."""
    names = ["203.0.113.11", "App_2.example.org", "10", "ec2-203-0-113-12.eu-central-1.compute.amazonaws.com"]
    fleet = make_fleet(*({"name": name, "address": f"10.0.0.{n}"} for n, name in enumerate(names)))
    text = render(fleet, {"10"}, {})
    assert [f"upstream pixel_without_{name} {{" in text for name in names] == [True] * 4
    config = tmp_path / "nginx.conf"
    config.write_text(
        f"pid {tmp_path}/pid; events {{}} http {{ map $host $pixel_upstream {{ default pixel; }}\n{text}}}\n"
    )
    done = subprocess.run(
        ["nginx", "-t", "-c", config, "-e", tmp_path / "log"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
