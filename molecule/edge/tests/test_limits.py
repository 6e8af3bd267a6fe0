"""Limits for clients, and the answers beyond them. The client is the host outside the fleet."""

from __future__ import annotations

import json
import time
from collections import Counter
from typing import Any

import pytest

testinfra_hosts = ["debian12"]

RATE, BURST, CONNECTIONS = 20, 20, 10
"""As set in vars/main.yml."""


@pytest.fixture
def visitor(shell: Any, address: str) -> Any:
    """Send requests from the outside client to the host under test; see molecule/edge/visitor.py."""

    def run(command: str, *words: object) -> Any:
        quoted = " ".join(f"'{word}'" for word in (address, *words))
        return json.loads(shell(f"visitor {command} {quoted}", on="stranger"))

    # Wait until the rate limit has recovered from the previous test.
    time.sleep(BURST / RATE)
    return run


@pytest.fixture
def local(host: Any) -> Any:
    """Send requests from the balancer's own host."""

    def run(command: str, *words: str) -> Any:
        quoted = " ".join(f"'{word}'" for word in words)
        return json.loads(host.check_output(f"visitor {command} 127.0.0.1 {quoted}"))

    return run


@pytest.fixture
def sources(fleet: dict[str, Any]) -> tuple[str, str]:
    """Two addresses of the outside client."""
    own: str = fleet["hosts"]["stranger"]["address"]
    return own, own.rsplit(".", 1)[0] + ".200"


def logged(host: Any, word: str) -> list[dict[str, Any]]:
    """Return the access log's lines that contain a word. Nginx flushes the log once a second."""
    return [
        json.loads(line)
        for line in host.check_output(f"sleep 1.2; grep {word} /var/log/nginx/access.log").splitlines()
    ]


def test_a_flood_from_one_client_does_not_affect_another(
    visitor: Any, sources: tuple[str, str], shell: Any, address: str
) -> None:
    """The flood is twice what both backends can serve."""
    flooder, other = sources
    shell(f"visitor rate {address} /work {flooder} 400 5 >/tmp/flood 2>&1 &", on="stranger")
    time.sleep(1)
    beside = visitor("rate", "/work", other, 10, 3)
    time.sleep(2)
    flood = json.loads(shell("cat /tmp/flood", on="stranger"))
    assert beside["statuses"] == {"200": 30}
    # Generous, because the test hosts share one machine.
    assert beside["p99_ms"] < 1000
    assert set(flood["statuses"]) == {"200", "429"}
    assert flood["statuses"]["200"] <= RATE * 7 + BURST


def test_a_rate_limited_client_gets_retry_after(visitor: Any) -> None:
    status, headers, body, after = visitor("limited")
    assert (status, headers["retry-after"], headers["content-type"]) == (429, "1", "application/problem+json")
    assert json.loads(body)["title"] == "Too Many Requests"
    assert after == 200


def test_the_requests_in_flight_of_one_client_are_limited(visitor: Any) -> None:
    """Twenty concurrent requests of half a second each are within the rate limit."""
    assert visitor("together", "/hold", 2 * CONNECTIONS) == {"200": CONNECTIONS, "429": CONNECTIONS}


def test_a_dry_run_refuses_no_request_and_logs_its_verdicts(host: Any, visitor: Any) -> None:
    config = "/etc/nginx/pixel/edge.conf"
    before = host.file(config).content_string
    assert "dry_run off;" in before
    host.run_expect([0], f"sed -i 's/dry_run off/dry_run on/' {config} && systemctl reload nginx")
    try:
        seen = visitor("rate", "/dry", "0.0.0.0", 100, 1)
    finally:
        host.run_expect([0], f"sed -i 's/dry_run on/dry_run off/' {config} && systemctl reload nginx")
    assert seen["statuses"] == {"200": 100}
    verdicts = Counter(line["limit"] for line in logged(host, "/dry"))
    assert verdicts["REJECTED_DRY_RUN"] > 0
    assert host.file(config).content_string == before


@pytest.mark.parametrize("part", ["header", "body"])
def test_a_slow_client_is_disconnected(visitor: Any, part: str) -> None:
    assert 1 < visitor("slow", part) < 6


def test_a_large_body_is_refused_before_it_is_sent(visitor: Any) -> None:
    status, _, body = visitor("ask", "/pixel", "POST", f"Content-Length: {3 * 1024 * 1024}")
    assert (status, json.loads(body)["detail"]) == (413, "The maximum size of a body is 2m.")


