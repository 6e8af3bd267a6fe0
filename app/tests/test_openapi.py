"""The OpenAPI description, compared with the answers of the service and of the history."""

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from conftest import RedisServer, Service, history_service
from hypothesis import settings
from schemathesis.specs.openapi.checks import positive_data_acceptance

from pixel import keys
from pixel.app import create_api
from pixel.cluster import Redis
from pixel.settings import Settings

HISTORY = r"history"

# The event stream has no end; test_events and test_service test it.
schema = schemathesis.openapi.from_dict(create_api(Settings()).openapi()).exclude(path="/events")

# A body that is too large may be wrong in other ways too.
schema.config.checks.negative_data_rejection.expected_statuses = ["400", "404", "413", "415", "422"]
# The tests send a key themselves.
schema.config.generation.update(with_security_parameters=False)

# Rules that a schema can't express: an area ends within the canvas, a blocked key exists, an undo selects
# something, nobody asks for an address.
RELATED = {
    "/canvas.rgb",
    "/canvas.png",
    "/moderation/areas",
    "/moderation/blocks",
    "/history",
    "/history/authors",
    "/history/undo",
}


@schema.hook
def map_body(context: schemathesis.HookContext, body: Any) -> Any:
    """JSON Schema accepts 1.0 as an integer; the API doesn't, which no schema can express."""
    if isinstance(body, dict):
        return {name: map_body(context, value) for name, value in body.items()}
    if isinstance(body, list):
        return [map_body(context, value) for value in body]
    return int(body) if isinstance(body, float) and body.is_integer() else body


@pytest.fixture(scope="module")
def key(shared_redis: RedisServer) -> dict[str, str]:
    """The header of a key with all scopes."""
    with shared_redis.admin() as admin:
        admin.flushall()
    command = keys.parse(["create", "contract", "--scopes", ",".join(keys.SCOPES)])
    token = asyncio.run(keys.execute(command, Redis(shared_redis.settings())))
    return {"Authorization": f"Bearer {token}"}


@pytest.fixture(scope="module")
def history(shared_redis: RedisServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a history service."""
    with history_service(shared_redis, tmp_path_factory.mktemp("history")) as url:
        yield url


def check(case: schemathesis.Case, url: str, key: dict[str, str]) -> None:
    excluded = [positive_data_acceptance] if case.path in RELATED else []
    case.call_and_validate(base_url=url, headers=key, excluded_checks=excluded)


@schema.exclude(path_regex=HISTORY).parametrize()
@settings(max_examples=50)
def test_the_api_matches_its_description(
    case: schemathesis.Case, key: dict[str, str], service: Service
) -> None:
    check(case, service.url, key)


@schema.include(path_regex=HISTORY).parametrize()
@settings(max_examples=20)
def test_the_history_matches_its_description(
    case: schemathesis.Case, key: dict[str, str], history: str
) -> None:
    check(case, history, key)
