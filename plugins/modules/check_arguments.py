#!/usr/bin/python
"""Documentation of the action plugin of this name, which runs on the control node."""

from __future__ import annotations

DOCUMENTATION = r"""
module: check_arguments
short_description: Check the arguments of roles, and report all faults at once
description:
  - >-
    Types and choices are those of the role's C(meta/argument_specs.yml). Ranges, formats and rules that
    concern several variables are in C(meta/checks.yml) beside it. Rules may use facts; the action itself
    connects to no host.
  - >-
    Values that Ansible would convert are accepted, such as C(-e redis_port=6380). Lists and mappings given as
    text are refused.
  - >-
    An unknown variable with the prefix of one of the roles is refused; the message suggests the most similar
    name.
options:
  roles:
    description: Roles that run on this host. All their variables are checked, with their defaults.
    type: list
    elements: str
    default: []
  others:
    description: Roles that don't run on this host. Their variables that are set are checked one by one.
    type: list
    elements: str
    default: []
attributes:
  check_mode: {support: full}
  diff_mode: {support: none}
author: Pixel Endpoint contributors
notes:
  - >-
    C(ranges) are phrases that the variable's description repeats: V(1 to 60 seconds), V(at least 2),
    V(1 to 9, or 0), V(above 0, at most 1), V(above 0, below 1).
  - >-
    C(formats) are V(ipv4), V(ipv4_with_prefix) (or empty), V(network) and V(user). For a list, ranges and
    formats apply to each element.
  - >-
    A rule consists of C(that), a condition, and C(message). With C(each), an expression, it is checked for
    every C(item). Values are converted to their types first.
"""

EXAMPLES = r"""
- name: Check the arguments
  pixel.endpoint.check_arguments:
    roles: [redis]
"""

RETURN = r"""
faults:
  description: The faults, one sentence each.
  returned: always
  type: list
  elements: str
"""
