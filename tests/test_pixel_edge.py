"""What clients saw, counted from Nginx's access log by pixel-watch."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pixel_watch
import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]


def line(uri: str, status: int = 200, seconds: float = 0.004, upstream_status: str | None = None) -> bytes:
    """A line of the access log; its fields and their order are those of role nginx_lb."""
    fields = {
        "time": "2026-11-27T20:00:00+00:00",
        "id": "0123456789abcdef0123456789abcdef",
        "client": "198.51.100.7",
        "method": "POST",
        "uri": uri,
        "status": status,
        "bytes": 300,
        "seconds": seconds,
        "upstream": "10.0.0.1:8000" if upstream_status != "" else "",
        "upstream_status": str(status) if upstream_status is None else upstream_status,
        "upstream_seconds": "0.004",
        "upstream_connect": "0.000",
        "limit": "PASSED",
        "connections": "PASSED",
        "agent": "curl",
    }
    return json.dumps(fields, separators=(",", ":")).encode() + b"\n"


@pytest.fixture
def edge() -> pixel_watch.Edge:
    return pixel_watch.Edge({})


def counted(edge: pixel_watch.Edge) -> dict[str, int]:
    return {key: number for key, number in edge.requests.items() if number}


def test_the_line_has_the_fields_of_role_nginx_lb() -> None:
    template = (ROOT / "roles/nginx_lb/templates/nginx.conf.j2").read_text()
    names = re.findall(
        r'"(\w+)":', template[template.index("log_format pixel") : template.index("access_log")]
    )
    assert names == list(json.loads(line("/")))


@pytest.mark.parametrize(
    ("uri", "route"),
    [
        ("/pixel", "/pixel"),
        ("/pixel?x=1", "/pixel"),
        ("/pixels", "/pixels"),
        ("/pixel/1/20", "/pixel/{x}/{y}"),
        ("/pixel/1/20/3", "other"),
        ("/cluster/t2/pixel/1/20", "/pixel/{x}/{y}"),
        ("/canvas.png?scale=2", "/canvas.png"),
        ("/events?after=1-0", "/events"),
        ("/", "/"),
        ("/readyz", "operations"),
        ('/"quoted"\\', "other"),
        ("/wp-login.php", "other"),
    ],
)
def test_a_request_is_counted_by_its_route(edge: pixel_watch.Edge, uri: str, route: str) -> None:
    edge.count([line(uri)])
    assert counted(edge) == {f"{route} 200 app": 1}


@pytest.mark.parametrize(
    ("status", "upstream_status", "by"),
    [
        (200, "200", "app"),
        (200, "502 : 200", "app"),
        (503, "503", "app"),
        (503, "504 : 502", "balancer"),
        (502, "502", "balancer"),
        (504, "504, 504", "balancer"),
        (429, "", "balancer"),
        (499, "-", "balancer"),
    ],
)
def test_answers_that_no_app_saw_are_the_balancers(
    edge: pixel_watch.Edge, status: int, upstream_status: str, by: str
) -> None:
    edge.count([line("/pixel", status, upstream_status=upstream_status)])
    assert counted(edge) == {f"/pixel {status} {by}": 1}


def test_latencies_are_a_histogram_of_good_answers(edge: pixel_watch.Edge) -> None:
    edge.count([line("/pixel", seconds=seconds) for seconds in (0.004, 0.005, 0.2, 9)])
    edge.count([line("/pixel", 503, 2.0), line("/events", seconds=300)])
    lines = edge.metrics()
    for bound, number in (("0.005", 2), ("0.1", 2), ("0.25", 3), ("5", 3), ("+Inf", 4)):
        assert f'pixel_edge_seconds_bucket{{route="/pixel",le="{bound}"}} {number}' in lines
    assert 'pixel_edge_seconds_sum{route="/pixel"} 9.209' in lines
    assert 'pixel_edge_requests_total{route="/pixel",status="503",by="app"} 1' in lines
    assert not [each for each in lines if each.startswith('pixel_edge_seconds_count{route="/events"}')]


def test_counters_exist_from_the_start_and_are_bounded(edge: pixel_watch.Edge) -> None:
    assert 'pixel_edge_requests_total{route="/pixel",status="502",by="balancer"} 0' in edge.metrics()
    before = len(edge.metrics())
    edge.count([line(f"/{number}") for number in range(100)])
    assert len(edge.metrics()) == before + 1


def test_the_target_of_the_latency_is_a_bound_of_the_histogram() -> None:
    specs: dict[str, Any] = yaml.safe_load((ROOT / "roles/monitoring/meta/argument_specs.yml").read_text())
    option = specs["argument_specs"]["main"]["options"]["monitoring_slo_latency_seconds"]
    assert option["choices"] == [bound for bound in pixel_watch.BOUNDS if bound >= 0.05]


def test_the_log_is_followed_across_runs_and_rotations(tmp_path: Path) -> None:
    log = tmp_path / "access.log"
    edge = pixel_watch.Edge({})

    def follow() -> list[bytes]:
        nonlocal edge
        found = list(edge.follow(log))
        edge = pixel_watch.Edge(json.loads(json.dumps(edge.state())))
        return found

    assert follow() == []
    log.write_bytes(b"old\n")
    assert follow() == []
    with log.open("ab") as file:
        file.write(b"a\nhal")
    assert follow() == [b"a\n"]
    with log.open("ab") as file:
        file.write(b"f\n")
    log.rename(tmp_path / "access.log.1")
    log.write_bytes(b"b\n")
    assert follow() == [b"half\n", b"b\n"]
    assert follow() == []
    log.write_bytes(b"")
    assert follow() == []
    log.write_bytes(b"c\n")
    assert follow() == [b"c\n"]


def test_a_run_adds_to_the_counters_of_the_run_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("EDGE", "EDGE_STATE", "ACCESS_LOG"):
        monkeypatch.setattr(pixel_watch, name, tmp_path / name)
    pixel_watch.ACCESS_LOG.write_bytes(b"")
    for _ in range(3):
        pixel_watch.watch_edge()
        with pixel_watch.ACCESS_LOG.open("ab") as file:
            file.write(line("/pixel"))
    assert (
        'pixel_edge_requests_total{route="/pixel",status="200",by="app"} 2\n' in pixel_watch.EDGE.read_text()
    )
    pixel_watch.EDGE_STATE.write_text("{half")
    pixel_watch.watch_edge()
    assert (
        'pixel_edge_requests_total{route="/pixel",status="200",by="app"} 0\n' in pixel_watch.EDGE.read_text()
    )
