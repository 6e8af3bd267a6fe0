"""Monitoring and logs. Keep this file last: its last test removes monitoring."""

from __future__ import annotations

import http.server
import json
import re
import socket
import socketserver
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[3]

testinfra_hosts = ["c5"]

PACKAGES = {
    "prometheus-node-exporter": 9100,
    "prometheus-redis-exporter": 9121,
    "prometheus-blackbox-exporter": 9115,
    "prometheus-nginx-exporter": 9113,
    "prometheus": 9090,
    "prometheus-alertmanager": 9093,
}
TOKEN = "a-token-that-nobody-may-see"


def wait_until(found: Callable[[], Any], seconds: float = 60) -> Any:
    end = time.monotonic() + seconds
    while not (result := found()):
        assert time.monotonic() < end, f"not within {seconds:.0f} s"
        time.sleep(0.5)
    return result


@pytest.fixture
def ask(address: str) -> Any:
    """Query Prometheus' HTTP API."""

    def get(path: str) -> Any:
        with urllib.request.urlopen(f"http://{address}:9090/api/v1/{path}", timeout=10) as answer:
            return json.load(answer)["data"]

    return get


@pytest.fixture
def query(ask: Any) -> Any:
    """Evaluate an expression; return its values by instance."""

    def get(expression: str) -> dict[str, float]:
        found = ask("query?query=" + quote(expression))["result"]
        return {sample["metric"].get("instance", ""): float(sample["value"][1]) for sample in found}

    return get


def test_prometheus_scrapes_every_target(ask: Any, address: str) -> None:
    def healthy() -> set[tuple[str, str]]:
        targets = ask("targets?state=active")["activeTargets"]
        return {
            (target["labels"]["job"], target["labels"]["instance"])
            for target in targets
            if target["health"] == "up"
        }

    jobs = ("pixel", "redis", "nginx", "node", "prometheus", "alertmanager", "blackbox", "history")
    others = {("pixel", "t2"), ("node", "t2"), ("probe-read", f"http://{address}/ping")}
    wait_until(lambda: healthy() == {(job, "c5") for job in jobs} | others)


@pytest.fixture(scope="module")
def backup(play: Any, tmp_path_factory: pytest.TempPathFactory) -> None:
    """A backup of the canvas has been made."""
    done = play("playbooks/backup.yml", redis_backup_dir=str(tmp_path_factory.mktemp("backups")))
    assert done.returncode == 0, done.words


@pytest.mark.usefixtures("backup")
def test_exporters_report_values(query: Any, client: Any) -> None:
    assert wait_until(lambda: query("redis_up")) == {"c5": 1}
    assert query("nginx_up") == {"c5": 1}
    before = sum(query("pixel_writes_total").values())
    for number in range(20):
        assert client.ask("/pixel", b'{"x":1,"y":1,"channel":"G","value":%d}' % number)[0] == 200
    wait_until(lambda: sum(query("pixel_writes_total").values()) >= before + 20)
    assert query("redis_aof_enabled") == {"c5": 1}
    wait_until(lambda: query('pixel_lb_backend_weight{backend="c5"}'))
    made = wait_until(lambda: query("pixel_backup_timestamp_seconds").get("c5"))
    assert time.time() - 3600 < made < time.time()


@pytest.mark.usefixtures("backup")
def test_every_panel_of_the_dashboard_has_data(ask: Any, client: Any) -> None:
    dashboard = json.loads((ROOT / "docs" / "dashboards" / "pixel.json").read_text())
    queries = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]

    def without_data() -> list[str]:
        for number in range(10):
            client.ask("/pixel", b'{"x":1,"y":1,"channel":"G","value":%d}' % number)
            client.ask("/pixel/1/1")
        return [
            query
            for query in queries
            if not any(
                sample["value"][1] != "NaN"
                for sample in ask("query?query=" + quote(query.replace("$__rate_interval", "30s")))["result"]
            )
        ]

    for _ in range(60):
        if not (left := without_data()):
            break
        time.sleep(1)
    assert left == []
    # Panels with `or vector(0)` show data even for a misspelt metric, so check the names.
    assert {name for query in queries for name in metrics(query)} <= {
        *ask("label/__name__/values"),
        "ALERTS",  # exists only while an alert is pending or firing
        *("pixel_replicas", "redis_cluster_slots_fail"),  # exist only with three Redis hosts
    }


