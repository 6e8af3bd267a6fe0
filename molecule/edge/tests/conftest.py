"""Requests to a host from the client outside the fleet, which trusts pebble's root certificate."""

from __future__ import annotations

import json
from typing import Any

import pytest


@pytest.fixture
def name(host: Any) -> str:
    return f"{host.backend.hostname}.example"


@pytest.fixture(scope="session")
def ports_seen(fleet: dict[str, Any], hosts: dict[str, Any]) -> Any:
    """Return which of these ports of a server a client can connect to."""

    def ask(client: str, server: str, ports: list[int]) -> list[int]:
        words = " ".join(map(str, [fleet["hosts"][server]["address"], *ports]))
        found: list[int] = json.loads(hosts[client].check_output(f"visitor ports {words}"))
        return found

    return ask


@pytest.fixture
def stranger(shell: Any) -> Any:
    """Run a script on the client outside the fleet."""
    return lambda script: shell(script, on="stranger")


@pytest.fixture
def curl(stranger: Any) -> Any:
    """Run curl on that client; return what `--write-out` prints."""

    def run(url: str, write_out: str, options: str = "") -> str:
        stranger("[ -e /tmp/root.pem ] || curl -sk https://localhost:15000/roots/0 -o /tmp/root.pem")
        command = f"curl -s --cacert /tmp/root.pem -o /dev/null -w '{write_out}' {options} '{url}' 2>&1"
        output: str = stranger(command)
        return output

    return run


@pytest.fixture
def certificate(stranger: Any, address: str, name: str) -> Any:
    """Return issuer and serial number of the certificate that the host presents."""
    command = f"openssl s_client -connect {address}:443 -servername {name} </dev/null 2>/dev/null"
    return lambda: stranger(f"{command} | openssl x509 -noout -issuer -serial").split("\n")[:2]


@pytest.fixture
def handshake(stranger: Any, address: str) -> Any:
    return lambda options: stranger(f"echo | openssl s_client -connect {address}:443 {options} 2>&1")
