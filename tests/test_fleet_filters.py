"""The filter plugin for the fleet's facts."""

from __future__ import annotations
