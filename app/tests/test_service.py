"""The service as a whole: Gunicorn, its workers, systemd's sockets, and the signals."""

import asyncio
import json
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx2 as httpx
import pytest
from conftest import GUNICORN, PASSWORD, RedisServer, Service, wait_until, worker_pids

from pixel import metrics

StartService = Callable[..., Service]

PIXEL = {"x": 1, "y": 2, "channel": "G", "value": 3}


def test_every_answer_on_both_sockets_names_the_instance(service: Service) -> None:
    with (
        httpx.Client(base_url=service.url) as tcp,
        httpx.Client(base_url="http://local", transport=httpx.HTTPTransport(uds=str(service.socket))) as unix,
    ):
        for client in (tcp, unix):
            answers = [
                client.post("/pixel", json=PIXEL),
                client.post("/pixel", json={}),
                client.get("/pixel/1/2"),
                client.get("/nothing"),
                client.request("DELETE", "/pixel"),
            ]
            assert [answer.status_code for answer in answers] == [200, 422, 200, 404, 405]
            assert all(answer.headers["x-pixel-instance"] == "c5" for answer in answers)
            assert all("server" not in answer.headers for answer in answers)


BAD_BODIES = [
    b"",
    b'{"\\ud800":1}',
    b'{"x":1,"y":2,"channel":"\\ud800","value":3}',
    b'{"R":1,"G":2,"B":"\\udc00\\ud800"}',
    b"x=1&y=2",
    b'{"x":1,"y":2,"channel":"R","value":',
    b'{"x":NaN,"y":2,"channel":"R","value":3}',
    b'{"x":-0,"y":2,"channel":"R","value":3}',
    b'{"x":1e0,"y":2,"channel":"R","value":3}',
    b'{"x":1,"y":2,"channel":"R","value":3,"value":4}',
    b'{"x":1,"y":2,"channel":"R","value":3,"alpha":4}',
    b'{"x":1,"y":2,"channel":"\xff","value":3}',
    b'{"x":1,"y":2,"channel":"R","value":%s}' % (b"9" * 500),
    b'{"R":1,"G":2,"B":-0}',
    b'{"R":1,"G":2,"B":3,"B":4}',
    b"[" * 1000,
    b"[" * 500_000 + b"]" * 500_000,
    b'{"x":' * 200_000,
    b" " * 3_000_000,
]


@pytest.mark.parametrize("body", BAD_BODIES, ids=lambda body: repr(body[:40]))
def test_a_bad_body_is_refused_and_nothing_is_written(service: Service, body: bytes) -> None:
    good = json.dumps(PIXEL | {"value": 77}).encode()
    with httpx.Client(base_url=service.url, timeout=20) as client:
        before = client.get("/canvas.rgb").headers["x-pixel-event"]
        for method, path, content in (
            ("POST", "/pixel", body),
            ("PUT", "/pixel/1/2", body),
            ("POST", "/pixels", body),
            ("POST", "/pixels", b"[%b,%b]" % (good, body)),
        ):
            headers = {"content-type": "application/json"}
            answer = client.request(method, path, content=content, headers=headers)
            assert answer.status_code in (400, 413, 422), (method, path, answer.text)
            assert answer.headers["content-type"] == "application/problem+json"
            assert answer.json()["detail"]
        assert client.get("/canvas.rgb").headers["x-pixel-event"] == before


def test_slow_clients_do_not_delay_others(shared_redis: RedisServer, start_service: StartService) -> None:
    service = start_service(shared_redis.url, PIXEL_WORKERS="1")
    httpx.get(f"{service.url}/readyz", timeout=20)
    head = (
        b"POST /pixels HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: 900\r\n\r\n"
    )
    slow = [socket.create_connection(service.tcp.getsockname()) for _ in range(200)]
    try:
        for number, connection in enumerate(slow):
            # Some stop within the head, some within the body.
            connection.sendall(head[: 1 + number % len(head)] if number % 2 else head + b"[{")
        started = time.monotonic()
        for _ in range(20):
            assert httpx.post(f"{service.url}/pixel", json=PIXEL).status_code == 200
        assert time.monotonic() - started < 5
    finally:
        for connection in slow:
            connection.close()


