"""The live page: the files under ``live/``, at the root and under ``/live``."""

from pathlib import Path

from fastapi import APIRouter
from fastapi.responses import FileResponse
from fastapi.staticfiles import StaticFiles

LIVE = Path(__file__).parent.parent / "live"

router = APIRouter(include_in_schema=False)

router.mount("/live", StaticFiles(directory=LIVE))


@router.get("/")
async def index() -> FileResponse:
    """The page itself."""
    return FileResponse(LIVE / "index.html")
