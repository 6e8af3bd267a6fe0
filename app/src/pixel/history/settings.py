"""Settings of the history service (prefix ``HISTORY_``), beside those of the application."""

from pathlib import Path
from typing import Annotated

from pydantic import Field, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

from pixel.settings import refuse

PREFIX = "HISTORY_"


class HistorySettings(BaseSettings):
    """Where the history is kept, for how long, and where it is served."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, frozen=True)

    path: Path = Path("history.sqlite")
    address: str = "127.0.0.1"
    port: Annotated[int, Field(ge=1, le=65_535)] = 8100
    days: Annotated[int, Field(ge=1, le=3650)] = 90
    max_mb: Annotated[int, Field(ge=10, le=1_000_000)] = 2000


def load() -> HistorySettings:
    """The settings of this process. If they are invalid, exits with 78 and a line for each fault."""
    try:
        return HistorySettings()
    except ValidationError as error:
        refuse(*(f"{PREFIX}{str(item['loc'][0]).upper()}: {item['msg']}" for item in error.errors()))
