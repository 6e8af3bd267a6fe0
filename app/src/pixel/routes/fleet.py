"""Status of the instances of the fleet."""

import asyncio
import os
from collections.abc import Iterator
from contextlib import contextmanager
from http import HTTPStatus
from typing import Annotated, Any

import h11
import msgspec
from fastapi import APIRouter, Query, Request, Response

from pixel import metrics, openapi
from pixel.client import AnswerError, get
from pixel.problems import Problem
from pixel.requests import State, json_response, state_of

router = APIRouter(prefix="/fleet", tags=["fleet"])

FAN_OUTS = 8
"""Requests to all peers that a worker handles at the same time; further ones get a 503."""

LATE = "is late"

EXAMPLE = {
    "instance": "c5",
    "port": 8000,
    "release": "2026-11-21",
    "uptime_s": 3600.5,
    "workers": 4,
    "load": [0.5, 0.4, 0.3],
    "redis_ms": 0.6,
    "writes": 1000000,
    "viewers": 12,
}

Milliseconds = Annotated[
    int, Query(alias="timeout", ge=1, le=60_000, description="How long to wait, in milliseconds.")
]


class Status(msgspec.Struct, frozen=True, omit_defaults=True):
    """Status of an instance; ``redis_ms`` is null if Redis doesn't accept its writes.

    ``replicas`` is present if Redis is a cluster: how many replicas have acknowledged the last write.
    """

    instance: str
    port: int
    release: str
    uptime_s: float
    workers: int
    load: Annotated[list[float], msgspec.Meta(min_length=3, max_length=3)]
    redis_ms: float | None
    writes: int
    viewers: int
    replicas: int | None = None


class Fleet(msgspec.Struct, frozen=True):
    """Status of all instances."""

    instances: list[Status]


class PeerError(Exception):
    """A peer has not answered as expected; the message is the cause."""


@router.get("/self", responses=openapi.answer(Status, EXAMPLE))
async def fleet_self(request: Request) -> Response:
    """Status of this instance; counts cover all its workers since the service started."""
    return json_response(await _status(state_of(request)))


@router.get(
    "/all",
    responses=openapi.answer(Fleet, {"instances": [EXAMPLE]}) | openapi.problems(422, 502, 503, 504),
)
async def fleet_all(request: Request, milliseconds: Milliseconds = 10_000) -> Response:
    """Status of every instance; all are asked at the same time.

    If one fails or is late, the answer is a problem that contains the answers of the others.
    """
    state = state_of(request)
    peers = state["settings"].peers
    if not peers:
        return json_response(Fleet([await _status(state)]))
    with _fan_out():
        asked = [asyncio.create_task(_ask(peer)) for peer in peers]
        try:
            await asyncio.wait(asked, timeout=milliseconds / 1000)
        finally:
            await _cancel(asked)
    instances = [task.result() for task in asked if _failure(task) is None]
    if len(instances) == len(peers):
        return json_response(Fleet(instances))
    raise _problem(dict(zip(peers, asked, strict=True)), instances)


@router.get("/first", responses=openapi.answer(Status, EXAMPLE) | openapi.problems(422, 502, 503, 504))
async def fleet_first(request: Request, milliseconds: Milliseconds = 10_000) -> Response:
    """Status of the first instance that answers; all are asked at the same time."""
    state = state_of(request)
    peers = state["settings"].peers
    if not peers:
        return json_response(await _status(state))
    with _fan_out():
        asked = [asyncio.create_task(_ask(peer)) for peer in peers]
        waiting = set(asked)
        try:
            async with asyncio.timeout(milliseconds / 1000):
                while waiting:
                    done, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
                    for task in done:
                        if _failure(task) is None:
                            return json_response(task.result())
        except TimeoutError:
            pass
        finally:
            await _cancel(asked)
    raise _problem(dict(zip(peers, asked, strict=True)))


_fan_outs = 0


@contextmanager
def _fan_out() -> Iterator[None]:
    global _fan_outs
    if _fan_outs >= FAN_OUTS:
        raise Problem.unavailable("Too many requests to the fleet are in progress.")
    _fan_outs += 1
    try:
        yield
    finally:
        _fan_outs -= 1


async def _status(state: State) -> Status:
    settings = state["settings"]
    try:
        redis_ms = round(await state["store"].probe() * 1000, 3)
    except Problem:
        redis_ms = None
    totals = await asyncio.to_thread(metrics.totals)
    return Status(
        instance=settings.instance,
        port=settings.port,
        release=settings.release,
        uptime_s=round(metrics.uptime(), 1),
        workers=int(totals["pixel_workers"]),
        load=list(os.getloadavg()),
        redis_ms=redis_ms,
        writes=int(totals["pixel_writes_total"]),
        viewers=int(totals["pixel_viewers"]),
        replicas=state["store"].replicas,
    )


async def _ask(peer: str) -> Status:
    """Status of the instance at a base URL. Raises PeerError."""
    try:
        code, body = await get(f"{peer}/fleet/self")
        if code != HTTPStatus.OK:
            raise PeerError(f"answered with status {code}")
        return msgspec.json.decode(body, type=Status)
    except AnswerError as error:
        raise PeerError(str(error)) from error
    except OSError as error:
        raise PeerError(f"can't be reached: {error.strerror or error}") from error
    except (h11.RemoteProtocolError, msgspec.DecodeError, UnicodeDecodeError) as error:
        raise PeerError("answered something else than its status") from error


async def _cancel(tasks: list[asyncio.Task[Status]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)


def _failure(task: asyncio.Task[Status]) -> str | None:
    """Why a task has no result; None if it has one."""
    if not task.done() or task.cancelled():
        return LATE
    error = task.exception()
    return str(error) if error else None


def _problem(asked: dict[str, asyncio.Task[Status]], instances: list[Status] | None = None) -> Problem:
    failures = [{"peer": peer, "cause": cause} for peer, task in asked.items() if (cause := _failure(task))]
    late = any(failure["cause"] == LATE for failure in failures)
    members: dict[str, Any] = {"failures": failures}
    if instances is not None:
        members["instances"] = instances
    return Problem(
        HTTPStatus.GATEWAY_TIMEOUT if late else HTTPStatus.BAD_GATEWAY,
        f"{len(failures)} of {len(asked)} instances have failed or are late.",
        members=members,
    )
