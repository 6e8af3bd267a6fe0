"""The configuration of role nginx_lb, tested with a local Nginx and a stand-in for an app host."""

from __future__ import annotations

import http.client
import json
import shutil
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from ansible.parsing.dataloader import DataLoader  # type: ignore[import-untyped]
from ansible.template import Templar, trust_as_template  # type: ignore[import-untyped]
from playwright.sync_api import Error as PlaywrightError
from playwright.sync_api import sync_playwright

from bench.compare.processes import free_port

ROLE = Path(__file__).resolve().parents[1] / "roles" / "nginx_lb"
RECEIVED: list[int] = []
"""Lengths of the bodies that the app host received."""
HEADERS: list[dict[str, str]] = []
"""Headers of the requests with a body that the app host received."""


class App(BaseHTTPRequestHandler):
    """Accepts any request; answers those that say `hold` after half a second."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        time.sleep(0.5 * ("hold" in self.path))
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_POST(self) -> None:
        RECEIVED.append(len(self.rfile.read(int(self.headers["Content-Length"]))))
        HEADERS.append(dict(self.headers))
        self.do_GET()

    def log_message(self, *_: object) -> None:
        """Print nothing."""


class Server(ThreadingHTTPServer):
    """Accepts many connections at once."""

    request_queue_size = 128


# Ports in a rendered configuration, which each balancer replaces with its own.
LISTEN_PORT, STATUS_PORT = 64001, 64002


@cache
def render(chosen: str) -> dict[str, str]:
    """The files of the configuration as the role writes it, with its defaults and the variables in JSON."""
    loader = DataLoader()
    parts = [
        loader.load_from_file(str(ROLE / name / "main.yml"), trusted_as_template=True)
        for name in ("defaults", "vars")
    ]
    facts = {"all_ipv6_addresses": [], "default_ipv4": {"address": "127.0.0.1"}}
    host = {"inventory_hostname": "a", "ansible_managed": "test", "ansible_facts": facts}
    variables = parts[0] | parts[1] | host | {"groups": {}, "hostvars": {}} | json.loads(chosen)
    templar = Templar(loader, variables)
    return {
        path.name.removesuffix(".j2"): templar.template(trust_as_template(path.read_text()))
        for path in (ROLE / "templates").glob("*.conf.j2")
    }


@contextmanager
def balancer(folder: Path, *, drained: bool = False, **chosen: Any) -> Iterator[int]:
    """The port of an Nginx with the role's configuration and the given variables."""
    port, log = free_port(), folder / "error.log"
    variables = chosen | {
        "nginx_lb_listen_port": LISTEN_PORT,
        "nginx_lb_status_port": STATUS_PORT,
        "nginx_lb_access_log": False,
        "_nginx_lb_write_lifetime": 1.6,
    }
    ports = {str(LISTEN_PORT): str(port), str(STATUS_PORT): str(free_port())}
    for name, text in render(json.dumps(variables, sort_keys=True)).items():
        for shown, own in ports.items():
            text = text.replace(shown, own)
        target = folder / (name if name == "nginx.conf" else f"pixel/{name}")
        target.parent.mkdir(exist_ok=True)
        target.write_text(text)
    main = folder / "nginx.conf"
    text = main.read_text().replace("user www-data;", "").replace("/run/nginx.pid", f"{folder}/pid")
    text = text.replace("/var/log/nginx/error.log", str(log))
    kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    paths = "".join(f"{kind}_temp_path {folder / kind};" for kind in kinds)
    main.write_text(text.replace("http {", f"http {{ {paths}"))
    with Server(("127.0.0.1", 0), App) as app:
        Thread(target=app.serve_forever, daemon=True).start()
        upstreams = "".join(
            f"upstream {name} {{ server 127.0.0.1:{app.server_port}; }}\n"
            for name in ("pixel", "pixel_streams")
        )
        upstreams += "map $upstream_addr $pixel_other { default pixel; }\n"
        upstreams += f"geo $pixel_drained {{ default {int(drained)}; }}\n"
        (folder / "pixel" / "upstreams.conf").write_text(upstreams)
        nginx = subprocess.Popen(["nginx", "-c", main, "-e", log, "-g", "daemon off;"])
        try:
            deadline = time.monotonic() + 10
            while not (folder / "pid").exists():
                assert nginx.poll() is None, log.read_text()
                assert time.monotonic() < deadline
                time.sleep(0.02)
            yield port
        finally:
            nginx.terminate()
            nginx.wait(10)
            app.shutdown()


@pytest.fixture(scope="module")
def full_balancer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """The port of a balancer that can't write temporary files."""
    folder = tmp_path_factory.mktemp("nginx")
    with balancer(folder) as port:
        (folder / "client_body").rmdir()
        yield port


