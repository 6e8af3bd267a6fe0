"""Uvicorn as a plain `pip install gunicorn uvicorn` gives it, even where more is installed."""

from __future__ import annotations

from uvicorn_worker import UvicornWorker


class PlainWorker(UvicornWorker):
    CONFIG_KWARGS = {"loop": "asyncio", "http": "h11"}
