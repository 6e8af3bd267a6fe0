"""Access: keys, anonymous clients and addresses, on the fast path and through FastAPI."""

import asyncio
import json
import time
from collections.abc import Callable
from http import HTTPStatus
from typing import Any

import httpx2 as httpx
import pytest
from conftest import RedisServer, Service, wait_until
from test_protocol import GOOD, Answer, Client, Served, head, serving

from pixel import access, keys
from pixel.cluster import Redis
from pixel.names import EVENTS, KEYS, KEYS_VERSION, budget_key
from pixel.problems import STAMP, Problem
from pixel.store import Store

BUDGET = json.dumps({"per_minute": 1, "burst": 4})

VARYING = ("date", "ratelimit")
"""Headers that differ between two answers of the same kind."""


async def run(server: RedisServer, *command: str) -> str:
    """Execute a command of ``pixel.keys``, and return the token."""
    return await keys.execute(keys.parse(command), Redis(server.settings()))


def bearer(token: str) -> str:
    return f"Authorization: Bearer {token}"


async def write_both_ways(served: Served, *lines: str) -> Answer:
    """Write a pixel on the fast path, and through FastAPI; returns the second answer.

    Both are equal but for what is left of the budget.
    """
    client = await served.connect()
    whole = await client.ask(head(len(GOOD), *lines) + GOOD)
    before = len(served.came)
    other = await client.ask(head(len(GOOD), *lines), GOOD)
    assert len(served.came) == before + 1
    client.writer.close()
    assert [name for name, _ in whole.headers] == [name for name, _ in other.headers]
    answers = [(a.first, [h for h in a.headers if h[0] not in VARYING], a.body) for a in (whole, other)]
    assert answers[0] == answers[1]
    return other


async def ask(client: Client, target: str, *lines: str, body: bytes = b"") -> Answer:
    request = head(len(body), *lines, first=f"{target} HTTP/1.1") + body
    return await client.ask(request, method=target.split()[0])


def header(answer: Answer, name: str) -> str:
    return dict(answer.headers).get(name, "")


