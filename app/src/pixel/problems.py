"""Errors as RFC 9457 problem details."""

from http import HTTPStatus
from typing import Any

import msgspec
from starlette.responses import Response


class Problem(Exception):  # noqa: N818 - the RFC's word for it
    """An answer other than the one that was asked for.

    ``errors`` names the faulty fields of a request, each with its reason; ``headers`` go onto
    the answer (``Allow``, ``Retry-After``); ``members`` are further members of its body.
    """

    def __init__(
        self,
        status: HTTPStatus,
        detail: str,
        *,
        errors: list[dict[str, str]] | None = None,
        headers: dict[str, str] | None = None,
        members: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(detail)
        self.status = status
        self.detail = detail
        self.errors = errors
        self.headers = headers
        self.members = members or {}

    @classmethod
    def invalid(cls, field: str, reason: str) -> "Problem":
        """422: a field of the request isn't what it has to be."""
        errors = [{"field": field, "reason": reason}]
        return cls(HTTPStatus.UNPROCESSABLE_ENTITY, f"{field} {reason}.", errors=errors)

    @classmethod
    def unavailable(cls, detail: str) -> "Problem":
        """503: nothing is wrong with the request, and it may be sent again soon."""
        return cls(HTTPStatus.SERVICE_UNAVAILABLE, detail, headers={"Retry-After": "1"})

    def response(self) -> Response:
        """The answer."""
        body: dict[str, Any] = {
            "type": "about:blank",
            "title": self.status.phrase,
            "status": self.status.value,
            "detail": self.detail,
        }
        if self.errors:
            body["errors"] = self.errors
        return Response(
            msgspec.json.encode(body | self.members),
            self.status,
            self.headers,
            "application/problem+json",
        )
