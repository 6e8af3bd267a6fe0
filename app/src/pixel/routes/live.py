"""The live page: the files under ``live/``, at the root and under ``/live``."""

from hashlib import blake2b
from http import HTTPStatus
from pathlib import Path
from typing import Annotated, NamedTuple

from fastapi import APIRouter, Header, Response

from pixel.problems import Problem
from pixel.requests import is_known

router = APIRouter(include_in_schema=False)

KnownTags = Annotated[str, Header(alias="If-None-Match")]

_TYPES = {
    ".css": "text/css",
    ".html": "text/html",
    ".js": "text/javascript",
    ".svg": "image/svg+xml",
}

SECURITY = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self';"
    " img-src 'self'; connect-src 'self'; base-uri 'none'; form-action 'none';"
    " frame-ancestors 'none'",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


class _File(NamedTuple):
    content: bytes
    media_type: str
    tag: str


def _read(path: Path) -> _File:
    content = path.read_bytes()
    # A digest of the content, so that all hosts send the same tag for the same file.
    return _File(content, _TYPES[path.suffix], f'"{blake2b(content, digest_size=16).hexdigest()}"')


_LIVE = Path(__file__).parent.parent / "live"
_FILES = {path.name: _read(path) for path in _LIVE.iterdir() if path.suffix in _TYPES}


@router.get("/")
async def index(known: KnownTags = "") -> Response:
    """The page itself."""
    return _answer(_FILES["index.html"], known)


@router.get("/live/{name}")
async def part(name: str, known: KnownTags = "") -> Response:
    """A script, style or image of the page."""
    if name not in _FILES:
        raise Problem(HTTPStatus.NOT_FOUND, "There is nothing at this path.")
    return _answer(_FILES[name], known)


def _answer(file: _File, known: str) -> Response:
    # Validated each time, so that no browser keeps the page of an earlier release.
    headers = SECURITY | {"Cache-Control": "no-cache", "ETag": file.tag}
    if is_known(file.tag, known):
        return Response(status_code=HTTPStatus.NOT_MODIFIED, headers=headers)
    return Response(file.content, headers=headers, media_type=file.media_type)
