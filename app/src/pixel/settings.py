"""Settings, read from the environment (prefix ``PIXEL_``) and from systemd's credentials.

``python -m pixel.settings`` checks them: it prints one line and exits with 0, or prints a line for
each fault and exits with 78 (``EX_CONFIG``).
"""

import difflib
import os
import socket
import ssl
import sys
from base64 import b64decode
from dataclasses import dataclass
from functools import cache, partial
from ipaddress import IPv4Network, IPv6Network, ip_network
from typing import Annotated, Literal, NoReturn, Self
from urllib.parse import SplitResult, parse_qs, urlsplit

from pydantic import (
    AfterValidator,
    AnyHttpUrl,
    ConfigDict,
    Field,
    Json,
    PlainValidator,
    SecretStr,
    TypeAdapter,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

PREFIX = "PIXEL_"
EX_CONFIG = 78

MAX_SIDE = 65_536
"""Largest width or height: an event holds a coordinate in 16 bits."""

MAX_PIXELS = 4096 * 4096
"""Largest canvas: a worker and a browser hold all of it in memory, 50 and 67 MB."""

MAX_BATCH = 10_000
"""Most pixels in one ``POST /pixels``."""

_HTTP_URL: TypeAdapter[AnyHttpUrl] = TypeAdapter(AnyHttpUrl)


def _base_url(value: str) -> str:
    """Normalize a base URL: HTTP, without a slash at its end."""
    return str(_HTTP_URL.validate_python(value)).rstrip("/")


BaseUrl = Annotated[str, AfterValidator(_base_url)]


def _certificates(value: str) -> str:
    """Decode certificates from the base64 of their PEM text, as a kubeconfig has them."""
    if not value:
        return value
    try:
        text = b64decode(value, validate=True).decode("ascii")
        ssl.create_default_context(cadata=text)
    except (ValueError, ssl.SSLError):
        raise ValueError("must be the base64 of certificates in PEM format") from None
    return text


Certificates = Annotated[str, AfterValidator(_certificates)]

# Bits of the host may be set, as in Ansible and Nginx.
Network = Annotated[IPv4Network | IPv6Network, PlainValidator(partial(ip_network, strict=False))]

MAX_BUDGET = 10_000_000
"""Largest value of a budget's fields."""


@dataclass(frozen=True, slots=True)
class Budget:
    """How much one client may write, counted in channel writes."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    per_minute: Annotated[int, Field(ge=1, le=MAX_BUDGET)]
    """Writes that a client may make in the long run."""

    burst: Annotated[int, Field(ge=1, le=MAX_BUDGET)]
    """Writes that a client may make at once after a pause."""


class Settings(BaseSettings):
    """Settings of the service. Times are in seconds, sizes in bytes unless stated otherwise."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX,
        # From systemd's LoadCredential; without the variable, no credentials are read.
        secrets_dir=os.environ.get("CREDENTIALS_DIRECTORY"),
        frozen=True,
        validate_default=False,
        hide_input_in_errors=True,
    )

    instance: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$")] = Field(
        default_factory=socket.gethostname
    )
    port: Annotated[int, Field(ge=1, le=65_535)] = 8000
    release: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._+-]{0,99}$")] = "dev"
    bind: Annotated[str, Field(pattern=r"^(unix:/.+|[^:]+:\d{1,5}|\[.+\]:\d{1,5})$")] = "127.0.0.1:8000"
    workers: Annotated[int, Field(ge=1, le=256)] = Field(default_factory=lambda: len(os.sched_getaffinity(0)))

    # One Redis; or several nodes of a cluster, separated by commas.
    redis_url: str = "redis://127.0.0.1:6379/0"
    redis_username: str | None = None
    redis_password: SecretStr | None = None
    # The authorities whose certificates Redis may show; by default those of the system.
    redis_ca: Certificates = ""
    redis_timeout: Annotated[float, Field(gt=0, le=0.9)] = 0.8
    # The age, by the balancer's stamp, at which a write may still begin.
    start_limit: Annotated[float, Field(ge=0.1, le=10)] = 0.8

    canvas_width: Annotated[int, Field(ge=1, le=MAX_SIDE)] = 1024
    canvas_height: Annotated[int, Field(ge=1, le=MAX_SIDE)] = 1024
    events_maxlen: Annotated[int, Field(ge=100)] = 20_000
    # Counted in channel writes; a full batch has to fit, or it could never be accepted.
    write_queue: Annotated[int, Field(ge=MAX_BATCH)] = 5 * MAX_BATCH
    # The pause between two messages to a viewer grows with viewers and load, within these bounds.
    frame_pause_min: Annotated[float, Field(ge=0.01, le=1)] = 0.05
    frame_pause_max: Annotated[float, Field(ge=0.01, le=1)] = 0.5
    body_limit: Annotated[int, Field(ge=128, le=65_536)] = 1024

    # What clients without a key may do: write, only read, or nothing.
    anonymous: Literal["paint", "read", "none"] = "paint"
    # The budget of each client without a key; without it, they may write as much as Redis takes.
    anonymous_budget: Annotated[Json[Budget | None], NoDecode] = None
    # Networks without this budget, in addition to loopback.
    budget_exempt: Annotated[Json[tuple[Network, ...]], NoDecode] = ()
    # Whether the event stream names the addresses of clients without a key.
    record_addresses: bool = False

    # NoDecode: pydantic reads the JSON, so that a fault in it is reported like any other.
    peers: Annotated[Json[tuple[BaseUrl, ...]], NoDecode] = ()

    graceful_timeout: Annotated[int, Field(ge=2, le=3600)] = 30
    keepalive: Annotated[int, Field(ge=1, le=3600)] = 75
    log_level: Literal["debug", "info", "warning", "error", "critical"] = "info"

    @model_validator(mode="after")
    def _check_canvas(self) -> Self:
        if self.canvas_width * self.canvas_height > MAX_PIXELS:
            raise ValueError(
                f"{PREFIX}CANVAS_WIDTH times {PREFIX}CANVAS_HEIGHT is more than {MAX_PIXELS}"
                " pixels, the largest canvas"
            )
        return self

    @model_validator(mode="after")
    def _check_pauses(self) -> Self:
        if self.frame_pause_min > self.frame_pause_max:
            raise ValueError(f"{PREFIX}FRAME_PAUSE_MIN is more than {PREFIX}FRAME_PAUSE_MAX")
        return self

    @field_validator("redis_url")
    @classmethod
    def _check_redis_url(cls, value: str) -> str:
        addresses = value.split(",")
        parts = [cls._check_redis_address(address) for address in addresses]
        if len(addresses) > 1 and any(
            (part.scheme, part.path.strip("/") or "0") not in (("redis", "0"), ("rediss", "0"))
            or part.scheme != parts[0].scheme
            for part in parts
        ):
            raise ValueError(
                "names nodes of a cluster, which must be all redis:// or all rediss://, with database 0"
            )
        return value

    @staticmethod
    def _check_redis_address(value: str) -> SplitResult:
        parts = urlsplit(value)
        if parts.scheme not in ("redis", "rediss", "unix"):
            raise ValueError("must begin with redis://, rediss:// or unix://")
        if parts.password or "password=" in parts.query:
            raise ValueError(
                "must not contain a password: set it as PIXEL_REDIS_PASSWORD"
                " or in the credential pixel_redis_password"
            )
        if parts.scheme == "unix":
            database = parse_qs(parts.query).get("db", ["0"])[0]
            if parts.hostname or not parts.path:
                raise ValueError("names no socket, as in unix:///run/redis/redis.sock")
        else:
            database = parts.path.strip("/") or "0"
            if not parts.hostname or parts.port == 0:
                raise ValueError("names no server, as in redis://127.0.0.1:6379/0")
        if not database.isdecimal():
            raise ValueError("names a database that is no number, as in redis://127.0.0.1:6379/0")
        return parts

    @field_validator("redis_password")
    @classmethod
    def _strip_newline(cls, value: SecretStr | None) -> SecretStr | None:
        """An editor ends a file with a newline, which is no part of the password."""
        return value and SecretStr(value.get_secret_value().rstrip("\r\n"))