@pytest.fixture
def post(full_balancer: int) -> Iterator[Any]:
    """Send a batch; gives status, headers and body of the answer."""
    RECEIVED.clear()
    connection = http.client.HTTPConnection("127.0.0.1", full_balancer, timeout=10)

    def send(body: bytes) -> tuple[int, Any, bytes]:
        connection.request("POST", "/pixels", body, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        return answer.status, answer.headers, answer.read()

    yield send
    connection.close()


def test_a_batch_needs_no_temporary_file(post: Any) -> None:
    """9,000 pixels, and the largest body that the app takes."""
    batch = json.dumps([{"x": 1000, "y": 1000, "channel": "R", "value": 255}] * 9_000).encode()
    assert [post(body)[0] for body in (batch, batch.ljust(1024 * 1024))] == [200, 200]
    assert [len(batch), 1024 * 1024] == RECEIVED


def test_a_body_without_space_is_a_problem_and_was_not_written(post: Any) -> None:
    status, headers, body = post(b" " * 1_900_000)
    assert (status, headers["Content-Type"], headers["Retry-After"]) == (503, "application/problem+json", "1")
    assert json.loads(body) == {
        "type": "about:blank",
        "title": "Service Unavailable",
        "status": 503,
        "detail": "The balancer has no memory or disk space for the request.",
        "written": "no",
    }
    assert RECEIVED == []


EXPENSIVE = [
    ("POST", "/pixels"),
    ("POST", "/pixels?x=1"),
    ("POST", "//pixels"),
    ("POST", "/cluster/a/pixels"),
    ("GET", "/canvas.png?x=1&y=1&w=9&h=9"),
    ("GET", "/canvas%2Ergb?x=1"),
    ("HEAD", "/canvas.png?scale=4"),
    ("GET", "/history?limit=1"),
    ("GET", "/history.csv.gz"),
    ("GET", "/pixel/1/1/history"),
]
OTHERS = [("POST", "/pixel"), ("GET", "/canvas.png"), ("GET", "/canvas.rgb"), ("GET", "/pixel/1/1?x=1")]


def test_expensive_requests_have_a_limit_of_their_own(tmp_path: Path) -> None:
    """A client can send four of each kind at once; other requests of the same client are answered."""
    limits: dict[str, Any] = {"nginx_lb_limit_expensive_rate": 1, "nginx_lb_limit_expensive_burst": 3}
    for number, (method, path) in enumerate(EXPENSIVE):
        folder = tmp_path / str(number)
        folder.mkdir()
        with balancer(folder, _nginx_lb_loopback=[], nginx_lb_picture_cache=0, **limits) as port:
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
            statuses: dict[tuple[str, str], Counter[int]] = {}
            for request in [(method, path), *OTHERS]:
                statuses[request] = Counter()
                for _ in range(8):
                    connection.request(*request, b"{}" if request[0] == "POST" else None)
                    answer = connection.getresponse()
                    body = answer.read()
                    statuses[request][answer.status] += 1
                    if answer.status == 429 and method != "HEAD":
                        assert json.loads(body)["title"] == "Too Many Requests"
                        assert answer.headers["Retry-After"] == "1"
            connection.close()
        limited = statuses.pop((method, path))
        assert limited.keys() == {200, 429}, path
        assert 4 <= limited[200] <= 5
        assert set(map(str, statuses.values())) == {"Counter({200: 8})"}


def test_expensive_requests_in_flight_are_limited(tmp_path: Path) -> None:
    def status(path: str) -> int:
        with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=10)) as connection:
            connection.request("GET", path)
            return connection.getresponse().status

    with (
        balancer(tmp_path, _nginx_lb_loopback=[], nginx_lb_limit_expensive_connections=2) as port,
        ThreadPoolExecutor(12) as pool,
    ):
        paths = [f"/canvas.png?hold={number}" for number in range(6)] + 6 * ["/ping?hold"]
        statuses = list(pool.map(status, paths))
    assert sorted(statuses[:6]) == [200, 200, 429, 429, 429, 429]
    assert statuses[6:] == 6 * [200]


class History(App):
    """A host of the history."""

    def do_GET(self) -> None:
        self.send_response(204)
        self.end_headers()


@pytest.fixture(scope="module")
def balancers_of_history(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[int, int]]:
    """The ports of a balancer with two hosts of the history, of which one answers, and of one without."""
    with Server(("127.0.0.1", 0), History) as history:
        Thread(target=history.serve_forever, daemon=True).start()
        hosts = [f"127.0.0.1:{port}" for port in (free_port(), history.server_port)]
        folders = [tmp_path_factory.mktemp(name) for name in ("with", "without")]
        with balancer(folders[0], _nginx_lb_history=hosts) as with_hosts, balancer(folders[1]) as without:
            yield with_hosts, without
        history.shutdown()


@pytest.mark.parametrize(
    "path", ["/history?limit=1", "/history/state", "/history.csv.gz", "/pixel/1/2/history"]
)
def test_questions_about_the_history_reach_its_hosts(
    balancers_of_history: tuple[int, int], path: str
) -> None:
    """The first host that answers has the complete history. Without such hosts, the app answers."""

    def status(port: int) -> int:
        with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=10)) as connection:
            connection.request("GET", path)
            return connection.getresponse().status

    with_hosts, without = balancers_of_history
    assert [status(with_hosts) for _ in range(5)] == [204] * 5
    assert status(without) == 200


