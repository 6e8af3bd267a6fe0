"""Validation of bodies, and the record of changes."""

import json
from http import HTTPStatus

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pixel.canvas import Canvas
from pixel.pixel import Change, Reader, pack, unpack
from pixel.problems import Problem

READER = Reader(Canvas(1024, 512))
GOOD = {"x": 10, "y": 20, "channel": "R", "value": 255}

UINT16 = st.integers(0, 65_535)


@given(st.lists(st.builds(Change, UINT16, UINT16, st.integers(0, 2), st.integers(0, 255))))
def test_changes_survive_their_record(changes: list[Change]) -> None:
    assert list(unpack(pack(changes))) == changes
    assert len(pack(changes)) == 6 * len(changes)


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
        ('{"x":1,"y":2,"channel":"R","value":1,"z":3}', "z", "is not known"),
        ('{"x":1,"y":2,"channel":"R","value":1,"x":1}', "x", "stands there twice"),
        (r'{"x":1,"y":2,"channel":"R","value":1,"\u0078":1}', "x", "stands there twice"),
        ('{"x":1,"y":2,"channel":"R","value":1,"z":{"a":[1,"\\""]}}', "z", "is not known"),
        ("[]", "", "must be an object"),
        ('"x"', "", "must be an object"),
        ("null", "", "must be an object"),
    ],
)
def test_what_is_wrong_with_an_object_is_told(body: str, field: str, reason: str) -> None:
    with pytest.raises(Problem) as caught:
        READER.pixel(body.encode())
    assert caught.value.status == HTTPStatus.UNPROCESSABLE_ENTITY
    errors = caught.value.errors or []
    assert [error["field"] for error in errors] == [field]
    assert reason in errors[0]["reason"]


def test_every_fault_of_an_object_is_told() -> None:
    with pytest.raises(Problem) as caught:
        READER.pixel(b'{"x":-1,"channel":"Q","extra":[]}')
    fields = {error["field"] for error in caught.value.errors or ()}
    assert fields == {"x", "y", "channel", "value", "extra"}


@pytest.mark.parametrize("body", ["{}", "3", "[]", json.dumps([GOOD] * 10_001)])
def test_a_batch_is_an_array_of_1_to_10000_pixels(body: str) -> None:
    with pytest.raises(Problem) as caught:
        READER.pixels(body.encode())
    assert caught.value.status == HTTPStatus.UNPROCESSABLE_ENTITY


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
            assert "what is asked for" not in problem.detail
