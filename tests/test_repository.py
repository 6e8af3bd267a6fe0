"""Versions, changelog, releases, CI, commit hooks, and links between documents."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import subprocess
import tomllib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
WORKFLOW = ROOT / ".github/workflows/ci.yml"
DOCUMENTS = sorted(
    {*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob(".github/**/*.md"), ROOT / "bench/README.md"}
)


def load(name: str) -> Any:
    return yaml.safe_load((ROOT / name).read_text())


def anchors(page: Path) -> set[str]:
    """Return the anchors that GitHub gives to a page's headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.fixture(scope="module")
def release() -> ModuleType:
    spec = importlib.util.spec_from_file_location("release", ROOT / ".ci/release.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("page", DOCUMENTS, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_have_existing_targets(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.S)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"https?:|mailto:", link):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_decisions_are_numbered_dated_and_listed() -> None:
    pages = sorted((ROOT / "docs/adr").glob("[0-9]*.md"))
    index = (ROOT / "docs/adr/README.md").read_text()
    assert [int(page.name[:4]) for page in pages] == list(range(1, len(pages) + 1))
    for page in pages:
        text = page.read_text()
        assert re.match(rf"# {int(page.name[:4])}\. .+\n\nDate: 20\d\d-\d\d-\d\d\n", text), page
        assert re.findall(r"^## (.*)$", text, re.M) == ["Context", "Decision", "Consequences"], page
        assert f"({page.name})" in index, page


def test_versions_agree() -> None:
    app = tomllib.loads((ROOT / "app/pyproject.toml").read_text())["project"]["version"]
    released = re.findall(r"^## \[(.*)\] - 20\d\d-\d\d-\d\d$", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert load("galaxy.yml")["version"] == app == released[0]


def test_the_changelog_follows_keep_a_changelog() -> None:
    """See https://keepachangelog.com/en/1.1.0/."""
    text = (ROOT / "CHANGELOG.md").read_text()
    headings = re.findall(r"^## (.*)$", text, re.M)
    assert headings[0] == "[Unreleased]"
    assert all(re.fullmatch(r"\[\d+\.\d+\.\d+\] - 20\d\d-\d\d-\d\d", heading) for heading in headings[1:])
    kinds = set(re.findall(r"^### (.*)$", text, re.M))
    assert kinds <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}


def test_a_release_is_dated_committed_and_tagged(release: ModuleType, tmp_path: Path) -> None:
    for name in ("CHANGELOG.md", "galaxy.yml", "app/pyproject.toml", "roles/redis/README.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    changelog = tmp_path / "CHANGELOG.md"
    head = changelog.read_text().split("## [1.0.0]")
    changelog.write_text(
        re.sub(
            r"(?s)## \[Unreleased\].*", "## [Unreleased]\n\n### Added\n\n- A thing.\n\n## [1.0.0]", head[0]
        )
        + head[1]
    )

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=tmp_path, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    git("init", "--quiet")
    git("config", "user.name", "A")
    git("config", "user.email", "a@example.org")
    git("add", "--all")
    with pytest.raises(release.ReleaseError, match="commit or remove"):
        release.release(tmp_path, "1.1.0", "2027-01-02")
    git("commit", "--quiet", "--message", "Before")

    for version, reason in (("1.0.0", "not newer"), ("1.1", "not a version")):
        with pytest.raises(release.ReleaseError, match=reason):
            release.release(tmp_path, version, "2027-01-02")
    assert git("status", "--porcelain") == ""

    release.release(tmp_path, "1.1.0", "2027-01-02")
    assert (
        "## [Unreleased]\n\n## [1.1.0] - 2027-01-02\n\n### Added\n\n- A thing.\n\n## [1.0.0]"
        in changelog.read_text()
    )
    assert "version: 1.1.0\n" in (tmp_path / "galaxy.yml").read_text()
    assert 'version = "1.1.0"\n' in (tmp_path / "app/pyproject.toml").read_text()
    assert "Version: 1.1.0\n" in (tmp_path / "roles/redis/README.md").read_text()
    assert git("status", "--porcelain") == ""
    assert git("describe", "--exact-match") == "v1.1.0"
    assert "- A thing." in git("tag", "--list", "--format=%(contents)", "v1.1.0")
    with pytest.raises(release.ReleaseError, match="already"):
        release.release(tmp_path, "1.1.0", "2027-01-02")
    with pytest.raises(release.ReleaseError, match="no change"):
        release.release(tmp_path, "1.2.0", "2027-01-02")


def test_ci_runs_every_part_of_make_test() -> None:
    jobs = load(".github/workflows/ci.yml")["jobs"]
    commands = {step["run"] for job in jobs.values() for step in job["steps"] if "run" in step}
    assert {"make lint", "make check", "make ${{ matrix.scenario }}"} <= commands
    scenarios = sorted(path.parent.name for path in ROOT.glob("molecule/*/molecule.yml"))
    assert sorted(jobs["scenario"]["strategy"]["matrix"]["scenario"]) == scenarios
    assert set(jobs["deploy"]["needs"]) == set(jobs) - {"deploy"}


def test_actions_are_pinned_by_commit() -> None:
    used = re.findall(r"uses: (.*)", WORKFLOW.read_text())
    assert used
    assert all(re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", action) for action in used)


def test_commit_hooks_run_every_command_of_make_lint() -> None:
    (recipe,) = re.findall(r"^lint: .*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.M)
    entries = [hook["entry"] for repo in load(".pre-commit-config.yaml")["repos"] for hook in repo["hooks"]]
    programs = {Path(word).name for entry in entries for word in entry.split()}
    for line in recipe.splitlines():
        command = line.strip().rpartition("&& ")[2].split()
        assert Path(command[0]).name in programs, line
        assert not command[0].endswith("ruff") or f".venv/bin/ruff {command[1]}" in " ".join(entries)


def test_the_eslint_lock_names_no_registry() -> None:
    lock = json.loads((ROOT / ".config/eslint/package-lock.json").read_text())
    packages = [package for name, package in lock["packages"].items() if name]
    assert packages
    assert all("integrity" in package and "resolved" not in package for package in packages)
