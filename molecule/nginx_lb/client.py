#!/usr/bin/python3
"""Ask the balancer on this host; curl isn't part of a minimal Debian.

client.py one PATH [METHOD [BODY [HEADER…]]]   prints [status, headers, body] as JSON
client.py many COUNT                           prints who answered each of so many GETs, or the status
"""

import http.client
import json
import sys

kind, subject, *rest = sys.argv[1:]
connection = http.client.HTTPConnection("127.0.0.1", 80, timeout=10)
if kind == "one":
    method, body, *headers = [*rest, *["GET", ""][len(rest) :]]
    fields = dict(header.split(": ", 1) for header in headers)
    connection.request(method, subject, body.encode() or None, fields)
    response = connection.getresponse()
    received = {name.lower(): value for name, value in response.getheaders()}
    print(json.dumps([response.status, received, response.read().decode()]))
else:
    seen = []
    for _ in range(int(subject)):
        connection.request("GET", "/who")
        response = connection.getresponse()
        response.read()
        seen.append(response.headers.get("X-Pixel-Instance") or response.status)
    print(json.dumps(seen))
