"""Errors as RFC 9457 problem details."""

from collections.abc import Iterable
from http import HTTPStatus
from typing import Any, Literal, Protocol, TypeVar

import msgspec
from starlette.responses import Response

Result = TypeVar("Result", contravariant=True)

Headers = Iterable[tuple[bytes, bytes]]

STAMP = b"x-request-start"
"""The header with the time at which a balancer sent a request that it can retry on another host."""

_OUTCOMES = {"no": "nothing was written", "maybe": "the write may have been made"}


class Problem(Exception):
    """An error answer.

    ``errors`` lists the faulty fields of a request, each with its reason; ``headers`` are headers of
    the answer (``Allow``, ``Retry-After``); ``members`` are further members of its body;
    ``written`` is the outcome of a write: ``no`` (it was not made, and will not be) or ``maybe``
    (it may have been made, but will not be made any more).
    """

    def __init__(
        self,
        status: HTTPStatus,
        detail: str,
        *,
        errors: list[dict[str, str]] | None = None,
        headers: dict[str, str] | None = None,
        members: dict[str, Any] | None = None,
        written: Literal["no", "maybe"] | None = None,
    ) -> None:
        super().__init__(detail)
        self.status = status
        self.detail = detail
        self.errors = errors
        self.headers = headers
        self.members = members or {}
        self.written = written
        self.elsewhere = False

    def __str__(self) -> str:
        if self.written is None:
            return self.detail
        return f"{self.detail.removesuffix('.')}; {_OUTCOMES[self.written]}."

    @classmethod
    def invalid(cls, field: str, reason: str) -> "Problem":
        """422: a field of the request is invalid."""
        errors = [{"field": field, "reason": reason}]
        return cls(HTTPStatus.UNPROCESSABLE_ENTITY, f"{field} {reason}.", errors=errors)

    @classmethod
    def unavailable(
        cls, detail: str, written: Literal["no", "maybe"] | None = None, *, elsewhere: bool = False
    ) -> "Problem":
        """503: the request is valid and can be sent again soon.

        Args:
            detail: the reason.
            written: the outcome of a write.
            elsewhere: whether the request may succeed on another host.
        """
        problem = cls(HTTPStatus.SERVICE_UNAVAILABLE, detail, headers={"Retry-After": "1"}, written=written)
        problem.elsewhere = elsewhere
        return problem

    @classmethod
    def not_written(cls, reason: str) -> "Problem":
        """503: the write was not made, and will not be. ``reason`` ends without a full stop."""
        return cls.unavailable(reason, "no", elsewhere=True)

    @classmethod
    def in_doubt(cls, reason: str) -> "Problem":
        """503: the write may have been made, but will not be made any more."""
        return cls.unavailable(reason, "maybe", elsewhere=True)

    def response(self, request_headers: Headers = ()) -> Response:
        """The answer to a request with these headers.

        For a 503 that may succeed on another host, X-Accel-Redirect names the balancer's location
        that retries the request; the balancer doesn't send the header to the client.
        """
        headers = {"Cache-Control": "no-store"} | (self.headers or {})
        stamp = dict(request_headers).get(STAMP) if self.elsewhere or self.written else None
        if stamp is not None and self.written == "no" and stamp.count(b" ") > 1:
            self.written = "maybe"  # the balancer's mark means that an earlier attempt is in doubt
        if stamp is not None and self.elsewhere:
            headers |= {"X-Accel-Redirect": "@again", "X-Pixel-Written": self.written or "no"}
        body: dict[str, Any] = {
            "type": "about:blank",
            "title": self.status.phrase,
            "status": self.status.value,
            "detail": str(self),
        }
        if self.written is not None:
            body["written"] = self.written
        if self.errors:
            body["errors"] = self.errors
        return Response(
            msgspec.json.encode(body | self.members),
            self.status,
            headers,
            "application/problem+json",
        )


class Answer(Protocol[Result]):
    """Receives the outcome of an operation: its result, or a ``Problem``. A future is one."""

    def done(self) -> bool:
        """Whether it needs no outcome any more."""

    def set_result(self, result: Result, /) -> None:
        """Receive the result."""

    def set_exception(self, problem: Problem, /) -> None:
        """Receive the error."""


class Refusal(Problem):
    """401 or 403: the request is not allowed. ``reason`` is the label of the metric that counts it."""

    def __init__(
        self,
        status: HTTPStatus,
        detail: str,
        reason: str,
        *,
        challenge: str | None = None,
        members: dict[str, Any] | None = None,
    ) -> None:
        headers = None if challenge is None else {"WWW-Authenticate": f'Bearer realm="pixel"{challenge}'}
        super().__init__(status, detail, headers=headers, members=members)
        self.reason = reason