def metrics(query: str) -> set[str]:
    """Return the metric names in a query: words that are neither functions nor labels."""
    rest = re.sub(r"\{.*?\}|\[.*?\]|\bby \(.*?\)", "", query)
    return set(re.findall(r"\b[a-zA-Z_]\w*\b(?! *\()", rest)) - {"or"}


def test_the_alert_rules_are_loaded(ask: Any) -> None:
    rules = [rule for group in ask("rules")["groups"] for rule in group["rules"]]
    names = {rule["name"] for rule in rules if rule["type"] == "alerting"}
    files = [ROOT / "tests" / name for name in ("alerts.yml", "alerts_long.yml", "slo.yml")]
    cases = [case for file in files for case in yaml.safe_load(file.read_text())["tests"]]
    # This fleet has one Redis.
    assert names == {case["name"] for case in cases} - {"RedisOneReplica", "RedisVoteMissing"}


def test_monitoring_listens_on_the_private_address_only(host: Any, address: str) -> None:
    listening = host.socket.get_listening_sockets()
    for port in PACKAGES.values():
        assert [place for place in listening if place.endswith(f":{port}")] == [f"tcp://{address}:{port}"]
    assert "tcp://127.0.0.1:8090" in listening


def test_the_exporters_redis_user_may_run_info_and_read_no_pixel(
    shell: Any, address: str, password: Any
) -> None:
    def ask(words: str) -> str:
        login = f"REDISCLI_AUTH={password('monitor')} redis-cli --user monitor -h {address}"
        answer: str = shell(f"{login} {words}")
        return answer

    assert "aof_enabled:1" in ask("info")
    for words in (
        "get pixel:{0}:tile:0:0",
        "config get '*'",
        "acl list",
        "set pixel:x 1",
        "xrange pixel:{0}:events - +",
    ):
        assert ask(words).startswith("NOPERM"), words


def test_exporters_are_sandboxed_and_do_not_run_as_root(host: Any) -> None:
    for package in PACKAGES:
        service = host.service(package)
        assert service.is_running, package
        assert service.is_enabled, package
        properties = service.systemd_properties
        assert (properties["User"], properties["ProtectSystem"]) == ("prometheus", "strict"), package


def test_what_clients_see_is_counted_at_the_balancer(client: Any, shell: Any, query: Any) -> None:
    def counts() -> list[float]:
        time.sleep(1.2)  # The log is flushed once a second; a former test's requests may be among them.
        shell("systemctl start pixel-watch.service")
        time.sleep(6)  # A scrape.
        labels = ('route="/pixel/{x}/{y}",status="200",by="app"', 'route="other",status="404",by="app"')
        found = [query(f"sum by (instance) (pixel_edge_requests_total{{{each}}})") for each in labels]
        return [each.get("c5", 0) for each in found]

    before = counts()
    for number in range(5):
        assert client.ask(f"/pixel/{number}/3")[0] == 200
        assert client.ask(f"/nothing/{number}")[0] == 404
    assert counts() == [count + 5 for count in before]
    assert query('sum by (instance) (pixel_edge_seconds_count{route="/pixel/{x}/{y}"})')["c5"] >= 5


def test_the_public_address_is_probed(query: Any, address: str, ask: Any) -> None:
    assert wait_until(lambda: query("probe_success")) == {f"http://{address}/ping": 1}
    flags = ask("status/flags")
    assert (flags["storage.tsdb.retention.time"], flags["storage.tsdb.retention.size"]) == ("15d", "5GiB")


