"""A client that writes rising numbers to a Redis Cluster as the app does."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Sequence

from redis_cluster import Process, ReplyError

KEY = "pixel:{0}:number"


class Writer:
    """Writes until it is left; a number is acknowledged by the master and every replica that counts.

    A replica doesn't count while the master sees it as failed, or not ready (flag `nofailover`).
    """

    def __init__(self, addresses: Sequence[str], connect: Callable[[str], Process]) -> None:
        self._addresses = addresses
        self._connect = connect
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._master = connect(addresses[0])
        self.acknowledged = 0
        self.slowest = 0.0
        """The longest time that a write took with its repetitions, in seconds."""

    def __enter__(self) -> Writer:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self._thread.join()
        self._master.close()

    def _run(self) -> None:
        while not self._stopped.wait(0.01):
            began = time.monotonic()
            while not self._write(self.acknowledged + 1):
                if self._stopped.wait(0.01):
                    return
            self.acknowledged += 1
            self.slowest = max(self.slowest, time.monotonic() - began)

    def _write(self, number: int) -> bool:
        try:
            members = self._master.members().values()
            counting = [each for each in members if each.master and not each.flags & {"fail", "nofailover"}]
            self._master.call("SET", KEY, number)
            return len(counting) > 0 and int(self._master.call("WAIT", len(counting), 500)) >= len(counting)
        except (OSError, ReplyError) as error:
            moved = str(error).split()[-1] if str(error).startswith("MOVED") else None
            self._master.close()
            others = [address for address in self._addresses if address != self._master.address]
            self._master = self._connect(moved or random.choice(others))
            return False
