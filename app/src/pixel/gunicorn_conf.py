"""Gunicorn's configuration: ``gunicorn --config python:pixel.gunicorn_conf pixel.app:app``.

Sockets that systemd passes take the place of ``bind``.
"""

import asyncio
import gc
import os
import shutil
import socket
import tempfile
from importlib.util import find_spec
from pathlib import Path

from gunicorn.arbiter import Arbiter
from gunicorn.workers.base import Worker as GunicornWorker

from pixel import logs
from pixel.settings import load, refuse

settings = load()

# Uvicorn itself would fall back to slower ones without a word.
for package in ("uvloop", "httptools"):
    if find_spec(package) is None:
        refuse(f"the package {package} is missing: install what requirements.txt lists")

# Where the workers' metrics meet has to be known before anything imports prometheus_client. A
# service is given its own directory.
own_metrics = ""
if "PROMETHEUS_MULTIPROC_DIR" not in os.environ:
    own_metrics = os.environ["PROMETHEUS_MULTIPROC_DIR"] = tempfile.mkdtemp(prefix="pixel-metrics-")

from prometheus_client import multiprocess  # noqa: E402
from uvicorn.server import Server  # noqa: E402
from uvicorn_worker import UvicornWorker  # noqa: E402

LAST_REQUESTS = 0.2
"""Seconds for which a worker on its way out still listens to the connections it has."""


class GracefulServer(Server):
    """Uvicorn, which on its way out cuts nobody short.

    It ends the streams, which would never end by themselves, and gives those who have just
    connected the time to ask; Uvicorn itself hangs up on whoever has not asked yet.
    """

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        for server in self.servers:
            server.close()
        self.lifespan.state["hub"].close()
        await asyncio.sleep(LAST_REQUESTS)
        await super().shutdown(sockets)


class Worker(UvicornWorker):  # type: ignore[misc]
    """Uvicorn on uvloop and httptools, with nothing on the way of a request that isn't used."""

    CONFIG_KWARGS = {  # noqa: RUF012 - declared so by the base class
        "loop": "uvloop",
        "http": "pixel.protocol:PixelProtocol",  # and so httptools
        "ws": "none",
        "lifespan": "on",
        "access_log": False,
        "proxy_headers": False,
        "server_header": False,
        # On every answer, also on those that Uvicorn gives by itself.
        "headers": [("X-Pixel-Instance", settings.instance)],
        # A second before the master loses patience and kills.
        "timeout_graceful_shutdown": settings.graceful_timeout - 1,
    }

    async def _serve(self) -> None:
        self.config.app = self.wsgi
        self._install_sigquit_handler()
        await GracefulServer(self.config).serve(sockets=self.sockets)


worker_class = Worker
workers = settings.workers
bind = settings.bind
keepalive = settings.keepalive
graceful_timeout = settings.graceful_timeout
logconfig_dict = logs.config(settings)
proc_name = "pixel"
control_socket_disable = True
# The workers' signs of life are writes to a file, which must not wait for a busy disk.
# S108 warns of names that others could guess: Gunicorn makes up an own one, and unlinks it at once.
worker_tmp_dir = "/dev/shm" if Path("/dev/shm").is_dir() else None  # noqa: S108


def post_worker_init(worker: GunicornWorker) -> None:
    """Spare the collector what stays until the end: the modules and the application."""
    gc.collect()
    gc.freeze()


def child_exit(server: Arbiter, worker: GunicornWorker) -> None:
    """Take a dead worker's gauges out of the sums."""
    multiprocess.mark_process_dead(worker.pid)  # type: ignore[no-untyped-call]


def on_exit(server: Arbiter) -> None:
    """Remove what isn't the service manager's to remove."""
    if own_metrics:
        shutil.rmtree(own_metrics, ignore_errors=True)  # the end is no time to fail
