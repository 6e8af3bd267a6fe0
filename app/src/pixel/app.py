"""The application: FastAPI behind ``MetricsMiddleware``.

Nearly all ``POST /pixel``, the hot path, are answered in ``protocol`` and don't get here.
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import APIRouter, FastAPI
from starlette.types import ASGIApp

from pixel import metrics
from pixel.canvas import Canvas
from pixel.errors import HANDLERS
from pixel.events import Hub
from pixel.middleware import MetricsMiddleware
from pixel.openapi import DescribedAPI
from pixel.pictures import PictureCache
from pixel.pixel import Reader
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


def create_api(settings: Settings) -> FastAPI:
    """FastAPI's part of the application. It connects to Redis at startup."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[State]:
        metrics.WORKERS.set(1)
        store = Store(settings)
        with PictureCache(store) as pictures:
            yield {
                "settings": settings,
                "store": store,
                "reader": Reader(store.canvas),
                "pictures": pictures,
                "hub": Hub(store, settings),
                "large_batches": Turns(pixels.LARGE_WAITING),
            }
        store.close()

    api = DescribedAPI(
        Canvas(settings.canvas_width, settings.canvas_height),
        title="Pixel Endpoint",
        summary="A durable shared canvas over HTTP.",
        version=settings.release,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        generate_unique_id_function=lambda route: route.name,
        lifespan=lifespan,
        telemetry={"tracing": False, "metrics": False, "logs": False},
        exception_handlers=HANDLERS,
    )
    api.state.routers = ROUTERS
    for router in ROUTERS:
        api.include_router(router)
    return api


def create_app(settings: Settings) -> ASGIApp:
    """The whole application."""
    return MetricsMiddleware(create_api(settings))


app = create_app(load())
