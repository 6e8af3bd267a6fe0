"""Counting of Nginx's connections. Scenario nginx_lb tests reloads."""

from __future__ import annotations

import os
import pwd
import socket
from pathlib import Path

from pixel_lb.nginx import connections


def test_open_connections_are_counted(tmp_path: Path) -> None:
    path = str(tmp_path / "s")
    own = pwd.getpwuid(os.getuid()).pw_name
    other = next(user.pw_name for user in pwd.getpwall() if user.pw_uid != os.getuid())
    for family, where in ((socket.AF_INET, ("127.0.0.1", 0)), (socket.AF_UNIX, path)):
        with socket.socket(family) as server, socket.socket(family) as client:
            server.bind(where)
            server.listen()
            name = server.getsockname()
            address = f"unix:{path}" if family == socket.AF_UNIX else f"{name[0]}:{name[1]}"
            assert connections(address, own) == 0
            client.connect(name)
            with server.accept()[0]:
                assert connections(address, own) == 1
                # Connections of other users, such as Prometheus, do not count.
                assert family == socket.AF_UNIX or connections(address, other) == 0
