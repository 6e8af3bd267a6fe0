"""Validation of bodies, and the record of changes."""

import json
import time
from http import HTTPStatus

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pixel.canvas import CHANNELS, Canvas
from pixel.pixel import Change, Reader, coalesce, pack
from pixel.problems import Problem

READER = Reader(Canvas(1024, 512))
GOOD = {"x": 10, "y": 20, "channel": "R", "value": 255}

UINT16 = st.integers(0, 65_535)


CHANGES = st.lists(st.builds(Change, UINT16, UINT16, st.integers(0, 2), st.integers(0, 255)))


@given(CHANGES)
def test_changes_survive_their_record(changes: list[Change]) -> None:
    records = [pack([change]) for change in changes]
    assert [coalesce([record]) for record in records] == [
        [(x, y, CHANNELS[channel], value)] for x, y, channel, value in changes
    ]
    assert pack(changes) == b"".join(records)
    assert len(pack(changes)) == 6 * len(changes)


@given(st.lists(CHANGES), st.integers(1, 3))
def test_of_a_channel_that_changed_often_the_last_value_is_left(parts: list[list[Change]], step: int) -> None:
    near = [[Change(x % step, y % step, *rest) for x, y, *rest in part] for part in parts]
    last = {(x, y, CHANNELS[channel]): value for part in near for x, y, channel, value in part}
    assert coalesce(map(pack, near)) == [(*place, value) for place, value in last.items()]


@pytest.mark.parametrize(
    "body",
    [
        '{"x":10,"y":20,"channel":"R","value":255}',
        ' {\n"value" : 255,"channel":"R",\t"y":20, "x":10 }\r\n',
        r'{"\u0078":10,"y":20,"channel":"\u0052","value":255}',
    ],
)
def test_a_pixel_is_read_however_its_json_is_written(body: str) -> None:
    assert READER.pixel(body.encode()).change() == (10, 20, 0, 255)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"null and void",
        b'{"x":10,',
        b'{"x":NaN,"y":20,"channel":"R","value":1}',
        b'{"x":-Infinity,"y":20,"channel":"R","value":1}',
        b'{"x":01,"y":20,"channel":"R","value":1}',
        b'{"x":10,"y":20,"channel":"\xff","value":1}',
        b'{"x":10,"y":20,"channel":"R","value":1}x',
        b'\xef\xbb\xbf{"x":10,"y":20,"channel":"R","value":1}',
        b'{"x":"ten","y":20,"channel":"R","value":1',
        b'{"x":' * 500,
        b"[" * 5000,
        b"[" * 100_000 + b"]" * 100_000,
    ],
)
def test_what_is_not_json_is_a_400(body: bytes) -> None:
    for read in (READER.pixel, READER.pixels, READER.colour):
        with pytest.raises(Problem) as caught:
            read(body)
        assert caught.value.status == HTTPStatus.BAD_REQUEST


BAD_FIELDS = [
    ("x", "-1"),
    ("x", "1024"),
    ("y", "512"),
    ("x", "1" + "0" * 30),
    ("x", "1" * 5000),
    ("x", "-0"),
    ("x", "1e2"),
    ("x", "1E400"),
    ("x", "10.0"),
    ("x", "true"),
    ("x", "null"),
    ("x", '"10"'),
    ("x", "[10]"),
    ("value", "256"),
    ("value", "-1"),
    ("value", '"255"'),
    ("value", "255.0"),
    ("value", "{}"),
    ("channel", '"A"'),
    ("channel", '"r"'),
    ("channel", '""'),
    ("channel", '"RG"'),
    ("channel", '"R\\u0000"'),
    ("channel", "0"),
]


def with_field(field: str, text: str) -> str:
    fields = {name: json.dumps(value) for name, value in GOOD.items()} | {field: text}
    return "{" + ",".join(f'"{name}":{value}' for name, value in fields.items()) + "}"


@pytest.mark.parametrize(("field", "text"), BAD_FIELDS)
def test_a_bad_field_is_named(field: str, text: str) -> None:
    with pytest.raises(Problem) as caught:
        READER.pixel(with_field(field, text).encode())
    assert caught.value.status == HTTPStatus.UNPROCESSABLE_ENTITY
    assert [error["field"] for error in caught.value.errors or ()] == [field]
    assert "must be" in caught.value.detail


@pytest.mark.parametrize(("field", "text"), BAD_FIELDS)
def test_a_bad_field_in_a_batch_is_named_with_its_place(field: str, text: str) -> None:
    body = f"[{json.dumps(GOOD)},{with_field(field, text)},{json.dumps(GOOD)}]"
    with pytest.raises(Problem) as caught:
        READER.pixels(body.encode())
    assert caught.value.status == HTTPStatus.UNPROCESSABLE_ENTITY
    assert [error["field"] for error in caught.value.errors or ()] == [f"[1].{field}"]


@pytest.mark.parametrize(
    ("body", "field", "reason"),
    [
        ('{"y":20,"channel":"R","value":1}', "x", "is missing"),
        ('{"x":1,"y":2,"channel":"R","value":1,"z":3}', "z", "is unknown"),
        ('{"x":1,"y":2,"channel":"R","value":1,"x":1}', "x", "is duplicated"),
        (r'{"x":1,"y":2,"channel":"R","value":1,"\u0078":1}', "x", "is duplicated"),
        ('{"x":1,"y":2,"channel":"R","value":1,"z":{"a":[1,"\\""]}}', "z", "is unknown"),
        ("[]", "", "must be an object"),
        ('"x"', "", "must be an object"),
        ("null", "", "must be an object"),
    ],
)
def test_the_fault_of_an_object_is_named(body: str, field: str, reason: str) -> None:
    with pytest.raises(Problem) as caught:
        READER.pixel(body.encode())
    assert caught.value.status == HTTPStatus.UNPROCESSABLE_ENTITY
    errors = caught.value.errors or []
    assert [error["field"] for error in errors] == [field]
    assert reason in errors[0]["reason"]


