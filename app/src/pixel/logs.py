"""Logs: a JSON object a line, to standard error, which systemd keeps.

Answers aren't logged one by one (Nginx does that), but for those that are our fault, and at level
debug. Such a line has the ``request_id`` that Nginx' line has.
"""

from typing import Any

from pythonjsonlogger.core import RESERVED_ATTRS

from pixel.settings import Settings


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
