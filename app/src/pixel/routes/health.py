"""Who this instance is and how it is."""

from typing import Literal

import msgspec
from fastapi import APIRouter, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST

from pixel import crashes, metrics, openapi
from pixel.problems import Problem
from pixel.requests import State, json_response, state_of

router = APIRouter(tags=["instance"])

EXAMPLE = {"instance": "c5", "port": 8000, "release": "2026-11-21"}


class Identity(msgspec.Struct, frozen=True):
    """What an instance is called, where it listens, what it runs."""

    instance: str
    port: int
    release: str


class Health(msgspec.Struct, frozen=True):
    """A process that can answer at all."""

    status: Literal["ok"] = "ok"


class Readiness(Identity, frozen=True):
    """An instance that can write, and how long Redis took just now, in milliseconds.

    ``crashes`` are those of the last ten minutes.
    """

    redis: Literal["ok", "unavailable"]
    crashes: int
    redis_ms: float | None = None


def _identity(state: State) -> Identity:
    settings = state["settings"]
    return Identity(settings.instance, settings.port, settings.release)


@router.get("/ping", responses=openapi.answer(Identity, EXAMPLE))
async def ping(request: Request) -> Response:
    """Which instance answers."""
    return json_response(_identity(state_of(request)))


@router.get("/healthz", responses=openapi.answer(Health, {"status": "ok"}))
async def healthz() -> Response:
    """The process is alive; says nothing about Redis."""
    return json_response(Health())


@router.get(
    "/readyz",
    responses=openapi.answer(Readiness, EXAMPLE | {"redis": "ok", "crashes": 0, "redis_ms": 0.6})
    | openapi.problems(503),
)
async def readyz(request: Request) -> Response:
    """Redis has just acknowledged a write, one that changes nothing; 503 if it has not."""
    state = state_of(request)
    known = msgspec.structs.asdict(_identity(state)) | {"crashes": crashes.lately()}
    try:
        seconds = await state["store"].probe()
    except Problem as problem:
        problem.members = known | {"redis": "unavailable"}
        raise
    return json_response(Readiness(**known, redis="ok", redis_ms=round(seconds * 1000, 3)))


@router.get(
    "/metrics",
    response_class=Response,
    responses={
        200: {"description": "OK", "content": {"text/plain": {"schema": {"type": "string"}}}}
    },
)
def get_metrics() -> Response:  # not async: reading the workers' files is left to a thread
    """Metrics of all workers of this instance, for Prometheus."""
    return Response(metrics.exposition(), media_type=CONTENT_TYPE_LATEST)
