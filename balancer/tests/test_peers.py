"""Balancers share their drains: the latest command about a host holds on all of them."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from pixel_lb import cli, drain
from pixel_lb.errors import LastBackend, Refused
from pixel_lb.nginx import Nginx
from pixel_lb.peers import fetch_drains
from pixel_lb.state import Drain, State
from pixel_lb.watch import Watch

LATER = 4e9


class Peer:
    """Another balancer that answers `/lb/drains`."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.status = 200
        self.content = b"{}"

    def knows(self, **drains: Drain) -> None:
        self.content = State.encode_drains(drains)


@pytest.fixture
def peer() -> Iterator[Peer]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            assert self.path == "/lb/drains"
            self.send_response(made.status)
            self.send_header("Content-Length", str(len(made.content)))
            self.end_headers()
            self.wfile.write(made.content)

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        made = Peer(f"http://127.0.0.1:{server.server_port}")
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield made
        server.shutdown()
        thread.join()


def test_the_latest_command_holds_whichever_balancer_it_was_given_to(balancer: Any) -> None:
    others = [{"b": Drain(True, 20.0), "a": Drain(False, 5.0)}, {"b": Drain(False, 10.0)}]
    assert drain.adopt(balancer.paths, balancer.nginx, others) == ["b"]
    assert balancer.downs == [False, True]
    assert drain.adopt(balancer.paths, balancer.nginx, others) == []
    assert drain.adopt(balancer.paths, balancer.nginx, [{"b": Drain(False, 30.0)}]) == ["b"]
    assert balancer.downs == [False, False]


def test_a_command_is_later_than_the_one_it_replaces_although_a_clock_is_ahead(balancer: Any) -> None:
    drain.adopt(balancer.paths, balancer.nginx, [{"b": Drain(True, LATER)}])
    assert balancer.undrain("b")
    assert drain.adopt(balancer.paths, balancer.nginx, [{"b": Drain(True, LATER)}]) == []
    assert balancer.state.drained() == set()


def test_a_repeated_command_is_later_than_another_balancers_in_between(balancer: Any) -> None:
    balancer.drain("b")
    first = balancer.state.drains()["b"].time
    assert not balancer.drain("b")
    assert drain.adopt(balancer.paths, balancer.nginx, [{"b": Drain(False, first + 0.0005)}]) == []


def test_drains_of_others_never_remove_the_last_host(balancer: Any) -> None:
    balancer.drain("a")
    with pytest.raises(LastBackend, match="other balancers have drained b"):
        drain.adopt(balancer.paths, balancer.nginx, [{"b": Drain(True, LATER)}])
    assert balancer.state.drained() == {"a"}


def test_drains_that_nginx_rejects_are_not_adopted(balancer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def reject(_: Nginx) -> bool:
        raise Refused("nginx -t failed")

    monkeypatch.setattr(Nginx, "reload_if_needed", reject)
    with pytest.raises(Refused):
        drain.adopt(balancer.paths, balancer.nginx, [{"b": Drain(True, LATER)}])
    assert balancer.state.drained() == set()


def test_a_balancer_that_does_not_answer_knows_nothing(peer: Peer) -> None:
    peer.knows(b=Drain(True, 7.0))
    assert fetch_drains(peer.url) == {"b": Drain(True, 7.0)}
    peer.status = 404
    assert fetch_drains(peer.url) == {}
    peer.status = 200
    for peer.content in (b"", b"[1]", b'{"b": 1}', b'{"b": {"drained": true}}', b'{"b": {"x": 1}}'):
        assert fetch_drains(peer.url) == {}
    assert fetch_drains("http://127.0.0.1:9") == {}


def test_the_controller_adopts_and_reports_what_it_cannot_adopt(balancer: Any, peer: Peer) -> None:
    balancer.write_facts(peers={"other": peer.url})
    watch = Watch(balancer.paths)
    peer.knows(b=Drain(True, 7.0))
    with ThreadPoolExecutor() as pool:
        watch.tick(pool)
        assert balancer.state.drained() == {"b"}
        peer.knows(a=Drain(True, 8.0))
        watch.tick(pool)
        assert "other balancers have drained a" in balancer.status()["controller"]["error"]
        peer.knows(a=Drain(True, 8.0), b=Drain(False, 9.0))
        watch.tick(pool)
    assert balancer.state.drained() == {"a"}
    assert balancer.status()["controller"]["error"] == ""


def test_sync_adopts_before_nginx_starts(
    balancer: Any, peer: Peer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli, "Paths", lambda: balancer.paths)
    balancer.write_facts(peers={"off": "http://127.0.0.1:9", "other": peer.url}, balancer="b")
    peer.knows(b=Drain(True, 7.0))
    assert cli.main(["sync"]) == 0
    assert cli.main(["sync"]) == 0
    assert capsys.readouterr().out == "changed\nunchanged\n"
    # Nginx answers /lb/ready with it: the balancer on a drained host does not hold the fleet's address.
    assert Path(balancer.paths.upstreams).read_text().endswith("geo $pixel_drained {\n    default 1;\n}\n")
