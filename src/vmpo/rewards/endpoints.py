"""Several servers of one reward: the least busy live one is asked, one that failed is put aside and tried later."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from vmpo.errors import UserError
from vmpo.rewards.http_request import RequestError

FIRST_REST = 5.0  # seconds after a first failure, doubled by every further one
LONGEST_REST = 300.0


class Endpoints:
    """Addresses with their load and health; used from one thread (the event loop's).

    Raises:
        UserError: for no address, or one that is no http(s) address.
    """

    def __init__(self, urls: str | Sequence[str], clock: Callable[[], float] = time.monotonic) -> None:
        given = [urls] if isinstance(urls, str) else list(urls)
        self.urls = list(dict.fromkeys(str(url).rstrip("/") for url in given))
        if not self.urls:
            raise UserError("endpoints is empty; give the address of a server, e.g. http://127.0.0.1:8765")
        for url in self.urls:
            if not url.startswith(("http://", "https://")) or not url.partition("://")[2]:
                raise UserError(f"endpoint '{url}' is no address; it must be like http://127.0.0.1:8765")
        self._clock = clock
        self._busy = dict.fromkeys(self.urls, 0)
        self._failures = dict.fromkeys(self.urls, 0)
        self._rests_until = dict.fromkeys(self.urls, 0.0)
        self._used = dict.fromkeys(self.urls, 0)
        self._turn = 0

    def live(self) -> list[str]:
        """Those that are not put aside at the moment."""
        now = self._clock()
        return [url for url in self.urls if self._rests_until[url] <= now]

    @contextmanager
    def lease(self) -> Iterator[str]:
        """A server for one request; a `RequestError` worth a retry that leaves the block puts it aside.

        If all are put aside it is the one that comes back first: better than to give up unasked.
        """
        candidates = self.live() or [min(self.urls, key=lambda url: self._rests_until[url])]
        url = min(candidates, key=lambda url: (self._busy[url], self._used[url]))
        self._turn += 1
        self._used[url] = self._turn
        self._busy[url] += 1
        try:
            yield url
            self._failures[url] = 0
        except RequestError as error:
            if error.retry and self._rests_until[url] <= self._clock():  # requests that fail together count once
                rest = min(FIRST_REST * 2 ** self._failures[url], LONGEST_REST)
                self._failures[url] += 1
                self._rests_until[url] = self._clock() + rest
            raise
        finally:
            self._busy[url] -= 1