@pytest.fixture
def webhook(fleet: dict[str, Any]) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """A webhook receiver on the test machine: its URL as the hosts reach it, and the posted alerts."""
    posted: list[dict[str, Any]] = []

    class Receiver(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            posted.append({"path": self.path, "authorization": self.headers["Authorization"], **body})
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    with http.server.HTTPServer((fleet["gateway"], 0), Receiver) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://{fleet['gateway']}:{server.server_port}/", posted
        server.shutdown()


@pytest.fixture
def relay(fleet: dict[str, Any]) -> Iterator[tuple[str, list[str]]]:
    """A mail relay without STARTTLS: its address, and the mails that it has received."""
    mails: list[str] = []

    class Relay(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            self.wfile.write(b"220 relay\r\n")
            for line in self.rfile:
                if line.upper().startswith(b"DATA"):
                    self.wfile.write(b"354 go on\r\n")
                    mails.append(b"".join(iter(self.rfile.readline, b".\r\n")).decode())
                self.wfile.write(b"250 relay\r\n")

    with socketserver.ThreadingTCPServer((fleet["gateway"], 0), Relay) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"{fleet['gateway']}:{server.server_address[1]}", mails
        server.shutdown()


def test_an_alert_reaches_the_operators(
    host: Any,
    play: Any,
    shell: Any,
    ask: Any,
    webhook: tuple[str, list[dict[str, Any]]],
    relay: tuple[str, list[str]],
) -> None:
    (url, posted), (smarthost, mails) = webhook, relay
    chosen = {"monitoring_webhook_url": url, "monitoring_webhook_token": TOKEN}
    chosen |= {"monitoring_heartbeat_url": f"{url}heartbeat"}
    chosen |= {"monitoring_mail_smarthost": smarthost, "monitoring_mail_starttls": "false"}
    chosen |= {f"monitoring_mail_{end}": f"{end}@example.org" for end in ("from", "to")}
    done = play("playbooks/monitoring.yml", "--tags", "monitoring", "--diff", **chosen)
    assert done.changes() == {"c5": 2, "t2": 0}  # the file, and the reload
    assert TOKEN not in done.stdout
    host.run_expect([0], "systemctl stop prometheus-nginx-exporter")
    host.run_expect([0], "systemctl stop redis-server")

    def firing() -> dict[str, Any]:
        """The firing alerts posted so far, by name; a slow machine may cause others."""
        alerts = [alert for each in posted for alert in each["alerts"] if each["path"] == "/"]
        return {each["labels"]["alertname"]: each for each in alerts if each["status"] == "firing"}

    redis_down = wait_until(lambda: firing().get("RedisDown"), 120)
    wait_until(lambda: any(re.search("^Subject: .*RedisDown", mail, re.M) for mail in mails))
    active = {(each["labels"]["alertname"], each["labels"].get("job")) for each in ask("alerts")["alerts"]}
    host.run_expect([0], "systemctl start redis-server prometheus-nginx-exporter")
    wait_until(lambda: any(each["path"] == "/heartbeat" for each in posted), 120)
    assert {(each["path"], each["authorization"]) for each in posted} == {
        ("/", f"Bearer {TOKEN}"),
        ("/heartbeat", None),
    }
    beats = [alert["labels"] for each in posted if each["path"] == "/heartbeat" for alert in each["alerts"]]
    assert {beat["alertname"] for beat in beats} == {"Heartbeat"}
    assert "Heartbeat" not in firing()
    assert redis_down["labels"]["instance"] == "c5"
    assert "journalctl -u redis-server" in redis_down["annotations"]["summary"]
    assert ("ExporterDown", "nginx") in active  # pending: it fires after five minutes
    file = host.file("/etc/prometheus/alertmanager.yml")
    assert (file.user, file.group, oct(file.mode)) == ("root", "prometheus", "0o640")
    for place in ("ps -eo args", "journalctl --no-pager", "systemctl show 'prometheus*'"):
        assert TOKEN not in shell(place), place


SECRET = "nobody-logs-what-is-in-a-body"


DEBUG = """
mkdir -p /run/systemd/system/pixel.service.d
echo PIXEL_LOG_LEVEL=debug >/run/pixel-debug.env
printf '[Service]\\nEnvironmentFile=/run/pixel-debug.env\\n' >/run/systemd/system/pixel.service.d/debug.conf
systemctl daemon-reload && systemctl restart pixel
"""
RESTORE_LOG_LEVEL = """
rm /run/pixel-debug.env /run/systemd/system/pixel.service.d/debug.conf
systemctl daemon-reload && systemctl restart pixel
"""


def test_logs_shows_a_request_on_all_hosts(play: Any, client: Any, shell: Any) -> None:
    def ask() -> tuple[str, str]:
        status, headers, _ = client.ask("/pixels", json.dumps([{"x": SECRET}]).encode())
        assert status == 422
        return headers["X-Pixel-Instance"], headers["X-Request-ID"]

    shell(DEBUG, on="t2")
    try:
        request_id = wait_until(lambda: found[1] if (found := ask())[0] == "t2" else None)
        wait_until(lambda: request_id in shell("cat /var/log/nginx/access.log"))
        output = play("playbooks/logs.yml", id=request_id).stdout
    finally:
        shell(RESTORE_LOG_LEVEL, on="t2")
    lines = dict(re.findall(r"^ +20\S+Z (\S+ \S+): (.*)$", output, re.M))
    assert lines.keys() == {"c5 nginx", "t2 pixel"}
    nginx, app = json.loads(lines["c5 nginx"]), json.loads(lines["t2 pixel"])
    assert (nginx["id"], nginx["uri"]) == (request_id, "/pixels")
    assert (app["request_id"], app["message"]) == (request_id, "POST /pixels was answered 422")
    for host in ("c5", "t2"):
        for place in ("cat /var/log/nginx/*.log", "journalctl --no-pager"):
            assert SECRET not in shell(place, on=host), (host, place)


def test_logs_are_bounded_in_size(host: Any, client: Any, shell: Any) -> None:
    assert "SystemMaxUse=1000M" in shell("systemd-analyze cat-config systemd/journald.conf")
    assert host.service("logrotate.timer").is_running
    shell("head -c 101M /dev/zero >>/var/log/nginx/error.log; systemctl start logrotate.service")
    assert int(shell("stat -c %s /var/log/nginx/error.log")) < 1000
    assert client.ask("/ping")[0] == 200
    shell("rm /var/log/nginx/error.log.1")


def test_logs_reach_a_collector(host: Any, play: Any, shell: Any, fleet: dict[str, Any], client: Any) -> None:
    received = b""
    logs = ("playbooks/monitoring.yml", "--tags", "logs", "--limit", "c5")
    with socket.create_server((fleet["gateway"], 0)) as collector:
        collector.settimeout(30)
        port = collector.getsockname()[1]
        play(*logs, logs_forward_to=f"{fleet['gateway']}:{port}").changes()
        request_id = client.ask("/ping")[1]["X-Request-ID"]
        connection, _ = collector.accept()
        with connection:
            connection.settimeout(1)
            wanted = [f'"id":"{request_id}"'.encode(), b" sudo "]
            # The access log is sent from its start, and may be large.
            end = time.monotonic() + 180
            while wanted:
                assert time.monotonic() < end, wanted
                try:
                    received = received[-200:] + connection.recv(65536)
                except TimeoutError:
                    # rsyslog skips journal entries from before its start, such as those of the play.
                    shell("true")
                wanted = [text for text in wanted if text not in received]
    play(*logs).changes()
    assert not host.service("rsyslog").is_running
    # An rsyslog configuration that the role did not write is left alone.
    shell("echo '*.* /dev/null' >/etc/rsyslog.conf; systemctl start rsyslog")
    assert play(*logs).changes() == {"c5": 0}
    assert host.service("rsyslog").is_running
    shell("systemctl stop rsyslog")


def test_logs_reach_a_collector_over_udp(play: Any, fleet: dict[str, Any], client: Any) -> None:
    logs = ("playbooks/monitoring.yml", "--tags", "logs", "--limit", "c5")
    received = b""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as collector:
        collector.bind((fleet["gateway"], 0))
        collector.settimeout(10)
        port = collector.getsockname()[1]
        options = {"logs_forward_to": f"{fleet['gateway']}:{port}", "logs_forward_protocol": "udp"}
        play(*logs, **options).changes()
        request_id = client.ask("/ping")[1]["X-Request-ID"]
        while f'"id":"{request_id}"'.encode() not in received:
            received = collector.recv(65536)
        assert received.startswith(b"<190>1 ")  # local7.info, RFC 5424
    play(*logs).changes()


def test_the_alert_rules_are_healthy(ask: Any) -> None:
    # A former test restarts Prometheus, which evaluates some groups only every twenty scrapes.
    wait_until(lambda: all(r["health"] == "ok" for g in ask("rules")["groups"] for r in g["rules"]), 110)


def test_monitoring_can_be_removed(host: Any, play: Any) -> None:
    remove = ("playbooks/monitoring.yml", "--tags", "monitoring")
    assert all(play(*remove, monitoring_state="absent").changes().values())
    assert not any(
        place.endswith(tuple(f":{port}" for port in PACKAGES.values()))
        for place in host.socket.get_listening_sockets()
    )
    left = host.run(
        "ls -d /etc/prometheus* /var/lib/prometheus* /etc/systemd/system/prometheus* /usr/bin/prom*"
    )
    assert left.stdout == ""
    assert host.run("dpkg -l 'prometheus*' | grep ^ii").stdout == ""
    assert not any(play(*remove, monitoring_state="absent").changes().values())
