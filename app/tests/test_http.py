"""The HTTP surface, as a client sees it."""

import asyncio
import gzip
import json
import re
from base64 import b64encode
from hashlib import sha256

import pytest
from conftest import RedisServer
from hypothesis import given
from hypothesis import strategies as st
from starlette.testclient import TestClient

from pixel import requests
from pixel.pixel import Reader
from pixel.problems import Problem

GOOD = {"x": 10, "y": 20, "channel": "R", "value": 255}


def test_a_pixel_is_written_and_read(client: TestClient) -> None:
    answer = client.post("/pixel", json=GOOD)
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "application/json"
    assert answer.text == ('{"status":"ok","received":{"x":10,"y":20,"channel":"R","value":255}}')
    assert client.get("/pixel/10/20").json() == {"x": 10, "y": 20, "R": 255, "G": 0, "B": 0}


def test_put_sets_all_channels_of_a_pixel(client: TestClient) -> None:
    answer = client.put("/pixel/1023/1023", json={"R": 1, "G": 2, "B": 3})
    assert answer.json() == {"x": 1023, "y": 1023, "R": 1, "G": 2, "B": 3}
    assert client.get("/pixel/1023/1023").json() == answer.json()
    assert answer.headers["x-pixel-event"] == client.get("/canvas.rgb").headers["x-pixel-event"]


def test_a_batch_is_written_in_its_order(client: TestClient) -> None:
    batch = [GOOD | {"value": 1}, GOOD | {"channel": "G"}, GOOD | {"value": 2}]
    answer = client.post("/pixels", json=batch)
    assert answer.text == '{"status":"ok","written":3}'
    assert answer.headers["x-pixel-event"] == client.get("/canvas.rgb").headers["x-pixel-event"]
    assert client.get("/pixel/10/20").json() == {"x": 10, "y": 20, "R": 2, "G": 255, "B": 0}


def test_a_batch_with_one_bad_pixel_writes_nothing(client: TestClient) -> None:
    answer = client.post("/pixels", json=[GOOD, GOOD | {"x": 5000}])
    assert answer.status_code == 422
    assert answer.json()["errors"][0]["field"] == "[1].x"
    assert client.get("/pixel/10/20").json()["R"] == 0


