"""Rewards behind HTTP: what they are asked with, how long that may take, and what becomes of a failure.

All requests run on one event loop in a daemon thread, so that a call can be abandoned whatever a server does, and
works inside a notebook's own loop. A request has a time limit, a call (all its requests and their retries) has another.
"""

from __future__ import annotations

import asyncio
import json
import math
import os
import random
import threading
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeVar

from vmpo.errors import UserError
from vmpo.rewards.endpoints import Endpoints
from vmpo.rewards.http_request import RequestError, request_json
from vmpo.rewards.scoring import log_once

if TYPE_CHECKING:
    import httpx2

T = TypeVar("T")

GRACE = 5.0  # seconds beyond the deadline in which the event loop must have let go
PROBE = 10.0  # seconds for a question about health


@dataclass(frozen=True)
class Job:
    """One request: the number of scores it must bring, the body to send, and how its reply is read.

    `read` raises RequestError for a reply that holds no scores.
    """

    scores: int
    body: Callable[[], dict[str, Any]]
    read: Callable[[Any], list[float]]


@dataclass(frozen=True, kw_only=True)
class HTTPReward:
    """Options that every reward behind HTTP has.

    Attributes:
        endpoints: address of a server, or a list: the least busy one is asked, a dead one is put aside for a while.
        timeout: seconds for one request; deadline: seconds for one call, retries included.
        retries: further tries of a request; backoff: seconds before the first, doubled each time, ±50 % at random.
        concurrency: requests at a time.
        key_env: environment variable that holds the bearer token; None: no token is sent.
        on_failure: 'mask' leaves out the pictures without a score, 'stop' ends the run at the first one.

    Raises:
        UserError: for options that cannot be; and, with on_failure 'stop', for a score that could not be had.
    """

    endpoints: str | Sequence[str]
    timeout: float = 60.0
    deadline: float = 300.0
    retries: int = 3
    backoff: float = 1.0
    concurrency: int = 4
    key_env: str | None = None
    on_failure: Literal["mask", "stop"] = "mask"
    differentiable: ClassVar[bool] = False

    def __post_init__(self) -> None:
        for name in ("timeout", "deadline", "backoff"):
            value = getattr(self, name)
            if not (isinstance(value, int | float) and math.isfinite(value) and value > 0):
                raise UserError(f"{name}={value!r} of a reward behind HTTP; it is in seconds and must be above 0")
        for name, least in (("retries", 0), ("concurrency", 1)):
            value = getattr(self, name)
            if not isinstance(value, int) or value < least:
                raise UserError(f"{name}={value!r} of a reward behind HTTP; it must be a whole number from {least} on")
        if self.on_failure not in ("mask", "stop"):
            raise UserError(f"on_failure='{self.on_failure}' of a reward behind HTTP; it must be 'mask' or 'stop'")
        _ = self._servers, self._headers  # their mistakes too are found now

    @cached_property
    def _servers(self) -> Endpoints:
        return Endpoints(self.endpoints)

    @cached_property
    def _headers(self) -> dict[str, str]:
        # identity: a packed reply could unpack to any size
        headers = {"Content-Type": "application/json", "Accept-Encoding": "identity"}
        if self.key_env is None:
            return headers
        token = os.environ.get(self.key_env, "")
        if not token:
            raise UserError(f"the environment variable '{self.key_env}' (key_env) is not set; it must hold the token")
        return headers | {"Authorization": f"Bearer {token}"}

    # --- scores ---------------------------------------------------------------------------------------------------

    def ask(self, path: str, jobs: list[Job]) -> list[list[float]]:
        """The scores of every job; NaN where it failed, after `on_failure` has had its say."""
        try:
            outcomes = _run(self._ask_all(path, jobs), self.deadline) if jobs else []
        except Exception as error:  # with on_failure 'stop' the first of any kind, else a loop that did not let go
            outcomes = [error] * len(jobs)
        found = []
        for job, outcome in zip(jobs, outcomes, strict=True):
            if isinstance(outcome, BaseException):
                self._failed(str(outcome) or type(outcome).__name__, job.scores)
                outcome = [math.nan] * job.scores
            elif missing := sum(not math.isfinite(score) for score in outcome):
                self._failed("the server returned no finite score (null, NaN or infinite)", missing)
            found.append(outcome)
        return found

    def _failed(self, message: str, scores: int) -> None:
        if self.on_failure == "stop":
            raise UserError(f"{self._name}: {message}; pictures without a score: {scores} (on_failure is 'stop')")
        log_once(self._name, message, "such pictures are left out")

    @property
    def _name(self) -> str:
        return ", ".join(self._servers.urls)

    async def _ask_all(self, path: str, jobs: list[Job]) -> list[list[float] | BaseException]:
        import httpx2

        gate = asyncio.Semaphore(self.concurrency)
        async with httpx2.AsyncClient(timeout=None, headers=self._headers) as client:
            tasks = [asyncio.create_task(self._ask(client, gate, path, job)) for job in jobs]
            until = asyncio.FIRST_EXCEPTION if self.on_failure == "stop" else asyncio.ALL_COMPLETED
            done, late = await asyncio.wait(tasks, timeout=self.deadline, return_when=until)
            for task in late:
                task.cancel()
            if late:
                await asyncio.wait(late, timeout=1.0)
        if self.on_failure == "stop":
            for task in done:
                task.result()  # raises the failure that broke off the others
        too_late = RequestError(f"no answer within the deadline of {self.deadline:g} s")
        outcomes: list[list[float] | BaseException] = []
        for task in tasks:
            error = task.exception() if task in done else too_late
            outcomes.append(task.result() if error is None else error)
        return outcomes

    async def _ask(self, client: httpx2.AsyncClient, gate: asyncio.Semaphore, path: str, job: Job) -> list[float]:
        async with gate:
            body = await asyncio.to_thread(lambda: json.dumps(job.body()).encode())
            for attempt in range(self.retries + 1):
                try:
                    with self._servers.lease() as url:
                        return job.read(await request_json(client, "POST", url + path, body, self.timeout))
                except RequestError as error:
                    if not error.retry or attempt == self.retries:
                        tries = f" ({attempt + 1} tries)" if attempt else ""
                        raise RequestError(f"{url}: {error}{tries}") from error
                if not self._servers.live():
                    await asyncio.sleep(self.backoff * 2**attempt * random.uniform(0.5, 1.5))
        raise AssertionError("unreachable")

    # --- before a run ---------------------------------------------------------------------------------------------

    def probe(self, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        """Each server's reply to one question, {address: reply or RequestError}; POST where there is a body."""
        urls = self._servers.urls
        data = None if body is None else json.dumps(body).encode()
        limit = min(PROBE, self.timeout)

        async def everywhere() -> list[Any]:
            import httpx2

            async with httpx2.AsyncClient(timeout=None, headers=self._headers) as client:
                method = "GET" if data is None else "POST"
                asked = [request_json(client, method, url + path, data, limit) for url in urls]
                return await asyncio.gather(*asked, return_exceptions=True)

        return dict(zip(urls, _run(everywhere(), limit), strict=True))


@cache
def _loop(process: int) -> asyncio.AbstractEventLoop:
    """The event loop of a process; a forked one has no running thread of its parent's and gets its own."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="vmpo-http", daemon=True).start()
    return loop


def _run(work: Coroutine[Any, Any, T], seconds: float) -> T:
    future = asyncio.run_coroutine_threadsafe(work, _loop(os.getpid()))
    try:
        return future.result(seconds + GRACE)
    except BaseException:  # an interrupt as well: nothing may go on behind the caller's back
        future.cancel()
        raise
