"""The canvas as a picture and as raw bytes."""

from http import HTTPStatus
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Header, Query, Request, Response
from pydantic import WithJsonSchema

from pixel import openapi
from pixel.canvas import Region
from pixel.pictures import Picture
from pixel.problems import Problem
from pixel.requests import is_known, state_of

router = APIRouter(tags=["canvas"])

_HEADERS = {
    "ETag": "Changes if and only if these pixels do.",
    "Cache-Control": "How long a cache may keep it.",
    "X-Pixel-Event": "With the events after this one, it is the canvas as it is.",
    "X-Pixel-Width": "Pixels in a row.",
    "X-Pixel-Height": "Rows.",
}


def _answers(media_type: str) -> dict[int | str, dict[str, Any]]:
    headers = {
        name: {"description": text, "schema": {"type": "string"}} for name, text in _HEADERS.items()
    }
    content = {media_type: {"schema": {"type": "string", "format": "binary"}}}
    return {
        200: {"description": "OK", "content": content, "headers": dict(headers)},
        304: {"description": "Not Modified", "headers": dict(headers)},
    } | openapi.problems(422, 503)


MOST_PIXELS = 4096 * 4096
"""Of one answer."""


Length = Annotated[int | None, Query(ge=1), WithJsonSchema({"type": "integer", "minimum": 1})]


def wanted_region(
    request: Request,
    x: Annotated[int, Query(ge=0)] = 0,
    y: Annotated[int, Query(ge=0)] = 0,
    w: Annotated[Length, Query(description="The rest of the row by default.")] = None,
    h: Annotated[Length, Query(description="The rest of the column by default.")] = None,
) -> Region:
    """The part of the canvas that is asked for: all of it by default."""
    canvas = state_of(request)["store"].canvas
    for name, start, length, size in (("w", x, w, canvas.width), ("h", y, h, canvas.height)):
        if start + (length or 1) > size:
            raise Problem.invalid(name, f"reaches beyond the canvas, which ends at {size}")
    return Region(x, y, w or canvas.width - x, h or canvas.height - y)


WantedRegion = Annotated[Region, Depends(wanted_region)]
KnownTags = Annotated[str, Header(alias="If-None-Match")]


@router.get(
    "/canvas.rgb",
    response_class=Response,
    responses=_answers("application/octet-stream"),
)
async def canvas_rgb(request: Request, region: WantedRegion, known: KnownTags = "") -> Response:
    """Three bytes (R, G, B) a pixel, row by row."""
    _bound(region, 1)
    picture = await state_of(request)["gallery"].picture(region)
    if is_known(_tag(picture), known):
        return _not_modified(picture)
    return Response(picture.raw, headers=_headers(picture), media_type="application/octet-stream")


@router.get("/canvas.png", response_class=Response, responses=_answers("image/png"))
async def canvas_png(
    request: Request,
    region: WantedRegion,
    scale: Annotated[int, Query(ge=1, le=16, description="A pixel's width and height.")] = 1,
    known: KnownTags = "",
) -> Response:
    """The picture as a PNG."""
    _bound(region, scale)
    picture = await state_of(request)["gallery"].picture(region)
    if is_known(_tag(picture), known):
        return _not_modified(picture)
    return Response(await picture.png(scale), headers=_headers(picture), media_type="image/png")


def _bound(region: Region, scale: int) -> None:
    if region.w * region.h * scale * scale > MOST_PIXELS:
        raise Problem.invalid("w", f"times h and scale is more than {MOST_PIXELS} pixels")


def _tag(picture: Picture) -> str:
    return f'"{picture.digest}"'


def _headers(picture: Picture) -> dict[str, str]:
    return {
        "ETag": _tag(picture),
        "Cache-Control": "max-age=1, stale-while-revalidate=10",
        "X-Pixel-Event": picture.event.text().decode(),
        "X-Pixel-Width": str(picture.region.w),
        "X-Pixel-Height": str(picture.region.h),
    }


def _not_modified(picture: Picture) -> Response:
    return Response(status_code=HTTPStatus.NOT_MODIFIED, headers=_headers(picture))
