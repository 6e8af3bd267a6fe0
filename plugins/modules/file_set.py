#!/usr/bin/python
"""Install a set of files, directories and links in one run."""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import grp
import hashlib
import os
import pwd
import re
import secrets
import shlex
import shutil
import stat
import subprocess
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from ansible.module_utils.basic import AnsibleModule  # type: ignore[import-untyped]

DOCUMENTATION = r"""
module: file_set
short_description: Install a set of files, directories and links in one module run
description:
  - >-
    One run replaces a sequence of M(ansible.builtin.template), M(ansible.builtin.copy) and
    M(ansible.builtin.file) tasks. Templates are rendered on the control node, as M(ansible.builtin.template)
    does; contents travel compressed in the arguments, so a set always takes one round trip.
  - >-
    The set is compared, then validated, then written. Every new file is first written beside its destination
    with its final owner and mode, and renamed only when all of them have been written. If the validation or a
    write fails, no file has changed.
  - >-
    A link at the destination is replaced, never followed. A link in the path before it is followed only if it
    can have been created by no other user than root and the user that runs the module.
  - >-
    Meant for configuration. Contents are held in memory and sent in every run; use M(ansible.builtin.copy)
    for large files.
options:
  files:
    description: >-
      Entries of the set, directories before their contents. An entry has exactly one of
      O(files[].template), O(files[].src), O(files[].content), O(files[].link) and O(files[].state).
    type: list
    elements: dict
    required: true
    suboptions:
      path:
        description: Absolute path on the host.
        type: str
        required: true
      name:
        description: Name of the entry in RV(changed_items); several may share one. The path by default.
        type: str
      template:
        description: Template in the role's C(templates), rendered on the control node.
        type: str
      src:
        description: File in the role's C(files), or an absolute path on the control node.
        type: str
      content:
        description: The file's content.
        type: str
      link:
        description: Target of a symbolic link that is created at O(files[].path). It need not exist.
        type: str
      state:
        description: >-
          V(directory) creates a directory and its missing parents. V(absent) removes a file, a link or a
          whole directory.
        type: str
        choices: [directory, absent]
      owner:
        description: User name or ID. O(owner) by default.
        type: str
      group:
        description: Group name or ID. O(group) by default.
        type: str
      mode:
        description: Permissions as a quoted octal number. O(mode) or O(directory_mode) by default.
        type: str
      each:
        description: >-
          Repeat the entry for every element of this list. The element replaces C(%s) in the entry's texts,
          and is C(item) in its template. An empty list leaves the entry out.
        type: list
        elements: str
      vars:
        description: Variables for the template.
        type: dict
      when:
        description: Leave the entry out unless this is true.
        type: bool
        default: true
      no_log:
        description: Keep the content out of diffs, output and logs.
        type: bool
        default: false
      notify:
        description: Handlers to notify if this entry changed.
        type: list
        elements: str
  owner:
    description: Owner of entries without one of their own. By default existing paths keep their owner.
    type: str
  group:
    description: Group of entries without one of their own. By default existing paths keep their group.
    type: str
  mode:
    description: Mode of files.
    type: str
    default: "0644"
  directory_mode:
    description: Mode of directories.
    type: str
    default: "0755"
  validate:
    description: >-
      Commands that check the set before anything is written, run only if a file or a link differs. C(%s) is
      a private directory that contains every file of the set under its full path. Also run in check mode, and
      without a shell.
    type: list
    elements: str
    default: []
attributes:
  check_mode: {support: full}
  diff_mode: {support: full}
author: Pixel Endpoint contributors
"""

EXAMPLES = r"""
- name: Configure the service
  pixel.endpoint.file_set:
    owner: root
    group: root
    validate: [exampled --check %s/etc/example/main.conf]
    files:
      - {path: /etc/example, state: directory}
      - {path: /etc/example/main.conf, template: main.conf.j2, notify: Restart example}
      - path: /etc/example/password
        content: "{{ example_password }}"
        mode: "0600"
        no_log: true
        notify: Restart example
      - path: /etc/example/sites/%s.conf
        template: site.conf.j2
        each: "{{ example_sites }}"
        notify: Reload example
      - {path: /etc/example/old.conf, state: absent}
      - {path: /etc/example/proxy.conf, src: proxy.conf, when: "{{ example_proxy | bool }}"}
  register: __example_files

- name: Rebuild the index
  ansible.builtin.command: example-index
  changed_when: true
  when: "'/etc/example/main.conf' in __example_files.changed_items"
"""

