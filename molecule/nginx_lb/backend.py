#!/usr/bin/python3
"""A backend that says who it is and what it was sent: backend.py NAME HOST:PORT SOCKET."""

import json
import os
import socketserver
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

NAME, TCP, UNIX = sys.argv[1:4]


class Echo(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def answer(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        seen = {
            "instance": NAME,
            "method": self.command,
            "path": self.path,
            "headers": dict(self.headers.items()),
            "body": self.rfile.read(length).decode(),
        }
        content = json.dumps(seen).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("X-Pixel-Instance", NAME)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = do_OPTIONS = answer

    def address_string(self) -> str:
        return "peer"


class UnixServer(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    daemon_threads = True


if os.path.exists(UNIX):
    os.unlink(UNIX)
over_unix = UnixServer(UNIX, Echo)
os.chmod(UNIX, 0o666)
threading.Thread(target=over_unix.serve_forever, daemon=True).start()
host, port = TCP.rsplit(":", 1)
ThreadingHTTPServer((host, int(port)), Echo).serve_forever()
