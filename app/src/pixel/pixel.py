"""Pixels: their JSON, its validation, and the binary record of a change."""

import json
import re
import struct
from collections.abc import Callable, Iterable
from http import HTTPStatus
from typing import Annotated, Any, Literal, NamedTuple

import msgspec

from pixel.canvas import CHANNELS, Canvas, Channel
from pixel.problems import Problem
from pixel.settings import MAX_BATCH

Coordinate = Annotated[int, msgspec.Meta(ge=0)]
Value = Annotated[int, msgspec.Meta(ge=0, le=255)]


class Change(NamedTuple):
    """One channel of one pixel, and its new value; ``channel`` is 0, 1, 2 for R, G, B."""

    x: int
    y: int
    channel: int
    value: int


_INDEX: dict[Channel, int] = {"R": 0, "G": 1, "B": 2}


class Pixel(msgspec.Struct, frozen=True, forbid_unknown_fields=True, gc=False):
    """One channel of a pixel: the body of ``POST /pixel``, repeated in its answer."""

    x: Coordinate
    y: Coordinate
    channel: Channel
    value: Value

    def change(self) -> Change:
        """The change that this request makes."""
        # Change(…) takes twice as long.
        return tuple.__new__(Change, (self.x, self.y, _INDEX[self.channel], self.value))


class Received(msgspec.Struct, frozen=True, gc=False):
    """The answer to ``POST /pixel``."""

    status: Literal["ok"]
    received: Pixel


