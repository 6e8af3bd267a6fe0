"""The pixel as a pydantic model."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, Field


class Pixel(BaseModel):
    x: int = Field(ge=0, lt=1024, strict=True)
    y: int = Field(ge=0, lt=1024, strict=True)
    channel: Literal["R", "G", "B"]
    value: int = Field(ge=0, le=255, strict=True)


class Stored(BaseModel):
    status: Literal["ok"] = "ok"
    received: Pixel
