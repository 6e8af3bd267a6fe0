#!/usr/bin/python3
"""Send requests to the balancer on this host; a minimal Debian has no curl.

client.py one PATH [METHOD [BODY [HEADER…]]]   prints [status, headers, body] as JSON
client.py many COUNT PATH [AT_ONCE]            prints the instance (or error status) of each of COUNT GETs
client.py each PATH…                           prints the instance (or error status) for each path
client.py steps JSON                           for [PATH, METHOD, HEADERS] each, or seconds to wait:
                                               prints [status, headers] of each answer as JSON
"""

import http.client
import json
import sys
import time
from concurrent.futures import ThreadPoolExecutor


def connect() -> http.client.HTTPConnection:
    return http.client.HTTPConnection("127.0.0.1", 80, timeout=10)


def ask(paths: list[str]) -> list[str]:
    """GET the paths over one connection; return the instance that answered, or the status."""
    connection = connect()
    seen = []
    for path in paths:
        connection.request("GET", path)
        response = connection.getresponse()
        response.read()
        seen.append(response.headers.get("X-Pixel-Instance") or str(response.status))
    return seen


kind, subject, *rest = sys.argv[1:]
if kind == "one":
    method, body, *headers = [*rest, *["GET", ""][len(rest) :]]
    fields = dict(header.split(": ", 1) for header in headers)
    connection = connect()
    connection.request(method, subject, body.encode() or None, fields)
    response = connection.getresponse()
    received = {name.lower(): value for name, value in response.getheaders()}
    print(json.dumps([response.status, received, response.read().decode()]))
elif kind == "steps":
    connection = connect()
    received_all: list[tuple[int, dict[str, str]]] = []
    for step in json.loads(subject):
        if isinstance(step, list):
            path, method, headers = step
            connection.request(method, path, None, headers)
            response = connection.getresponse()
            response.read()
            received = {name.lower(): value for name, value in response.getheaders()}
            received_all.append((response.status, received))
        else:
            time.sleep(step)
    print(json.dumps(received_all))
elif kind == "each":
    print(json.dumps(ask([subject, *rest])))
else:
    path, at_once = rest[0], int(rest[1]) if rest[1:] else 1
    with ThreadPoolExecutor(at_once) as pool:
        answers = pool.map(lambda _: ask([path] * (int(subject) // at_once)), range(at_once))
    print(json.dumps([name for several in answers for name in several]))
