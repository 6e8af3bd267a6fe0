"""Identity, health and metrics of this instance."""

from typing import Literal

import msgspec
from fastapi import APIRouter, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST

from pixel import crashes, metrics, openapi
from pixel.access import Rights
from pixel.maintenance import Maintenance
from pixel.problems import Problem
from pixel.requests import State, json_response, state_of

router = APIRouter(tags=["instance"])

EXAMPLE = {"instance": "c5", "port": 8000, "release": "2026-11-21"}


class Identity(msgspec.Struct, frozen=True):
    """Name, port and release of an instance."""

    instance: str
    port: int
    release: str


class Health(msgspec.Struct, frozen=True):
    """The process is alive."""

    status: Literal["ok"] = "ok"


class Readiness(Identity, frozen=True, omit_defaults=True):
    """Whether an instance can write; ``redis_ms`` is how long a write took, in milliseconds.

    ``crashes`` counts those of the last ten minutes. Maintenance doesn't affect readiness. ``replicas``
    is present if Redis is a cluster: how many replicas have acknowledged the write.
    """

    redis: Literal["ok", "unavailable"]
    crashes: int
    maintenance: Maintenance | None
    redis_ms: float | None = None
    replicas: int | None = None


def _identity(state: State) -> Identity:
    settings = state["settings"]
    return Identity(settings.instance, settings.port, settings.release)


@router.get("/ping", responses=openapi.answer(Identity, EXAMPLE))
async def ping(request: Request) -> Response:
    """The instance that answers."""
    return json_response(_identity(state_of(request)))


@router.get(
    "/access",
    responses=openapi.answer(Rights, {"author": "key:alice", "scopes": ["paint", "batch"]})
    | openapi.problems(401, 503),
)
async def get_access(request: Request) -> Response:
    """Whom the key in the request belongs to, and what it allows; without a key, what everybody may do."""
    return json_response(state_of(request)["access"].rights(dict(request.scope["headers"])))


@router.get("/healthz", responses=openapi.answer(Health, {"status": "ok"}))
async def healthz() -> Response:
    """The process is alive, independent of Redis."""
    return json_response(Health())


@router.get(
    "/readyz",
    responses=openapi.answer(
        Readiness, EXAMPLE | {"redis": "ok", "crashes": 0, "maintenance": None, "redis_ms": 0.6}
    )
    | openapi.problems(503),
)
async def readyz(request: Request) -> Response:
    """200 if Redis has acknowledged a write that changes nothing; 503 otherwise."""
    state = state_of(request)
    store = state["store"]
    maintenance = state["gate"].maintenance
    known = msgspec.structs.asdict(_identity(state)) | {
        "crashes": crashes.lately(),
        "maintenance": maintenance if maintenance.notice else None,
    }
    try:
        seconds = await store.probe()
    except Problem as problem:
        replicas = {} if store.replicas is None else {"replicas": store.replicas}
        problem.members = known | {"redis": "unavailable"} | replicas
        raise
    milliseconds = round(seconds * 1000, 3)
    return json_response(Readiness(**known, redis="ok", redis_ms=milliseconds, replicas=store.replicas))


@router.get(
    "/metrics",
    response_class=Response,
    responses={200: {"description": "OK", "content": {"text/plain": {"schema": {"type": "string"}}}}},
)
def get_metrics() -> Response:  # not async: a thread reads the workers' files
    """Metrics of all workers of this instance, for Prometheus."""
    return Response(metrics.exposition(), media_type=CONTENT_TYPE_LATEST)
