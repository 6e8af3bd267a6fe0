"""Moderation: protected areas and blocked clients. Undo is a part of the history (``history.service``)."""

from collections.abc import Awaitable
from typing import Annotated, Literal, TypeVar

import msgspec
from fastapi import APIRouter, Query, Request, Response

from pixel import moderation, openapi
from pixel.cluster import Redis
from pixel.moderation import Act, Area, Block, Edit, Restrictions, WantedArea, WantedBlock
from pixel.problems import Problem
from pixel.requests import decode_body, find_moderator, json_response, read_json, state_of
from pixel.resp import ReplyError

router = APIRouter(prefix="/moderation", tags=[openapi.MODERATION])

T = TypeVar("T")

AREA = {
    "id": "5f0c1a2b",
    "area": "0,0,64,64",
    "reason": "The logo",
    "by": "key:mod",
    "since": "2026-11-21T02:31:38Z",
}
BLOCK = {
    "id": "9d3e4c5a",
    "client": "addr:192.0.2.7",
    "until": "2026-11-22T02:31:38Z",
    "reason": "Vandalism",
    "by": "key:mod",
    "since": "2026-11-21T02:31:38Z",
}
ACT = {"time": "2026-11-21T02:31:38Z", "by": "key:mod", "did": "protect", "what": AREA}
WANTED_AREA = {"area": "0,0,64,64", "reason": "The logo"}
WANTED_BLOCK = {"client": "addr:192.0.2.7", "minutes": 1440, "reason": "Vandalism"}

_READ = openapi.problems(401, 403, 503)
_ADD = openapi.problems(400, 401, 403, 408, 409, 413, 415, 422, 503)
_REMOVE = openapi.problems(401, 403, 404, 503)


@router.get("", responses=openapi.answer(Restrictions, {"areas": [AREA], "blocks": [BLOCK]}) | _READ)
async def get_restrictions(request: Request) -> Response:
    """All protected areas and blocked clients."""
    find_moderator(request)
    return json_response(await _asked(moderation.read(_redis(request))))


@router.get("/acts", responses=openapi.answer(list[Act], [ACT]) | openapi.problems(422) | _READ)
async def get_acts(
    request: Request, limit: Annotated[int, Query(ge=1, le=moderation.MOST_ACTS)] = 100
) -> Response:
    """What moderators and operators did, the newest first; the last 1,000 acts are kept."""
    find_moderator(request)
    return json_response(await _asked(moderation.acts(_redis(request), limit)))


@router.post(
    "/areas",
    openapi_extra=openapi.body(WantedArea, WANTED_AREA),
    responses=openapi.answer(Area, AREA) | _ADD,
)
async def protect_area(request: Request) -> Response:
    """Protect an area: only moderators may write in it, within two seconds."""
    by = find_moderator(request)
    wanted = await _body(request, WantedArea)
    return await _change(request, by, moderation.protect(wanted, by, state_of(request)["store"].canvas))


@router.delete("/areas/{area_id}", responses=openapi.answer(Area, AREA) | _REMOVE)
async def unprotect_area(request: Request, area_id: str) -> Response:
    """End the protection of an area."""
    return await _change(request, find_moderator(request), moderation.remove(area_id, (Area,)))


@router.post(
    "/blocks",
    openapi_extra=openapi.body(WantedBlock, WANTED_BLOCK),
    responses=openapi.answer(Block, BLOCK) | _ADD,
)
async def block_client(request: Request) -> Response:
    """Refuse the writes of a key or an address for a time, within two seconds."""
    by = find_moderator(request)
    return await _change(request, by, moderation.block(await _body(request, WantedBlock), by))


@router.delete("/blocks/{block_id}", responses=openapi.answer(Block, BLOCK) | _REMOVE)
async def unblock_client(request: Request, block_id: str) -> Response:
    """End a block."""
    return await _change(request, find_moderator(request), moderation.remove(block_id, (Block,)))


async def _change(request: Request, by: str, edit: Edit) -> Response:
    return json_response(await _asked(moderation.change(_redis(request), by, edit), "maybe"))


async def _body(request: Request, kind: type[T]) -> T:
    limit = state_of(request)["settings"].body_limit
    return decode_body(await read_json(request.scope, request.receive, limit), kind)


def _redis(request: Request) -> Redis:
    return Redis(state_of(request)["settings"])


async def _asked(answer: Awaitable[T], written: Literal["maybe"] | None = None) -> T:
    """An answer of Redis. Raises a 503 ``Problem`` without one."""
    try:
        return await answer
    except (OSError, ReplyError, msgspec.DecodeError) as error:
        raise Problem.unavailable("Redis doesn't answer, or refuses", written) from error
