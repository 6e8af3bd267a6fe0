"""Moderation: protected areas, blocked clients, and their commands."""

import asyncio
import json
import re
import time
from collections.abc import Callable
from typing import Any

import httpx2 as httpx
import pytest
from conftest import RedisServer, Service
from test_access import ask, bearer, header, run, write_both_ways
from test_protocol import GOOD, serving

from pixel import access, keys, moderation
from pixel.names import ACTS, RESTRICTIONS
from pixel.settings import Settings
from pixel.store import Store

COLOUR = b'{"R":1,"G":2,"B":3}'


async def command(settings: Settings, *words: str) -> Any:
    """Execute a command of ``pixel.moderation``; returns what it prints."""
    output = await moderation.execute(moderation.parse(["--user", "olga", *words]), settings)
    lines = [json.loads(line) for line in output.splitlines()]
    return lines if words[0] in ("list", "acts") else lines[0]


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers follow the restrictions without a noticeable delay."""
    monkeypatch.setattr(access, "FOLLOW_PAUSE", 0.01)


async def json_of(http: Any, target: str, /, *lines: str, **body: Any) -> Any:
    content = json.dumps(body).encode() if body else b""
    answer = await ask(http, target, *lines, body=content)
    return answer.status, json.loads(answer.body)


async def test_an_area_is_protected_from_all_but_moderators(redis_server: RedisServer, quick: None) -> None:
    painter = bearer(await run(redis_server, "create", "painter", "--scopes", "paint,batch"))
    moderator = bearer(await run(redis_server, "create", "mod", "--scopes", "paint,batch,moderate"))
    # GOOD is at 10, 20.
    inside, outside = b"[%b]" % GOOD, b'[{"x":14,"y":20,"channel":"R","value":1}]'
    async with serving(redis_server.settings()) as served:
        client = await served.connect()
        wanted = {"area": "8,16,6,8", "reason": "The logo."}
        status, area = await json_of(client, "POST /moderation/areas", moderator, **wanted)
        assert (status, area["by"], area["area"]) == (200, "key:mod", "8,16,6,8")
        await asyncio.sleep(0.2)
        for lines in ([], [painter]):
            answer = await write_both_ways(served, *lines)
            assert answer.status == 403
            assert json.loads(answer.body) == {
                "type": "about:blank",
                "title": "Forbidden",
                "status": 403,
                "detail": "The area 8,16,6,8 is protected: The logo; nothing was written.",
                "written": "no",
                "protected": "8,16,6,8",
            }
            for target, body, allowed in (
                ("PUT /pixel/10/20", COLOUR, False),
                ("PUT /pixel/8/16", COLOUR, False),
                ("PUT /pixel/13/23", COLOUR, False),
                ("POST /pixels", outside[:-1] + b"," + inside[1:], False),
                ("PUT /pixel/7/16", COLOUR, True),
                ("PUT /pixel/8/24", COLOUR, True),
                ("PUT /pixel/14/23", COLOUR, True),
                ("POST /pixels", outside, True),
            ):
                answer = await ask(client, target, *lines, body=body)
                assert answer.status == (200 if allowed else 403), (target, lines)
        # Nothing of the refused batch was written.
        assert json.loads((await ask(client, "GET /pixel/10/20")).body)["R"] == 0
        assert (await write_both_ways(served, moderator)).status == 200
        assert (await ask(client, "POST /pixels", moderator, body=inside)).status == 200
        exposition = (await ask(client, "GET /metrics")).body.decode()
        refused = re.search(r'pixel_refusals_total\{reason="protected"\} (\S+)', exposition)
        assert refused is not None
        assert float(refused[1]) >= 12
        assert (await json_of(client, "GET /moderation", moderator))[1] == {"areas": [area], "blocks": []}
        assert (await json_of(client, f"DELETE /moderation/blocks/{area['id']}", moderator))[0] == 404
        assert (await json_of(client, f"DELETE /moderation/areas/{area['id']}", moderator))[0] == 200
        assert (await json_of(client, f"DELETE /moderation/areas/{area['id']}", moderator))[0] == 404
        await asyncio.sleep(0.2)
        assert (await write_both_ways(served)).status == 200
        _, acts = await json_of(client, "GET /moderation/acts", moderator)
        assert [(act["by"], act["did"], act["what"]["id"]) for act in acts] == [
            ("key:mod", "remove", area["id"]),
            ("key:mod", "protect", area["id"]),
        ]


async def test_without_areas_a_write_is_not_checked(store: Store, redis_server: RedisServer) -> None:
    rules = access.Access(store, redis_server.settings())
    await rules.start()
    unchecked = store.submit
    await command(redis_server.settings(), "protect", "0,0,1,1")
    await rules._refresh()
    assert store.submit != unchecked
    [area] = await command(redis_server.settings(), "list")
    await command(redis_server.settings(), "remove", area["id"])
    await rules._refresh()
    assert store.submit == unchecked
    rules.close()


@pytest.mark.parametrize(
    ("client", "line", "shown"),
    [
        ("addr:192.0.2.7", "X-Forwarded-For: 192.0.2.7", "addr:192.0.2.7"),
        ("addr:2001:db8:1:2::9", "X-Forwarded-For: 2001:db8:1:2:aaaa::1", "addr:2001:db8:1:2::/64"),
        ("addr:2001:db8:1:2::/64", "X-Forwarded-For: 2001:db8:1:2::", "addr:2001:db8:1:2::/64"),
        ("addr:127.0.0.1", "X-Other: 1", "addr:127.0.0.1"),
        ("key:alice", "", "key:alice"),
    ],
)
async def test_a_client_is_blocked_for_a_time(
    redis_server: RedisServer, quick: None, client: str, line: str, shown: str
) -> None:
    moderator = bearer(await run(redis_server, "create", "mod", "--scopes", "paint,moderate"))
    line = line or bearer(await run(redis_server, "create", "alice", "--scopes", "paint,batch"))
    async with serving(redis_server.settings()) as served:
        http = await served.connect()
        assert (await write_both_ways(served, line)).status == 200
        wanted = {"client": client, "minutes": 5, "reason": "Vandalism"}
        status, block = await json_of(http, "POST /moderation/blocks", moderator, **wanted)
        assert (status, block["client"]) == (200, shown)
        await asyncio.sleep(0.2)
        answer = await write_both_ways(served, line)
        problem = json.loads(answer.body)
        assert (answer.status, header(answer, "www-authenticate")) == (403, "")
        assert (
            problem["detail"]
            == f"This client is blocked until {block['until']}: Vandalism; nothing was written."
        )
        assert problem["blocked_until"] == block["until"]
        for target, body in (("PUT /pixel/1/2", COLOUR), ("POST /pixels", b"[%b]" % GOOD)):
            assert (await ask(http, target, line, body=body)).status == 403
        # Others are not blocked, and the client may read.
        assert (await write_both_ways(served, "X-Forwarded-For: 198.51.100.1")).status == 200
        assert (await write_both_ways(served, moderator, "X-Forwarded-For: 192.0.2.7")).status == 200
        assert (await ask(http, "GET /pixel/1/2", line)).status == 200
        # The block ends by Redis's clock.
        with redis_server.admin() as admin:
            stored = json.loads(admin.get(RESTRICTIONS))
            end = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() + 2))
            stored["blocks"][0]["until"] = end
            admin.set(RESTRICTIONS, json.dumps(stored))
            admin.incr(keys.KEYS_VERSION)
        await asyncio.sleep(0.3)
        assert (await write_both_ways(served, line)).status == 403
        await asyncio.sleep(2)
        assert (await write_both_ways(served, line)).status == 200
        assert (await json_of(http, "GET /moderation", moderator))[1]["blocks"] == []


async def test_a_later_block_of_a_client_replaces_the_former(redis_server: RedisServer) -> None:
    settings = redis_server.settings()
    first = await command(settings, "block", "addr:192.0.2.7", "--for", "1h")
    second = await command(settings, "block", "addr:192.0.2.7", "--for", "30d", "--reason", "again")
    assert await command(settings, "list") == [second]
    assert second["by"] == "operator:olga"
    acts = await command(settings, "acts")
    assert [act["what"] for act in acts] == [second, first]
    await command(settings, "remove", second["id"])
    assert await command(settings, "list") == []
    # Backups count keys with content.
    with redis_server.admin() as admin:
        assert admin.get(RESTRICTIONS) == b""


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["protect", "1,2,3"], "area must be x,y,width,height"),
        (["protect", "1020,0,5,1"], "part of the canvas, which has 1024x1024"),
        (["block", "192.0.2.7", "--for", "1h"], "key:NAME or addr:ADDRESS"),
        (["block", "addr:192.0.2", "--for", "1h"], "key:NAME or addr:ADDRESS"),
        (["block", "key:bob", "--for", "1h"], "must name a key that exists"),
        (["block", "addr:192.0.2.7", "--for", "367d"], "at most 366d"),
        (["remove", "5f0c1a2b"], "no area or block with this ID"),
    ],
)
async def test_a_command_that_cannot_be_executed_says_why(
    redis_server: RedisServer, words: list[str], message: str
) -> None:
    with pytest.raises(moderation.Problem, match=message):
        await command(redis_server.settings(), *words)
    with redis_server.admin() as admin:
        assert admin.get(RESTRICTIONS) is None
        assert not admin.exists(ACTS)


async def test_there_is_a_bound(redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moderation, "MOST", 2)
    settings = redis_server.settings()
    for n in range(2):
        await command(settings, "protect", f"{n},0,1,1")
        await command(settings, "block", f"addr:192.0.2.{n}", "--for", "1h")
    for words in (["protect", "5,0,1,1"], ["block", "addr:192.0.2.9", "--for", "1h"]):
        with pytest.raises(moderation.Problem, match=r"There are 2 .* already: remove some"):
            await command(settings, *words)
    await command(settings, "block", "addr:192.0.2.1", "--for", "2h")


BODIES = {
    "POST /moderation/areas": {"area": "0,0,1,1"},
    "POST /moderation/blocks": {"client": "addr:192.0.2.7", "minutes": 5},
}
TARGETS = ["GET /moderation", "GET /moderation/acts", "DELETE /moderation/areas/00000000", *BODIES]


@pytest.mark.parametrize("anonymous", ["paint", "none"])
async def test_moderation_needs_its_scope(redis_server: RedisServer, anonymous: str) -> None:
    painter = bearer(await run(redis_server, "create", "painter", "--scopes", "paint,batch"))
    async with serving(redis_server.settings(anonymous=anonymous)) as served:
        client = await served.connect()
        for target in TARGETS:
            for lines, expected in (([], 401), ([painter], 403), ([bearer("x")], 401)):
                status, problem = await json_of(client, target, *lines, **BODIES.get(target, {}))
                assert (status, problem["status"]) == (expected, expected)
    assert await command(redis_server.settings(), "list") == []


@pytest.mark.parametrize(
    ("target", "body", "status", "field"),
    [
        ("areas", b"{", 400, None),
        ("areas", b'{"area":"0,0,1,1\xff"}', 400, None),
        ("areas", b"[]", 422, "the body"),
        ("areas", b'{"area":"0,0,1"}', 422, "area"),
        ("areas", b'{"area":"0,0,0,1"}', 422, "area"),
        ("areas", b'{"area":"0,0,1,1","more":1}', 422, "the body"),
        ("blocks", b'{"client":"key:nobody","minutes":1}', 422, "client"),
        ("blocks", b'{"client":"addr:192.0.2.7","minutes":1.0}', 422, "minutes"),
        ("blocks", b'{"client":"addr:192.0.2.7","minutes":0}', 422, "minutes"),
        ("blocks", b'{"client":"addr:192.0.2.7","minutes":1,"reason":"%b"}' % (b"x" * 201), 422, "reason"),
    ],
)
async def test_invalid_bodies_are_refused_by_field(
    redis_server: RedisServer, target: str, body: bytes, status: int, field: str | None
) -> None:
    moderator = bearer(await run(redis_server, "create", "mod", "--scopes", "moderate"))
    async with serving(redis_server.settings()) as served:
        answer = await ask(await served.connect(), f"POST /moderation/{target}", moderator, body=body)
        problem = json.loads(answer.body)
        assert (answer.status, problem["status"]) == (status, status)
        assert [error["field"] for error in problem.get("errors", [])] == ([field] if field else [])


async def test_restrictions_that_this_release_cannot_read_change_nothing(
    redis_server: RedisServer, quick: None, caplog: pytest.LogCaptureFixture
) -> None:
    await command(redis_server.settings(), "protect", "0,0,1024,1024")
    async with serving(redis_server.settings()) as served:
        assert (await write_both_ways(served)).status == 403
        with redis_server.admin() as admin:
            admin.set(RESTRICTIONS, '{"areas": 1}')
            admin.incr(keys.KEYS_VERSION)
        await asyncio.sleep(0.2)
        assert (await write_both_ways(served)).status == 403
    assert caplog.text.count("restrictions in Redis are invalid") == 1


def test_restrictions_are_followed_by_all_workers_within_two_seconds(
    redis_server: RedisServer, start_service: Callable[..., Service]
) -> None:
    settings = redis_server.settings()
    service = start_service(redis_server.url, PIXEL_WORKERS="4")
    assert httpx.get(f"{service.url}/readyz", timeout=20).status_code == 200

    def statuses() -> set[int]:
        """The answers to many connections, which reach all workers."""
        found = set()
        for _ in range(40):
            with httpx.Client(timeout=20) as client:
                lines = {"Content-Type": "application/json"}
                found.add(client.post(f"{service.url}/pixel", content=GOOD, headers=lines).status_code)
        return found

    for words in (["protect", "0,0,64,64"], ["block", "addr:127.0.0.1", "--for", "5m"]):
        item = asyncio.run(command(settings, *words))
        time.sleep(2)
        assert statuses() == {403}
        asyncio.run(command(settings, "remove", item["id"]))
        time.sleep(2)
        assert statuses() == {200}
