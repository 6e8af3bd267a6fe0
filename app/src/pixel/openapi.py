"""The OpenAPI description, generated from the types of the bodies."""

from http import HTTPStatus
from typing import Any

import msgspec
from fastapi import FastAPI

from pixel.canvas import Canvas

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
    404: "There is no such pixel.",
    408: "The body took too long to arrive.",
    413: "The body is larger than 1024 bytes.",
    415: "The body must be sent as application/json.",
    422: "value must be an integer from 0 to 255.",
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

_INSTANCE_HEADER = {
    "description": "The instance that answered.",
    "schema": {"type": "string"},
}


def answer(kind: Any, example: Any, *, event: bool = False) -> dict[int | str, dict[str, Any]]:
    """The 200 of a route that answers with JSON.

    Args:
        kind: the msgspec type of the answer.
        example: one such answer.
        event: whether the answer has the header ``X-Pixel-Event``.
    """
    content = {"application/json": {"schema": _schema(kind), "example": example}}
    headers = {"X-Pixel-Event": _EVENT_HEADER} if event else {}
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
    if status == HTTPStatus.SERVICE_UNAVAILABLE:
        retry = {"description": "Seconds.", "schema": {"type": "integer"}}
        described["headers"] = {"Retry-After": retry}
    return described


def _schema(kind: Any) -> Any:
    _described.append(kind)
    return msgspec.json.schema_components([kind], ref_template=_REF)[0][0]


class DescribedAPI(FastAPI):
    """FastAPI whose description contains the msgspec types and the size of the canvas."""

    def __init__(self, canvas: Canvas, **options: Any) -> None:
        super().__init__(**options)
        self._most = {
            "x": canvas.width - 1,
            "y": canvas.height - 1,
            "w": canvas.width,
            "h": canvas.height,
        }

    def openapi(self) -> dict[str, Any]:
        """The description; made at its first use."""
        if self.openapi_schema is None:
            schema = super().openapi()
            _, components = msgspec.json.schema_components(_described, ref_template=_REF)
            # Replace FastAPI's own schemas, which no answer uses.
            schema["components"] = {"schemas": components | {"Problem": _PROBLEM}}
            for path in schema["paths"].values():
                for operation in path.values():
                    self._complete(operation)
            for name in ("Pixel", "PixelColour"):
                for axis in ("x", "y"):
                    components[name]["properties"][axis]["maximum"] = self._most[axis]
        return self.openapi_schema or {}

    def _complete(self, operation: dict[str, Any]) -> None:
        for parameter in operation.get("parameters", ()):
            if parameter["name"] in self._most:
                parameter["schema"]["maximum"] = self._most[parameter["name"]]
        responses = operation["responses"]
        if "application/json" in responses.get("422", {}).get("content", {}):
            del responses["422"]  # FastAPI's own, which no route answers with
        for response in responses.values():
            response.setdefault("headers", {})["X-Pixel-Instance"] = _INSTANCE_HEADER
