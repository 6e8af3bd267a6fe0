"""The other values of nginx_lb_tls, in order, on one host. The last test restores the scenario's setting."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

testinfra_hosts = ["debian12"]


@pytest.fixture
def balancer(play: Any) -> Any:
    """Run playbooks/nginx_lb.yml for this host, with the scenario's variables."""
    edge = ("--limit", "debian12", "--extra-vars", "@molecule/edge/vars/main.yml")
    return lambda **variables: play("playbooks/nginx_lb.yml", *edge, **variables)


@pytest.fixture
def pair(stranger: Any, tmp_path: Path) -> Any:
    """Create a certificate for these names and its key on the control node."""

    def make(label: str, *names: str) -> dict[str, str]:
        alternatives = ",".join(f"DNS:{name}" for name in names)
        text = stranger(
            f"openssl req -x509 -nodes -newkey rsa:2048 -subj /CN={label} -days 9"
            f" -addext subjectAltName={alternatives} -keyout /tmp/k -out /tmp/c; cat /tmp/k /tmp/c"
        )
        end = text.index("-----BEGIN CERTIFICATE")
        (tmp_path / f"{label}.key").write_text(text[:end])
        (tmp_path / f"{label}.crt").write_text(text[end:])
        return {
            "nginx_lb_tls_certificate": str(tmp_path / f"{label}.crt"),
            "nginx_lb_tls_key": str(tmp_path / f"{label}.key"),
        }

    return make


def test_an_unsuitable_certificate_is_refused_and_the_former_one_is_kept(
    balancer: Any, pair: Any, certificate: Any
) -> None:
    before = certificate()
    one, other = pair("one", "debian12.example", "canvas.example"), pair("other", "debian12.example")
    refused = balancer(nginx_lb_tls="provided", **other)
    assert refused.returncode != 0
    assert "It is not valid for canvas.example." in refused.words
    refused = balancer(nginx_lb_tls="provided", **one | {"nginx_lb_tls_key": other["nginx_lb_tls_key"]})
    assert refused.returncode != 0
    assert "key values mismatch" in refused.stdout
    assert certificate() == before


def test_a_provided_certificate_is_used(balancer: Any, pair: Any, certificate: Any) -> None:
    chosen = {"nginx_lb_tls": "provided"} | pair("own", "debian12.example", "canvas.example")
    assert balancer(**chosen).returncode == 0
    assert "CN = own" in certificate()[0]


def test_a_self_signed_certificate_is_created_once(balancer: Any, certificate: Any) -> None:
    assert balancer(nginx_lb_tls="selfsigned").returncode == 0
    shown = certificate()
    assert "CN = pixel-lb" in shown[0]
    assert "changed=0" in balancer(nginx_lb_tls="selfsigned").stdout
    assert certificate() == shown


def test_without_tls_port_443_is_closed(balancer: Any, stranger: Any, handshake: Any) -> None:
    assert balancer(nginx_lb_tls=False, nginx_lb_hsts=0).returncode == 0
    assert "Connection refused" in handshake("")
    assert stranger("curl -s -o /dev/null -w '%{http_code}' http://debian12.example/ping") == "200"


def test_an_issued_certificate_is_reused(balancer: Any, host: Any, certificate: Any) -> None:
    issued = host.check_output("ls /etc/letsencrypt/archive/pixel")
    assert balancer().returncode == 0
    assert "Pebble" in certificate()[0]
    assert host.check_output("ls /etc/letsencrypt/archive/pixel") == issued
