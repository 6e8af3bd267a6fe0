"""TLS with certificates from the authority pebble on host `stranger`; see prepare.yml."""

from __future__ import annotations

import json
import re
import time
from typing import Any

import pytest

testinfra_hosts = ["debian12", "debian13"]


def test_the_hosts_present_the_authoritys_certificate(curl: Any, name: str, address: str) -> None:
    assert curl(f"https://{name}/ping", "%{http_code}") == "200"
    # Both serve this name. The authority reached debian12 only, which passed the challenge on to debian13.
    resolve = f"--resolve canvas.example:443:{address}"
    assert curl("https://canvas.example/ping", "%{http_code}", resolve) == "200"


def test_http_2_and_http_1_1_are_served(curl: Any, name: str) -> None:
    assert curl(f"https://{name}/ping", "%{http_version}") == "2"
    assert curl(f"https://{name}/ping", "%{http_version}", "--http1.1") == "1.1"


def test_plain_http_redirects_to_https(curl: Any, name: str, host: Any) -> None:
    write_out = "%{http_code} %{redirect_url}"
    assert curl(f"http://{name}/pixel/1/2?x=%20", write_out) == f"308 https://{name}/pixel/1/2?x=%20"
    # The target does not depend on the client's Host header.
    assert curl(f"http://{name}/", write_out, "-H 'Host: evil.example'") == f"308 https://{name}/"
    assert curl(f"http://{name}/.well-known/acme-challenge/none", "%{http_code}") == "404"
    # Requests from the host itself are served over plain HTTP.
    assert json.loads(host.check_output("client one /ping"))[0] == 200


@pytest.mark.parametrize(("scheme", "status"), [("https", "200"), ("http", "308")])
def test_requests_that_a_trusted_proxy_received_over_https_are_not_redirected(
    curl: Any, name: str, fleet: dict[str, Any], scheme: str, status: str
) -> None:
    """The proxy connects over plain HTTP; a redirect would loop."""
    proxy = fleet["hosts"]["stranger"]["address"].rsplit(".", 1)[0] + ".202"
    header = f"-H 'X-Forwarded-Proto: {scheme}'"
    assert curl(f"http://{name}/ping", "%{http_code}", f"--interface {proxy} {header}") == status
    assert curl(f"http://{name}/ping", "%{http_code}", header) == "308"


def test_plain_http_on_the_tls_port_is_answered_with_a_problem(curl: Any, name: str) -> None:
    answer = curl(f"http://{name}:443/", "%{http_code} %{content_type}")
    assert answer == "400 application/problem+json"


def test_answers_have_the_hsts_header(stranger: Any, name: str) -> None:
    answer = stranger(f"curl -sk -D - -o /dev/null https://{name}/metrics").lower()
    assert "403" in answer.splitlines()[0]
    assert "strict-transport-security: max-age=3600" in answer


@pytest.mark.parametrize(
    ("options", "works"),
    [
        ("-tls1_3", True),
        ("-tls1_2", True),
        ("-tls1_2 -cipher ECDHE-ECDSA-CHACHA20-POLY1305", True),
        ("-tls1_2 -cipher ECDHE-ECDSA-AES128-SHA", False),
        ("-tls1_2 -cipher AES128-GCM-SHA256", False),
        ("-tls1_1 -cipher ALL@SECLEVEL=0", False),
    ],
)
def test_protocols_and_ciphers_match_mozillas_intermediate_profile(
    handshake: Any, options: str, works: bool
) -> None:
    output = handshake(options)
    assert ("Cipher is (NONE)" not in output and "Cipher is " in output) is works
    # The server refuses, not the client.
    assert ("alert" in output) is not works


def test_a_scanner_gives_every_cipher_the_best_grade(stranger: Any, address: str) -> None:
    report = stranger(f"nmap -Pn -p 443 --script ssl-enum-ciphers {address}")
    assert re.findall(r"(TLSv[0-9.]+|SSLv[0-9]):", report) == ["TLSv1.2", "TLSv1.3"], report
    grades = re.findall(r"TLS_\w+ .* - ([A-F])$", report, re.M)
    assert len(grades) >= 6
    assert set(grades) == {"A"}
    assert "least strength: A" in report


@pytest.mark.parametrize("version", ["-tls1_2", "-tls1_3"])
def test_sessions_are_resumed(stranger: Any, handshake: Any, address: str, version: str) -> None:
    stranger(f"(sleep 1) | openssl s_client -connect {address}:443 {version} -sess_out /tmp/session")
    assert "Reused, TLSv1" in handshake(f"{version} -sess_in /tmp/session")


def test_private_keys_are_readable_by_root_only(host: Any, shell: Any) -> None:
    for folder in ("/etc/nginx/tls", "/etc/nginx/staged/tls"):
        assert host.file(folder).mode == 0o700
        assert host.file(f"{folder}/privkey.pem").mode == 0o600
    key = shell("sed -n 2p /etc/nginx/tls/privkey.pem").strip()
    assert len(key) == 64
    assert key not in shell("journalctl --no-pager; cat /var/log/letsencrypt/* /var/log/nginx/*")


def test_a_renewal_fails_no_request(
    host: Any, shell: Any, stranger: Any, certificate: Any, fleet: dict[str, Any], address: str
) -> None:
    """Renew as certbot's timer does, under 200 writes a second over keep-alive connections."""
    master = host.service("nginx").systemd_properties["MainPID"]
    before = certificate()
    exempt = fleet["hosts"]["stranger"]["address"].rsplit(".", 1)[0] + ".201"
    # Make every certificate due for renewal.
    renewal = "/etc/letsencrypt/renewal/pixel.conf"
    host.run_expect([0], f"sed -i '1i renew_before_expiry = 9999 days' {renewal}")
    stranger("rm -f /tmp/load")
    stranger(f"visitor rate {address} /pixel {exempt} 200 15 POST >/tmp/load 2>&1 &")
    time.sleep(2)
    try:
        host.run_expect([0], "systemctl start certbot.service")
    finally:
        host.run_expect([0], f"sed -i 1d {renewal}")
    renewed_in_time = stranger("cat /tmp/load") == ""
    after = certificate()
    for _ in range(40):
        if load := stranger("cat /tmp/load"):
            break
        time.sleep(0.5)
    assert renewed_in_time
    assert json.loads(load)["statuses"] == {"200": 3000}
    assert before[0] == after[0]
    assert "Pebble" in after[0]
    assert before[1] != after[1]
    assert host.service("nginx").systemd_properties["MainPID"] == master


def test_the_renewal_timer_is_enabled(host: Any) -> None:
    assert host.service("certbot.timer").is_running
    assert host.service("certbot.timer").is_enabled
