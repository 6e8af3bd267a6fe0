"""What a pixel is: its JSON and the validation of it, and the record of its change."""

import json
import struct
from collections.abc import Callable, Iterable, Iterator
from http import HTTPStatus
from typing import Annotated, Any, Literal, NamedTuple

import msgspec

from pixel.canvas import CHANNELS, Canvas
from pixel.problems import Problem
from pixel.settings import MAX_BATCH

Channel = Literal["R", "G", "B"]
Coordinate = Annotated[int, msgspec.Meta(ge=0)]
Value = Annotated[int, msgspec.Meta(ge=0, le=255)]


class Change(NamedTuple):
    """One channel of one pixel, and its new value; ``channel`` is 0, 1, 2 for R, G, B."""

    x: int
    y: int
    channel: int
    value: int


_INDEX: dict[Channel, int] = {"R": 0, "G": 1, "B": 2}


class Pixel(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One channel of a pixel, as ``POST /pixel`` takes it and says it back."""

    x: Coordinate
    y: Coordinate
    channel: Channel
    value: Value

    def change(self) -> Change:
        """The change that it asks for."""
        return Change(self.x, self.y, _INDEX[self.channel], self.value)


class Received(msgspec.Struct, frozen=True):
    """The answer to ``POST /pixel``."""

    status: Literal["ok"]
    received: Pixel


class Colour(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A pixel's three channels, as ``PUT /pixel/{x}/{y}`` takes them."""

    R: Value
    G: Value
    B: Value


class PixelColour(msgspec.Struct, frozen=True):
    """A pixel whole."""

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
    """Changes as they stand in the event stream: six bytes each (x, y: 16 bits, little-endian)."""
    return b"".join([_RECORD.pack(*change) for change in changes])


def unpack(record: bytes) -> Iterator[Change]:
    """What ``pack`` has packed."""
    return map(Change._make, _RECORD.iter_unpack(record))


class Reader:
    """Reads JSON bodies, strictly: nothing is coerced, dropped or taken twice.

    msgspec decides. What it lets pass, equal keys and a negative zero, shows in a count of the
    quotes (keys and channels have two each, and there are no others) and in a minus.

    Every method raises a ``Problem``: 400 if the body isn't JSON; 422, with the fields and the
    reasons, if it is JSON but not what is asked for.
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
        self._colour_rules = dict.fromkeys(CHANNELS, _integer(255))

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
            raise _problem(_faults(_parse(body), self._pixel_rules))
        return pixel

    def pixels(self, body: bytes) -> list[Pixel]:
        """The body of ``POST /pixels``: 1 to 10,000 pixels."""
        try:
            pixels = self._decode_pixels(body)
        except _REFUSALS:
            pixels = []
        if (
            not pixels
            or body.count(b'"') != 10 * len(pixels)
            or b"-" in body
            or not all(self._canvas.contains(pixel.x, pixel.y) for pixel in pixels)
        ):
            raise self._batch_problem(_parse(body))
        return pixels

    def colour(self, body: bytes) -> Colour:
        """The body of ``PUT /pixel/{x}/{y}``."""
        try:
            colour = self._decode_colour(body)
        except _REFUSALS:
            colour = None
        if colour is None or body.count(b'"') != 6 or b"-" in body:
            raise _problem(_faults(_parse(body), self._colour_rules))
        return colour

    def _batch_problem(self, document: Any) -> Problem:
        if not isinstance(document, list) or isinstance(document, _Object):
            return _problem([_Fault("", "must be an array of pixels")])
        if not 1 <= len(document) <= MAX_BATCH:
            return _problem([_Fault("", f"must hold 1 to {MAX_BATCH} pixels")])
        for index, item in enumerate(document):
            if faults := _faults(item, self._pixel_rules, f"[{index}]"):
                return _problem(faults)
        return _problem([])


# What follows explains a refusal. It is a second, slow reader, which is told everything about a
# body that msgspec has no words for.

_REFUSALS = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)


class _Integer(str):
    """An integer as it is written: ``-0`` and ten thousand digits are integers too."""


class _Object(list[tuple[str, Any]]):
    """A JSON object with all its members, also those of the same name."""


class _Rule(NamedTuple):
    accepts: Callable[[Any], bool]
    reason: str


class _Fault(NamedTuple):
    field: str
    reason: str


def _integer(last: int) -> _Rule:
    def accepts(value: Any) -> bool:
        return (
            isinstance(value, _Integer)
            and value.isdigit()
            and len(value) < 9
            and int(value) <= last
        )

    return _Rule(accepts, f"must be an integer from 0 to {last}")


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def _parse(body: bytes) -> Any:
    try:
        return json.loads(
            body.decode(),
            object_pairs_hook=_Object,
            parse_int=_Integer,
            parse_constant=_no_constant,
        )
    except json.JSONDecodeError as error:
        place = f"line {error.lineno} column {error.colno}"
        detail = f"The body is not JSON: {error.msg} at {place}."
    except UnicodeDecodeError as error:
        detail = f"The body is not JSON: byte {error.start} is not UTF-8."
    except ValueError as error:
        detail = f"The body is not JSON: {error}."
    except RecursionError:
        detail = "The body is nested too deeply."
    raise Problem(HTTPStatus.BAD_REQUEST, detail)


def _faults(document: Any, rules: dict[str, _Rule], place: str = "") -> list[_Fault]:
    if not isinstance(document, _Object):
        return [_Fault(place, f"must be an object with {', '.join(rules)}")]
    prefix = f"{place}." if place else ""
    faults = []
    seen: set[str] = set()
    for name, value in document:
        if name in seen:
            faults.append(_Fault(prefix + name, "stands there twice"))
        elif name not in rules:
            faults.append(_Fault(prefix + name[:50], f"is not known; known are {', '.join(rules)}"))
        elif not rules[name].accepts(value):
            faults.append(_Fault(prefix + name, rules[name].reason))
        seen.add(name)
    faults += [_Fault(prefix + name, "is missing") for name in rules if name not in seen]
    return faults


def _problem(faults: list[_Fault]) -> Problem:
    told = faults or [_Fault("", "is not what is asked for")]
    return Problem(
        HTTPStatus.UNPROCESSABLE_ENTITY,
        "; ".join(f"{field or 'the body'} {reason}" for field, reason in told[:10]) + ".",
        errors=[fault._asdict() for fault in told[:10]],
    )
