"""The agent's errors and their exit statuses."""

from __future__ import annotations


class Refused(Exception):
    """The operator can fix the cause; nothing was changed."""

    exit_status = 1


class LastBackend(Refused):
    """The host is the last one that receives requests."""

    exit_status = 3


class WaitTimeout(Refused):
    """The change is applied, but its effect was not observed in time."""

    exit_status = 4
