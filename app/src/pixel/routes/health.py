"""Who this instance is and how it is."""

from typing import Any

from fastapi import APIRouter, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST

from pixel import metrics
from pixel.problems import Problem
from pixel.requests import State, state_of

router = APIRouter(tags=["instance"])


def identity(state: State) -> dict[str, Any]:
    """What an instance is called, where it listens, what it runs."""
    settings = state["settings"]
    return {
        "instance": settings.instance,
        "port": settings.port,
        "release": settings.release,
    }


@router.get("/ping")
async def ping(request: Request) -> dict[str, Any]:
    """Which instance answers."""
    return identity(state_of(request))


@router.get("/healthz")
async def healthz() -> dict[str, str]:
    """The process is alive; says nothing about Redis."""
    return {"status": "ok"}


@router.get("/readyz")
async def readyz(request: Request) -> dict[str, Any]:
    """Redis has just acknowledged a write, one that changes nothing; 503 if it did not."""
    state = state_of(request)
    try:
        seconds = await state["store"].probe()
    except Problem as problem:
        problem.members = identity(state) | {"redis": "unavailable"}
        raise
    return identity(state) | {"redis": "ok", "redis_ms": round(seconds * 1000, 3)}


@router.get("/metrics", response_class=Response)
def get_metrics() -> Response:  # not async: reading the workers' files is left to a thread
    """Metrics of all workers of this instance, for Prometheus."""
    return Response(metrics.exposition(), media_type=CONTENT_TYPE_LATEST)
