"""Types of command-line options, and the limit on open files, for the programs of `bench`."""

from __future__ import annotations

import argparse
import math
import resource
from collections.abc import Mapping
from typing import TypeVar

Named = TypeVar("Named")
SPARE_FILES = 64


class ImpossibleError(Exception):
    """The run is not possible; the message has the reason."""


def positive(text: str) -> float:
    value = float(text)
    if not (math.isfinite(value) and value > 0):
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return value


def count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    return value


def count_or_zero(text: str) -> int:
    return 0 if text == "0" else count(text)


def named(
    parser: argparse.ArgumentParser, kind: str, known: Mapping[str, Named], text: str | None
) -> list[Named]:
    """Returns the values of the names in a list such as "a,b"; all of them without a list."""
    names = [name.strip() for name in text.split(",")] if text else list(known)
    for name in names:
        if name not in known:
            parser.error(f"unknown {kind} {name!r}; the {kind}s are {', '.join(known)}")
    return [known[name] for name in names]


def size(text: str) -> tuple[int, int]:
    width, by, height = text.partition("x")
    if not (by and width.isdigit() and height.isdigit() and int(width) and int(height)):
        raise argparse.ArgumentTypeError(f"{text!r} is not WIDTHxHEIGHT")
    return int(width), int(height)


def allow_files(wanted: int) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = wanted + SPARE_FILES
    if soft != resource.RLIM_INFINITY and soft < needed:
        if hard != resource.RLIM_INFINITY and hard < needed:
            raise ImpossibleError(f"{wanted} connections need `ulimit -n {needed}`; the limit is {hard}")
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
