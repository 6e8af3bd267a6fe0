"""Drained hosts, the controller's shares, and changes that Nginx rejects."""

from __future__ import annotations

import resource
from typing import Any

import pytest
from pixel_lb import cli, drain
from pixel_lb.errors import LastBackend, Refused, WaitTimeout
from pixel_lb.nginx import Nginx
from pixel_lb.weights import FULL, Share


def test_a_drain_marks_down_and_an_undrain_restores(balancer: Any) -> None:
    balancer.undrain("b")
    before = balancer.upstreams
    assert balancer.drain("b")
    assert balancer.server_parameters == [
        "weight=3 max_fails=3 fail_timeout=5s; # a",
        "weight=2 max_fails=3 fail_timeout=5s down; # b",
    ]
    # The remaining server is the only one that is not commented out.
    used = balancer.upstreams.split("upstream pixel_without_b")[0]
    assert [line.strip() for line in used.splitlines() if "server " in line] == [
        "server 10.0.0.1:8000 weight=3 max_fails=3 fail_timeout=5s; # a",
        "# server 10.0.0.2:8000 weight=2 max_fails=3 fail_timeout=5s down; # b",
    ]
    assert balancer.status()["backends"]["b"]["state"] == "drained"
    assert not balancer.drain("b")
    assert balancer.undrain("b")
    assert balancer.upstreams == before
    assert not balancer.undrain("b")


def test_the_last_host_is_drained_by_force_only(balancer: Any) -> None:
    balancer.drain("a")
    with pytest.raises(LastBackend, match="last backend"):
        balancer.drain("b")
    assert balancer.state.drained() == {"a"}
    balancer.drain("b", force=True)
    assert balancer.state.drained() == {"a", "b"}


def test_an_unknown_name_changes_nothing(balancer: Any) -> None:
    with pytest.raises(Refused, match="known backends: a, b"):
        balancer.drain("c")
    assert balancer.state.drained() == set()


def test_an_unready_backend_is_down_but_never_all_of_them(balancer: Any) -> None:
    balancer.apply_shares(a=FULL, b=Share(1.0, True))
    assert balancer.downs == [False, True]
    assert balancer.status()["backends"]["b"]["state"] == "down"
    with pytest.raises(LastBackend):
        balancer.drain("a")
    # A drained host stays down; then the unready host receives the requests.
    balancer.drain("a", force=True)
    assert balancer.downs == [True, False]


def test_servers_of_a_host_are_drained_together_and_marked_down_separately(balancer: Any) -> None:
    instances = balancer.facts["hosts"][0]["instances"]
    instances.append(instances[0] | {"name": "a-8001", "address": "10.0.0.1:8001"})
    balancer.write_facts()
    balancer.apply_shares(**{"a": Share(1.0, True), "a-8001": FULL, "b": FULL})
    assert balancer.downs == [True, False, False]
    balancer.drain("b")  # One instance of a is left.
    balancer.undrain("b")
    balancer.drain("a")
    assert balancer.downs == [True, True, False]
    assert [each["host"] for each in balancer.status()["backends"].values()] == ["a", "a", "b"]
    with pytest.raises(Refused, match="known backends: a, b"):
        balancer.drain("a-8001")


def reject(_: Nginx) -> bool:
    raise Refused("nginx -t failed")


def test_shares_that_nginx_rejects_are_not_kept(balancer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    balancer.apply_shares(a=FULL, b=Share(0.5, False))
    valid = balancer.upstreams
    monkeypatch.setattr(Nginx, "reload_if_needed", reject)
    with pytest.raises(Refused):
        balancer.apply_shares(a=FULL, b=Share(0.1, False))
    assert balancer.upstreams == valid
    assert balancer.state.shares()["b"].factor == 0.5


def test_a_drain_that_nginx_rejects_leaves_no_mark(balancer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    balancer.drain("b")
    monkeypatch.setattr(Nginx, "reload_if_needed", reject)
    with pytest.raises(Refused):
        balancer.undrain("b")
    assert balancer.state.drained() == {"b"}
    with pytest.raises(Refused):
        balancer.drain("a", force=True)
    assert balancer.state.drained() == {"b"}


def test_a_drain_on_a_full_disk_leaves_no_mark(
    balancer: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli, "Paths", lambda: balancer.paths)
    balancer.undrain("b")
    before = {path: path.read_bytes() for path in balancer.paths.nginx.parent.rglob("*") if path.is_file()}
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, limit[1]))
    try:
        status = cli.main(["drain", "b"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert status == 1
    assert capsys.readouterr().err == f"pixel-lb: {balancer.paths.drains}: File too large\n"
    lock = balancer.paths.lock
    after = {path: path.read_bytes() for path in balancer.paths.nginx.parent.rglob("*") if path.is_file()}
    assert after == before | {lock: b""}
    assert balancer.drain("b")


def test_hosts_that_an_earlier_release_has_drained_stay_drained(balancer: Any) -> None:
    balancer.paths.former_drains.mkdir()
    (balancer.paths.former_drains / "b").touch()
    assert balancer.state.drained() == {"b"}
    assert balancer.undrain("b")
    assert balancer.state.drained() == set()


@pytest.mark.parametrize(
    ("method", "backup", "waits"),
    [
        ("least_conn", False, True),
        ("least_conn", True, False),
        ("ip_hash", False, False),
        ("hash", False, False),
    ],
)
def test_a_host_that_may_receive_no_request_is_not_waited_for(
    balancer: Any, monkeypatch: pytest.MonkeyPatch, method: str, backup: bool, waits: bool
) -> None:
    balancer.facts["hosts"][1]["backup"] = backup
    balancer.write_facts(method=method)
    monkeypatch.setattr(drain, "answering_instance", lambda _: "a")
    if waits:
        with pytest.raises(WaitTimeout, match="b answered none"):
            drain.wait_until_seen(balancer.paths, "b", 0.1)
    else:
        drain.wait_until_seen(balancer.paths, "b", 0.1)


def test_a_drain_waits_for_requests_in_flight_at_every_address(
    balancer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The balancer's own host has two addresses: TCP with consistent hashing, otherwise its socket.
    balancer.write_facts(balancer="b", sticky=True)
    in_flight = {"unix:/run/pixel.sock": 1, "10.0.0.2:8000": 1}
    monkeypatch.setattr(drain, "connections", lambda address: in_flight[address])
    with pytest.raises(WaitTimeout, match="b still has 2 requests in flight"):
        drain.wait_until_idle(balancer.paths, "b", 0.1)
    in_flight.update(dict.fromkeys(in_flight, 0))
    drain.wait_until_idle(balancer.paths, "b", 0.1)