def test_a_write_carries_only_the_headers_that_the_app_reads(tmp_path: Path) -> None:
    """A browser sends a dozen others, which cost the app as much as a third of a write."""
    others = {"User-Agent": "a browser", "Accept": "*/*", "Cookie": "a=b", "Sec-Fetch-Mode": "cors"}
    read = {"Content-Type": "application/json", "Content-Encoding": "identity", "Authorization": "Bearer a"}
    added = {"Host", "X-Forwarded-For", "X-Request-ID", "X-Request-Start", "Content-Length"}

    def received(path: str, sent: dict[str, str]) -> dict[str, str]:
        with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=10)) as connection:
            connection.request("POST", path, b"{}", sent)
            assert connection.getresponse().status == 200
        return HEADERS[-1]

    with balancer(tmp_path) as port:
        whole = received("/pixel", others | read)
        assert whole.keys() == added | read.keys()
        assert read.items() <= whole.items()
        assert received("/pixel", others).keys() == added
        assert (others | read).items() <= received("/pixels", others | read).items()


def test_a_method_that_nginx_refuses_has_an_allow(tmp_path: Path) -> None:
    with (
        balancer(tmp_path) as port,
        closing(http.client.HTTPConnection("127.0.0.1", port, timeout=10)) as connection,
    ):
        connection.request("TRACE", "/ping")
        answer = connection.getresponse()
        assert (answer.status, json.load(answer)["title"]) == (405, "Method Not Allowed")
        assert "GET" in answer.headers["Allow"]


OWN = "https://game.example.org"
FLAGS = ["--no-sandbox", "--disable-background-networking", "--disable-component-update", "--disable-sync"]


@pytest.mark.parametrize(
    ("allowed", "origin", "accepted"),
    [
        ([OWN], OWN, True),
        ([OWN], "https://other.example.org", False),
        (["*"], "http://a:1", True),
        ([], OWN, False),
    ],
)
def test_pages_of_named_origins_may_use_the_api(
    tmp_path: Path, allowed: list[str], origin: str, accepted: bool
) -> None:
    ask = {"Origin": origin, "Access-Control-Request-Method": "POST"}

    def answer(method: str, path: str, sent: dict[str, str]) -> tuple[int, Any]:
        with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=10)) as connection:
            connection.request(method, path, headers=sent)
            found = connection.getresponse()
            return found.status, found.headers

    with balancer(tmp_path, nginx_lb_cors_origins=allowed) as port:
        status, headers = answer("OPTIONS", "/pixel", ask)
        assert headers["Access-Control-Allow-Origin"] == (origin if accepted else None)
        if accepted:
            assert status == 204
            assert headers["Access-Control-Allow-Methods"] == "GET, HEAD, POST, PUT, DELETE"
            assert "Authorization" in headers["Access-Control-Allow-Headers"]
        # The balancer's own errors too, or a page could not read their reasons.
        for extra, expected in ({}, 200), ({"Content-Length": "99999999"}, 413):
            status, headers = answer("GET", "/ping", {"Origin": origin} | extra)
            assert status == expected
            assert headers["Access-Control-Allow-Origin"] == (origin if accepted else None)
            assert headers["Vary"] == ("Origin" if allowed else None)
            assert ("Retry-After" in (headers["Access-Control-Expose-Headers"] or "")) is accepted
        assert answer("GET", "/ping", {})[1]["Access-Control-Allow-Origin"] is None


def test_a_page_of_another_origin_paints_in_a_browser(tmp_path: Path) -> None:
    """The browser asks first, because of the content type and the key."""
    script = """async (url) => {
        const headers = {"Content-Type": "application/json", Authorization: "Bearer a"};
        const answer = await fetch(url, {method: "POST", headers, body: "{}"});
        return [answer.status, answer.headers.get("X-Request-ID")?.length];
    }"""
    with Server(("127.0.0.1", 0), App) as site, sync_playwright() as playwright:
        Thread(target=site.serve_forever, daemon=True).start()
        origin = f"http://127.0.0.1:{site.server_port}"
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=FLAGS)
        page = browser.new_page()
        page.goto(origin)
        with balancer(tmp_path, nginx_lb_cors_origins=[origin]) as port:
            assert page.evaluate(script, f"http://127.0.0.1:{port}/pixel") == [200, 32]
            assert HEADERS[-1]["Authorization"] == "Bearer a"
        (tmp_path / "other").mkdir()
        with (
            balancer(tmp_path / "other", nginx_lb_cors_origins=[OWN]) as port,
            pytest.raises(PlaywrightError, match="Failed to fetch"),
        ):
            page.evaluate(script, f"http://127.0.0.1:{port}/pixel")
        browser.close()
        site.shutdown()


@pytest.mark.parametrize(("drained", "status"), [(False, 200), (True, 503)])
def test_a_balancer_on_a_drained_host_is_not_ready(tmp_path: Path, *, drained: bool, status: int) -> None:
    with (
        balancer(tmp_path, drained=drained) as port,
        closing(http.client.HTTPConnection("127.0.0.1", port, timeout=10)) as connection,
    ):
        connection.request("GET", "/lb/ready")
        assert connection.getresponse().status == status
