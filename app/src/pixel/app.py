"""The application: FastAPI behind ``MetricsMiddleware``.

Nearly all ``POST /pixel``, the hot path, are answered in ``protocol`` and don't get here.
"""

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from http import HTTPStatus
from itertools import chain
from time import perf_counter

from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.routing import Mount, Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pixel import logs, metrics
from pixel.access import Access
from pixel.canvas import Canvas
from pixel.events import Hub
from pixel.maintenance import Gate
from pixel.openapi import DescribedAPI
from pixel.pictures import PictureCache
from pixel.pixel import Reader
from pixel.problems import Problem
from pixel.requests import State, Turns
from pixel.routes import canvas, docs, events, fleet, health, live, pixels
from pixel.settings import Settings, load
from pixel.store import Store

ROUTERS: tuple[APIRouter, ...] = (
    pixels.router,
    canvas.router,
    events.router,
    fleet.router,
    health.router,
    docs.router,
    live.router,
)

DISCONNECTED = 499
"""In metrics, the status of a request whose client disconnected before the answer."""

INTERNAL_ERROR = Problem(HTTPStatus.INTERNAL_SERVER_ERROR, "This is a fault of the server; it is logged.")

log = logging.getLogger(__name__)


class MetricsMiddleware:
    """Counts and logs FastAPI's answers, answers HEAD, and limits caching.

    HEAD is answered as GET without the body. An answer to GET without a ``Cache-Control`` must not be
    stored by a cache; one with an ETag must be validated each time.
    """

    def __init__(self, api: ASGIApp) -> None:
        self._api = api

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._api(scope, receive, send)
            return
        started = perf_counter()
        status = DISCONNECTED
        level = logging.DEBUG
        method = scope["method"]
        if method == "HEAD":
            scope = {**scope, "method": "GET"}

        async def watch(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                if method in ("GET", "HEAD"):
                    _limit_caching(message["headers"])
                await send(message)
                if method == "HEAD":
                    await send({"type": "http.response.body"})
            elif method != "HEAD":
                await send(message)

        try:
            await self._api(scope, receive, watch)
            # /readyz is asked every other second; the store logs an outage of Redis once, and the gate
            # the beginning of maintenance.
            refused = status == HTTPStatus.SERVICE_UNAVAILABLE and scope["state"]["gate"].maintenance.refuses(
                method
            )
            if status >= HTTPStatus.INTERNAL_SERVER_ERROR and scope["path"] != "/readyz" and not refused:
                level = logging.WARNING
        except ClientDisconnect:
            pass
        except Exception:
            # FastAPI has answered it with a 500 by then.
            log_fault(scope)
        route = getattr(scope.get("route"), "path", "")
        seconds = perf_counter() - started
        metrics.observe(method, route, status, seconds)
        logs.answered(level, method, scope["path"], status, seconds, scope["headers"])


def log_fault(scope: Scope) -> None:
    """Log the exception that is being handled."""
    what = (scope["method"], scope["path"])
    log.exception("%s %s failed", *what, extra={"request_id": logs.request_id(scope["headers"])})


def _limit_caching(headers: list[tuple[bytes, bytes]]) -> None:
    names = {name.lower() for name, _ in headers}
    if b"cache-control" not in names:
        headers.append((b"cache-control", b"no-cache" if b"etag" in names else b"no-store"))


async def fault_answer(request: Request, error: Exception) -> Response:
    """The answer to an unexpected exception."""
    return INTERNAL_ERROR.response()


async def problem_answer(request: Request, error: Exception) -> Response:
    """The answer to a problem that a route has raised."""
    assert isinstance(error, Problem)
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
    for route in chain(request.app.routes, *(router.routes for router in ROUTERS)):
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


def create_api(settings: Settings) -> FastAPI:
    """FastAPI's part of the application. It connects to Redis at startup."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[State]:
        metrics.WORKERS.set(1)
        store = Store(settings)
        access = Access(store, settings)
        await access.start()
        with PictureCache(store) as pictures:
            hub = Hub(store, settings)
            gate = Gate(store, hub)
            await gate.read()
            following = asyncio.create_task(gate.follow(), name="maintenance")
            yield {
                "settings": settings,
                "store": store,
                "access": access,
                "reader": Reader(store.canvas),
                "pictures": pictures,
                "hub": hub,
                "large_batches": Turns(pixels.LARGE_WAITING),
                "gate": gate,
            }
            following.cancel()
        access.close()
        store.close()

    api = DescribedAPI(
        Canvas(settings.canvas_width, settings.canvas_height),
        settings.anonymous,
        title="Pixel Endpoint",
        summary="A durable shared canvas over HTTP.",
        version=settings.release,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        generate_unique_id_function=lambda route: route.name,
        lifespan=lifespan,
        telemetry={"tracing": False, "metrics": False, "logs": False},
        exception_handlers={
            Exception: fault_answer,
            Problem: problem_answer,
            HTTPException: http_answer,
            RequestValidationError: validation_answer,
        },
    )
    for router in ROUTERS:
        api.include_router(router)
    return api


def create_app(settings: Settings) -> ASGIApp:
    """The whole application."""
    return MetricsMiddleware(create_api(settings))


app = create_app(load())
