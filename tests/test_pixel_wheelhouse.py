"""The wheelhouse of a release, and the release name of a source tree."""

from __future__ import annotations

import hashlib
import resource
import shutil
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from ansible.errors import AnsibleLookupError  # type: ignore[import-untyped]
from ansible_collections.pixel.endpoint.plugins.lookup.pixel_source import LookupModule, release_name
from ansible_collections.pixel.endpoint.plugins.modules import pixel_wheelhouse
from ansible_collections.pixel.endpoint.plugins.modules.pixel_wheelhouse import Failure, make, pack

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A small package that builds like the app, without dependencies."""
    app = tmp_path / "the app"
    (app / "src" / "pixel").mkdir(parents=True)
    (app / "src" / "pixel" / "__init__.py").write_text('"""A test\'s app."""\n')
    (app / "pyproject.toml").write_text(
        '[build-system]\nrequires = ["flit-core"]\nbuild-backend = "flit_core.buildapi"\n'
        '[project]\nname = "pixel"\nversion = "1.2.3"\ndescription = "A test"\nrequires-python = ">=3.11"\n'
    )
    (app / "requirements.txt").write_text("# none\n")
    return app


def test_equal_sources_have_equal_names(source: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(source, copy)
    (copy / "src" / "pixel" / "__init__.pyc").touch()
    name = release_name(source)
    assert name.startswith("1.2.3-")
    assert LookupModule().run([str(source), str(copy)]) == [name, name]


@pytest.mark.parametrize(
    "file", ["src/pixel/__init__.py", "pyproject.toml", "requirements.txt", "src/new.py"]
)
def test_a_change_of_any_file_changes_the_name(source: Path, file: str) -> None:
    before = release_name(source)
    with (source / file).open("a") as changed:
        changed.write("# changed\n")
    assert release_name(source) != before


def test_a_renamed_file_changes_the_name(source: Path) -> None:
    before = release_name(source)
    package = source / "src" / "pixel"
    package.rename(package.with_name("pixels"))
    assert release_name(source) != before


def test_a_directory_that_is_not_a_source_is_reported(tmp_path: Path) -> None:
    with pytest.raises(AnsibleLookupError, match=f"no release can be built from {tmp_path}.*pyproject.toml"):
        LookupModule().run([str(tmp_path)])


def test_a_wheelhouse_contains_the_wheels_and_their_hashes(source: Path, tmp_path: Path) -> None:
    wheels = tmp_path / "cache" / "libraries" / f"3.11-x86_64-{digest(source / 'requirements.txt')[:12]}"
    wheels.mkdir(parents=True)
    (wheels / "one-1-py3-none-any.whl").write_text("a library")
    arguments = (source, tmp_path / "cache", "1.2.3-abc", sys.executable, "3.11", "x86_64")
    bundle, changed = make(*arguments)
    assert changed
    with tarfile.open(bundle) as packed:
        packed.extractall(tmp_path / "host", filter="data")
    own = tmp_path / "host" / "pixel-1.2.3-py3-none-any.whl"
    requirements = (tmp_path / "host" / "requirements.txt").read_text()
    assert requirements == f"# none\n\npixel==1.2.3 --hash=sha256:{digest(own)}\n"
    assert {path.name for path in own.parent.iterdir()} == {
        own.name,
        "one-1-py3-none-any.whl",
        "requirements.txt",
    }
    assert make(*arguments) == (bundle, False)


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_libraries_are_downloaded_for_the_hosts_platform_regardless_of_markers(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock = source / "requirements.txt"
    lock.write_text(
        'one==1 ; sys_platform != "win32" \\\n    --hash=sha256:12\ntwo==2 \\\n    --hash=sha256:34\n'
    )
    commands: list[list[str]] = []
    seen: list[str] = []

    def run(*argv: str | Path) -> None:
        commands.append([str(word) for word in argv])
        seen.append(Path(argv[argv.index("--requirement") + 1]).read_text())

    monkeypatch.setattr(pixel_wheelhouse, "run", run)
    folder = pixel_wheelhouse.libraries(tmp_path / "libraries", lock, "python", "3.13", "aarch64")
    assert list(folder.iterdir()) == []
    (command,) = commands
    assert command[command.index("--python-version") + 1] == "3.13"
    assert {"--require-hashes", "manylinux2014_aarch64", "manylinux_2_36_aarch64"} <= set(command)
    assert seen == ["one==1 \\\n    --hash=sha256:12\ntwo==2 \\\n    --hash=sha256:34\n"]


def test_an_interrupted_download_is_repeated(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*argv: str | Path) -> None:
        (Path(argv[argv.index("--dest") + 1]) / "half.whl").touch()
        raise Failure("no network")

    arguments = (tmp_path / "libraries", source / "requirements.txt", "python", "3.11", "x86_64")
    monkeypatch.setattr(pixel_wheelhouse, "run", fail)
    with pytest.raises(Failure, match="no network"):
        pixel_wheelhouse.libraries(*arguments)
    assert not (tmp_path / "libraries").exists()
    monkeypatch.setattr(pixel_wheelhouse, "run", lambda *argv: None)
    assert list(pixel_wheelhouse.libraries(*arguments).iterdir()) == []


@pytest.fixture
def full_disk() -> Iterator[None]:
    """Limit the file size to 1 kB, so that larger writes fail as on a full disk (Python ignores SIGXFSZ)."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_an_interrupted_wheelhouse_is_packed_again(
    source: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """A full disk leaves an incomplete temporary file, and no wheelhouse."""
    own = tmp_path / "pixel-1-py3-none-any.whl"
    own.write_text("wheel")
    bundle = tmp_path / "bundle.tar"
    lock = source / "requirements.txt"
    request.getfixturevalue("full_disk")
    with pytest.raises(OSError, match="File too large"):
        pack(bundle, tmp_path, own, lock)
    assert not bundle.exists()
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    pack(bundle, tmp_path / "none", own, lock)
    with tarfile.open(bundle) as packed:
        assert packed.getnames() == ["requirements.txt", own.name]


@pytest.mark.parametrize("plugin", ["modules/pixel_wheelhouse.py", "lookup/pixel_source.py"])
def test_the_documentation_is_valid_yaml(plugin: str) -> None:
    namespace: dict[str, str] = {}
    text = (ROOT / "plugins" / plugin).read_text()
    exec(text[: text.index("import ", text.index("RETURN"))], namespace)
    for part in ("DOCUMENTATION", "EXAMPLES", "RETURN"):
        assert yaml.safe_load(namespace[part])
