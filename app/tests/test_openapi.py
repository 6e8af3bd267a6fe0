"""The OpenAPI description, compared with the service's answers."""

from typing import Any

import schemathesis
from conftest import Service
from hypothesis import settings
from schemathesis.specs.openapi.checks import positive_data_acceptance

from pixel.app import create_api
from pixel.settings import Settings

# The event stream has no end; test_events and test_service test it.
schema = schemathesis.openapi.from_dict(create_api(Settings()).openapi()).exclude(path="/events")

# A body that is too large may be wrong in other ways too.
schema.config.checks.negative_data_rejection.expected_statuses = ["400", "404", "413", "415", "422"]

# A region must end within the canvas: a rule about two parameters, which a schema can't express.
RELATED_PARAMETERS = {"/canvas.rgb", "/canvas.png"}


@schema.hook
def map_body(context: schemathesis.HookContext, body: Any) -> Any:
    """JSON Schema accepts 1.0 as an integer; the API doesn't, which no schema can express."""
    if isinstance(body, dict):
        return {name: map_body(context, value) for name, value in body.items()}
    if isinstance(body, list):
        return [map_body(context, value) for value in body]
    return int(body) if isinstance(body, float) and body.is_integer() else body


@schema.parametrize()
@settings(max_examples=50)
def test_the_api_matches_its_description(case: schemathesis.Case, service: Service) -> None:
    excluded = [positive_data_acceptance] if case.path in RELATED_PARAMETERS else []
    case.call_and_validate(base_url=service.url, excluded_checks=excluded)
