"""Role nginx_lb, with two backends that echo the request."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest

testinfra_hosts = ["debian12", "debian13"]


@pytest.fixture
def many(host: Any) -> Any:
    """Send `count` requests in sequence; return the instance (or error status) of each answer."""
    return lambda count, path="/who": json.loads(host.check_output(f"client many {count} {path}"))


def master(host: Any) -> str:
    pid: str = host.service("nginx").systemd_properties["MainPID"]
    return pid


def test_nginx_runs_and_starts_at_boot(host: Any) -> None:
    assert host.service("nginx").is_running
    assert host.service("nginx").is_enabled


def test_workers_are_unprivileged(host: Any) -> None:
    workers = host.process.filter(ppid=int(master(host)))
    assert workers
    assert {worker.user for worker in workers} == {"www-data"}


def test_the_upstream_follows_the_inventory(host: Any, fleet: dict[str, Any]) -> None:
    own = host.backend.hostname
    (other,) = set(fleet["hosts"]) - {own}
    weights = {"debian12": 3, "debian13": 2}
    config = host.check_output("nginx -T 2>/dev/null")
    rest = "max_fails=10 fail_timeout=1s;"
    assert f"server unix:/run/pixel.sock weight={weights[own]} {rest} # {own}" in config
    address = fleet["hosts"][other]["address"]
    assert f"server {address}:8000 weight={weights[other]} {rest} # {other}" in config


def test_sequential_requests_follow_the_weights_exactly(many: Any) -> None:
    many(20)  # After a failure Nginx raises a backend's effective weight again step by step.
    seen = many(100)
    assert Counter(seen) == {"debian12": 60, "debian13": 40}
    assert seen[:50] == seen[50:]


@pytest.mark.parametrize("method", ["GET", "PUT", "POST", "HEAD", "DELETE", "OPTIONS"])
def test_method_path_headers_and_body_reach_the_backend_unchanged(curl: Any, method: str) -> None:
    status, headers, body = curl("/a/b?x=1&y=%20z", method, "some body", "X-Own: kept")
    # An answer to HEAD has no body, so the backend also echoes the request in a header.
    seen = json.loads(headers["x-seen"])
    assert status == 200
    assert body == ("" if method == "HEAD" else headers["x-seen"])
    assert (seen["method"], seen["path"], seen["body"]) == (method, "/a/b?x=1&y=%20z", "some body")
    assert seen["headers"]["X-Own"] == "kept"


def test_a_cluster_path_serves_the_same_api_from_its_hosts_only(curl: Any, many: Any) -> None:
    assert set(many(10, "/cluster/c5/who")) == {"debian12"}
    assert set(many(10, "/cluster/t2/who")) == {"debian13"}
    status, _, body = curl("/cluster/t2/a/b?x=1&y=%20z", "PUT", "some body")
    seen = json.loads(body)
    assert status == 200
    assert (seen["method"], seen["path"], seen["body"]) == ("PUT", "/a/b?x=1&y=%20z", "some body")
    assert curl("/cluster/t2/metrics")[0] == curl("/metrics")[0]


def test_the_backend_receives_the_clients_address_and_scheme(curl: Any) -> None:
    _, answer, body = curl("/", "GET", "", "X-Forwarded-For: 6.6.6.6", "Host: canvas.example")
    sent = json.loads(body)["headers"]
    assert sent["Host"] == "canvas.example"
    assert sent["X-Real-IP"] == "127.0.0.1"
    assert sent["X-Forwarded-For"] == "127.0.0.1"
    assert sent["X-Forwarded-Proto"] == "http"
    assert sent["X-Request-ID"] == answer["x-request-id"]
    assert "Connection" not in sent


def test_the_access_log_contains_the_upstream_and_its_time(host: Any, curl: Any) -> None:
    _, headers, _ = curl("/logged?q=%22")
    for _ in range(20):
        found = host.run(f"grep {headers['x-request-id']} /var/log/nginx/access.log")
        if found.rc == 0:
            break
        host.run("sleep 0.2")
    line = json.loads(found.stdout)
    assert (line["uri"], line["status"]) == ("/logged?q=%22", 200)
    assert line["upstream"].startswith(("unix:", "172."))
    assert float(line["upstream_seconds"]) >= 0


def test_x_accel_buffering_is_passed_on_to_a_proxy_in_front(curl: Any) -> None:
    status, headers, _ = curl("/events")
    assert (status, headers["x-accel-buffering"]) == (200, "no")


def test_a_picture_is_kept_for_a_second_and_can_be_asked_for_past_the_cache(host: Any) -> None:
    path = "/canvas.rgb?x=1"
    none: dict[str, str] = {}

    def look(*steps: list[Any] | float) -> list[tuple[int, str, str]]:
        answers = json.loads(host.check_output(f"client steps '{json.dumps(steps)}'"))
        return [(status, seen["x-pixel-cache"], seen["x-pixel-event"]) for status, seen in answers]

    made, *kept = look([path, "GET", none], [path, "GET", none], [path, "HEAD", none])
    event = made[2]
    assert made == (200, "MISS", event)
    assert kept == [(200, "HIT", event)] * 2
    # Another region, another group of hosts and another event to contain are other pictures.
    others = ("/canvas.rgb?x=2", "/cluster/t2/canvas.rgb?x=1", "/canvas.rgb?x=1&after=1-0")
    assert [cache for _, cache, _ in look(*([other, "GET", none] for other in others))] == ["MISS"] * 3
    past, again, unchanged = look(
        [path, "GET", {"Cache-Control": "no-cache"}],
        [path, "GET", none],
        [path, "GET", {"If-None-Match": '"none"'}],
    )
    assert past[1] == "BYPASS"
    assert past[2] > event
    assert again == unchanged == (200, "HIT", past[2])
    first, *later = look(
        [path, "GET", {"Cache-Control": "no-cache"}], 2.1, [path, "GET", none], 0.5, [path, "GET", none]
    )
    # The former one is given while the next one is made.
    assert later[0] == (200, "STALE", first[2])
    assert later[1][1] == "HIT"
    assert later[1][2] > first[2]
    tag = f'"{later[1][2]}"'
    assert look([path, "GET", {"If-None-Match": "*"}])[0][0] == 304
    assert look(5, [path, "GET", {"If-None-Match": tag}])[0][1] in ("EXPIRED", "MISS")


def test_many_who_want_the_same_picture_cost_one(host: Any) -> None:
    path = "/canvas.rgb?x=3&y=4"
    assert len(json.loads(host.check_output(f"client many 200 '{path}' 50"))) == 200
    time.sleep(1.5)
    log = host.check_output(f"grep -F '{path}' /var/log/nginx/access.log")
    lines = [json.loads(line) for line in log.splitlines()]
    assert len(lines) == 200
    assert sum(line["upstream"] not in ("", "-") for line in lines) <= 2


def test_pictures_are_kept_in_memory_and_bounded(host: Any) -> None:
    mounts = host.check_output(f"cat /proc/{master(host)}/mounts").splitlines()
    [options] = [fields[3] for line in mounts if (fields := line.split())[1] == "/run/pixel-pictures"]
    assert "size=262144k" in options.split(",")


def test_the_server_header_has_no_version(curl: Any) -> None:
    assert curl("/")[1]["server"] == "nginx"


def test_errors_from_nginx_are_problem_details(curl: Any) -> None:
    status, headers, body = curl("/", "POST", "x", f"Content-Length: {3 * 1024 * 1024}")
    assert status == 413
    assert headers["content-type"] == "application/problem+json"
    assert json.loads(body) == {
        "type": "about:blank",
        "title": "Content Too Large",
        "status": 413,
        "detail": "The maximum size of a body is 2m.",
    }


@pytest.fixture
def method(host: Any, shell: Any) -> Iterator[Any]:
    """Install another balancing method."""
    path = "/etc/nginx/staged/pixel/backends.json"
    staged = json.loads(host.file(path).content_string)

    def choose(name: str) -> None:
        shell(f"cat >{path} <<'END'\n{json.dumps(staged | {'method': name})}\nEND")
        assert host.check_output("pixel-lb install") == "changed"

    yield choose
    shell(f"cat >{path} <<'END'\n{json.dumps(staged)}\nEND")
    assert host.check_output("pixel-lb install") == "changed"


def test_round_robin_follows_the_weights_exactly(method: Any, many: Any) -> None:
    method("round_robin")
    seen = many(100)
    assert Counter(seen) == {"debian12": 60, "debian13": 40}
    assert seen[:50] == seen[50:]


def test_concurrent_requests_are_spread_by_weight(method: Any, host: Any) -> None:
    def of_debian12() -> int:
        seen = Counter(json.loads(host.check_output("client many 200 /slow 50")))
        assert sum(seen.values()) == 200
        return seen["debian12"]

    # least_conn depends on response times, which vary on a shared machine.
    assert abs(of_debian12() - 120) <= 50
    method("round_robin")
    # A backend's failure in an earlier test may still lower its effective weight.
    assert abs(of_debian12() - 120) <= 4


def test_least_conn_prefers_the_idle_backend(host: Any) -> None:
    # Requests of a slow host are in flight for longer, so it gets fewer; by weight it would get 80.
    seen = Counter(json.loads(host.check_output("client many 200 /slow/debian13 20")))
    assert 0 < seen["debian13"] < 50


def test_random_ip_hash_and_hash_are_supported(method: Any, many: Any) -> None:
    method("random")
    assert set(many(100)) == {"debian12", "debian13"}
    method("ip_hash")
    assert len(set(many(20))) == 1
    method("hash")
    assert len(set(many(20))) == 1


def test_a_drained_backend_gets_no_request_and_nginx_is_not_restarted(host: Any, many: Any) -> None:
    before = master(host)
    assert host.check_output("pixel-lb drain debian13") == "changed"
    assert host.check_output("pixel-lb drain debian13") == "unchanged"
    assert set(many(20)) == {"debian12"}
    refused = host.run("pixel-lb drain debian12")
    assert refused.rc == 3
    assert "debian12 is the last backend" in refused.stderr
    assert json.loads(host.check_output("pixel-lb status"))["backends"]["debian13"]["state"] == "drained"
    assert host.check_output("pixel-lb undrain debian13") == "changed"
    assert Counter(many(50)) == {"debian12": 30, "debian13": 20}
    assert master(host) == before


def test_an_unknown_backend_is_refused_by_name(host: Any) -> None:
    refused = host.run("pixel-lb drain nobody")
    assert refused.rc == 1
    assert "unknown backend 'nobody'; known backends: debian12, debian13" in refused.stderr


def test_an_invalid_configuration_never_replaces_a_valid_one(host: Any, shell: Any, many: Any) -> None:
    valid = host.file("/etc/nginx/nginx.conf").content_string
    shell("sed -i 's/worker_connections/worker_konnections/' /etc/nginx/staged/nginx.conf")
    refused = host.run("pixel-lb install")
    shell("sed -i 's/worker_konnections/worker_connections/' /etc/nginx/staged/nginx.conf")
    assert refused.rc == 1
    assert "unknown directive" in refused.stderr
    assert host.file("/etc/nginx/nginx.conf").content_string == valid
    assert len(many(5)) == 5
    assert host.check_output("pixel-lb install") == "unchanged"


def test_files_that_nginx_has_not_loaded_yet_are_loaded(host: Any, shell: Any) -> None:
    """As after an interrupted run: files newer than Nginx's last reload."""
    shell("echo '# left over' >>/etc/nginx/pixel/proxy.conf")
    before = master(host)
    assert host.check_output("pixel-lb install") == "changed"
    assert "left over" not in host.check_output("nginx -T 2>/dev/null")
    assert json.loads(host.check_output("pixel-lb status"))["loaded"] is True
    assert master(host) == before