def authors(server: RedisServer) -> list[Any]:
    with server.admin() as admin:
        return [json.loads(fields.get(b"a", b"null")) for _, fields in admin.xrange(EVENTS)]


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers follow the keys without a noticeable delay."""
    monkeypatch.setattr(access, "FOLLOW_PAUSE", 0.01)


async def test_a_key_is_followed_from_its_creation_to_its_end(redis_server: RedisServer, quick: None) -> None:
    async with serving(redis_server.settings()) as served:
        assert (await write_both_ways(served, bearer("pixel_unknown"))).status == 401
        token = await run(redis_server, "create", "alice", "--scopes", "paint")
        await asyncio.sleep(0.2)
        assert (await write_both_ways(served, bearer(token))).status == 200
        assert (await write_both_ways(served, f"authorization: bEARER {token}")).status == 200
        rotated = await run(redis_server, "rotate", "alice")
        await asyncio.sleep(0.2)
        answer = await write_both_ways(served, bearer(token))
        assert answer.status == 401
        assert header(answer, "www-authenticate") == 'bearer realm="pixel", error="invalid_token"'
        assert json.loads(answer.body)["detail"] == "The key is unknown; nothing was written."
        assert (await write_both_ways(served, bearer(rotated))).status == 200
        await run(redis_server, "revoke", "alice")
        await asyncio.sleep(0.2)
        answer = await write_both_ways(served, bearer(rotated))
        assert (answer.status, json.loads(answer.body)["title"]) == (401, "Unauthorized")
        assert "revoked" in json.loads(answer.body)["detail"]
        # Without a key, the client is anonymous; so it is with another scheme's credentials.
        assert (await write_both_ways(served)).status == 200
        assert (await write_both_ways(served, "Authorization: Basic YTpi")).status == 200
    assert authors(redis_server) == [[["key:alice", 1]]] * 6 + [None] * 4


async def test_a_key_expires_by_the_clock_of_redis(redis_server: RedisServer) -> None:
    token = await run(redis_server, "create", "alice", "--scopes", "paint", "--expires", "1m")
    async with serving(redis_server.settings()) as served:
        assert (await write_both_ways(served, bearer(token))).status == 200
        with redis_server.admin() as admin:
            [stored] = admin.hvals(KEYS)
            fields = json.loads(stored)
            admin.hset(KEYS, "alice", json.dumps(fields | {"expires": int(time.time()) + 2}))
            admin.incr(KEYS_VERSION)
        await asyncio.sleep(1)
        assert (await write_both_ways(served, bearer(token))).status == 200
        await asyncio.sleep(1.5)
        answer = await write_both_ways(served, bearer(token))
        assert (answer.status, "expired" in json.loads(answer.body)["detail"]) == (401, True)


async def test_each_write_needs_its_scope(redis_server: RedisServer) -> None:
    tokens = {scope: await run(redis_server, "create", scope, "--scopes", scope) for scope in keys.SCOPES}
    colour = b'{"R":1,"G":2,"B":3}'
    writes = {
        "POST /pixel": ("paint", GOOD),
        "PUT /pixel/1/2": ("paint", colour),
        "POST /pixels": ("batch", b"[" + GOOD + b"]"),
    }
    async with serving(redis_server.settings()) as served:
        client = await served.connect()
        for target, (needed, body) in writes.items():
            for scope, token in tokens.items():
                answer = await ask(client, target, bearer(token), body=body)
                assert answer.status == (200 if scope == needed else 403)
                challenge = f'bearer realm="pixel", error="insufficient_scope", scope="{needed}"'
                assert header(answer, "www-authenticate") == ("" if scope == needed else challenge)
        assert (await write_both_ways(served, bearer(tokens["batch"]))).status == 403


READS = ["GET /pixel/1/2", "HEAD /pixel/1/2", "GET /canvas.png", "GET /canvas.rgb", "GET /events"]
OPEN = ["GET /", "GET /ping", "GET /healthz", "GET /readyz", "GET /metrics", "GET /docs", "GET /openapi.json"]


@pytest.mark.parametrize("anonymous", ["paint", "read", "none"])
async def test_what_anonymous_clients_may_do_is_set(redis_server: RedisServer, anonymous: str) -> None:
    token = await run(redis_server, "create", "reader", "--scopes", "moderate")
    painter = await run(redis_server, "create", "painter", "--scopes", "paint")
    async with serving(redis_server.settings(anonymous=anonymous)) as served:
        written = await write_both_ways(served)
        assert written.status == (200 if anonymous == "paint" else 401)
        if anonymous != "paint":
            assert header(written, "www-authenticate") == 'bearer realm="pixel"'
        assert (await write_both_ways(served, bearer(painter))).status == 200
        client = await served.connect()
        for target, body in (("PUT /pixel/1/2", b'{"R":1,"G":2,"B":3}'), ("POST /pixels", b"[%b]" % GOOD)):
            answer = await ask(client, target, body=body)
            assert answer.status == written.status
        for target in READS:
            for lines, allowed in (([], anonymous != "none"), ([bearer(token)], True), ([bearer("x")], None)):
                client = await served.connect()
                answer = await ask(client, target, *lines)
                if allowed is not None:
                    assert answer.status == (200 if allowed else 401), target
                elif anonymous == "none":
                    assert answer.status == 401
                assert b'"written"' not in answer.body
                client.writer.close()
        client = await served.connect()
        for target in OPEN:
            assert (await ask(client, target)).status == 200


@pytest.mark.parametrize("anonymous", ["paint", "none"])
async def test_shared_caches_store_no_private_canvas(redis_server: RedisServer, anonymous: str) -> None:
    token = await run(redis_server, "create", "reader", "--scopes", "paint")
    async with serving(redis_server.settings(anonymous=anonymous)) as served:
        client = await served.connect()
        for target in ("GET /canvas.png", "GET /canvas.rgb"):
            first = await ask(client, target, bearer(token))
            again = await ask(client, target, bearer(token), f"If-None-Match: {header(first, 'etag')}")
            star = await ask(client, target, bearer(token), "If-None-Match: *")
            assert [answer.status for answer in (first, again, star)] == [200, 304, 304]
            for answer in (first, again, star):
                private = header(answer, "cache-control").startswith("private")
                assert private == (anonymous == "none")


@pytest.mark.parametrize(
    ("line", "account"),
    [
        ("X-Forwarded-For: 192.0.2.7", "addr:192.0.2.7"),
        ("X-Forwarded-For: ::ffff:192.0.2.7", "addr:192.0.2.7"),
        ("X-Forwarded-For: 2001:db8:1:2:aaaa::1", "addr:2001:db8:1:2::/64"),
        ("X-Forwarded-For: unix:", "addr:unknown"),
        ("X-Forwarded-For: 127.0.0.1", None),
        ("X-Forwarded-For: 10.1.2.3", None),
        ("X-Forwarded-For: 2001:db8:ffff::1", None),
        ("X-Real-IP: 192.0.2.7", None),  # the connection is from loopback
    ],
)
async def test_an_anonymous_client_is_an_address(
    redis_server: RedisServer, line: str, account: str | None
) -> None:
    settings = redis_server.settings(
        anonymous_budget=BUDGET,
        budget_exempt='["10.0.0.0/8", "2001:db8:ffff::/48"]',
        record_addresses=True,
    )
    async with serving(settings) as served:
        answers = [await write_both_ways(served, line) for _ in range(2)]
        assert [answer.status for answer in answers] == [200, 200]
        assert header(answers[0], "ratelimit") == ('"writes";r=2;t=120' if account else "")
        assert header(answers[1], "ratelimit") == ('"writes";r=0;t=240' if account else "")
        last = await write_both_ways(served, line)
        assert last.status == (429 if account else 200)
        with redis_server.admin() as admin:
            expected_keys = [budget_key(account).encode()] if account else []
            assert admin.keys(budget_key("*")) == expected_keys
    address = line.split(": ")[1].removeprefix("::ffff:")
    if line.startswith("X-Real"):
        address = "127.0.0.1"
    name = account or f"addr:{address}"
    expected = {"addr:unknown": None, "addr:2001:db8:ffff::1": [["addr:2001:db8:ffff::/64", 1]]}
    assert authors(redis_server)[0] == expected.get(name, [[name, 1]])


async def test_addresses_are_recorded_only_if_that_is_set(redis_server: RedisServer) -> None:
    async with serving(redis_server.settings(anonymous_budget=BUDGET)) as served:
        assert (await write_both_ways(served, "X-Forwarded-For: 192.0.2.7")).status == 200
    assert authors(redis_server) == [None, None]


async def test_a_budget_is_counted_in_channels_on_every_route(redis_server: RedisServer) -> None:
    settings = redis_server.settings(anonymous_budget=json.dumps({"per_minute": 1, "burst": 9}))
    line = "X-Forwarded-For: 192.0.2.7"
    async with serving(settings) as served:
        client = await served.connect()
        assert (await ask(client, "POST /pixel", line, body=GOOD)).status == 200
        answer = await ask(client, "PUT /pixel/1/2", line, body=b'{"R":1,"G":2,"B":3}')
        assert (answer.status, header(answer, "ratelimit")) == (200, '"writes";r=5;t=240')
        batch = b"[" + b",".join([GOOD] * 4) + b"]"
        answer = await ask(client, "POST /pixels", line, body=batch)
        assert (answer.status, header(answer, "ratelimit-policy")) == (200, '"writes";q=9;w=540')
        answer = await ask(client, "POST /pixels", line, body=batch)
        assert (answer.status, header(answer, "retry-after")) == (429, "180")
        assert header(answer, "ratelimit") == '"writes";r=1;t=480'
        assert json.loads(answer.body)["written"] == "no"
        assert (await ask(client, "POST /pixel", line, body=GOOD)).status == 200
        assert (await write_both_ways(served, line)).status == 429
        assert (await write_both_ways(served, "X-Forwarded-For: 192.0.2.8")).status == 200
        exposition = (await ask(client, "GET /metrics")).body.decode()
    assert 'pixel_refusals_total{reason="budget"}' in exposition


def test_the_refusal_of_a_retry_does_not_deny_the_attempt_before_it() -> None:
    problem = Problem(HTTPStatus.TOO_MANY_REQUESTS, "The budget is spent", written="no")
    answer = problem.response([(STAMP, b"1795776690.753 127.0.0.1:80 maybe")])
    assert json.loads(bytes(answer.body))["written"] == "maybe"
    assert "x-accel-redirect" not in answer.headers


async def test_a_key_has_its_own_budget_and_not_its_address_one(redis_server: RedisServer) -> None:
    counted = await run(
        redis_server, "create", "counted", "--scopes", "paint", "--per-minute", "1", "--burst", "4"
    )
    free = await run(redis_server, "create", "free", "--scopes", "paint")
    async with serving(redis_server.settings(anonymous_budget=BUDGET)) as served:
        line = "X-Forwarded-For: 192.0.2.7"
        for _ in range(3):
            assert (await write_both_ways(served, line, bearer(free))).status == 200
        assert [(await write_both_ways(served, line)).status for _ in range(3)] == [200, 200, 429]
        answers = [(await write_both_ways(served, line, bearer(counted))).status for _ in range(3)]
        assert answers == [200, 200, 429]


async def test_a_key_that_this_release_cannot_read_is_left_out(
    redis_server: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    token = await run(redis_server, "create", "alice", "--scopes", "paint")
    with redis_server.admin() as admin:
        admin.hset(KEYS, "broken", '{"hash": 1}')
    async with serving(redis_server.settings()) as served:
        assert (await write_both_ways(served, bearer(token))).status == 200
    assert caplog.text.count("key broken can't be read") == 1


async def test_moderation_needs_a_key_on_every_canvas(store: Store, redis_server: RedisServer) -> None:
    token = await run(redis_server, "create", "mod", "--scopes", "moderate")
    rules = access.Access(store, redis_server.settings())
    await rules.start()
    with pytest.raises(access.Refusal, match="needs a key"):
        rules.writer({}, None, "moderate")
    assert rules.writer({}, None, "paint") is None
    moderator = rules.writer({b"authorization": bearer(token).partition(" ")[2].encode()}, None, "moderate")
    assert moderator is not None
    assert moderator.author == "key:mod"
    rules.close()


async def test_a_worker_that_cannot_read_the_keys_accepts_none(
    redis_server: RedisServer, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It can still write, but would not know of a revoked key."""
    monkeypatch.setattr(access, "OUTDATED", 0.3)
    token = await run(redis_server, "create", "alice", "--scopes", "paint")
    async with serving(redis_server.settings()) as served:
        assert (await write_both_ways(served, bearer(token))).status == 200
        with redis_server.admin() as admin:
            version = admin.get(KEYS_VERSION)
            admin.delete(KEYS_VERSION)
            admin.lpush(KEYS_VERSION, "broken")
        await asyncio.sleep(0.5)
        assert (await write_both_ways(served, bearer(token))).status == 503
        assert (await write_both_ways(served)).status == 200
        with redis_server.admin() as admin:
            admin.set(KEYS_VERSION, version)
        await asyncio.sleep(0.5)
        assert (await write_both_ways(served, bearer(token))).status == 200