def test_all_faults_of_an_object_are_named() -> None:
    with pytest.raises(Problem) as caught:
        READER.pixel(b'{"x":-1,"channel":"Q","extra":[]}')
    fields = {error["field"] for error in caught.value.errors or ()}
    assert fields == {"x", "y", "channel", "value", "extra"}


@pytest.mark.parametrize("body", ["{}", "3", "[]", json.dumps([GOOD] * 10_001)])
def test_a_batch_is_an_array_of_1_to_10000_pixels(body: str) -> None:
    with pytest.raises(Problem) as caught:
        READER.pixels(body.encode())
    assert caught.value.status == HTTPStatus.UNPROCESSABLE_ENTITY


def test_in_a_large_batch_the_first_fault_is_named() -> None:
    good = json.dumps(GOOD)
    for item, field, reason in (
        (with_field("value", "256"), ".value", "must be an integer from 0 to 255"),
        (with_field("x", "1024"), ".x", "must be an integer from 0 to 1023"),
        (with_field("y", "-0"), ".y", "must be an integer from 0 to 511"),
        (good[:-1] + ',"x":1}', ".x", "is duplicated"),
        ("7", "", "must be an object"),
        ('{"x":"' + "7" * 10_000 + '"}', "", "must be an object"),
    ):
        body = f"[{', '.join([good] * 500 + [item] + [good] * 500 + [item])}]"
        with pytest.raises(Problem) as caught:
            READER.pixels(body.encode())
        assert caught.value.status == HTTPStatus.UNPROCESSABLE_ENTITY
        [error] = caught.value.errors or []
        assert error["field"] == f"[500]{field}"
        assert reason in error["reason"]


def test_ten_faults_are_reported() -> None:
    members = ",".join(f'"{number}":{number}' for number in range(100))
    for read, body in ((READER.pixel, "{%s}"), (READER.pixels, "[{%s}]"), (READER.colour, "{%s}")):
        with pytest.raises(Problem) as caught:
            read((body % members).encode())
        assert len(caught.value.errors or []) == 10


MEGABYTE = 1024 * 1024
PIXEL = json.dumps(GOOD).encode()
LARGE = {
    "members": b"{" + b",".join(b'"%d":1' % n for n in range(90_000)) + b"}",
    "members of an item": b"[{" + b",".join(b'"%d":1' % n for n in range(90_000)) + b"}]",
    "one member": b"[{" + b",".join([b'"x":1'] * 150_000) + b"}]",
    "too many pixels": b"[" + b",".join([PIXEL] * 20_000) + b"]",
    "too many objects": b"[" + b",".join([b"{}"] * 300_000) + b"]",
    "too many numbers": b"[" + b",".join([b"1"] * 500_000) + b"]",
    "the last is wrong": b"[" + b",".join([PIXEL] * 9_999 + [PIXEL[:-1] + b',"x":1}']) + b"]",
    "the last is outside": b"[" + b",".join([PIXEL] * 9_999 + [b'{"x":1024' + PIXEL[8:]]) + b"]",
    "arrays": b"[" * (MEGABYTE // 2) + b"]" * (MEGABYTE // 2),
    "a deep value": b'[{"x":' + b"[" * (MEGABYTE // 2) + b"]" * (MEGABYTE // 2) + b"}]",
    "an integer": b'[{"x":' + b"1" * MEGABYTE + b"}]",
    "a fraction": b'[{"x":1.' + b"1" * MEGABYTE + b"}]",
    "an exponent": b'[{"x":1e' + b"1" * MEGABYTE + b"}]",
    "a string": b'[{"channel":"' + b"A" * MEGABYTE + b'"}]',
    "a string that is no ASCII": b'[{"channel":"' + "ä".encode() * 500_000 + b'"}]',
    "a name": b'[{"' + b"\\u0041" * 170_000 + b'":1}]',
    "spaces": b" " * MEGABYTE,
    "quotes": b'"' * MEGABYTE,
    "surrogates": b'[{"' + b"\\ud800" * 170_000 + b'":1}]',
}


@pytest.mark.parametrize("body", LARGE.values(), ids=LARGE.keys())
def test_a_large_body_is_refused_quickly(body: bytes) -> None:
    for read in (READER.pixel, READER.pixels, READER.colour):
        seconds = []
        for _ in range(5):
            started = time.thread_time()
            with pytest.raises(Problem) as caught:
                read(body)
            caught.value.response()
            seconds.append(time.thread_time() - started)
        assert caught.value.status in (400, 422)
        # The bound is 5 ms on an idle machine; a valid batch takes 2 ms.
        assert min(seconds) < 0.02


def test_a_full_batch_is_read() -> None:
    assert len(READER.pixels(json.dumps([GOOD] * 10_000).encode())) == 10_000


@given(st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.just("R"),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(st.sampled_from(["x", "y", "channel", "value"]) | st.text(), inner),
    max_leaves=8,
))  # fmt: skip
def test_whatever_is_sent_is_read_or_refused_with_a_reason(document: object) -> None:
    body = json.dumps(document).encode()
    for read in (READER.pixel, READER.pixels, READER.colour):
        problem = None
        try:
            read(body)
        except Problem as refusal:
            problem = refusal
        if problem:
            assert problem.status in (400, 422)
            assert problem.status == 400 or problem.errors
            assert "is invalid" not in problem.detail
