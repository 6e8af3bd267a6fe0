"""The application: FastAPI behind ``MetricsMiddleware``.

Nearly all ``POST /pixel``, the hot path, are answered in ``protocol`` and don't get here.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import APIRouter, FastAPI
from starlette.types import ASGIApp

from pixel import metrics
from pixel.access import Access
from pixel.canvas import Canvas
from pixel.events import Hub
from pixel.maintenance import Gate
from pixel.middleware import MetricsMiddleware
from pixel.openapi import DescribedAPI
from pixel.pictures import PictureCache
from pixel.pixel import Reader
from pixel.requests import State, Turns
from pixel.routes import canvas, docs, events, fleet, health, live, moderation, pixels
from pixel.settings import Settings, load
from pixel.store import Store

ROUTERS: tuple[APIRouter, ...] = (
    pixels.router,
    canvas.router,
    events.router,
    moderation.router,
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
        access = Access(store, settings)
        await access.start()
        with PictureCache(store) as pictures:
            hub = Hub(store, settings)
            gate = Gate(store, hub)
            await gate.read()
            following = asyncio.create_task(gate.follow(), name="maintenance")
            yield {
                "settings": settings,
                "store": store,
                "access": access,
                "reader": Reader(store.canvas),
                "pictures": pictures,
                "hub": hub,
                "large_batches": Turns(pixels.LARGE_WAITING),
                "gate": gate,
            }
            following.cancel()
        access.close()
        store.close()

    api = DescribedAPI(
        Canvas(settings.canvas_width, settings.canvas_height),
        settings.anonymous,
        beside=lambda: _history_api(settings),
        title="Pixel Endpoint",
        summary="A durable shared canvas over HTTP.",
        version=settings.release,
        lifespan=lifespan,
    )
    api.state.routers = ROUTERS
    for router in ROUTERS:
        api.include_router(router)
    return api


def _history_api(settings: Settings) -> FastAPI:
    """The history's API, for the description. Its import would cost each worker memory."""
    from pixel.history import service
    from pixel.history.settings import HistorySettings

    return service.create_api(settings, HistorySettings())


def create_app(settings: Settings) -> ASGIApp:
    """The whole application."""
    return MetricsMiddleware(create_api(settings))


app = create_app(load())
