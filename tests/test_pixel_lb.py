"""pixel-lb's own logic; what it does to a running Nginx is tested on hosts."""

from __future__ import annotations

import json
import os
import pwd
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pixel_lb
import pytest
import watch
from controller import Cpu, Share


def server(name: str, weight: int) -> dict[str, Any]:
    return {
        "name": name,
        "host": name,
        "address": {"a": "10.0.0.1:8000", "b": "10.0.0.2:8000"}[name],
        "weight": weight,
        "max_fails": 3,
        "fail_timeout": "5s",
        "backup": False,
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
                "ring": False,
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
    assert servers_of(balancer) == [
        "weight=3 max_fails=3 fail_timeout=5s; # a",
        "weight=2 max_fails=3 fail_timeout=5s down; # b",
    ]
    # Nginx sees the only one that is left, and no other.
    assert [line.strip() for line in upstreams(balancer).splitlines() if "server " in line] == [
        "server 10.0.0.1:8000 weight=3 max_fails=3 fail_timeout=5s; # a",
        "# server 10.0.0.2:8000 weight=2 max_fails=3 fail_timeout=5s down; # b",
    ]
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


def test_a_backup_that_is_left_alone_is_none(balancer: pixel_lb.Balancer) -> None:
    path = balancer.nginx / "pixel" / "backends.json"
    spec = json.loads(path.read_text())
    spec["upstreams"]["pixel"]["servers"][1]["backup"] = True
    path.write_text(json.dumps(spec))
    balancer.undrain("a")
    assert " backup;" in servers_of(balancer)[1]
    balancer.drain("a")
    # Nginx takes no upstream of backups alone.
    assert "backup" not in servers_of(balancer)[1]


def test_a_wrong_name_changes_nothing(balancer: pixel_lb.Balancer) -> None:
    with pytest.raises(pixel_lb.Refused, match="there are a, b"):
        balancer.drain("c")
    assert balancer.drained() == []


def test_open_connections_are_counted(balancer: pixel_lb.Balancer, tmp_path: Path) -> None:
    path = str(tmp_path / "s")
    own = pwd.getpwuid(os.getuid()).pw_name
    other = next(user.pw_name for user in pwd.getpwall() if user.pw_uid != os.getuid())
    for family, where in ((socket.AF_INET, ("127.0.0.1", 0)), (socket.AF_UNIX, path)):
        with socket.socket(family) as server, socket.socket(family) as client:
            server.bind(where)
            server.listen()
            name = server.getsockname()
            address = f"unix:{path}" if family == socket.AF_UNIX else f"{name[0]}:{name[1]}"
            assert pixel_lb.connections(address, own) == 0
            client.connect(name)
            with server.accept()[0]:
                assert pixel_lb.connections(address, own) == 1
                # Prometheus' own, say.
                assert family == socket.AF_UNIX or pixel_lb.connections(address, other) == 0


def servers_of(balancer: pixel_lb.Balancer) -> list[str]:
    lines = [line.strip().removeprefix("# ") for line in upstreams(balancer).splitlines()]
    return [line.split(" ", 2)[2] for line in lines if line.startswith("server")]


def test_shares_make_weights_in_their_ratio(balancer: pixel_lb.Balancer) -> None:
    balancer.give({"a": Share(1.0, False), "b": Share(0.5, False)})
    assert [line.split()[0] for line in servers_of(balancer)] == ["weight=3", "weight=1"]
    balancer.give({"a": Share(1.0, False), "b": Share(0.001, False)})
    assert [line.split()[0] for line in servers_of(balancer)] == ["weight=300", "weight=1"]
    balancer.give({"a": pixel_lb.WHOLE, "b": pixel_lb.WHOLE})
    assert [line.split()[0] for line in servers_of(balancer)] == ["weight=3", "weight=2"]


def test_who_is_not_ready_is_down_and_never_all_of_them(balancer: pixel_lb.Balancer) -> None:
    down = Share(1.0, True)
    balancer.give({"a": pixel_lb.WHOLE, "b": down})
    assert [" down;" in line for line in servers_of(balancer)] == [False, True]
    assert balancer.status()["backends"]["b"]["state"] == "down"
    with pytest.raises(pixel_lb.LastBackend):
        balancer.drain("a")
    # Drained by force, it stays out; who only isn't ready is the better choice then.
    balancer.drain("a", force=True)
    assert [" down;" in line for line in servers_of(balancer)] == [True, False]


def test_the_servers_of_a_host_are_drained_together_and_judged_apart(balancer: pixel_lb.Balancer) -> None:
    path = balancer.nginx / "pixel" / "backends.json"
    spec = json.loads(path.read_text())
    servers = spec["upstreams"]["pixel"]["servers"]
    servers.insert(1, servers[0] | {"name": "a-8001", "address": "10.0.0.1:8001"})
    path.write_text(json.dumps(spec))
    balancer.give({"a": Share(1.0, True), "a-8001": pixel_lb.WHOLE, "b": pixel_lb.WHOLE})
    assert [" down;" in line for line in servers_of(balancer)] == [True, False, False]
    balancer.drain("b")  # One of a's is left.
    balancer.undrain("b")
    balancer.drain("a")
    assert [" down;" in line for line in servers_of(balancer)] == [True, True, False]
    assert [each["host"] for each in balancer.status()["backends"].values()] == ["a", "a", "b"]
    with pytest.raises(pixel_lb.Refused, match="there are a, b"):
        balancer.drain("a-8001")


def test_shares_that_nginx_refuses_are_not_kept(
    balancer: pixel_lb.Balancer, monkeypatch: pytest.MonkeyPatch
) -> None:
    balancer.give({"a": pixel_lb.WHOLE, "b": Share(0.5, False)})
    good = upstreams(balancer)

    def refuse() -> bool:
        raise pixel_lb.Refused("nginx -t refuses")

    monkeypatch.setattr(balancer, "reload_if_needed", refuse)
    with pytest.raises(pixel_lb.Refused):
        balancer.give({"a": pixel_lb.WHOLE, "b": Share(0.1, False)})
    assert upstreams(balancer) == good
    assert balancer.shares()["b"].factor == 0.5


def test_a_drain_that_nginx_refuses_leaves_no_mark(
    balancer: pixel_lb.Balancer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse() -> bool:
        raise pixel_lb.Refused("nginx -t refuses")

    balancer.drain("b")
    monkeypatch.setattr(balancer, "reload_if_needed", refuse)
    with pytest.raises(pixel_lb.Refused):
        balancer.undrain("b")
    assert balancer.drained() == ["b"]
    with pytest.raises(pixel_lb.Refused):
        balancer.drain("a", force=True)
    assert balancer.drained() == ["b"]


@pytest.mark.parametrize(
    ("method", "backup", "waits"),
    [
        ("least_conn", False, True),
        ("least_conn", True, False),
        ("ip_hash", False, False),
        ("hash", False, False),
    ],
)
def test_who_may_get_no_request_of_ours_is_not_waited_for(
    balancer: pixel_lb.Balancer, monkeypatch: pytest.MonkeyPatch, method: str, backup: bool, waits: bool
) -> None:
    path = balancer.nginx / "pixel" / "backends.json"
    spec = json.loads(path.read_text())
    spec |= {"probe": "http://127.0.0.1:9/ping", "watch": {"method": method}}
    spec["upstreams"]["pixel"]["servers"][1]["backup"] = backup
    path.write_text(json.dumps(spec))
    monkeypatch.setattr(pixel_lb, "ask", lambda _: "a")
    if waits:
        with pytest.raises(pixel_lb.InVain, match="b has answered none"):
            balancer.wait_until_seen("b", 0.1)
    else:
        balancer.wait_until_seen("b", 0.1)


def test_what_the_controller_is_worried_about_is_told(balancer: pixel_lb.Balancer) -> None:
    assert balancer.status()["controller"] == {"age_s": None, "alarm": "", "error": ""}
    said = {"alarm": "no backend is ready", "error": "nginx -t refuses", "backends": []}
    balancer.status_file.write_text(json.dumps(said))
    os.utime(balancer.status_file, (time.time() - 100, time.time() - 100))
    told = balancer.status()["controller"]
    assert told | {"age_s": 0} == {"age_s": 0, "alarm": "no backend is ready", "error": "nginx -t refuses"}
    assert 99 <= told["age_s"] <= 110


def test_a_ring_keeps_its_base_weights(balancer: pixel_lb.Balancer) -> None:
    path = balancer.nginx / "pixel" / "backends.json"
    spec = json.loads(path.read_text())
    spec["upstreams"]["pixel"]["ring"] = True
    path.write_text(json.dumps(spec))
    balancer.give({"a": Share(0.3, False), "b": Share(1.0, True)})
    assert [line.split()[0] for line in servers_of(balancer)] == ["weight=3", "weight=2"]
    assert " down;" in servers_of(balancer)[1]


# --- the controller's senses ------------------------------------------------------------------------


def line(uri: str, upstream: str, seconds: str) -> bytes:
    # As nginx.conf.j2 writes it.
    text = (
        f'{{"time":"2026-11-21T08:00:00+00:00","client":"10.0.0.9","uri":"{uri}","status":200,"bytes":99,'
        f'"seconds":0.001,"upstream":"{upstream}","upstream_status":"200","upstream_seconds":"{seconds}",'
        f'"upstream_connect":"0.000","agent":"x"}}\n'
    )
    return text.encode()


def test_the_log_tells_how_long_each_backend_takes_for_a_pixel(tmp_path: Path) -> None:
    log = tmp_path / "access.log"
    log.write_bytes(line("/pixel", "10.0.0.1:8000", "9.999"))
    tail = watch.LogTail(log)
    assert tail.read() == {}  # It was there before.
    with log.open("ab") as file:
        file.write(line("/pixel", "10.0.0.1:8000", "0.004") + line("/pixel/1/2", "10.0.0.1:8000", "0.002"))
        file.write(line("/cluster/t2/pixel", "unix:/run/pixel.sock", "30.5"))
        file.write(line("/pixel", "10.0.0.1:8000, unix:/run/pixel.sock", "0.500, 0.001"))
        for uri in ("/events", "/canvas.png", "/pixels", "/ping"):
            file.write(line(uri, "10.0.0.1:8000", "7.000"))
        file.write(line("/pixel", "-", "-"))
    seen = tail.read()
    assert seen["10.0.0.1:8000"] == pytest.approx((3, 0.506))
    assert seen["unix:/run/pixel.sock"] == pytest.approx((2, 1.001))  # One counts for a second at most.
    assert tail.read() == {}


def test_the_log_may_be_rotated_or_be_too_long_to_read(tmp_path: Path) -> None:
    log = tmp_path / "access.log"
    log.touch()
    tail = watch.LogTail(log)
    tail.read()
    log.rename(tmp_path / "access.log.1")
    assert tail.read() == {}
    one = line("/pixel", "10.0.0.1:8000", "0.002")
    log.write_bytes(one * 20_000)
    count, seconds = tail.read()["10.0.0.1:8000"]
    assert count == pytest.approx(20_000, rel=0.01)
    assert seconds / count == pytest.approx(0.002)


MODES = ("user", "nice", "system", "idle", "iowait", "irq", "softirq", "steal")


class Standin(BaseHTTPRequestHandler):
    """Answers /readyz and /metrics as it is told to."""

    ready = 200
    metrics = 200

    def do_GET(self) -> None:
        if self.path == "/metrics" and self.metrics == 0:
            return  # Without a word.
        cpu = "\n".join(f'pixel_host_cpu_seconds_total{{mode="{mode}"}} {n}' for n, mode in enumerate(MODES))
        content = f"# HELP x\n{cpu}\npixel_workers 4.0\n".encode() if self.path == "/metrics" else b"{}"
        self.send_response(self.ready if self.path == "/readyz" else self.metrics)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


def test_a_look_at_a_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    with HTTPServer(("127.0.0.1", 0), Standin) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"127.0.0.1:{server.server_port}"
        seen = watch.look(address, 2)
        assert (seen.ready, seen.cpu) == (True, Cpu(busy=14, steal=7, total=28))
        for broken in (0, 500):
            monkeypatch.setattr(Standin, "metrics", broken)
            assert watch.look(address, 2)[1:] == (True, "", None)
        monkeypatch.setattr(Standin, "ready", 503)
        seen = watch.look(address, 2)
        assert (seen.ready, seen.why, seen.cpu) == (False, "/readyz answers 503", None)
        server.shutdown()
    assert "refused" in watch.look(address, 2).why
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        seen = watch.look(f"127.0.0.1:{deaf.getsockname()[1]}", 0.1)
        assert seen.why == "/readyz has no answer within 0.1 s"
    assert "No such file" in watch.look("unix:/nonexistent", 1).why