def test_one_client_cannot_harm_another(
    redis_server: RedisServer, start_service: StartService, tmp_path: Path
) -> None:
    """Makes the quick attacks on one instance; a scenario makes them through the balancer."""
    service = start_service(redis_server.url, PIXEL_WORKERS="1")
    httpx.get(f"{service.url}/readyz", timeout=20)
    master = service.process.pid
    options = ("--quick", "--least", "1", "--json", str(tmp_path / "attack.json"))
    done = subprocess.run(
        [sys.executable, "-m", "bench.attack", *options, "--url", service.url, "--master", str(master)],
        cwd=Path(__file__).parents[2],
        text=True,
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_large_batches_wait_in_a_queue_of_their_own(
    redis_server: RedisServer, start_service: StartService
) -> None:
    """Forty concurrent batches would exceed the queue of all writes eight times."""
    service = start_service(redis_server.url, PIXEL_WORKERS="1")
    httpx.get(f"{service.url}/readyz", timeout=20)
    large = json.dumps([PIXEL] * 10_000).encode()

    def post(_: int) -> httpx.Response:
        headers = {"content-type": "application/json"}
        return httpx.post(f"{service.url}/pixels", content=large, headers=headers, timeout=20)

    with ThreadPoolExecutor(40) as pool:
        batches = pool.map(post, range(80))
        small = [httpx.post(f"{service.url}/pixel", json=PIXEL, timeout=20) for _ in range(60)]
        answers = list(batches)
    statuses = [answer.status_code for answer in small]
    assert statuses == [200] * 60
    assert {answer.status_code for answer in answers} == {200, 503}
    refused = {answer.json()["detail"]: answer for answer in answers if answer.status_code == 503}
    answer = refused["Too many large requests are waiting; nothing was written."]
    assert answer.headers["retry-after"] == "1"


def test_metrics_cover_all_workers(service: Service) -> None:
    for _ in range(20):  # new connections, so that both workers get some
        httpx.post(f"{service.url}/pixel", json=PIXEL)
    httpx.get(f"{service.url}/pixel/5/5")
    text = httpx.get(f"{service.url}/metrics").text
    assert "\npixel_workers 2.0" in text
    counts = dict(re.findall(r"^pixel_request_seconds_count\{(.*)\} ([0-9.]+)$", text, re.MULTILINE))
    assert float(counts['method="POST",route="/pixel",status="200"']) >= 20
    assert float(counts['method="GET",route="/pixel/{x}/{y}",status="200"']) >= 1
    assert len(list((service.directory / "metrics").glob("counter_*.db"))) == 2


def test_metrics_contain_the_cpu_times_of_the_host(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOST_PROC", str(tmp_path))
    (tmp_path / "stat").write_text("cpu  100 2 30 4000 5 0 7 800 50 0\ncpu0 1 1 1 1 1 1 1 1 1 1\n")
    (family,) = metrics.HOST_CPU.collect()
    seconds = {sample.labels["mode"]: sample.value for sample in family.samples}
    modes = ("user", "nice", "system", "idle", "iowait", "irq", "softirq", "steal")
    ticks = os.sysconf("SC_CLK_TCK")
    assert seconds == {
        mode: count / ticks for mode, count in zip(modes, (100, 2, 30, 4000, 5, 0, 7, 800), strict=True)
    }
    (tmp_path / "stat").unlink()
    assert next(iter(metrics.HOST_CPU.collect())).samples == []


async def test_answers_are_counted_by_their_time() -> None:
    for seconds in (0.0, 0.001, 0.0011, 3, 60, 60):
        metrics.observe("PATCH", "/test", 200, seconds)
    await asyncio.sleep(0)
    metrics.observe("BREW", "/test", 200, 0.3)
    await asyncio.sleep(0)
    found = re.findall(
        r'^pixel_request_seconds_(\w+)\{(?:le="(.*?)",)?method="other",route="/test",'
        r'status="200"\} ([0-9.]+)$',
        metrics.exposition().decode(),
        re.MULTILINE,
    )
    counted = {le or name: float(value) for name, le, value in found}
    assert [counted[le] for le in ("0.001", "0.002", "0.2", "0.5", "5.0", "10.0", "+Inf")] == [
        2, 3, 3, 4, 5, 5, 7
    ]  # fmt: skip
    assert counted["count"] == 7
    assert counted["sum"] == pytest.approx(123.3021)


def metric(service: Service, name: str) -> float:
    """The value of one sample of /metrics; ``name`` includes its labels."""
    text = httpx.get(f"{service.url}/metrics").text
    return float(re.findall(rf"^{re.escape(name)} (\S+)$", text, re.MULTILINE)[0])


def test_counters_survive_a_worker_and_its_gauges_do_not(
    shared_redis: RedisServer, start_service: StartService
) -> None:
    service = start_service(shared_redis.url)
    httpx.get(f"{service.url}/readyz", timeout=20)
    wait_until(lambda: len(worker_pids(service)) == 2)
    body = [PIXEL] * 30
    for _ in range(20):
        assert httpx.post(f"{service.url}/pixels", json=body).status_code == 200
    for pid in worker_pids(service):
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda pid=pid: pid not in worker_pids(service))
        wait_until(lambda: len(worker_pids(service)) == 2)
    wait_until(lambda: metric(service, "pixel_workers") == 2)
    assert metric(service, "pixel_writes_total") == 600
    assert metric(service, "pixel_batch_writes_sum") == 600
    assert metric(service, 'pixel_batch_writes_bucket{le="20.0"}') == 1  # the readiness probe's
    assert metric(service, 'pixel_batch_writes_bucket{le="50.0"}') >= 2
    count = 'pixel_request_seconds_count{method="POST",route="/pixels",status="200"}'
    assert metric(service, count) == 20
    assert metric(service, "pixel_commit_seconds_count") <= 21
    assert metric(service, "pixel_queued_writes") == 0


def test_metrics_count_an_outage_of_redis(fragile_redis: RedisServer, start_service: StartService) -> None:
    service = start_service(fragile_redis.url, PIXEL_WORKERS="1")
    assert httpx.get(f"{service.url}/pixel/1/2", timeout=20).status_code == 200
    assert httpx.post(f"{service.url}/pixel", json=PIXEL).status_code == 200
    assert metric(service, "pixel_redis_reconnects_total") == 0
    assert metric(service, "pixel_read_seconds_count") >= 2  # the maintenance state, and the pixel
    # While Redis hangs, one write waits for it, and the others are refused at once. The queue is
    # measured once a second, so it may take several attempts to see that write.
    for _ in range(10):
        fragile_redis.pause()
        with ThreadPoolExecutor() as pool:
            waiting = pool.submit(httpx.post, f"{service.url}/pixel", json=PIXEL)
            seen = [metric(service, "pixel_queued_writes")]
            while not waiting.done():
                seen.append(metric(service, "pixel_queued_writes"))
            assert waiting.result().status_code == 503
        fragile_redis.resume()
        wait_until(lambda: httpx.get(f"{service.url}/readyz").status_code == 200)
        if 1 in seen:
            break
    assert 1 in seen
    fragile_redis.kill()
    assert httpx.get(f"{service.url}/pixel/1/2").status_code == 503
    assert metric(service, 'pixel_redis_errors_total{operation="read"}') >= 1
    assert metric(service, 'pixel_redis_errors_total{operation="write"}') >= 1
    fragile_redis.start()
    wait_until(lambda: httpx.get(f"{service.url}/readyz").status_code == 200)
    assert httpx.get(f"{service.url}/pixel/1/2").status_code == 200
    assert metric(service, "pixel_redis_reconnects_total") >= 3


def test_the_password_is_nowhere_to_be_seen(service: Service) -> None:
    for pid in worker_pids(service) | {service.process.pid}:
        assert PASSWORD not in Path(f"/proc/{pid}/cmdline").read_text()
    assert PASSWORD not in service.output()


def test_every_line_of_the_log_is_json(service: Service) -> None:
    lines = [json.loads(line) for line in service.output().splitlines()]
    assert {"time", "level", "logger", "process", "message", "instance", "release"} <= set(lines[0])
    assert any(line["message"] == "connected to Redis" for line in lines)


def test_at_level_debug_each_answer_is_logged_with_its_id_and_without_its_body(
    shared_redis: RedisServer, start_service: StartService
) -> None:
    service = start_service(shared_redis.url, PIXEL_WORKERS="1", PIXEL_LOG_LEVEL="debug")
    httpx.get(f"{service.url}/readyz", timeout=20)
    name = {"X-Request-ID": "0123456789abcdef"}
    assert httpx.post(f"{service.url}/pixel", json=PIXEL, headers=name).status_code == 200
    httpx.post(f"{service.url}/pixel?key=hidden", content=b"hidden", headers=name)
    wait_until(lambda: service.output().count("0123456789abcdef") == 2)
    lines = [json.loads(line) for line in service.output().splitlines()]
    logged = [line for line in lines if line.get("request_id") == "0123456789abcdef"]
    messages = [line["message"] for line in logged]
    assert messages == ["POST /pixel was answered 200", "POST /pixel was answered 415"]
    assert all(0 < line["seconds"] < 1 for line in logged)
    assert "hidden" not in service.output()


def test_a_reload_replaces_the_workers_and_no_request_fails(
    shared_redis: RedisServer, start_service: StartService
) -> None:
    service = start_service(shared_redis.url)
    httpx.get(f"{service.url}/readyz", timeout=20)
    stop = threading.Event()
    statuses: list[int] = []

    def write_on() -> None:
        while not stop.is_set():
            statuses.append(httpx.post(f"{service.url}/pixel", json=PIXEL).status_code)

    writer = threading.Thread(target=write_on)
    writer.start()
    try:
        wait_until(lambda: len(worker_pids(service)) == 2)
        before = worker_pids(service)
        service.process.send_signal(signal.SIGHUP)
        wait_until(lambda: len(worker_pids(service)) == 2 and not worker_pids(service) & before)
    finally:
        stop.set()
        writer.join()
    assert set(statuses) == {200}
    wait_until(lambda: "\npixel_workers 2.0" in httpx.get(f"{service.url}/metrics").text)


def test_reloads_neither_add_metrics_files_nor_reset_counters(
    shared_redis: RedisServer, start_service: StartService
) -> None:
    service = start_service(shared_redis.url)
    httpx.get(f"{service.url}/readyz", timeout=20)
    started = metric(service, "pixel_start_time_seconds")
    for reload in range(1, 7):
        wait_until(lambda: len(worker_pids(service)) == 2)
        before = worker_pids(service)
        for _ in range(5):
            assert httpx.post(f"{service.url}/pixel", json=PIXEL).status_code == 200
        assert metric(service, "pixel_writes_total") == 5 * reload
        service.process.send_signal(signal.SIGHUP)
        wait_until(lambda before=before: len(worker_pids(service)) == 2 and not worker_pids(service) & before)
        assert metric(service, "pixel_writes_total") == 5 * reload
    # A dead worker leaves two files; a live worker has four more.
    files = list((service.directory / "metrics").glob("*.db"))
    assert len(list((service.directory / "metrics").glob("counter_*.db"))) <= 2 * 2
    assert len(files) <= 4 * 6
    wait_until(lambda: metric(service, "pixel_workers") == 2)
    assert metric(service, "pixel_viewers") == 0
    assert metric(service, "pixel_start_time_seconds") == pytest.approx(started, abs=0.1)
    assert httpx.get(f"{service.url}/fleet/self").json()["uptime_s"] > 1


def test_a_worker_frees_the_memory_of_pictures(
    redis_server: RedisServer, start_service: StartService
) -> None:
    service = start_service(redis_server.url, PIXEL_WORKERS="1")
    httpx.get(f"{service.url}/readyz", timeout=20)

    def resident() -> float:  # megabytes
        [pid] = worker_pids(service)
        pages = Path(f"/proc/{pid}/statm").read_text().split()[1]
        return int(pages) * os.sysconf("SC_PAGE_SIZE") / 1e6

    def look(part: int) -> int:
        area = f"x={part % 5}&y={part // 5}&w=1000&h=1000"
        return httpx.get(f"{service.url}/canvas.png?{area}&scale=2", timeout=20).status_code

    before = resident()
    with ThreadPoolExecutor(12) as pool:
        statuses = set(pool.map(look, range(60)))
    assert statuses <= {200, 503}
    assert resident() < before + 80
    # Four pictures of 3 MB stay, with their PNGs.
    wait_until(lambda: resident() < before + 30)


def test_head_of_a_stream_ends_at_once(service: Service) -> None:
    answer = httpx.head(f"{service.url}/events", timeout=5)
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.headers["x-accel-buffering"] == "no"
    wait_until(lambda: metric(service, "pixel_viewers") == 0)


def test_a_stop_answers_the_requests_in_flight(
    fragile_redis: RedisServer, start_service: StartService
) -> None:
    service = start_service(fragile_redis.url, PIXEL_WORKERS="1")
    httpx.get(f"{service.url}/readyz", timeout=20)
    fragile_redis.pause()
    statuses: list[int] = []
    writer = threading.Thread(
        target=lambda: statuses.append(httpx.post(f"{service.url}/pixel", json=PIXEL).status_code)
    )
    writer.start()
    time.sleep(0.2)
    service.process.terminate()
    time.sleep(0.2)
    fragile_redis.resume()
    writer.join()
    assert statuses == [200]
    assert service.process.wait(10) == 0


def test_the_service_starts_without_redis_and_is_not_ready(
    fragile_redis: RedisServer, start_service: StartService
) -> None:
    fragile_redis.kill()
    service = start_service(fragile_redis.url, PIXEL_WORKERS="1")
    assert httpx.get(f"{service.url}/healthz", timeout=20).status_code == 200
    started = time.monotonic()
    assert httpx.get(f"{service.url}/readyz").status_code == 503
    name = {"X-Request-ID": "0123456789abcdef"}
    assert httpx.post(f"{service.url}/pixel", json=PIXEL, headers=name).status_code == 503
    assert httpx.post(f"{service.url}/pixels", json=[PIXEL], headers=name).status_code == 503
    assert time.monotonic() - started < 3
    wait_until(lambda: service.output().count("0123456789abcdef") == 2)
    lines = [json.loads(line) for line in service.output().splitlines()]
    messages = [line["message"] for line in lines if "answered" in line["message"]]
    assert messages == ["POST /pixel was answered 503", "POST /pixels was answered 503"]
    fragile_redis.start()
    wait_until(lambda: httpx.get(f"{service.url}/readyz").status_code == 200)


def test_without_passed_sockets_the_configured_address_is_bound(
    shared_redis: RedisServer, start_service: StartService
) -> None:
    path = shared_redis.directory / "bound.sock"
    service = start_service(shared_redis.url, PIXEL_WORKERS="1", PIXEL_BIND=f"unix:{path}")
    service.stop()
    process = subprocess.Popen(
        [sys.executable, "-m", *GUNICORN], env=service.environment, stderr=subprocess.DEVNULL
    )
    wait_until(path.exists)
    with httpx.Client(transport=httpx.HTTPTransport(uds=str(path))) as client:
        assert client.get("http://local/ping", timeout=20).json()["instance"] == "c5"
    process.terminate()
    assert process.wait(10) == 0


def test_streams_end_cleanly_when_the_service_stops(
    shared_redis: RedisServer, start_service: StartService
) -> None:
    service = start_service(shared_redis.url, PIXEL_WORKERS="1")
    httpx.get(f"{service.url}/readyz", timeout=20)
    with httpx.stream("GET", f"{service.url}/events", timeout=5) as stream:
        assert stream.headers["content-type"] == "text/event-stream; charset=utf-8"
        assert stream.headers["x-accel-buffering"] == "no"
        lines = stream.iter_lines()
        assert next(lines) == "retry: 1000"
        httpx.post(f"{service.url}/pixel", json=PIXEL)
        while next(lines) != 'data: [[1,2,"G",3]]':
            pass
        started = time.monotonic()
        service.process.terminate()
        assert list(lines) == [""]  # a complete answer, not a broken connection
    assert service.process.wait(10) == 0
    assert time.monotonic() - started < 3


def test_a_viewer_that_disconnects_is_no_longer_counted(service: Service) -> None:
    def viewers() -> float:
        text = httpx.get(f"{service.url}/metrics").text
        return float(re.findall(r"^pixel_viewers ([0-9.]+)$", text, re.MULTILINE)[0])

    wait_until(lambda: viewers() == 0)
    with httpx.stream("GET", f"{service.url}/events", timeout=5) as stream:
        lines = stream.iter_lines()
        assert next(lines) == "retry: 1000"
        assert viewers() == 1
    wait_until(lambda: viewers() == 0)
    assert httpx.head(f"{service.url}/events").status_code == 200
    assert httpx.get(f"{service.url}/events?after=never").status_code == 422
    wait_until(lambda: viewers() == 0)


async def test_a_thousand_viewers_on_one_worker_receive_every_write(
    shared_redis: RedisServer, start_service: StartService
) -> None:
    allow_files(3_000)
    service = start_service(shared_redis.url, PIXEL_WORKERS="1")
    httpx.get(f"{service.url}/readyz", timeout=20)
    port = service.tcp.getsockname()[1]
    written = {(x, 9, "G"): x % 256 for x in range(100)}

    async def watch() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"GET /events HTTP/1.1\r\nHost: local\r\n\r\n")
        await reader.readuntil(b"retry: 1000")
        opened.release()
        seen: dict[tuple[int, int, str], int] = {}
        while not written.items() <= seen.items():
            data = (await reader.readuntil(b"\n\n")).partition(b"\ndata: ")[2]
            if data.startswith(b"[["):
                seen |= {(x, y, channel): value for x, y, channel, value in json.loads(data)}
        writer.close()

    opened = asyncio.Semaphore(0)
    async with asyncio.timeout(60), asyncio.TaskGroup() as tasks:
        viewers = [tasks.create_task(watch()) for _ in range(1_000)]
        for _ in viewers:
            await opened.acquire()
        async with httpx.AsyncClient(base_url=service.url) as client:
            for (x, y, channel), value in written.items():
                pixel = {"x": x, "y": y, "channel": channel, "value": value}
                assert (await client.post("/pixel", json=pixel)).status_code == 200


def allow_files(wanted: int) -> None:
    """Raise the limit of open files of this process and its children."""
    now, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(now, wanted), most))