RETURN = r"""
changed_items:
  description: Names of the entries that changed, each once, in the order of the set.
  returned: always
  type: list
  elements: str
changed_paths:
  description: Paths that changed, in the order of the set.
  returned: always
  type: list
  elements: str
"""

LONGEST_DIFF = 104448
MOST_LINKS = 40
WALK = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW
HIDDEN = "The content is secret.\n"


class Fault(Exception):
    """An error whose message is for the operator."""


@dataclasses.dataclass(frozen=True)
class Entry:
    """The state of a path, found or wanted.

    kind is "absent", "file", "directory", "link" or "other"; content is a file's bytes or a link's target. An
    owner, group or mode of None is not compared.
    """

    kind: str
    content: bytes = b""
    mode: int | None = None
    owner: int | None = None
    group: int | None = None
    shared: bool = False  # the file has other names (hard links)

    def attributes(self) -> str:
        """Describe mode, owner and group, one a line."""
        mode = "" if self.mode is None else f"{self.mode:04o}"
        return f"mode: {mode}\nowner: {self.owner}\ngroup: {self.group}\n"


@dataclasses.dataclass(frozen=True)
class Item:
    """An entry of the set: the wanted state and the state found."""

    path: PurePosixPath
    name: str
    secret: bool
    wanted: Entry
    found: Entry

    @property
    def differs(self) -> bool:
        return self.content_differs or self.attributes_differ

    @property
    def content_differs(self) -> bool:
        return (self.found.kind, self.found.content) != (self.wanted.kind, self.wanted.content)

    @property
    def attributes_differ(self) -> bool:
        pairs = (
            (self.wanted.mode, self.found.mode),
            (self.wanted.owner, self.found.owner),
            (self.wanted.group, self.found.group),
        )
        return any(wanted is not None and wanted != found for wanted, found in pairs)


@contextlib.contextmanager
def parent_of(path: PurePosixPath) -> Iterator[int]:
    """Open the parent directory of a path, without following links that other users may have created.

    Yields a file descriptor. Raises FileNotFoundError if the directory does not exist, Fault if a link is not
    trusted.
    """
    names = list(reversed(path.parts[1:-1]))
    links = 0
    directory = os.open("/", WALK)
    try:
        while names:
            name = names.pop()
            there = os.stat(name, dir_fd=directory, follow_symlinks=False)
            if stat.S_ISLNK(there.st_mode):
                links += 1
                holder = os.fstat(directory)
                trusted = {0, os.geteuid()}
                if {there.st_uid, holder.st_uid} - trusted or holder.st_mode & 0o022 or links > MOST_LINKS:
                    raise Fault(f"{path}: the symbolic link {name!r} in this path is not followed")
                target = PurePosixPath(os.readlink(name, dir_fd=directory))
                names += reversed(target.parts[1:] if target.is_absolute() else target.parts)
                step = os.open("/", WALK) if target.is_absolute() else os.dup(directory)
            else:
                try:
                    step = os.open(name, WALK, dir_fd=directory)
                except NotADirectoryError as error:
                    raise Fault(f"{path}: {name!r} in this path is not a directory") from error
            os.close(directory)
            directory = step
        yield directory
    finally:
        os.close(directory)


def read_entry(path: PurePosixPath) -> Entry:
    """Read the state of a path. A path whose directory is missing is absent."""
    try:
        with parent_of(path) as parent:
            there = os.stat(path.name, dir_fd=parent, follow_symlinks=False)
            attributes = (stat.S_IMODE(there.st_mode), there.st_uid, there.st_gid)
            if stat.S_ISLNK(there.st_mode):
                target = os.fsencode(os.readlink(path.name, dir_fd=parent))
                return Entry("link", target, None, there.st_uid, there.st_gid)
            if stat.S_ISDIR(there.st_mode):
                return Entry("directory", b"", *attributes)
            if not stat.S_ISREG(there.st_mode):
                return Entry("other", b"", *attributes)
            with open(open_file(path.name, parent), "rb") as file:
                return Entry("file", file.read(), *attributes, shared=there.st_nlink > 1)
    except FileNotFoundError:
        return Entry("absent")


