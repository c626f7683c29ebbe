"""Which of several reward servers is asked, and how long a failed one rests."""

from __future__ import annotations

import pytest

from vmpo.rewards.endpoints import FIRST_REST, Endpoints
from vmpo.rewards.http_request import RequestError


def test_the_least_busy_server_is_asked_and_turns_are_taken() -> None:
    servers = Endpoints(["http://a", "http://b/", "http://a"])
    assert servers.urls == ["http://a", "http://b"]
    with servers.lease() as first, servers.lease() as second:
        assert {first, second} == {"http://a", "http://b"}
    order = []
    for _ in range(4):
        with servers.lease() as url:
            order.append(url)
    assert order == ["http://a", "http://b"] * 2


def test_a_failed_server_rests_and_comes_back() -> None:
    now = [100.0]
    servers = Endpoints(["http://a", "http://b"], clock=lambda: now[0])

    def fail(retry: bool = True) -> str:
        with pytest.raises(RequestError), servers.lease() as url:
            raise RequestError("gone", retry=retry)
        return url

    assert fail() == "http://a"
    assert servers.live() == ["http://b"]
    assert fail(retry=False) == "http://b", "a refused request is no sign of a dead server"
    assert servers.live() == ["http://b"]
    assert fail() == "http://b"
    assert servers.live() == []
    with servers.lease() as url:  # none is live: the one that comes back first
        assert url == "http://a"
    now[0] += FIRST_REST
    assert servers.live() == ["http://a", "http://b"]


def test_a_server_that_fails_again_rests_longer_until_it_answers() -> None:
    now = [100.0]
    server = Endpoints("http://a", clock=lambda: now[0])

    def rest_after_failure() -> float:
        with pytest.raises(RequestError), server.lease():
            raise RequestError("gone")
        for rest in (5, 10, 20, 40, 80, 160, 300, 320):
            now[0] += rest - 0.001
            resting = not server.live()
            now[0] += 0.001
            if resting and server.live():
                return rest
            now[0] -= rest
        raise AssertionError

    found = []
    for _ in range(8):
        found.append(rest_after_failure())
        now[0] += 1000
    assert found == [5, 10, 20, 40, 80, 160, 300, 300]
    with server.lease():
        pass
    assert rest_after_failure() == 5


def test_requests_that_fail_together_count_once() -> None:
    now = [100.0]
    server = Endpoints("http://a", clock=lambda: now[0])
    with pytest.raises(RequestError), server.lease(), server.lease(), server.lease():
        raise RequestError("gone")
    now[0] += FIRST_REST
    assert server.live()