def test_a_large_header_is_refused(visitor: Any) -> None:
    status, headers, body = visitor("ask", "/", "GET", "X-Large: " + 10_000 * "x")
    assert (status, headers["content-type"]) == (431, "application/problem+json")
    assert json.loads(body)["title"] == "Request Header Fields Too Large"


def test_operator_paths_are_closed_to_outside_clients(visitor: Any, local: Any) -> None:
    paths = (
        *("/metrics", "/metrics?x=1", "//metrics", "/x/../metrics", "/%6Detrics"),
        *("/fleet/all", "/fleet/first", "/./fleet/all", "/fleet/../fleet/all"),
        *("/lb/status", "/cluster/fast/metrics", "/cluster/fast/fleet/all", "/cluster/fast/lb/status"),
    )
    assert visitor("paths", *paths) == [403] * len(paths)
    assert local("paths", *paths) == [200] * len(paths)
    _, headers, body = visitor("ask", "/metrics")
    assert headers["content-type"] == "application/problem+json"
    assert "nginx_lb_admin_networks" in json.loads(body)["detail"]


def test_forwarding_headers_of_a_trusted_proxy_are_used(host: Any, local: Any) -> None:
    """vars/main.yml trusts 127.0.0.1; the client is the last address that is not a trusted proxy."""
    chain = "X-Forwarded-For: 6.6.6.6, 203.0.113.9, 127.0.0.1"
    status, headers, body = local("ask", "/who", "GET", chain, "X-Forwarded-Proto: http")
    sent = json.loads(body)["headers"]
    assert status == 200
    assert sent["X-Forwarded-For"] == sent["X-Real-IP"] == "203.0.113.9"
    assert sent["X-Forwarded-Proto"] == "http"
    assert logged(host, headers["x-request-id"])[0]["client"] == "203.0.113.9"
    assert local("ask", "/metrics", "GET", chain)[0] == 403


def test_forwarding_headers_of_other_clients_are_ignored(visitor: Any, sources: tuple[str, str]) -> None:
    claims = ("X-Forwarded-For: 127.0.0.1", "X-Forwarded-Proto: http", "X-Real-IP: 127.0.0.1")
    sent = json.loads(visitor("ask", "/who", "GET", *claims)[2])["headers"]
    assert sent["X-Forwarded-For"] == sent["X-Real-IP"] == sources[0]
    assert sent["X-Forwarded-Proto"] == "https"
    assert visitor("ask", "/metrics", "GET", *claims)[0] == 403


def test_ipv6_clients_are_limited_by_their_64_network(local: Any) -> None:
    """Addresses of one /64 share a limit; different /64 networks do not."""
    assert local("limited", "X-Forwarded-For: 2001:db8:0:a0a::{}")[0] == 429
    assert local("limited", "X-Forwarded-For: 2001:db8:0:{}::1")[0] == 200


def test_every_answer_has_security_headers(visitor: Any) -> None:
    for path, status in (("/", 200), ("/metrics", 403)):
        seen, headers, _ = visitor("ask", path)
        assert seen == status
        assert headers["server"] == "nginx"
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["x-frame-options"] == "DENY"
        assert headers["referrer-policy"] == "strict-origin-when-cross-origin"
    assert headers["content-security-policy"] == "default-src 'none'; frame-ancestors 'none'"


def test_security_headers_of_the_backend_are_kept(visitor: Any) -> None:
    headers = visitor("ask", "/live")[1]
    assert headers["content-security-policy"] == "default-src 'self'"
    assert headers["referrer-policy"] == "no-referrer"
    assert headers["x-content-type-options"] == "nosniff"


def test_every_line_of_the_log_is_json_in_utf_8(visitor: Any, host: Any) -> None:
    """User agents and URIs contain invalid UTF-8, surrogates and quotes."""
    # Python's http.server, the backend, takes some other bytes for white space.
    texts = [b"bad\xff\xfe", b"\xed\xa1\x82", "grün".encode(), b'quote"\\']
    assert visitor("agents", *(text.hex() for text in texts)) == [200] * 4
    check = (
        "import json; lines = open('/var/log/nginx/access.log', 'rb').read().splitlines();"
        "print(json.dumps([json.loads(line.decode())['agent'] for line in lines]))"
    )
    agents = json.loads(host.check_output(f'sleep 1.2; python3 -c "{check}"'))
    # Each worker flushes its own buffer, so the order varies.
    assert sorted(agents[-4:]) == sorted(["bad…", "…", "grün", 'quote"\\'])