def open_file(name: str, parent: int) -> int:
    """Open a regular file in a directory, without following a link and without blocking."""
    return os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=parent)


def number_of(kind: str, name: str | None, may_lack: bool) -> int | None:
    """Return the ID of a user ("owner") or a group ("group").

    With may_lack an unknown name is -1, which equals no ID: a dry run may precede the user's creation.
    """
    if name is None:
        return None
    if name.isdecimal():
        return int(name)
    try:
        return pwd.getpwnam(name).pw_uid if kind == "owner" else grp.getgrnam(name).gr_gid
    except KeyError as error:
        if may_lack:
            return -1
        raise Fault(f"{kind} {name!r} is not known on this host") from error


def mode_of(text: str) -> int:
    """Parse a mode. Raises Fault unless it is octal."""
    if not re.fullmatch(r"[0-7]{3,4}", text):
        raise Fault(f"mode {text!r} is invalid: write it as a quoted octal number, such as '0644'")
    return int(text, 8)


def read_item(entry: dict[str, Any], params: dict[str, Any], check_mode: bool) -> Item:
    """Convert an entry of the set to an item, and read the current state of its path."""
    path = PurePosixPath(entry["path"])
    if not path.is_absolute() or ".." in path.parts or len(path.parts) < 2 or str(path) != entry["path"]:
        raise Fault(
            f"path {entry['path']!r} is invalid: it must be absolute, without '..', '//' or a '/' at its end"
        )
    owner = number_of("owner", entry["owner"] or params["owner"], check_mode)
    group = number_of("group", entry["group"] or params["group"], check_mode)
    if entry["state"] == "absent":
        wanted = Entry("absent")
    elif entry["state"] == "directory":
        mode = mode_of(entry["mode"] or params["directory_mode"])
        wanted = Entry("directory", b"", mode, owner, group)
    elif entry["link"] is not None:
        wanted = Entry("link", os.fsencode(entry["link"]), None, owner, group)
    elif entry["data"] is not None:
        data = zlib.decompress(base64.b64decode(entry["data"]))
        wanted = Entry("file", data, mode_of(entry["mode"] or params["mode"]), owner, group)
    else:
        raise Fault(f"{path}: templates and files are read by the action plugin, which did not run")
    found = read_entry(path)
    if wanted.kind in ("file", "link") and found.kind in ("directory", "other"):
        raise Fault(f"{path} is a {found.kind}, not a {wanted.kind}: remove it first")
    if wanted.kind == "directory" and found.kind not in ("absent", "directory"):
        raise Fault(f"{path} is a {found.kind}, not a directory: remove it first")
    return Item(path, entry["name"] or entry["path"], entry["no_log"], wanted, found)


def describe(item: Item) -> list[dict[str, str]]:
    """Return the diffs of an item as Ansible shows them: one of the content, one of the attributes."""
    diffs = []
    header = {"before_header": str(item.path), "after_header": str(item.path)}
    if item.content_differs:
        if item.secret:
            diffs.append(header | {"before": "", "after": HIDDEN})
        else:
            diffs.append(header | {"before": as_text(item.found), "after": as_text(item.wanted)})
    if item.attributes_differ and item.found.kind == item.wanted.kind:
        kept = dataclasses.replace(
            item.wanted,
            **{
                name: getattr(item.found, name)
                for name in ("mode", "owner", "group")
                if getattr(item.wanted, name) is None
            },
        )
        diffs.append(header | {"before": item.found.attributes(), "after": kept.attributes()})
    return diffs


def as_text(entry: Entry) -> str:
    """Describe an entry as text for a diff."""
    if entry.kind == "absent":
        return ""
    if entry.kind == "link":
        return f"link to {os.fsdecode(entry.content)}\n"
    if entry.kind != "file":
        return f"{entry.kind}\n"
    if len(entry.content) > LONGEST_DIFF or b"\0" in entry.content:
        digest = hashlib.sha256(entry.content).hexdigest()
        return f"{len(entry.content)} bytes, SHA-256 {digest}\n"
    return entry.content.decode(errors="replace")


