"""A client on the balancer's own host."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest

# The variables of converge.yml.
DEFAULT = {"nginx_lb_health_checks": False}


@pytest.fixture(scope="session")
def configure(play: Any) -> Iterator[Callable[..., None]]:
    """Run the role with these variables, unless they are applied already. The teardown restores DEFAULT."""
    in_force: dict[str, Any] = DEFAULT

    def run(**variables: Any) -> None:
        nonlocal in_force
        if variables != in_force:
            play("playbooks/nginx_lb.yml", **variables).changes()
            in_force = variables

    yield run
    run(**DEFAULT)


@pytest.fixture(scope="module", autouse=True)
def configured(request: pytest.FixtureRequest, configure: Callable[..., None]) -> None:
    """Apply the variables in VARIABLES of the test module."""
    configure(**getattr(request.module, "VARIABLES", DEFAULT))


@pytest.fixture
def curl(host: Any) -> Any:
    """Send a request to the balancer on its own host; returns status, headers (lower case) and body."""

    def run(path: str, *options: str) -> tuple[int, dict[str, str], str]:
        words = " ".join(f"'{word}'" for word in options)
        done = host.run(f"client one '{path}' {words}")
        assert done.rc == 0, done.stderr
        status, headers, body = json.loads(done.stdout)
        return status, headers, body

    return run
