"""Certificates and what is spoken over them. The authority is pebble, on the stranger; see prepare.yml."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest

testinfra_hosts = ["debian12", "debian13"]


def test_the_authoritys_certificate_is_in_force(curl: Any, name: str, address: str) -> None:
    assert curl(f"https://{name}/ping", "%{http_code}") == "200"
    # Both have this name, and the authority could ask debian12 only, which asked debian13.
    resolve = f"--resolve canvas.example:443:{address}"
    assert curl("https://canvas.example/ping", "%{http_code}", resolve) == "200"


def test_http_2_and_1_are_spoken(curl: Any, name: str) -> None:
    assert curl(f"https://{name}/ping", "%{http_version}") == "2"
    assert curl(f"https://{name}/ping", "%{http_version}", "--http1.1") == "1.1"


def test_plain_http_leads_to_tls(curl: Any, name: str, host: Any) -> None:
    asked = "%{http_code} %{redirect_url}"
    assert curl(f"http://{name}/pixel/1/2?x=%20", asked) == f"308 https://{name}/pixel/1/2?x=%20"
    # Not wherever the client likes.
    assert curl(f"http://{name}/", asked, "-H 'Host: evil.example'") == f"308 https://{name}/"
    assert curl(f"http://{name}/.well-known/acme-challenge/none", "%{http_code}") == "404"
    # This host itself is served in clear.
    assert json.loads(host.check_output("client one /ping"))[0] == 200


@pytest.mark.parametrize(("scheme", "status"), [("https", "200"), ("http", "308")])
def test_what_a_trusted_proxy_has_received_by_https_is_served(
    curl: Any, name: str, fleet: dict[str, Any], scheme: str, status: str
) -> None:
    """The proxy itself asks by plain HTTP, and a redirect would come back to it for ever."""
    proxy = fleet["hosts"]["stranger"]["address"].rsplit(".", 1)[0] + ".202"
    said = f"-H 'X-Forwarded-Proto: {scheme}'"
    assert curl(f"http://{name}/ping", "%{http_code}", f"--interface {proxy} {said}") == status
    assert curl(f"http://{name}/ping", "%{http_code}", said) == "308"


def test_plain_http_on_the_port_of_tls_is_told(curl: Any, name: str) -> None:
    said = curl(f"http://{name}:443/", "%{http_code} %{content_type}")
    assert said == "400 application/problem+json"


def test_browsers_are_told_to_stay(stranger: Any, name: str) -> None:
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
def test_protocols_and_ciphers_are_the_intermediate_profiles(
    handshake: Any, options: str, works: bool
) -> None:
    said = handshake(options)
    assert ("Cipher is (NONE)" not in said and "Cipher is " in said) is works
    # It is the server that refuses.
    assert ("alert" in said) is not works


@pytest.mark.parametrize("version", ["-tls1_2", "-tls1_3"])
def test_sessions_are_resumed(stranger: Any, handshake: Any, address: str, version: str) -> None:
    stranger(f"(sleep 1) | openssl s_client -connect {address}:443 {version} -sess_out /tmp/session")
    assert "Reused, TLSv1" in handshake(f"{version} -sess_in /tmp/session")


def test_keys_are_roots_alone(host: Any, shell: Any) -> None:
    for folder in ("/etc/nginx/tls", "/etc/nginx/staged/tls"):
        assert host.file(folder).mode == 0o700
        assert host.file(f"{folder}/privkey.pem").mode == 0o600
    key = shell("sed -n 2p /etc/nginx/tls/privkey.pem").strip()
    assert len(key) == 64
    assert key not in shell("journalctl --no-pager; cat /var/log/letsencrypt/* /var/log/nginx/*")


def test_a_renewal_fails_no_request(
    host: Any, shell: Any, stranger: Any, certificate: Any, fleet: dict[str, Any], address: str
) -> None:
    """As certbot's timer does it: 200 writes a second meanwhile, over connections that are kept."""
    master = host.service("nginx").systemd_properties["MainPID"]
    before = certificate()
    exempt = fleet["hosts"]["stranger"]["address"].rsplit(".", 1)[0] + ".201"
    # Every certificate is due.
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


def test_renewals_have_a_timer(host: Any) -> None:
    assert host.service("certbot.timer").is_running
    assert host.service("certbot.timer").is_enabled
