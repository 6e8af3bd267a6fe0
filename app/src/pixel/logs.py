"""Logs: one JSON object per line to standard error, which systemd stores in the journal.

Nginx logs every request. The app logs only answers with status 500 and above and, at level debug,
all others, with the ``request_id`` of Nginx's line. While Redis is unavailable that is one line per
request; the journal limits the rate for each service.
"""

import logging
from collections.abc import Iterable
from typing import Any

from pythonjsonlogger.core import RESERVED_ATTRS

from pixel.settings import Settings

log = logging.getLogger(__name__)


def request_id(headers: Iterable[tuple[bytes, bytes]]) -> str:
    """The ID that the balancer has given to a request; its own log contains it too."""
    return dict(headers).get(b"x-request-id", b"").decode("latin-1")


def answered(
    level: int,
    method: str,
    path: str,
    status: int,
    seconds: float,
    headers: Iterable[tuple[bytes, bytes]],
) -> None:
    """Log an answer; ``headers`` are its request's."""
    if log.isEnabledFor(level):
        what = {"request_id": request_id(headers), "seconds": round(seconds, 6)}
        log.log(level, "%s %s was answered %d", method, path, status, extra=what)


def config(settings: Settings) -> dict[str, Any]:
    """Logging for the master and its workers, as ``logging.config.dictConfig`` takes it."""
    level = settings.log_level.upper()
    return {
        "version": 1,
        "disable_existing_loggers": False,
        "formatters": {
            "json": {
                "()": "pythonjsonlogger.json.JsonFormatter",
                "fmt": "%(levelname)s %(name)s %(process)d %(message)s",
                "rename_fields": {"levelname": "level", "name": "logger"},
                "timestamp": "time",
                "reserved_attrs": [*RESERVED_ATTRS, "color_message"],
                "static_fields": {"instance": settings.instance, "release": settings.release},
            }
        },
        "handlers": {"stderr": {"class": "logging.StreamHandler", "formatter": "json"}},
        "root": {"level": level, "handlers": ["stderr"]},
        # Uvicorn logs through the handlers that Gunicorn's logger has, so it needs its own.
        "loggers": {"gunicorn.error": {"level": level, "handlers": ["stderr"], "propagate": False}},
    }
