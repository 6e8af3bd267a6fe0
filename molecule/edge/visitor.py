#!/usr/bin/python3
"""A test client outside the fleet, over TLS. Prints its result as JSON.

visitor.py ask HOST PATH [METHOD [HEADER…]]     [status, headers, body]
visitor.py paths HOST PATH…                     [status, …]
visitor.py rate HOST PATH SOURCE RATE SECONDS [METHOD]
                                                {"statuses": {status or error: count}, "p99_ms": …}
visitor.py limited HOST [HEADER]                [status, headers, body] of the first refusal of 100 requests,
                                                and the status after Retry-After; {} in HEADER is a number
visitor.py together HOST PATH COUNT             {status: count} of COUNT concurrent requests
visitor.py ports HOST PORT…                     [open port, …]
visitor.py half HOST SOURCE COUNT               number of connections with an incomplete header that stay open
visitor.py agents HOST HEX…                     [status, …] with these bytes in User-Agent and URI
visitor.py slow HOST header|body                seconds until the server closes the connection
"""

import collections
import concurrent.futures
import http.client
import json
import socket
import ssl
import statistics
import sys
import threading
import time
from typing import Any

# Other tests verify the certificate.
TLS = ssl.create_default_context()
TLS.check_hostname = False
TLS.verify_mode = ssl.CERT_NONE


def connect(host: str, source: str = "0.0.0.0") -> http.client.HTTPConnection:
    return http.client.HTTPSConnection(host, timeout=30, source_address=(source, 0), context=TLS)


def send(
    connection: http.client.HTTPConnection, path: str, method: str = "GET", *headers: str
) -> tuple[int, dict[str, str], str]:
    connection.request(method, path, headers=dict(header.split(": ", 1) for header in headers))
    response = connection.getresponse()
    names = {name.lower(): value for name, value in response.getheaders()}
    return response.status, names, response.read().decode()


def ask(host: str, path: str, method: str = "GET", *headers: str) -> Any:
    return send(connect(host), path, method, *headers)


def paths(host: str, *paths: str) -> Any:
    return [ask(host, path)[0] for path in paths]


def half(host: str, source: str, count: str) -> int:
    """Open connections that each send an incomplete request header; return how many were accepted."""
    taken = []
    for _ in range(int(count)):
        try:
            connection = socket.create_connection((host, 80), timeout=5, source_address=(source, 0))
            connection.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n")
            taken.append(connection)
        except OSError:
            pass
    return len(taken)


def agents(host: str, *encoded: str) -> list[int]:
    statuses = []
    for each in map(bytes.fromhex, encoded):
        with TLS.wrap_socket(socket.create_connection((host, 443), 5)) as connection:
            connection.sendall(b"GET /ping?q=%b HTTP/1.0\r\nUser-Agent: %b\r\n\r\n" % (each, each))
            statuses.append(int(connection.recv(4096).split()[1]))
    return statuses


def rate(host: str, path: str, source: str, rate: str, seconds: str, method: str = "GET") -> Any:
    """Send at a constant rate over keep-alive connections; a slow answer does not delay the next request."""
    own = threading.local()

    def one(due: float) -> tuple[int | str, float]:
        time.sleep(max(0.0, due - time.monotonic()))
        if not hasattr(own, "connection"):
            own.connection = connect(host, source)
        try:
            status: int | str = send(own.connection, path, method)[0]
        except (OSError, http.client.HTTPException) as error:
            status = type(error).__name__
            own.connection.close()
        return status, (time.monotonic() - due) * 1000

    start = time.monotonic() + 0.1
    due = [start + number / float(rate) for number in range(int(float(rate) * float(seconds)))]
    with concurrent.futures.ThreadPoolExecutor(64) as pool:
        seen = list(pool.map(one, due))
    answered = [milliseconds for status, milliseconds in seen if status == 200]
    return {
        "statuses": collections.Counter(str(status) for status, _ in seen),
        "p99_ms": round(statistics.quantiles(answered, n=100)[98], 1) if len(answered) > 1 else None,
    }


def limited(host: str, header: str = "X-Number: {}") -> Any:
    connection = connect(host)
    for number in range(1, 101):
        status, headers, body = send(connection, "/", "GET", header.format(number))
        if status != 200:
            time.sleep(int(headers["retry-after"]))
            return status, headers, body, ask(host, "/", "GET", header.format(number))[0]
    return 200, None, None, None


def together(host: str, path: str, count: str) -> Any:
    with concurrent.futures.ThreadPoolExecutor(int(count)) as pool:
        return collections.Counter(pool.map(lambda _: str(ask(host, path)[0]), range(int(count))))


def slow(host: str, part: str) -> Any:
    with TLS.wrap_socket(socket.create_connection((host, 443), 30)) as connection:
        connection.sendall(b"POST /pixel HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n")
        if part == "body":
            connection.sendall(b"\r\nhalf a body")
        start = time.monotonic()
        connection.settimeout(0.5)
        while time.monotonic() < start + 20:
            try:
                if part == "header":
                    connection.sendall(b"X")
                if not connection.recv(1000):
                    break
            except TimeoutError:
                continue
            except OSError:
                break
        return time.monotonic() - start


def ports(host: str, *ports: str) -> Any:
    def answers(port: str) -> bool:
        try:
            socket.create_connection((host, int(port)), 2).close()
        except OSError:
            return False
        return True

    with concurrent.futures.ThreadPoolExecutor(len(ports)) as pool:
        return [int(port) for port, yes in zip(ports, pool.map(answers, ports), strict=True) if yes]


commands = {
    command.__name__: command for command in (ask, paths, rate, limited, together, ports, half, agents, slow)
}
print(json.dumps(commands[sys.argv[1]](*sys.argv[2:])))
