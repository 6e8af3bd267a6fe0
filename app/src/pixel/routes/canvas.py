"""The canvas as a picture and as raw bytes."""

from http import HTTPStatus
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Header, Query, Request, Response
from pydantic import WithJsonSchema

from pixel import openapi
from pixel.canvas import Region
from pixel.pictures import Picture, PictureResponse
from pixel.problems import Problem
from pixel.requests import admit, check_reader, is_known, matches_any, state_of
from pixel.stream import EVENT_PATTERN

router = APIRouter(tags=["canvas"], dependencies=[Depends(admit), Depends(check_reader)])

_HEADERS = {
    "ETag": "Changes if and only if these pixels do.",
    "Cache-Control": "How long a cache may keep the answer.",
    "X-Pixel-Event": "Event ID of this snapshot; apply later events to it.",
    "X-Pixel-Width": "Width in pixels.",
    "X-Pixel-Height": "Height in pixels.",
}


def _answers(media_type: str) -> dict[int | str, dict[str, Any]]:
    headers = {name: {"description": text, "schema": {"type": "string"}} for name, text in _HEADERS.items()}
    content = {media_type: {"schema": {"type": "string", "format": "binary"}}}
    return {
        200: {"description": "OK", "content": content, "headers": dict(headers)},
        304: {"description": "Not Modified", "headers": dict(headers)},
    } | openapi.problems(401, 422, 503)


CACHING = "max-age=1, stale-while-revalidate=2"
PRIVATE_CACHING = "private, no-cache"
"""If reading needs a key: neither the balancer's cache nor any other one may serve it to others."""

MOST_SCALED_PIXELS = 2048 * 2048
"""Most pixels of an enlarged picture. Others are bounded by the canvas (settings.MAX_PIXELS)."""

Length = Annotated[int | None, Query(ge=1), WithJsonSchema({"type": "integer", "minimum": 1})]


def wanted_region(
    request: Request,
    x: Annotated[int, Query(ge=0)] = 0,
    y: Annotated[int, Query(ge=0)] = 0,
    w: Annotated[Length, Query(description="By default, the rest of the row.")] = None,
    h: Annotated[Length, Query(description="By default, the rest of the column.")] = None,
) -> Region:
    """The requested part of the canvas; by default, all of it."""
    canvas = state_of(request)["store"].canvas
    for name, start, length, size in (("w", x, w, canvas.width), ("h", y, h, canvas.height)):
        if start + (length or 1) > size:
            raise Problem.invalid(name, f"reaches beyond the canvas, which ends at {size}")
    return Region(x, y, w or canvas.width - x, h or canvas.height - y)


WantedRegion = Annotated[Region, Depends(wanted_region)]
# It makes the URL another one. Who knows the event asks after it has happened, so what a cache has
# for this URL is no older.
Contained = Annotated[
    str | None,
    Query(
        alias="after",
        pattern=f"^{EVENT_PATTERN}$",
        description="An event that the answer must contain, also if a cache gives it.",
    ),
]
KnownTags = Annotated[str, Header(alias="If-None-Match")]


@router.get(
    "/canvas.rgb",
    response_class=Response,
    responses=_answers("application/octet-stream"),
)
async def canvas_rgb(
    request: Request, region: WantedRegion, _: Contained = None, known: KnownTags = ""
) -> Response:
    """Three bytes (R, G, B) a pixel, row by row."""
    caching = _caching(request)
    if matches_any(known):  # every canvas matches: it needs no read
        return _not_modified({"Cache-Control": caching})
    picture = await state_of(request)["pictures"].picture(region)
    headers = _headers(picture, caching)
    if is_known(headers["ETag"], known):
        return _not_modified(headers)
    return PictureResponse(picture, picture.raw, headers, "application/octet-stream")


@router.get("/canvas.png", response_class=Response, responses=_answers("image/png"))
async def canvas_png(
    request: Request,
    region: WantedRegion,
    scale: Annotated[int, Query(ge=1, le=16, description="Width and height of each pixel.")] = 1,
    _: Contained = None,
    known: KnownTags = "",
) -> Response:
    """The canvas, or a part of it, as a PNG."""
    if scale > 1 and region.w * region.h * scale * scale > MOST_SCALED_PIXELS:
        raise Problem.invalid("w", f"times h times scale squared is over {MOST_SCALED_PIXELS}")
    caching = _caching(request)
    if matches_any(known):
        return _not_modified({"Cache-Control": caching})
    pictures = state_of(request)["pictures"]
    picture = await pictures.picture(region)
    headers = _headers(picture, caching)
    if is_known(headers["ETag"], known):
        return _not_modified(headers)
    png = await pictures.png(picture, scale)
    return PictureResponse(picture, png, headers, "image/png")


def _caching(request: Request) -> str:
    return PRIVATE_CACHING if state_of(request)["access"].is_private else CACHING


def _headers(picture: Picture, caching: str) -> dict[str, str]:
    return {
        "ETag": f'"{picture.digest}"',
        "Cache-Control": caching,
        "X-Pixel-Event": picture.event.text().decode(),
        "X-Pixel-Width": str(picture.region.w),
        "X-Pixel-Height": str(picture.region.h),
    }


def _not_modified(headers: dict[str, str]) -> Response:
    return Response(status_code=HTTPStatus.NOT_MODIFIED, headers=headers)