@cache
def load() -> Settings:
    """The settings of this process. If they are invalid, exits with 78 and a line for each fault."""
    faults = _unknown_variables()
    try:
        settings = Settings()
    except ValidationError as error:
        faults += _bad_values(error)
    if faults:
        refuse(*faults)
    return settings


def refuse(*faults: str) -> NoReturn:
    """Exit with the status for an invalid configuration, which systemd doesn't restart."""
    for fault in faults:
        print(f"pixel: {fault}", file=sys.stderr)
    sys.exit(EX_CONFIG)


def _unknown_variables() -> list[str]:
    """A line for each unknown variable: a misspelt one would silently have no effect."""
    known = {PREFIX + name.upper() for name in Settings.model_fields}
    lines = []
    for name in sorted(os.environ):
        if name.startswith(PREFIX) and name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(sorted(known))}"
            lines.append(f"{name}: there is no such setting; {hint}")
    return lines


def _bad_values(error: ValidationError) -> list[str]:
    """A line for each bad setting: its variable, what is wrong, how to fix it."""
    lines = []
    for item in error.errors(include_input=False, include_url=False):
        message = item["msg"].removeprefix("Value error, ")
        if item["loc"]:
            variable = PREFIX + str(item["loc"][0]).upper()
            field = Settings.model_fields[str(item["loc"][0])]
            default = "" if field.is_required() or field.default_factory else field.default
            hint = f" (the default is {default!r})" if default not in ("", None, ()) else ""
            message = f"{variable}: {message}{hint}"
        lines.append(message)
    return lines


if __name__ == "__main__":
    settings = load()
    print(
        f"settings are valid: instance {settings.instance}, release {settings.release},"
        f" {settings.workers} workers,"
        f" a canvas of {settings.canvas_width}x{settings.canvas_height}"
    )
