#!/usr/bin/python
"""Documentation of the action plugin of this name, which runs on the control node."""

from __future__ import annotations

DOCUMENTATION = r"""
module: package_set
short_description: Install Debian packages that are missing
description:
  - >-
    Compares the packages with C(ansible_facts['packages']), and runs M(ansible.builtin.apt) only for those
    that are missing. If none is missing, no module runs on the host. Missing facts are gathered first, and
    again after an installation.
  - In check mode the package lists are refreshed, because without them apt does not find the packages.
  - Further options are those of M(ansible.builtin.apt). Recommended packages are not installed by default.
options:
  name:
    description: Names of the packages.
    type: list
    elements: str
    required: true
  policy_rc_d:
    description: As in M(ansible.builtin.apt); V(101) keeps the services of new packages from starting.
    type: int
attributes:
  check_mode: {support: full}
  diff_mode: {support: full}
author: Pixel Endpoint contributors
"""

EXAMPLES = r"""
- name: Install Redis
  pixel.endpoint.package_set:
    name: [redis-server]
"""

RETURN = r"""
missing:
  description: Packages that were not installed before.
  returned: always
  type: list
  elements: str
"""
