"""Render a set of files on the control node and hand it to the module of the same name."""

from __future__ import annotations

import base64
import os
import zlib
from collections.abc import Iterator
from typing import Any

from ansible.errors import AnsibleActionFail, AnsibleError  # type: ignore[import-untyped]
from ansible.module_utils.parsing.convert_bool import boolean  # type: ignore[import-untyped]
from ansible.plugins.action import ActionBase  # type: ignore[import-untyped]
from ansible.template import (  # type: ignore[import-untyped]
    generate_ansible_template_vars,
    trust_as_template,
)


class ActionModule(ActionBase):  # type: ignore[misc]
    """Turns templates, control-node files and inline contents into data, in one run of the module."""

    _supports_check_mode = True

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        """Run the module once.

        task_vars are the host's variables. Returns the module's result, with the handlers of the entries that
        changed. Raises AnsibleActionFail for an entry that can't be read or rendered.
        """
        task_vars = task_vars or {}
        result: dict[str, Any] = super().run(tmp, task_vars)
        entries = self._task.args.get("files")
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise AnsibleActionFail("files must be a list of entries")
        prepared = []
        handlers: dict[str, list[str]] = {}
        for entry, element in self._entries(entries):
            mode = entry.get("mode")
            if mode is not None and not isinstance(mode, str):
                raise AnsibleActionFail(
                    f"{entry.get('path')}: mode must be a quoted octal number, such as '0644'"
                )
            notify = entry.pop("notify", [])
            handlers[entry.get("path", "")] = [notify] if isinstance(notify, str) else notify
            prepared.append(self._with_data(entry, element, task_vars))
        result.update(
            self._execute_module(module_args=self._task.args | {"files": prepared}, task_vars=task_vars)
        )
        # The executor reads the handlers to notify from this key; only changed entries notify.
        called = [name for path in result.get("changed_paths", []) for name in handlers[path]]
        if called:
            result["_ansible_notify"] = list(dict.fromkeys([*(self._task.notify or []), *called]))
        return result

    def _entries(self, entries: list[dict[str, Any]]) -> Iterator[tuple[dict[str, Any], str | None]]:
        """Yield every entry whose `when` is true, once for each element of its `each`."""
        for entry in entries:
            rest = {key: value for key, value in entry.items() if key not in ("each", "when")}
            if not boolean(entry.get("when", True)):
                continue
            if "each" not in entry:
                yield rest, None
                continue
            if not isinstance(entry["each"], list):
                raise AnsibleActionFail(f"{entry.get('path')}: each must be a list")
            for element in entry["each"]:
                yield {key: _fill(value, str(element)) for key, value in rest.items()}, str(element)

    def _with_data(
        self, entry: dict[str, Any], element: str | None, task_vars: dict[str, Any]
    ) -> dict[str, Any]:
        """Replace an entry's template, source or content with the compressed data."""
        variables = entry.pop("vars", {}) | ({} if element is None else {"item": element})
        if "template" in entry:
            text = self._render(entry.pop("template"), entry.get("path"), task_vars | variables)
        elif "src" in entry:
            path = self._loader.get_real_file(self._find("files", entry.pop("src")))
            with open(path, "rb") as file:
                return entry | {"data": _pack(file.read())}
        elif "content" in entry:
            text = entry.pop("content")
            if not isinstance(text, str):
                raise AnsibleActionFail(
                    f"{entry.get('path')}: content must be text; use to_json or to_nice_yaml"
                )
        else:
            return entry
        return entry | {"data": _pack(text.encode("utf-8", "surrogateescape"))}

    def _render(self, name: str, destination: Any, variables: dict[str, Any]) -> str:
        """Render a template with the variables and the search path of the template module."""
        source = self._find("templates", name)
        roots = [
            *variables.get("ansible_search_path", []),
            self._loader.get_basedir(),
            os.path.dirname(source),
        ]
        search = [path for root in roots for path in (os.path.join(root, "templates"), root)]
        described = generate_ansible_template_vars(path=name, fullpath=source, dest_path=destination)
        if "ansible_managed" in variables:
            described.pop("ansible_managed", None)
        templar = self._templar.copy_with_new_env(
            searchpath=search, available_variables=variables | described
        )
        text = trust_as_template(self._loader.get_text_file_contents(source))
        overrides = {"trim_blocks": True, "lstrip_blocks": False}
        rendered = templar.template(text, escape_backslashes=False, overrides=overrides)
        return "" if rendered is None else str(rendered)

    def _find(self, folder: str, name: str) -> str:
        try:
            return str(self._find_needle(folder, name))
        except AnsibleError as error:
            raise AnsibleActionFail(str(error)) from error


def _fill(value: Any, element: str) -> Any:
    """Replace %s by an element if the value is text."""
    return value.replace("%s", element) if isinstance(value, str) else value


def _pack(data: bytes) -> str:
    """Compress data into text that fits into a module's arguments."""
    return base64.b64encode(zlib.compress(data, 9)).decode()
