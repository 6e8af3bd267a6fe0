"""The OpenAPI description, generated from the types of the bodies."""

from collections.abc import Callable
from http import HTTPStatus
from typing import Any, Literal

import msgspec
from fastapi import FastAPI

from pixel.canvas import Canvas
from pixel.errors import HANDLERS

_REF = "#/components/schemas/{name}"

_PROBLEM = {
    "type": "object",
    "title": "Problem",
    "description": "Problem details (RFC 9457).",
    "required": ["type", "title", "status", "detail"],
    "properties": {
        "type": {"type": "string", "const": "about:blank"},
        "title": {"type": "string"},
        "status": {"type": "integer"},
        "detail": {"type": "string"},
        "errors": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["field", "reason"],
                "properties": {"field": {"type": "string"}, "reason": {"type": "string"}},
            },
        },
    },
}

_DETAILS = {
    400: "The body is not JSON: Expecting ',' delimiter at line 1 column 8.",
    401: "The key is revoked.",
    403: "This request needs a key with scope batch; nothing was written.",
    404: "There is no such pixel.",
    408: "The body took too long to arrive.",
    409: "There are 500 blocks already: remove some.",
    413: "The body is larger than 1024 bytes.",
    415: "The body must be sent as application/json.",
    422: "value must be an integer from 0 to 255.",
    429: "The budget is 600 channel writes a minute, and 1200 at once; the next can be made in 7 s;"
    " nothing was written.",
    502: "1 of 2 instances have failed or are late.",
    503: "Redis can't be reached; nothing was written.",
    504: "1 of 2 instances have failed or are late.",
}

# The types that the routes use.
_described: list[Any] = []

_EVENT_HEADER = {
    "description": "Stream event that contains these changes.",
    "schema": {"type": "string"},
}

_BUDGET_HEADERS = {
    "RateLimit-Policy": {
        "description": "Only if the client has a budget: the channel writes that it can make at once (q), and"
        " the seconds in which an empty budget is full again (w).",
        "schema": {"type": "string"},
        "example": '"writes";q=1200;w=120',
    },
    "RateLimit": {
        "description": "Only if the client has a budget: the channel writes that are left (r), and the"
        " seconds until it is full again (t).",
        "schema": {"type": "string"},
        "example": '"writes";r=1197;t=1',
    },
}

_RETRY_HEADER = {"description": "Seconds.", "schema": {"type": "integer"}}

# By status, the headers of a problem.
_PROBLEM_HEADERS = {
    401: {"WWW-Authenticate": {"description": "Bearer.", "schema": {"type": "string"}}},
    403: {
        "WWW-Authenticate": {
            "description": "Bearer; names the scope, if the key doesn't have it.",
            "schema": {"type": "string"},
        }
    },
    429: {"Retry-After": _RETRY_HEADER} | _BUDGET_HEADERS,
    503: {"Retry-After": _RETRY_HEADER},
}

_KEY = {
    "type": "http",
    "scheme": "bearer",
    "description": "A key's token. Scope paint allows single pixels, batch arrays of them,"
    " moderate moderation.",
}

MODERATION = "moderation"
"""Tag of the routes that need a key of scope moderate, whatever clients without a key may do."""

_INSTANCE_HEADER = {
    "description": "The instance that answered.",
    "schema": {"type": "string"},
}


def answer(
    kind: Any, example: Any, *, event: bool = False, budget: bool = False
) -> dict[int | str, dict[str, Any]]:
    """The 200 of a route that answers with JSON.

    Args:
        kind: the msgspec type of the answer.
        example: one such answer.
        event: whether the answer has the header ``X-Pixel-Event``.
        budget: whether the request counts against a budget.
    """
    content = {"application/json": {"schema": _schema(kind), "example": example}}
    headers = {"X-Pixel-Event": _EVENT_HEADER} if event else {}
    headers |= _BUDGET_HEADERS if budget else {}
    return {200: {"description": "OK", "content": content, "headers": headers}}


def body(kind: Any, example: Any) -> dict[str, Any]:
    """The body of a route, for its ``openapi_extra``."""
    content = {"application/json": {"schema": _schema(kind), "example": example}}
    return {"requestBody": {"required": True, "content": content}}


def problems(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The problems that a route can answer with."""
    return {status: _problem(HTTPStatus(status)) for status in statuses}


def _problem(status: HTTPStatus) -> dict[str, Any]:
    example: dict[str, Any] = {
        "type": "about:blank",
        "title": status.phrase,
        "status": status.value,
        "detail": _DETAILS[status],
    }
    if status == HTTPStatus.UNPROCESSABLE_ENTITY:
        reason = "must be an integer from 0 to 255"
        example["errors"] = [{"field": "value", "reason": reason}]
    described: dict[str, Any] = {
        "description": status.phrase,
        "content": {
            "application/problem+json": {
                "schema": {"$ref": _REF.format(name="Problem")},
                "example": example,
            }
        },
    }
    if status in _PROBLEM_HEADERS:
        described["headers"] = dict(_PROBLEM_HEADERS[status])
    return described


def _schema(kind: Any) -> Any:
    _described.append(kind)
    return msgspec.json.schema_components([kind], ref_template=_REF)[0][0]


class DescribedAPI(FastAPI):
    """FastAPI with our answers to exceptions; describes the msgspec types, the canvas and the use of keys."""

    def __init__(
        self,
        canvas: Canvas,
        anonymous: Literal["paint", "read", "none"],
        *,
        beside: Callable[[], FastAPI] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(
            docs_url=None,
            redoc_url=None,
            redirect_slashes=False,
            generate_unique_id_function=lambda route: route.name,
            telemetry={"tracing": False, "metrics": False, "logs": False},
            exception_handlers=HANDLERS,
            **options,
        )
        # Another application at the same address, whose routes are described too.
        self._beside = beside
        # The methods that need a key.
        self._closed = {"paint": (), "read": ("post", "put"), "none": ("get", "post", "put")}[anonymous]
        self._most = {
            "x": canvas.width - 1,
            "y": canvas.height - 1,
            "w": canvas.width,
            "h": canvas.height,
        }

    def openapi(self) -> dict[str, Any]:
        """The description; made at its first use."""
        if self.openapi_schema is None:
            others = self._beside().openapi()["paths"] if self._beside else {}
            schema = super().openapi()
            _, components = msgspec.json.schema_components(_described, ref_template=_REF)
            # Replace FastAPI's own schemas, which no answer uses.
            schema["components"] = {
                "schemas": components | {"Problem": _PROBLEM},
                "securitySchemes": {"key": _KEY},
            }
            for path in schema["paths"].values():
                for method, operation in path.items():
                    self._complete(method, operation)
            schema["paths"] |= others
            for name in ("Pixel", "PixelColour"):
                for axis in ("x", "y"):
                    components[name]["properties"][axis]["maximum"] = self._most[axis]
        return self.openapi_schema or {}

    def _complete(self, method: str, operation: dict[str, Any]) -> None:
        for parameter in operation.get("parameters", ()):
            if parameter["name"] in self._most:
                parameter["schema"]["maximum"] = self._most[parameter["name"]]
        responses = operation["responses"]
        if "application/json" in responses.get("422", {}).get("content", {}):
            del responses["422"]  # FastAPI's own, which no route answers with
        if "401" in responses:
            closed = method in self._closed or MODERATION in operation.get("tags", ())
            operation["security"] = [{"key": []}, *([] if closed else [{}])]
        for response in responses.values():
            response.setdefault("headers", {})["X-Pixel-Instance"] = _INSTANCE_HEADER
