"""Answers to exceptions, as problem details; the handlers of FastAPI's applications.

``app.state.routers`` are an application's routers.
"""

from collections.abc import Callable, Coroutine
from http import HTTPStatus
from itertools import chain
from typing import Any

from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.routing import Mount, Route

from pixel import metrics
from pixel.problems import Problem, Refusal

INTERNAL_ERROR = Problem(HTTPStatus.INTERNAL_SERVER_ERROR, "This is a fault of the server; it is logged.")


async def fault_answer(request: Request, error: Exception) -> Response:
    """The answer to an unexpected exception."""
    return INTERNAL_ERROR.response()


async def problem_answer(request: Request, error: Exception) -> Response:
    """The answer to a problem that a route has raised."""
    assert isinstance(error, Problem)
    if isinstance(error, Refusal):
        metrics.REFUSALS.labels(error.reason).inc()
    return error.response(request.scope["headers"])


async def http_answer(request: Request, error: Exception) -> Response:
    """The router's 404 and 405, and the answer to OPTIONS, which no route has."""
    assert isinstance(error, HTTPException)
    if error.status_code == HTTPStatus.NOT_FOUND:
        return Problem(HTTPStatus.NOT_FOUND, "There is nothing at this path.").response()
    if error.status_code != HTTPStatus.METHOD_NOT_ALLOWED:
        return Problem(HTTPStatus(error.status_code), error.detail).response()
    allow = {"Allow": ", ".join(sorted(allowed(request)))}
    if request.method == "OPTIONS":
        return Response(status_code=HTTPStatus.NO_CONTENT, headers=allow)
    detail = f"{request.method} is not allowed at this path."
    return Problem(HTTPStatus.METHOD_NOT_ALLOWED, detail, headers=allow).response()


def allowed(request: Request) -> set[str]:
    """The methods that the routes at the path of a request answer."""
    methods = {"OPTIONS"}
    for route in chain(request.app.routes, *(router.routes for router in request.app.state.routers)):
        if isinstance(route, Route | APIRoute) and route.path_regex.match(request.url.path):
            methods |= route.methods or set()
        elif isinstance(route, Mount) and route.path_regex.match(request.url.path):
            methods.add("GET")
    return methods | {"HEAD"} if "GET" in methods else methods


async def validation_answer(request: Request, error: Exception) -> Response:
    """422 for an invalid query parameter; an invalid path parameter is a 404."""
    assert isinstance(error, RequestValidationError)
    faults = error.errors()
    if any(fault["loc"][0] == "path" for fault in faults):
        return Problem(HTTPStatus.NOT_FOUND, "There is no such pixel.").response()
    errors = [{"field": str(fault["loc"][-1]), "reason": str(fault["msg"])} for fault in faults]
    detail = "; ".join(f"{fault['field']}: {fault['reason']}" for fault in errors)
    return Problem(HTTPStatus.UNPROCESSABLE_ENTITY, detail, errors=errors).response()


HANDLERS: dict[int | type[Exception], Callable[[Request, Any], Coroutine[Any, Any, Response]]] = {
    Exception: fault_answer,
    Problem: problem_answer,
    HTTPException: http_answer,
    RequestValidationError: validation_answer,
}
