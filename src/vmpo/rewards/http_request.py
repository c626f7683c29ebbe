"""One HTTP request: its JSON, or an error in one line, within a time limit and a size limit."""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import httpx2

MAX_REPLY = 2**24  # bytes; a score is some ten
WORTH_A_RETRY = (408, 425, 429)  # of the statuses below 500


class RequestError(Exception):
    """A request that brought no score.

    Attributes:
        retry: whether another try, perhaps at another server, may mend it.
    """

    def __init__(self, message: str, *, retry: bool = True) -> None:
        super().__init__(message)
        self.retry = retry


class StatusError(RequestError):
    """A reply with another status than 200."""

    def __init__(self, message: str, status: int, *, retry: bool) -> None:
        super().__init__(message, retry=retry)
        self.status = status


async def request_json(client: httpx2.AsyncClient, method: str, url: str, body: bytes | None, seconds: float) -> Any:
    """The JSON of a reply.

    Raises:
        RequestError: for whatever else comes, or nothing in time.
    """
    import httpx2

    try:
        async with asyncio.timeout(seconds), client.stream(method, url, content=body) as response:
            data = bytearray()
            async for chunk in response.aiter_raw():
                data += chunk
                if len(data) > MAX_REPLY:
                    raise RequestError(f"the reply is longer than {MAX_REPLY >> 20} MiB")
            status = response.status_code
    except TimeoutError as error:
        raise RequestError(f"no answer within {seconds:g} s") from error
    except (httpx2.HTTPError, httpx2.InvalidURL, httpx2.StreamError, OSError) as error:
        raise RequestError(f"{_one_line(str(error)) or type(error).__name__}") from error
    if status != 200:
        retry = status >= 500 or status in WORTH_A_RETRY
        raise StatusError(f"status {status}: {_one_line(_reason(data))}", status, retry=retry)
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"the reply is no JSON: {_one_line(data.decode(errors='replace'))}") from error


def _reason(data: bytearray) -> str:
    try:
        reply = json.loads(data)
    except (ValueError, RecursionError):
        reply = None
    reason = reply.get("error") if isinstance(reply, dict) else None
    if isinstance(reason, dict):  # as OpenAI-compatible servers have it
        reason = reason.get("message")
    return reason if isinstance(reason, str) else data.decode(errors="replace")


def _one_line(text: str, most: int = 200) -> str:
    line = " ".join("".join(char if char.isprintable() else " " for char in text[: 4 * most]).split())
    return line if len(line) <= most else line[:most] + "…"
