"""The lookup `certificate`: certificates of hosts, and their authority."""

from __future__ import annotations

import ipaddress
import socket
import ssl
import stat
import threading
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from ansible.errors import AnsibleLookupError  # type: ignore[import-untyped]
from ansible_collections.pixel.endpoint.plugins.lookup.certificate import LookupModule
from cryptography import x509

Get = Callable[..., dict[str, str]]


@pytest.fixture
def get(tmp_path: Path) -> Get:
    """Return the certificate of a host, as a task gets it."""

    def run(name: str = "a", *addresses: str, check: bool = False) -> dict[str, str]:
        variables = {"ansible_check_mode": check}
        terms, names = [str(tmp_path / "tls")], list(addresses) or ["127.0.0.1"]
        [found] = LookupModule().run(terms, variables, name=name, addresses=names)
        return found

    return run


def handshake(server: dict[str, str], client: dict[str, str], folder: Path) -> str:
    """The names in the server's certificate, after a handshake in which both sides check the other's."""
    contexts = []
    for purpose, own in ((ssl.Purpose.CLIENT_AUTH, server), (ssl.Purpose.SERVER_AUTH, client)):
        context = ssl.create_default_context(purpose, cadata=own["ca"])
        # As strict as the newest Python is by default.
        context.verify_flags |= ssl.VERIFY_X509_STRICT
        context.verify_mode = ssl.CERT_REQUIRED
        for part in ("certificate", "key"):
            (folder / part).write_text(own[part])
        context.load_cert_chain(folder / "certificate", folder / "key")
        contexts.append(context)
    here, there = socket.socketpair()

    def serve() -> None:
        with contexts[0].wrap_socket(here, server_side=True) as connection:
            connection.recv(1)

    thread = threading.Thread(target=serve)
    thread.start()
    with contexts[1].wrap_socket(there, server_hostname="127.0.0.1") as connection:
        found = connection.getpeercert()
        connection.sendall(b"x")
    thread.join()
    assert found is not None
    return str(found["subjectAltName"])


def test_hosts_trust_one_another(get: Get, tmp_path: Path) -> None:
    assert handshake(get("a"), get("b"), tmp_path) == "(('IP Address', '127.0.0.1'),)"


def test_a_certificate_is_kept_and_its_key_is_private(get: Get, tmp_path: Path) -> None:
    assert get("a") == get("a")
    assert get("a") != get("b")
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "tls").iterdir()}
    private, public = ("ca.key", "a.key", "b.key"), ("ca.pem", "a.pem", "b.pem")
    assert modes == dict.fromkeys(private, 0o600) | dict.fromkeys(public, 0o644)
    assert stat.S_IMODE((tmp_path / "tls").stat().st_mode) == 0o700


def test_a_dry_run_writes_nothing(get: Get, tmp_path: Path) -> None:
    assert get("a", check=True)["key"].startswith("-----BEGIN PRIVATE KEY-----")
    assert not (tmp_path / "tls").exists()


def test_a_certificate_for_other_addresses_is_replaced(get: Get, tmp_path: Path) -> None:
    former = get("a", "10.0.0.1")
    assert get("a", "10.0.0.1", "127.0.0.1") != former
    certificate = x509.load_pem_x509_certificate((tmp_path / "tls/a.pem").read_bytes())
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.IPAddress) == [
        ipaddress.ip_address("10.0.0.1"),
        ipaddress.ip_address("127.0.0.1"),
    ]
    # One for more addresses than asked for stays.
    assert get("a", "10.0.0.1") == get("a", "127.0.0.1")


def test_a_certificate_that_expires_soon_is_replaced(get: Get, monkeypatch: pytest.MonkeyPatch) -> None:
    former = get("a")
    later = datetime.now(UTC) + timedelta(days=3650 - 364)

    class Later(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> datetime:  # type: ignore[override]
            return later

    monkeypatch.setattr("ansible_collections.pixel.endpoint.plugins.lookup.certificate.datetime", Later)
    assert get("a")["ca"] == former["ca"]
    assert get("a")["certificate"] != former["certificate"]


def test_certificates_of_an_own_authority_are_used_and_checked(get: Get, tmp_path: Path) -> None:
    own = get("a", "10.0.0.1")
    (tmp_path / "tls/ca.key").unlink()
    assert get("a", "10.0.0.1") == own
    for arguments, message in (
        (("b", "10.0.0.2"), "b.pem is missing. Put a certificate of your authority for 10.0.0.2 there"),
        (("a", "10.0.0.9"), "a.pem is not for 10.0.0.9. Put"),
    ):
        with pytest.raises(AnsibleLookupError, match=message):
            get(*arguments)
    (tmp_path / "tls/ca.pem").write_text("no certificate")
    with pytest.raises(AnsibleLookupError, match="The certificate of a can't be read or issued"):
        get("a", "10.0.0.1")
