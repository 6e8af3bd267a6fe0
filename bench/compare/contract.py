"""Checks that a variant implements the API before it is measured."""

from __future__ import annotations

import contextlib
import http.client
import json
import time
from typing import Any

from bench.compare.processes import StartError
from bench.compare.variants import Stack, Variant

PIXEL = {"x": 1, "y": 2, "channel": "R", "value": 3}
READY_SECONDS = 30.0


def check(variant: Variant, stack: Stack) -> None:
    """Waits until the variant answers, and checks its answers; raises StartError."""
    if variant.publish:
        return  # viewers' messages are checked as they are measured
    answer = _first_answer(variant, stack)
    if answer != (200, {"status": "ok", "received": PIXEL}):
        raise StartError(f"{variant.name} answered a write with {answer}\n{_log_tail(stack)}")
    if not variant.stores:
        return
    if "mix90" in variant.workloads:
        status, body = _ask(stack.port, "GET", "/pixel/1/2")
        if status != 200 or body.get("R") != PIXEL["value"]:
            raise StartError(f"{variant.name} did not store the pixel: {status} {body}")
    if "batch100" in variant.workloads:
        status, body = _ask(stack.port, "POST", "/pixels", [PIXEL, {**PIXEL, "channel": "G"}])
        if (status, body) != (200, {"status": "ok", "written": 2}):
            raise StartError(f"{variant.name} answered a batch with {status} {body}")


def _first_answer(variant: Variant, stack: Stack) -> tuple[int, Any]:
    deadline = time.monotonic() + READY_SECONDS
    last: tuple[int, Any] = (0, "nothing")
    while time.monotonic() < deadline:
        for program in stack.programs.values():
            if not program.running():
                raise StartError(f"{variant.name}: {program.name}:\n{program.log_tail()}")
        with contextlib.suppress(OSError, http.client.HTTPException):
            last = _ask(stack.port, "POST", "/pixel", PIXEL)
            if last[0] not in (502, 503, 504):
                return last
        time.sleep(0.05)
    raise StartError(f"{variant.name} was not ready in time; its last answer was {last}\n{_log_tail(stack)}")


def _log_tail(stack: Stack) -> str:
    return "\n".join(program.log_tail() for program in stack.programs.values())


def _ask(port: int, method: str, path: str, body: object = None) -> tuple[int, Any]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request(
            method,
            path,
            json.dumps(body) if body is not None else None,
            {"Content-Type": "application/json"},
        )
        answer = connection.getresponse()
        text = answer.read()
    finally:
        connection.close()
    try:
        return answer.status, json.loads(text)
    except ValueError:
        return answer.status, text[:200]
