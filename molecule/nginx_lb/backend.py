#!/usr/bin/python3
"""A backend that answers with its name and the request that it received: backend.py NAME HOST:PORT SOCKET.

Special paths: /work takes 10 ms, one request at a time; /hold takes half a second; /live and /events set
headers; each answer to /canvas.rgb is another picture. /run/behaviour controls /pixel: `no` and `maybe`
refuse a write as the app does, `break` closes the connection, `hang` answers after the balancer's timeout.
"""

import json
import os
import socketserver
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

NAME, TCP, UNIX = sys.argv[1:4]
WORK = threading.Lock()


def cpu() -> bytes:
    """Replay recorded CPU counters from /run/stat: its samples are 2 s apart, and begin at its mtime."""
    try:
        began = os.stat("/run/stat").st_mtime
        with open("/run/stat") as file:
            lines = file.read().split("\n\n")
    except FileNotFoundError:
        return b""
    # After the last sample, continue at the rate of the last interval.
    at = (time.time() - began) / 2
    first, last = (list(map(int, line.split()[1:9])) for line in lines[-2:])
    if at < len(lines) - 1:
        first, last = (list(map(int, line.split()[1:9])) for line in lines[int(at) : int(at) + 2])
        at -= int(at)
    else:
        at -= len(lines) - 2
    ticks = [one + (other - one) * at for one, other in zip(first, last, strict=True)]
    modes = zip(("user", "nice", "system", "idle", "iowait", "irq", "softirq", "steal"), ticks, strict=True)
    text = (f'pixel_host_cpu_seconds_total{{mode="{mode}"}} {count / 100}\n' for mode, count in modes)
    return "".join(text).encode()


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
        status = 200
        if self.path == "/readyz":
            status = 503 if os.path.exists("/run/unready") else 200
        elif self.path == "/metrics":
            content = cpu()
        time.sleep({"/slow": 0.05, f"/slow/{NAME}": 0.2}.get(self.path, 0))
        if self.path == "/work":
            with WORK:
                time.sleep(0.01)
        if self.path == "/hold":
            time.sleep(0.5)
        behaviour = ""
        if self.path == "/pixel" and os.path.exists("/run/behaviour"):
            with open("/run/behaviour") as file:
                behaviour = file.read().strip()
        if behaviour == "break":
            self.close_connection = True
            return
        if behaviour == "hang":
            time.sleep(5)
        if behaviour in ("no", "maybe"):
            status = 503
        self.send_response(status)
        if behaviour in ("no", "maybe"):
            self.send_header("X-Accel-Redirect", "@again")
            self.send_header("X-Pixel-Written", behaviour)
        self.send_header("Content-Type", "application/json")
        self.send_header("X-Pixel-Instance", NAME)
        self.send_header("X-Seen", json.dumps(seen))
        if self.path == "/live":
            self.send_header("Content-Security-Policy", "default-src 'self'")
            self.send_header("Referrer-Policy", "no-referrer")
        if self.path.startswith("/canvas.rgb"):
            time.sleep(0.2)
            event = f"{int(time.time() * 1000)}-0"
            self.send_header("Cache-Control", "max-age=1, stale-while-revalidate=2")
            self.send_header("ETag", f'"{event}"')
            self.send_header("X-Pixel-Event", event)
        if self.path == "/events":
            self.send_header("X-Accel-Buffering", "no")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = do_OPTIONS = answer

    def address_string(self) -> str:
        return "peer"


class TcpServer(ThreadingHTTPServer):
    request_queue_size = 1024


class UnixServer(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    daemon_threads = True
    request_queue_size = 1024


if os.path.exists(UNIX):
    os.unlink(UNIX)
over_unix = UnixServer(UNIX, Echo)
os.chmod(UNIX, 0o666)
threading.Thread(target=over_unix.serve_forever, daemon=True).start()
host, port = TCP.rsplit(":", 1)
TcpServer((host, int(port)), Echo).serve_forever()
