"""HTTP requests to other parts of the fleet, without the environment's proxy."""

import asyncio
from urllib.parse import urlsplit

import h11

MOST_BYTES = 64 * 1024


class AnswerError(Exception):
    """The answer is not the expected one."""


async def get(url: str) -> tuple[int, bytes]:
    """Status and body of the answer to a GET.

    Args:
        url: absolute, http or https.

    Raises:
        OSError: the host can't be reached.
        h11.RemoteProtocolError: the answer is not HTTP.
        AnswerError: the answer is larger than 64 kB.
    """
    parts = urlsplit(url)
    tls = parts.scheme == "https"
    reader, writer = await asyncio.open_connection(
        parts.hostname, parts.port or (443 if tls else 80), ssl=tls or None
    )
    try:
        connection = h11.Connection(h11.CLIENT)
        headers = [("Host", parts.netloc), ("Connection", "close")]
        request = h11.Request(method="GET", target=parts.path, headers=headers)
        writer.write(connection.send(request) or b"")
        status, body = 0, b""
        while not isinstance(event := connection.next_event(), h11.EndOfMessage):
            if event is h11.NEED_DATA:
                connection.receive_data(await reader.read(MOST_BYTES))
            elif isinstance(event, h11.Response):
                status = event.status_code
            elif isinstance(event, h11.Data):
                body += event.data
                if len(body) > MOST_BYTES:
                    raise AnswerError("answered too much")
    finally:
        writer.close()
    return status, body