def validate(items: list[Item], commands: list[str], scratch: str) -> None:
    """Run commands on a private copy of the set. Raises Fault with the output of the first that fails."""
    stage = Path(tempfile.mkdtemp(prefix="file_set.", dir=scratch))
    try:
        for item in items:
            place = stage.joinpath(*item.path.parts[1:])
            place.parent.mkdir(parents=True, exist_ok=True)
            if item.wanted.kind == "directory":
                place.mkdir(exist_ok=True)
            elif item.wanted.kind == "link":
                place.symlink_to(os.fsdecode(item.wanted.content))
            elif item.wanted.kind == "file":
                place.write_bytes(item.wanted.content)
                place.chmod((item.wanted.mode or 0) | 0o400)
        for command in commands:
            argv = [part.replace("%s", str(stage)) for part in shlex.split(command)]
            try:
                done = subprocess.run(
                    argv, cwd=stage, stdin=subprocess.DEVNULL, capture_output=True, check=False
                )
            except OSError as error:
                raise Fault(f"validate: {error}; nothing was changed") from error
            if done.returncode != 0:
                output = (done.stdout + done.stderr).decode(errors="replace").replace(str(stage), "")
                raise Fault(
                    f"validate: {command!r} ended with {done.returncode}; nothing was changed."
                    f" Output:\n{without_secrets(output, items).strip()}"
                )
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def without_secrets(text: str, items: list[Item]) -> str:
    """Replace every word of secret contents with asterisks."""
    contents = b"\n".join(item.wanted.content for item in items if item.secret).decode(errors="replace")
    for word in sorted(set(re.findall(r"[^\s'\"=:,;]{4,}", contents)), key=len, reverse=True):
        text = text.replace(word, "********")
    return text


def apply(items: list[Item]) -> None:
    """Write a set: directories, then new files beside their destinations, then all renames and removals."""
    ready: list[tuple[Item, str]] = []
    try:
        for item in items:
            if item.wanted.kind == "directory":
                make_directory(item.path, item.wanted)
            elif item.wanted.kind in ("file", "link") and (item.content_differs or item.found.shared):
                ready.append((item, write_beside(item)))
        while ready:
            item, new = ready[0]
            with parent_of(item.path) as parent:
                os.rename(new, item.path.name, src_dir_fd=parent, dst_dir_fd=parent)
            ready.pop(0)
    finally:
        for item, new in ready:
            with contextlib.suppress(OSError), parent_of(item.path) as parent:
                os.unlink(new, dir_fd=parent)
    for item in items:
        if item.wanted.kind == "absent":
            remove(item)
        elif item.wanted.kind == "link":
            if not item.content_differs:
                with parent_of(item.path) as parent:
                    own_link(item.path.name, item.wanted, parent)
        elif item.wanted.kind == "file" and not item.content_differs and not item.found.shared:
            with parent_of(item.path) as parent:
                file = open_file(item.path.name, parent)
                try:
                    set_attributes(file, item.wanted)
                finally:
                    os.close(file)


def make_directory(path: PurePosixPath, wanted: Entry) -> None:
    """Create a directory and its missing parents, or set the attributes of the existing one."""
    if path.parent != path and read_entry(path.parent).kind == "absent" and len(path.parts) > 2:
        make_directory(path.parent, wanted)
    with parent_of(path) as parent:
        with contextlib.suppress(FileExistsError):
            os.mkdir(path.name, 0o700, dir_fd=parent)
        directory = os.open(path.name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=parent)
    try:
        set_attributes(directory, wanted)
    finally:
        os.close(directory)


def write_beside(item: Item) -> str:
    """Write a file or a link under a temporary name beside its destination, with its owner and mode.

    Returns the name. An owner or group that is not set stays unchanged.
    """
    new = f".{item.path.name}.{secrets.token_hex(6)}.tmp"
    try:
        with parent_of(item.path) as parent:
            if item.wanted.kind == "link":
                os.symlink(item.wanted.content, os.fsencode(new), dir_fd=parent)
                own_link(new, item.wanted, parent)
                return new
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
            with open(os.open(new, flags, 0o600, dir_fd=parent), "wb") as file:
                try:
                    file.write(item.wanted.content)
                    file.flush()
                    former = item.found if item.found.kind == "file" else Entry("absent")
                    set_attributes(
                        file.fileno(),
                        dataclasses.replace(
                            item.wanted,
                            owner=former.owner if item.wanted.owner is None else item.wanted.owner,
                            group=former.group if item.wanted.group is None else item.wanted.group,
                        ),
                    )
                    os.fsync(file.fileno())
                except BaseException:
                    os.unlink(new, dir_fd=parent)
                    raise
    except FileNotFoundError as error:
        raise Fault(f"{item.path}: there is no directory {item.path.parent}") from error
    return new


