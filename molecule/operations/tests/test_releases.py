"""Releases under load: deploys, failed trials, rollbacks, interruptions, and two operators at once."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
from collections import Counter
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from bench.drill.sources import LATE_FAULTS, bad_after, never_ready

ROOT = Path(__file__).resolve().parents[3]

testinfra_hosts = ["c5"]


def test_a_failed_trial_then_a_good_release_of_its_name_its_rollback_and_its_return(
    host: Any, play: Any, releases: Any, requests: Any, watched: Any, tmp_path: Path
) -> None:
    """The release that fails its trial is not switched to, and its name can be used again.

    To deploy the good one again after its rollback prints a warning first. This time it is watched, on the
    first host only and with few requests.
    """
    before = releases()
    own = before["c5"]
    bad_options = {"pixel_app_source": str(never_ready(tmp_path)), "pixel_app_ready_timeout": 5}
    with watched(), requests():
        bad = play("playbooks/pixel_app.yml", pixel_app_release="tried", **bad_options)
        after = releases()
        assert bad.returncode != 0
        assert "Release tried failed its trial on" in bad.words
        assert "The release was removed" in bad.words
        assert after == before
        assert not host.file("/opt/pixel/releases/tried").exists
        good = play("playbooks/pixel_app.yml", pixel_app_release="tried")
        assert good.returncode == 0, good.words
        assert set(releases().values()) == {"tried"}
        back = play("playbooks/rollback.yml")
    assert back.returncode == 0, back.stdout
    assert releases() == before
    status = play("playbooks/status.yml").stdout
    for name in ("c5", "t2"):
        assert re.search(rf"^ *{name} +{own} +active .* tried$", status, re.M), status

    options = {"pixel_app_release": "tried", "pixel_app_bake": 6, "pixel_app_canary_weight": 20}
    since = host.check_output("date '+%F %T'")
    with requests():
        again = play("site.yml", "--tags", "pixel_app", **options)
    assert again.returncode == 0, again.words
    preparation, _, _ = again.stdout.partition("PLAY [Switch the app, host by host (3 of 10)]")
    for name in ("c5", "t2"):
        warning = f"This run deploys release tried to {name} again, which was rolled back to {own} at"
        assert warning in " ".join(preparation.split())
    assert set(releases().values()) == {"tried"}
    assert re.search(r"^ *c5 +tried +active .*(?<!tried)$", play("playbooks/status.yml").stdout, re.M)
    journal = host.check_output(f"journalctl --unit=pixel-lb --since='{since}' --output=cat")
    assert "set c5 to 20% (canary: at most 20% of its weight), t2 to 100%" in journal
    limited, restored = again.words.index("Limit the weight of"), again.words.index("Restore the weight")
    assert limited < again.words.index("c5 in 6 s: ") < restored
    assert not host.file("/var/lib/pixel-lb/canary.json").exists
    assert re.search(
        r"c5 in 6 s: \d+ answers, 0.0% errors, p99 0.\d+ s; the other hosts: \d+ answers", again.words
    )
    assert "t2 in 6 s" not in again.words
    assert play("playbooks/pixel_app.yml").returncode == 0
    assert releases() == before


def test_a_release_that_becomes_worse_later_is_switched_back_by_itself(
    host: Any, play: Any, releases: Any, requests: Any, tmp_path: Path
) -> None:
    before = releases()
    errors, slow = "answers are errors, 0.0% on the other hosts", "the p99 of requests for pixels is"
    # Where hosts share processors, slow writes may also be too late, which is an error.
    reasons = {"errors": [errors], "slow": [slow, errors]}
    for fault in LATE_FAULTS:
        source = str(bad_after(tmp_path / fault, fault, 10))
        options = {"pixel_app_release": fault, "pixel_app_bake": 60, "pixel_app_canary_weight": 50}
        with requests():
            deployed = play("playbooks/pixel_app.yml", pixel_app_source=source, **options)
            after = releases()
        assert f"Release {fault} was given up on c5: " in deployed.words
        assert any(reason in deployed.words for reason in reasons[fault])
        assert "was restored and serves. Hosts after it were not touched." in deployed.words
        assert deployed.returncode != 0
        assert after == before
        assert deployed.words.index("Limit the weight of") < deployed.words.index("Restore the weight")
        assert not host.file("/var/lib/pixel-lb/canary.json").exists
    # The next run removes what was staged on the hosts that were not touched.
    assert play("playbooks/pixel_app.yml").returncode == 0
    assert releases() == before


def interrupt(task: str, signum: int, name: str, *arguments: str) -> None:
    """Start a playbook, and signal its process group when it reaches a task."""
    with subprocess.Popen(
        ["ansible-playbook", f"playbooks/{name}.yml", *arguments],
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        start_new_session=True,
    ) as playing:
        assert playing.stdout is not None
        for line in playing.stdout:
            if task in line:
                break
        else:
            raise AssertionError(f"the playbook never reached {task!r}")
        # Python may lose a Ctrl-C, so send it until the process ends.
        while playing.poll() is None:
            os.killpg(playing.pid, signum)
            with suppress(subprocess.TimeoutExpired):
                playing.communicate(timeout=10)
    assert playing.returncode != 0


CUT_OFF = """
before=$(readlink /opt/pixel/current)
while [ "$(readlink /opt/pixel/current)" = "$before" ]; do :; done
kill -KILL "$(cat /opt/pixel/lock)"
"""
"""Kills the release module between changing `current` and restarting the service."""


def test_the_next_deploy_completes_an_interrupted_one(
    host: Any, play: Any, releases: Any, requests: Any, watched: Any, shell: Any
) -> None:
    before = releases()
    release = ("-e", "pixel_app_release=cut-off")
    with watched(), requests():
        interrupt("Build the release from the wheelhouse", signal.SIGINT, "pixel_app", *release)
        interrupt("Try the release with its settings", signal.SIGKILL, "pixel_app", *release)
        # The first host then has the new settings, units and `current`, and still runs the old release.
        shell(
            f"cat >/run/cut-off <<'END'\n{CUT_OFF}\nEND\nsystemd-run --unit=cut-off --collect sh /run/cut-off"
        )
        cut_off = play("playbooks/pixel_app.yml", *release)
        assert cut_off.returncode != 0
        assert host.check_output("readlink /opt/pixel/current") == "/opt/pixel/releases/cut-off"
        half_way = releases()
        finished = play("playbooks/pixel_app.yml", *release)
        after = releases()
        # The rollback target is the release that served before the interruption.
        back = play("playbooks/rollback.yml")
    assert half_way == before
    assert finished.returncode == 0, finished.stdout
    assert set(after.values()) == {"cut-off"}
    assert back.returncode == 0, back.stdout
    assert releases() == before


def test_a_concurrent_deploy_is_refused_and_names_the_lock_holder(host: Any, play: Any, shell: Any) -> None:
    holder = {"node": "elsewhere", "user": "somebody", "process": "42", "since": "2026-01-01T00:00:00Z"}
    shell(f"cat >/run/pixel-deploy.lock <<'END'\n{json.dumps(holder)}\nEND\n")
    try:
        refused = play("playbooks/pixel_app.yml")
        assert refused.returncode != 0
        holder_named = "somebody on elsewhere (process 42) has been deploying since 2026-01-01T00:00:00Z"
        assert holder_named in refused.words
        shell("truncate --size=0 /run/pixel-deploy.lock")
        damaged = play("playbooks/pixel_app.yml")
        assert damaged.returncode != 0
        assert "ansible c5 --become -a 'rm /run/pixel-deploy.lock'" in damaged.words
        shell("touch -d '1 hour ago' /run/pixel-deploy.lock")
        assert play("playbooks/pixel_app.yml").returncode == 0
        assert not host.file("/run/pixel-deploy.lock").exists
    finally:
        shell("rm -f /run/pixel-deploy.lock")


def test_a_drained_host_is_sent_no_request_and_a_deploy_to_the_other_one_refuses_none(
    play: Any, client: Any, viewer: Any, releases: Any, requests: Any
) -> None:
    """As in a fleet of one: requests during the restart wait in the listening sockets."""
    assert play("playbooks/nginx_lb.yml", nginx_lb_pixel_timeout=10).returncode == 0
    assert play("playbooks/drain.yml", "-e", "host=t2").returncode == 0
    with ExitStack() as streams:
        try:
            assert {client.ask("/ping")[1]["X-Pixel-Instance"] for _ in range(20)} == {"c5"}
            assert play("playbooks/drain.yml", "-e", "host=c5").returncode != 0
            with requests():
                deployed = play("playbooks/pixel_app.yml", "--limit", "c5", pixel_app_release="alone")
            assert deployed.returncode == 0, deployed.stdout
            assert client.read_from("c5", "/ping")["release"] == "alone"
            for _ in range(12):
                streams.enter_context(viewer())
        finally:
            assert play("playbooks/undrain.yml", "-e", "host=t2").returncode == 0
        # Streams that are open on c5 only don't change its share of other requests.
        answered = Counter(client.ask("/ping")[1]["X-Pixel-Instance"] for _ in range(50))
    assert answered.keys() == {"c5", "t2"}
    assert answered["c5"] > 20
    assert play("site.yml", "--tags", "pixel_app,nginx_lb").returncode == 0
    assert len(set(releases().values())) == 1
