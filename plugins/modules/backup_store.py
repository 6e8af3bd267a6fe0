#!/usr/bin/python
"""Documentation of the action plugin of this name, which runs on the control node."""

from __future__ import annotations

DOCUMENTATION = r"""
module: backup_store
short_description: Fetch a backup from a host, store it on the control node, and remove the oldest ones
description:
  - >-
    The backup gets its final name when it is complete, and its checksum is in a file beside it. Both are
    readable by their owner only. An existing file is never replaced.
  - >-
    Only backups whose names have O(name)'s prefix and suffix around a time in UTC
    (V(pixel-20260101T000000Z.rdb)) are removed, never the new one. Names sort by time.
  - No module runs on the host. The login user must be able to read O(src).
options:
  src:
    description: Path of the backup on the host.
    type: path
    required: true
  checksum:
    description: SHA-256 of the backup, computed on the host.
    type: str
    required: true
  directory:
    description: Directory of the backups on the control node. A new one is accessible to its owner only.
    type: path
    required: true
  name:
    description: Name of the backup, with the present time.
    type: str
    required: true
  keep:
    description: How many backups to keep, with the new one.
    type: int
    required: true
attributes:
  check_mode: {support: none}
  diff_mode: {support: none}
author: Pixel Endpoint contributors
"""

EXAMPLES = r"""
- name: Store the backup
  pixel.endpoint.backup_store:
    src: /var/tmp/snapshot
    checksum: "{{ checksum }}"
    directory: backups/local
    name: pixel-{{ now(utc=true, fmt='%Y%m%dT%H%M%SZ') }}.rdb
    keep: 7
"""

RETURN = r"""
path:
  description: Path of the backup.
  returned: success
  type: str
size:
  description: Its size in bytes.
  returned: success
  type: int
removed:
  description: Names of the backups that were removed.
  returned: success
  type: list
  elements: str
ahead:
  description: Names of backups with a later time than the new one, made while a clock was ahead.
  returned: success
  type: list
  elements: str
"""
