"""Downloads a file into the cache: whole and with the right checksum, or not at all."""

from __future__ import annotations

import hashlib
import http.client
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

from vmpo.disk import write_file
from vmpo.errors import UserError

TIMEOUT = 30.0  # seconds without a byte
WAITS = (1.0, 2.0, 4.0)  # seconds before the second, third and fourth attempt
BLOCK = 1 << 16
PASSING = (408, 425, 429, 500, 502, 503, 504)  # answers that another attempt may turn into a good one
HUB = "https://huggingface.co"


def cache_folder() -> Path:
    """$VMPO_CACHE, else $XDG_CACHE_HOME/vmpo, else ~/.cache/vmpo."""
    if own := os.environ.get("VMPO_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vmpo"


def is_offline() -> bool:
    """Whether downloads are forbidden by HF_HUB_OFFLINE, the Hugging Face libraries' own switch."""
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")


def checksum(content: bytes, kind: str) -> str:
    """'sha256:…', or 'git:…', the SHA-1 by which git names a file of this content."""
    if kind == "git":
        return "git:" + hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    return "sha256:" + hashlib.sha256(content).hexdigest()


def check(content: bytes, expected: str, where: str) -> None:
    """Compares with an expected checksum 'kind:digest'.

    Raises:
        UserError: if they differ.
    """
    found = checksum(content, expected.partition(":")[0])
    if found != expected:
        raise UserError(f"{where} has the checksum {found}, not {expected}: it was changed or damaged, and is not used")


def download(url: str, target: Path, expected: str, progress: Callable[[int, int | None], None] | None = None) -> bytes:
    """Fetches `url` into `target`, in one step, after its checksum was compared; returns the content.

    Args:
        expected: checksum 'kind:digest'; empty if none is known.
        progress: called with the bytes that have come and their total (None if unknown).

    Raises:
        UserError: if the server refuses, does not answer or breaks off four times, or the checksum differs.
    """
    if endpoint := os.environ.get("HF_ENDPOINT"):  # the mirror that the Hugging Face libraries would ask too
        url = url.replace(HUB, endpoint.rstrip("/"), 1)
    for wait in (*WAITS, None):
        try:
            content = _attempt(url, progress)
            break
        except (OSError, http.client.HTTPException) as error:  # URLError, timeouts and resets are OSErrors
            final = isinstance(error, urllib.error.HTTPError) and error.code not in PASSING
            if final or wait is None:
                raise UserError(f"{url} could not be downloaded: {_reason(error)}") from error
            time.sleep(wait)
    if expected:
        check(content, expected, url)
    write_file(target, content, "VMPO_CACHE names another cache folder")
    return content


def _attempt(url: str, progress: Callable[[int, int | None], None] | None) -> bytes:
    request = urllib.request.Request(url, headers={"User-Agent": "vmpo"})
    content = bytearray()
    with urllib.request.urlopen(request, timeout=TIMEOUT) as response:
        length = response.headers.get("Content-Length")
        total = int(length) if length else None
        while block := response.read(BLOCK):
            content += block
            if progress is not None:
                progress(len(content), total)
    if total is not None and len(content) != total:
        raise ConnectionError(f"it broke off after {len(content)} of {total} bytes")
    return bytes(content)


def _reason(error: Exception) -> str:
    if isinstance(error, urllib.error.HTTPError):
        return f"the server answered {error.code} {error.reason}"
    return str(getattr(error, "reason", None) or error) or type(error).__name__