class Colour(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The three channels of a pixel: the body of ``PUT /pixel/{x}/{y}``."""

    R: Value
    G: Value
    B: Value


class PixelColour(msgspec.Struct, frozen=True, gc=False):
    """A pixel with its three channels."""

    x: Coordinate
    y: Coordinate
    R: Value
    G: Value
    B: Value


Batch = Annotated[list[Pixel], msgspec.Meta(min_length=1, max_length=MAX_BATCH)]


class Written(msgspec.Struct, frozen=True):
    """The answer to ``POST /pixels``."""

    status: Literal["ok"]
    written: int


_RECORD = struct.Struct("<HHBB")
RECORD_BYTES = _RECORD.size


def pack(changes: Iterable[Change]) -> bytes:
    """Encode changes for the event stream: six bytes each (x, y: 16 bits, little-endian)."""
    return b"".join([_RECORD.pack(*change) for change in changes])


def unpack(record: bytes) -> list[Change]:
    """Decode the result of ``pack``."""
    return [Change(*fields) for fields in _RECORD.iter_unpack(record)]


def coalesce(records: Iterable[bytes]) -> list[tuple[int, int, str, int]]:
    """Return the last value of each channel in results of ``pack``: x, y, channel, value."""
    changes = b"".join(records)
    # Keys of bytes take half the time of tuples, and no work of the garbage collector.
    last = {
        changes[start : start + RECORD_BYTES - 1]: changes[start : start + RECORD_BYTES]
        for start in range(0, len(changes), RECORD_BYTES)
    }
    return [
        (x, y, CHANNELS[channel], value)
        for x, y, channel, value in _RECORD.iter_unpack(b"".join(last.values()))
    ]


class Reader:
    """Reads JSON bodies strictly: no value is coerced, dropped or read twice.

    msgspec validates. It accepts duplicate keys and a negative zero; both are found by counting
    quotes (keys and channels have two each, nothing else has any) and by looking for a minus.

    Every method raises a ``Problem``: 400 if the body isn't JSON; 422, with fields and reasons, if
    it is JSON but invalid.
    """

    def __init__(self, canvas: Canvas) -> None:
        self._canvas = canvas
        self._decode_pixel = msgspec.json.Decoder(Pixel).decode
        self._decode_pixels = msgspec.json.Decoder(Batch).decode
        self._decode_colour = msgspec.json.Decoder(Colour).decode
        self._pixel_rules = {
            "x": _integer(canvas.width - 1),
            "y": _integer(canvas.height - 1),
            "channel": _Rule(lambda value: value in CHANNELS, 'must be "R", "G" or "B"'),
            "value": _integer(255),
        }
        self._colour_rules: dict[str, _Rule] = dict.fromkeys(CHANNELS, _integer(255))

    def pixel(self, body: bytes) -> Pixel:
        """The body of ``POST /pixel``."""
        try:
            pixel = self._decode_pixel(body)
        except _REFUSALS:
            pixel = None
        if (
            pixel is None
            or body.count(b'"') != 10
            or b"-" in body
            or not self._canvas.contains(pixel.x, pixel.y)
        ):
            raise _object_problem(body, self._pixel_rules)
        return pixel

    def pixels(self, body: bytes) -> list[Pixel]:
        """The body of ``POST /pixels``: 1 to 10,000 pixels."""
        pixels: list[Pixel] = []
        fault = None
        # msgspec reads all items before it counts them, so a body with too many is refused before.
        if body.count(b"{") <= MAX_BATCH and body.count(b'"') <= 20 * MAX_BATCH and body.isascii():
            try:
                pixels = self._decode_pixels(body)
            except _REFUSALS as error:
                fault = _ITEM.search(str(error)[-64:])
        if (
            not pixels
            or body.count(b'"') != 10 * len(pixels)
            or b"-" in body
            or not self._canvas.contains(
                max([pixel.x for pixel in pixels]), max([pixel.y for pixel in pixels])
            )
        ):
            raise self._batch_problem(body, pixels, int(fault[1]) if fault else None)
        return pixels

    def colour(self, body: bytes) -> Colour:
        """The body of ``PUT /pixel/{x}/{y}``."""
        try:
            colour = self._decode_colour(body)
        except _REFUSALS:
            colour = None
        if colour is None or body.count(b'"') != 6 or b"-" in body:
            raise _object_problem(body, self._colour_rules)
        return colour

    def _batch_problem(self, body: bytes, pixels: list[Pixel], index: int | None) -> Problem:
        """Explain a refused batch by its first faulty item.

        ``pixels`` are the pixels that msgspec has decoded, or ``index`` is the item that it refused.
        """
        fields = ", ".join(self._pixel_rules)
        size = _Fault("", f"must contain 1 to {MAX_BATCH} pixels, objects with {fields}")
        if len(body) <= EXPLAINED_BYTES:
            document = _parse(body)
            if not isinstance(document, list) or isinstance(document, _Object):
                return _problem([_Fault("", "must be an array of pixels")])
            for number, item in enumerate(document):
                if faults := _faults(item, self._pixel_rules, f"[{number}]"):
                    return _problem(faults)
            return _problem([] if document else [size])
        _check_syntax(body)
        if not body.lstrip().startswith(b"["):
            return _problem([_Fault("", "must be an array of pixels")])
        if index is None and not pixels:
            return _problem([size])
        if index is None:
            index = self._first_fault(body, pixels)
        # Each item before this one is a pixel, and has one closing brace.
        rest = body.split(b"}", index)[-1] if index else body.lstrip()[1:]
        return _problem(_prefix_faults(rest.lstrip(b" \t\r\n,"), self._pixel_rules, f"[{index}]"))

    def _first_fault(self, body: bytes, pixels: list[Pixel]) -> int:
        """The first item with a fault that msgspec accepts."""
        width, height = self._canvas.width, self._canvas.height
        texts = body.split(b"}")
        minus = body.find(b"-")
        none = len(pixels)
        return min(
            next((n for n, text in enumerate(texts) if text.count(b'"') != 10), none),
            next((n for n, p in enumerate(pixels) if p.x >= width or p.y >= height), none),
            body.count(b"}", 0, minus) if minus >= 0 else none,
        )


# The rest of this module explains a refusal with a second, slower parser, because msgspec's messages
# don't name all faults. It runs on the event loop, so its work is bounded: it parses EXPLAINED_BYTES
# at most and stops after REPORTED_FAULTS. Of a larger body only the syntax is checked (by msgspec,
# which then builds no values), and the first faulty item is explained.

EXPLAINED_BYTES = 8192
"""Most bytes of a body that are parsed again to explain a refusal."""

REPORTED_FAULTS = 10

_REFUSALS = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)

_ITEM = re.compile(r" - at `\$\[(\d+)\][^`]*`$")

_skip = msgspec.json.Decoder(msgspec.Raw).decode


class _Integer(str):
    """An integer as written: ``-0`` and ten thousand digits are integers too."""


class _Object(list[tuple[str, Any]]):
    """A JSON object with all its members, duplicates included."""


class _Rule(NamedTuple):
    accepts: Callable[[Any], bool]
    reason: str


class _Fault(NamedTuple):
    field: str
    reason: str


def _integer(last: int) -> _Rule:
    def accepts(value: Any) -> bool:
        return isinstance(value, _Integer) and value.isdigit() and len(value) < 9 and int(value) <= last

    return _Rule(accepts, f"must be an integer from 0 to {last}")


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON value")


_decoder = json.JSONDecoder(object_pairs_hook=_Object, parse_int=_Integer, parse_constant=_no_constant)


def _parse(body: bytes) -> Any:
    """A body of at most EXPLAINED_BYTES. Raises a 400 ``Problem``."""
    try:
        text = body.decode()
        if text.startswith("\ufeff"):
            raise ValueError("it starts with a byte order mark")
        return _decoder.decode(text)
    except json.JSONDecodeError as error:
        detail = f"The body is not JSON: {error.msg} at line {error.lineno} column {error.colno}."
    except UnicodeDecodeError as error:
        detail = f"The body is not JSON: byte {error.start} is not UTF-8."
    except ValueError as error:
        detail = f"The body is not JSON: {error}."
    except RecursionError:
        detail = "The body is nested too deeply."
    raise Problem(HTTPStatus.BAD_REQUEST, detail)


def _check_syntax(body: bytes) -> None:
    """Raise a 400 ``Problem`` unless a body of any size is JSON; builds no values."""
    try:
        body.decode()
        _skip(body)
    except UnicodeDecodeError as error:
        detail = f"The body is not JSON: byte {error.start} is not UTF-8."
    except RecursionError:
        detail = "The body is nested too deeply."
    except msgspec.DecodeError as error:
        detail = f"The body is not JSON: {str(error).removeprefix('JSON is malformed: ')}."
    else:
        return
    raise Problem(HTTPStatus.BAD_REQUEST, detail)


def _object_problem(body: bytes, rules: dict[str, _Rule]) -> Problem:
    if len(body) <= EXPLAINED_BYTES:
        return _problem(_faults(_parse(body), rules))
    _check_syntax(body)
    return _problem(_prefix_faults(body.lstrip(), rules, ""))


def _prefix_faults(text: bytes, rules: dict[str, _Rule], place: str) -> list[_Fault]:
    """The faults of the JSON value at the start of a text; a large value is not examined."""
    try:
        value, _ = _decoder.raw_decode(text[:EXPLAINED_BYTES].decode(errors="ignore"))
    except (ValueError, RecursionError):
        return [_Fault(place, f"must be an object with {', '.join(rules)} and nothing else")]
    return _faults(value, rules, place)


def _faults(document: Any, rules: dict[str, _Rule], place: str = "") -> list[_Fault]:
    if not isinstance(document, _Object):
        return [_Fault(place, f"must be an object with {', '.join(rules)}")]
    prefix = f"{place}." if place else ""
    faults = []
    seen: set[str] = set()
    for name, value in document:
        # A lone surrogate is JSON, but can't be sent back as UTF-8.
        shown = prefix + name[:50].encode(errors="backslashreplace").decode()
        if name in seen:
            faults.append(_Fault(shown, "is duplicated"))
        elif name not in rules:
            faults.append(_Fault(shown, f"is unknown; the fields are {', '.join(rules)}"))
        elif not rules[name].accepts(value):
            faults.append(_Fault(shown, rules[name].reason))
        seen.add(name)
        if len(faults) == REPORTED_FAULTS:
            return faults
    faults += [_Fault(prefix + name, "is missing") for name in rules if name not in seen]
    return faults[:REPORTED_FAULTS]


def _problem(faults: list[_Fault]) -> Problem:
    reported = faults or [_Fault("", "is invalid")]
    return Problem(
        HTTPStatus.UNPROCESSABLE_ENTITY,
        "; ".join(f"{field or 'the body'} {reason}" for field, reason in reported) + ".",
        errors=[fault._asdict() for fault in reported],
    )
