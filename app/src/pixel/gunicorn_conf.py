"""Gunicorn's configuration: ``gunicorn --config python:pixel.gunicorn_conf pixel.app:app``.

Sockets that systemd passes replace ``bind``.
"""

import asyncio
import ctypes
import gc
import os
import shutil
import socket
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path

from gunicorn.arbiter import Arbiter
from gunicorn.workers.base import Worker as GunicornWorker

from pixel import logs
from pixel.settings import load, refuse

settings = load()

# Without these packages, Uvicorn would silently use slower ones.
for package in ("uvloop", "httptools"):
    if find_spec(package) is None:
        refuse(f"the package {package} is missing: install what requirements.txt lists")

# The directory for the workers' metrics must be known before prometheus_client is imported. The
# unit sets it.
own_metrics = ""
if "PROMETHEUS_MULTIPROC_DIR" not in os.environ:
    own_metrics = os.environ["PROMETHEUS_MULTIPROC_DIR"] = tempfile.mkdtemp(prefix="pixel-metrics-")

# Workers compute the service's uptime from this time of the monotonic clock.
os.environ.setdefault("SERVICE_STARTED", str(time.monotonic()))

# Workers inherit the libraries that are slow to import, and share their memory.
import fastapi  # noqa: E402, F401
import PIL.Image  # noqa: E402, F401
from prometheus_client import multiprocess  # noqa: E402
from uvicorn.server import Server  # noqa: E402
from uvicorn_worker import UvicornWorker  # noqa: E402

LAST_REQUESTS = 0.2
"""Seconds for which a worker that stops still accepts requests on open connections."""


class GracefulServer(Server):
    """Uvicorn with a shutdown that aborts no request.

    It ends the event streams, which have no end of their own, and waits for the first request of
    clients that have just connected; Uvicorn would close such connections at once.
    """

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        for server in self.servers:
            server.close()
        self.lifespan.state["hub"].close()
        await asyncio.sleep(LAST_REQUESTS)
        await super().shutdown(sockets)


class Worker(UvicornWorker):  # type: ignore[misc]
    """Uvicorn on uvloop and httptools, without the layers that this service doesn't use."""

    CONFIG_KWARGS = {  # noqa: RUF012 - declared so by the base class
        "loop": "uvloop",
        "http": "pixel.protocol:PixelProtocol",  # uses httptools
        "ws": "none",
        "lifespan": "on",
        "access_log": False,
        "proxy_headers": False,
        "server_header": False,
        # For every answer, including those of Uvicorn itself.
        "headers": [("X-Pixel-Instance", settings.instance)],
        # A second before the master kills the worker.
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
# Workers report that they are alive by touching a file, which must not wait for a busy disk.
# S108 warns of predictable names: Gunicorn generates a random one, and unlinks it at once.
worker_tmp_dir = "/dev/shm" if Path("/dev/shm").is_dir() else None  # noqa: S108


_M_MMAP_THRESHOLD = -3
_LARGE = 256 * 1024


def pre_fork(server: Arbiter, worker: GunicornWorker) -> None:
    """Give a new worker the lowest free slot for its metrics."""
    used = {other.metrics_slot for other in server.WORKERS.values()}
    worker.metrics_slot = min(set(range(len(used) + 1)) - used)


def post_fork(server: Arbiter, worker: GunicornWorker) -> None:
    """Pass the slot on to ``metrics``, which is imported later."""
    os.environ["METRICS_SLOT"] = str(worker.metrics_slot)


def post_worker_init(worker: GunicornWorker) -> None:
    """Set up the worker's memory."""
    # Modules and the application live as long as the process: exclude them from garbage collection.
    gc.collect()
    gc.freeze()
    # Large buffers (pictures, batches) are mapped, so that the kernel gets them back when they are
    # freed. By default glibc raises this threshold up to 32 MB as a process uses such buffers.
    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None):
        mallopt(_M_MMAP_THRESHOLD, _LARGE)


def child_exit(server: Arbiter, worker: GunicornWorker) -> None:
    """Remove a dead worker's gauges from the sums."""
    multiprocess.mark_process_dead(worker.metrics_slot)  # type: ignore[no-untyped-call]


def on_exit(server: Arbiter) -> None:
    """Remove the metrics if the service manager doesn't."""
    if own_metrics:
        shutil.rmtree(own_metrics, ignore_errors=True)  # an error must not fail the shutdown