def test_a_full_batch_with_spaces_fits(client: TestClient) -> None:
    body = json.dumps([GOOD | {"x": 1000 + n % 24, "y": 1000} for n in range(10_000)], indent=1)
    answer = client.post("/pixels", content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 200


@pytest.mark.parametrize(
    "path",
    ["/pixel/1024/0", "/pixel/0/1024", "/pixel/-1/0", "/pixel/a/0", "/pixel/1.0/0", "/pixel/0/+1",
     "/pixel/" + "9" * 5000 + "/0", "/pixel/٣/0", "/nothing", "/pixel/", "/pixel/1/1/"],
)  # fmt: skip
def test_an_unknown_path_or_pixel_is_a_404(client: TestClient, path: str) -> None:
    for answer in (client.get(path), client.put(path, json={"R": 1, "G": 2, "B": 3})):
        assert answer.status_code == 404
        problem = answer.json()
        assert answer.headers["content-type"] == "application/problem+json"
        assert (problem["type"], problem["title"]) == ("about:blank", "Not Found")
        assert problem["status"] == 404


@pytest.mark.parametrize(
    ("path", "methods"),
    [
        ("/pixel", "OPTIONS, POST"),
        ("/pixels", "OPTIONS, POST"),
        ("/pixel/1/1", "GET, HEAD, OPTIONS, PUT"),
        ("/ping", "GET, HEAD, OPTIONS"),
        ("/", "GET, HEAD, OPTIONS"),
        ("/docs/static/swagger-ui.css", "GET, HEAD, OPTIONS"),
        ("/openapi.json", "GET, HEAD, OPTIONS"),
    ],
)
def test_allow_lists_the_methods(client: TestClient, path: str, methods: str) -> None:
    answer = client.request("DELETE", path)
    assert answer.status_code == 405
    assert answer.headers["allow"] == methods
    assert answer.json()["title"] == "Method Not Allowed"
    answer = client.options(path)
    assert (answer.status_code, answer.headers["allow"]) == (204, methods)


def test_a_type_other_than_json_is_a_415(client: TestClient) -> None:
    for headers in ({}, {"content-type": "text/plain"}, {"content-type": "application/jsonx"}):
        for method, path in (("POST", "/pixel"), ("POST", "/pixels"), ("PUT", "/pixel/1/1")):
            answer = client.request(method, path, content="{}", headers=headers)
            assert answer.status_code == 415
    answer = client.post(
        "/pixel",
        content=json.dumps(GOOD),
        headers={"content-type": "Application/JSON ; charset=utf-8"},
    )
    assert answer.status_code == 200


@pytest.mark.parametrize("coding", ["gzip", "br", "zstd", "identity, gzip"])
def test_an_encoded_body_is_a_415(client: TestClient, coding: str) -> None:
    headers = {"content-type": "application/json", "content-encoding": coding}
    for method, path in (("POST", "/pixel"), ("POST", "/pixels"), ("PUT", "/pixel/1/1")):
        for content in (gzip.compress(json.dumps(GOOD).encode()), json.dumps(GOOD).encode()):
            answer = client.request(method, path, content=content, headers=headers)
            assert answer.status_code == 415
            assert answer.headers["accept-encoding"] == "identity"
            assert "Content-Encoding" in answer.json()["detail"]
    headers["content-encoding"] = "Identity"
    assert client.post("/pixel", content=json.dumps(GOOD), headers=headers).status_code == 200


@pytest.mark.parametrize("codings", [("gzip", "identity"), ("identity", "gzip")])
def test_an_encoding_beside_identity_is_a_415(client: TestClient, codings: tuple[str, str]) -> None:
    headers = [("content-type", "application/json"), *(("content-encoding", each) for each in codings)]
    assert client.post("/pixel", content=json.dumps(GOOD), headers=headers).status_code == 415


# Pieces of valid and of almost valid JSON.
PIECES = [
    *(b"{", b"}", b"[", b"]", b",", b":", b'"', b" ", b"\\", b"-", b"1", b"null", b"true", b"NaN"),
    *(b'"x":1', b'"y":2', b'"channel":"R"', b'"value":3', b'"R":1', b'"G":2', b'"B":3', b'"x"'),
    *(b'"\\ud800"', b'"\\udc00\\ud800":1', b"\\u0000", b"\xff", b"\xed\xa0\x80", b"\xef\xbb\xbf"),
    *(
        b"1e400",
        b"-0",
        b"0.1",
        b"9" * 500,
        b'{"x":1,"y":2,"channel":"R","value":3}',
        b"\n",
        b"\x00",
    ),
]


@given(st.binary(max_size=40) | st.lists(st.sampled_from(PIECES), max_size=16).map(b"".join))
def test_no_body_makes_a_500(client: TestClient, body: bytes) -> None:
    headers = {"content-type": "application/json"}
    for method, path in (("POST", "/pixel"), ("POST", "/pixels"), ("PUT", "/pixel/1/1")):
        for content in (body, b"[%b]" % body, b"{%b}" % body, b'{"%b":1}' % body):
            answer = client.request(method, path, content=content, headers=headers)
            assert answer.status_code in (200, 400, 413, 422), (method, path, content, answer.text)
            if answer.status_code != 200:
                assert answer.headers["content-type"] == "application/problem+json"
                assert answer.json()["detail"]


def test_answers_that_can_change_are_not_cached(client: TestClient) -> None:
    fresh = ("/pixel/1/1", "/fleet/self", "/fleet/all", "/fleet/first", "/ping", "/healthz",
             "/readyz", "/metrics", "/openapi.json", "/docs", "/nothing", "/pixel/5000/1",
             "/canvas.png?w=0")  # fmt: skip
    for path in fresh:
        for method in ("GET", "HEAD"):
            assert client.request(method, path).headers["cache-control"] == "no-store", path
    for path in ("/", "/live/main.js", "/docs/static/swagger-ui.css"):
        answer = client.get(path)
        assert answer.headers["cache-control"] == "no-cache"
        assert answer.headers["etag"]
    assert client.post("/pixel", json={}).headers["cache-control"] == "no-store"
    assert client.request("DELETE", "/pixel").headers["cache-control"] == "no-store"


def test_a_body_beyond_its_bound_is_a_413(client: TestClient) -> None:
    padded = json.dumps(GOOD) + " " * 1024
    headers = {"content-type": "application/json"}
    assert client.post("/pixel", content=padded, headers=headers).status_code == 413
    assert client.put("/pixel/1/1", content=padded, headers=headers).status_code == 413
    parts = (b" " * 65_536 for _ in range(100))
    assert client.post("/pixels", content=parts, headers=headers).status_code == 413


def test_identity_and_health(client: TestClient) -> None:
    assert client.get("/ping").json() == {"instance": "c5", "port": 8000, "release": "r1"}
    assert client.get("/healthz").json() == {"status": "ok"}
    ready = client.get("/readyz").json()
    assert ready.pop("redis_ms") < 800
    assert ready == {
        "instance": "c5",
        "port": 8000,
        "release": "r1",
        "redis": "ok",
        "crashes": 0,
        "maintenance": None,
    }


def test_readiness_requires_permission_to_write(client: TestClient, redis_server: RedisServer) -> None:
    with redis_server.admin() as admin:
        admin.acl_setuser("pixel", enabled=True, commands=["-bitfield"])
        try:
            answer = client.get("/readyz")
        finally:
            admin.acl_setuser("pixel", enabled=True, commands=["+bitfield"])
    assert answer.status_code == 503
    assert answer.headers["retry-after"] == "1"
    assert answer.json()["redis"] == "unavailable"
    assert answer.json()["instance"] == "c5"
    assert client.get("/healthz").status_code == 200


def test_the_documentation_loads_nothing_from_outside(client: TestClient) -> None:
    answer = client.get("/docs")
    page = answer.text
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    [script] = re.findall("<script>(.*?)</script>", page, re.DOTALL)
    digest = b64encode(sha256(script.encode()).digest()).decode()
    assert f"script-src 'self' 'sha256-{digest}';" in policy
    assert "http" not in page.replace("http-equiv", "")
    for path in ("swagger-ui-bundle.js", "swagger-ui.css", "favicon-32x32.png"):
        assert f'"/docs/static/{path}"' in page
        assert client.get(f"/docs/static/{path}").status_code == 200


def test_a_body_that_never_ends_is_a_408(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(requests, "BODY_SECONDS", 0.05)

    async def receive() -> dict[str, object]:
        await asyncio.sleep(0.02)
        return {"type": "http.request", "body": b" ", "more_body": True}

    scope = {"headers": [(b"content-type", b"application/json")]}
    with pytest.raises(Problem) as caught:
        asyncio.run(requests.read_json(scope, receive, 1024))
    assert caught.value.status == 408


def test_an_internal_error_is_a_500_and_logged(
    client: TestClient, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("internal detail")

    monkeypatch.setattr(Reader, "pixel", fail)
    monkeypatch.setattr(Reader, "pixels", fail)
    for path in ("/pixel", "/pixels"):
        answer = client.post(path, json=GOOD, headers={"X-Request-ID": "r-17"})
        assert answer.status_code == 500
        assert answer.headers["content-type"] == "application/problem+json"
        assert "internal detail" not in answer.text
        record = caplog.records[-1]
        assert record.message == f"POST {path} failed"
        assert record.request_id == "r-17"
        assert record.exc_info