def test_a_reload_is_announced_to_writers(host: Any, shell: Any, curl: Any) -> None:
    assert curl("/pixel", "POST", "a body")[1]["connection"] == "keep-alive"
    shell("touch /run/pixel-lb/closing")
    time.sleep(1.1)  # Workers look for the file once a second.
    status, headers, body = curl("/pixel", "POST", "a body")
    assert (status, headers["connection"], json.loads(body)["body"]) == (200, "close", "a body")
    before = {worker.pid for worker in host.process.filter(ppid=int(master(host)))}
    shell("systemctl reload nginx")
    assert not host.file("/run/pixel-lb/closing").exists
    assert {worker.pid for worker in host.process.filter(ppid=int(master(host)))} - before
    time.sleep(1.1)
    assert curl("/pixel", "POST", "a body")[1]["connection"] == "keep-alive"


def test_a_dead_backend_fails_no_request(host: Any, many: Any) -> None:
    host.run_expect([0], "systemctl stop backend")
    try:
        assert len(set(many(40))) == 1
    finally:
        host.run_expect([0], "systemctl start backend")


def test_no_backend_at_all_is_a_problem_with_a_hint(shell: Any, curl: Any, fleet: dict[str, Any]) -> None:
    try:
        for name in fleet["hosts"]:
            shell("systemctl stop backend", on=name)
        status, headers, body = curl("/pixel", "POST", "{}")
    finally:
        for name in fleet["hosts"]:
            shell("systemctl start backend", on=name)
    assert (status, json.loads(body)["title"]) == (502, "Bad Gateway")
    assert headers["retry-after"] == "1"


def test_the_unit_stops_nginx_gracefully(host: Any) -> None:
    properties = host.service("nginx").systemd_properties
    assert "nginx -s quit" in properties["ExecStop"]
    assert int(properties["LimitNOFILE"]) == 65536


def test_the_units_limits_apply_to_the_process_that_the_package_started(host: Any) -> None:
    def open_files(process: str) -> list[int]:
        """Return the soft and the hard limit of a process."""
        return [
            int(word)
            for word in host.check_output(f"grep '^Max open files' /proc/{process}/limits").split()[3:5]
        ]

    # A container can't have more than its engine allows.
    most = min(65536, open_files("1")[1])
    assert open_files(master(host)) == [most, most]
    assert "NoNewPrivs:\t1" in host.check_output(f"cat /proc/{master(host)}/status")