def test_a_key_takes_effect_on_all_workers_within_two_seconds(
    redis_server: RedisServer, start_service: Callable[..., Service]
) -> None:
    service = start_service(redis_server.url, PIXEL_ANONYMOUS="read", PIXEL_WORKERS="4")
    assert httpx.get(f"{service.url}/readyz", timeout=20).status_code == 200

    def statuses(token: str) -> set[int]:
        """The answers to many connections, which reach all workers."""
        found = set()
        for _ in range(40):
            with httpx.Client(timeout=20) as client:
                lines = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
                found.add(client.post(f"{service.url}/pixel", content=GOOD, headers=lines).status_code)
        return found

    token = asyncio.run(run(redis_server, "create", "alice", "--scopes", "paint"))
    time.sleep(2)
    assert statuses(token) == {200}
    asyncio.run(run(redis_server, "revoke", "alice"))
    time.sleep(2)
    assert statuses(token) == {401}
    assert token not in service.output()
    assert statuses("x") == {401}


def test_after_a_restore_the_keys_are_read_again(
    fragile_redis: RedisServer, start_service: Callable[..., Service]
) -> None:
    """The version may then be the same as before for other keys."""
    token = asyncio.run(run(fragile_redis, "create", "alice", "--scopes", "paint"))
    service = start_service(fragile_redis.url, PIXEL_ANONYMOUS="read", PIXEL_WORKERS="1")
    assert httpx.get(f"{service.url}/readyz", timeout=20).status_code == 200
    with fragile_redis.admin() as admin:
        admin.delete(KEYS)
    fragile_redis.kill()
    time.sleep(2)
    fragile_redis.start()
    lines = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}

    def status() -> int:
        return int(httpx.post(f"{service.url}/pixel", content=GOOD, headers=lines).status_code)

    wait_until(lambda: status() == 401)