def set_attributes(file: int, wanted: Entry) -> None:
    """Set owner, group and mode of an open file where they differ.

    The mode is set last, because a change of owner may clear bits.
    """
    there = os.fstat(file)
    owner = there.st_uid if wanted.owner is None else wanted.owner
    group = there.st_gid if wanted.group is None else wanted.group
    if (owner, group) != (there.st_uid, there.st_gid):
        os.fchown(file, owner, group)
    if wanted.mode is not None and wanted.mode != stat.S_IMODE(os.fstat(file).st_mode):
        os.fchmod(file, wanted.mode)


def own_link(name: str, wanted: Entry, parent: int) -> None:
    """Set owner and group of a link itself."""
    there = os.stat(name, dir_fd=parent, follow_symlinks=False)
    owner = there.st_uid if wanted.owner is None else wanted.owner
    group = there.st_gid if wanted.group is None else wanted.group
    if (owner, group) != (there.st_uid, there.st_gid):
        os.chown(name, owner, group, dir_fd=parent, follow_symlinks=False)


def remove(item: Item) -> None:
    """Remove a file, a link, or a directory with its contents."""
    with contextlib.suppress(FileNotFoundError), parent_of(item.path) as parent:
        if item.found.kind == "directory":
            shutil.rmtree(item.path.name, dir_fd=parent)
        else:
            os.unlink(item.path.name, dir_fd=parent)


def main() -> None:
    text = {"type": "str"}
    entry: dict[str, Any] = {
        "path": text | {"required": True},
        "name": text,
        "template": text,
        "src": text,
        "content": text | {"no_log": True},
        "data": text | {"no_log": True},
        "link": text,
        "state": text | {"choices": ["directory", "absent"]},
        "owner": text,
        "group": text,
        "mode": text,
        "each": {"type": "list", "elements": "str"},
        "vars": {"type": "dict"},
        "when": {"type": "bool", "default": True},
        "no_log": {"type": "bool", "default": False, "no_log": False},
        "notify": {"type": "list", "elements": "str"},
    }
    kinds = ("template", "src", "content", "data", "link", "state")
    files = {"type": "list", "elements": "dict", "required": True, "options": entry}
    module = AnsibleModule(
        argument_spec={
            "files": files | {"mutually_exclusive": [kinds], "required_one_of": [kinds]},
            "owner": text,
            "group": text,
            "mode": text | {"default": "0644"},
            "directory_mode": text | {"default": "0755"},
            "validate": {"type": "list", "elements": "str", "default": []},
        },
        supports_check_mode=True,
    )
    try:
        items = [read_item(entry, module.params, module.check_mode) for entry in module.params["files"]]
        paths = [str(item.path) for item in items]
        duplicates = sorted({path for path in paths if paths.count(path) > 1})
        if duplicates:
            raise Fault(f"duplicated in the set: {', '.join(duplicates)}")
        changed = [item for item in items if item.differs]
        if any(item.content_differs and item.wanted.kind in ("file", "link") for item in changed):
            validate(items, module.params["validate"], module.tmpdir)
        if not module.check_mode:
            apply(changed)
    except Fault as fault:
        module.fail_json(msg=str(fault), changed_items=[], changed_paths=[])
    except OSError as error:
        module.fail_json(msg=str(error), changed_items=[], changed_paths=[])
    module.exit_json(
        changed=bool(changed),
        changed_items=list(dict.fromkeys(item.name for item in changed)),
        changed_paths=[str(item.path) for item in changed],
        diff=[diff for item in changed for diff in describe(item)] if module._diff else [],
    )


if __name__ == "__main__":
    main()
