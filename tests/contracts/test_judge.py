"""Vision-language judges: what they are asked, how their rating is read, and that no rating is no score."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.reward_servers import FAULTS, Server, redness
from vmpo.errors import UserError
from vmpo.rewards import load_reward
from vmpo.rewards.png import decode_png
from vmpo.rewards.rating import by_json, by_pattern, expected_rating

NAN = float("nan")
IMAGES = torch.rand(5, 3, 10, 16, generator=torch.Generator().manual_seed(8))
IMAGES[:, 0] *= torch.linspace(0.2, 1, 5)[:, None, None]
PROMPTS = [f"caption {i}" for i in range(5)]
METADATA: list[dict[str, Any]] = [{"question": f"Is it {i}?"} for i in range(5)]
QUICK = {"timeout": 0.4, "deadline": 2.0, "retries": 0, "backoff": 0.01}


def completion(text: Any, tokens: list[dict[str, Any]] | None = None) -> dict[str, Any]:
    choice: dict[str, Any] = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
    if tokens is not None:
        choice["logprobs"] = {"content": tokens}
    return {"id": "x", "object": "chat.completion", "choices": [choice]}


def picture(request: dict[str, Any]) -> str:
    url = request["messages"][0]["content"][0]["image_url"]["url"]
    kind, _, encoded = url.partition(",")
    assert kind == "data:image/png;base64"
    return encoded


def question(request: dict[str, Any]) -> str:
    return request["messages"][0]["content"][1]["text"]


def judge(url: str, name: str = "vlm_judge", **options: Any) -> Any:
    given = {"model": "judge-7b"} if name == "vlm_judge" else {}
    return load_reward(name, {"endpoints": f"{url}/v1", **given, **QUICK, **options})


def token(text: str, **alternatives: float) -> dict[str, Any]:
    top = [{"token": word, "logprob": math.log(p)} for word, p in alternatives.items()]
    return {"token": text, "logprob": 0.0, "top_logprobs": top}


def test_the_request_is_a_greedy_chat_completion_with_the_picture() -> None:
    with Server(lambda request, number: completion(f"Score: {redness(picture(request)):.6f}")) as server:
        reward = judge(server.url, template="{question} of {prompt}, as {json}", low=0, high=10)
        scores = reward(IMAGES, PROMPTS, METADATA)
    rounded = (IMAGES * 255).round() / 255
    torch.testing.assert_close(scores, 10 * rounded[:, 0].mean((1, 2)), rtol=1e-5, atol=0)
    assert {question(r) for r in server.requests} == {f"Is it {i}? of caption {i}, as {{json}}" for i in range(5)}
    for request in server.requests:
        assert request["model"] == "judge-7b"
        assert request["temperature"] == 0
        assert "logprobs" not in request
        row = int(re.search(r"caption (\d)", question(request))[1])
        assert torch.equal(decode_png(picture(request)), rounded[row])


def test_default_question_and_range() -> None:
    with Server(lambda request, number: completion(f"Score: {number + 1}")) as server:
        reward = judge(server.url, concurrency=1)
        assert reward(IMAGES, PROMPTS, METADATA).tolist() == [1, 2, 3, 4, 5]
    assert reward.range == "[1, 5]"
    assert reward.differentiable is False
    assert all(f"caption {i}" in question(request) for i, request in enumerate(server.requests))


def test_unified_reward_divides_by_five_and_sends_512_pixels() -> None:
    replies = ["Final Score: 4.5", "Final Score:2", "It is fine.", "Final Score: 5.7", "Final Score: 1 or so"]
    with Server(lambda request, number: completion(replies[number])) as server:
        reward = judge(server.url, "unified_reward", concurrency=1)
        scores = reward(IMAGES, PROMPTS, METADATA)
    torch.testing.assert_close(scores, torch.tensor([0.9, 0.4, NAN, NAN, 0.2]), equal_nan=True)
    assert reward.range == "[0.2, 1]"
    request = server.requests[3]
    assert decode_png(picture(request)).shape == (3, 512, 512)
    assert "Text Caption: [caption 3]" in question(request)
    assert request["model"] == "UnifiedReward-7b-v1.5"


def test_a_template_file_and_json(tmp_path: Path) -> None:
    file = tmp_path / "question.txt"
    file.write_text('Reply {"rating": ...} for «{prompt}»', encoding="utf-8")
    replies = [
        '{"rating": 7}',
        'Thinking {"rating": 1} … so:\n```json\n{"why": "a {b}", "rating": "6.5"}\n```',
        '{"rating": null}',
        '{"score": 3}',
        "7",
    ]
    with Server(lambda request, number: completion(replies[number])) as server:
        reward = judge(server.url, concurrency=1, template_file=str(file), json_key="rating", low=0, high=10, scale=10)
        scores = reward(IMAGES, PROMPTS, METADATA)
    torch.testing.assert_close(scores, torch.tensor([0.7, 0.65, NAN, NAN, NAN]), equal_nan=True)
    assert question(server.requests[0]) == 'Reply {"rating": ...} for «caption 0»'


def test_expected_rating_over_the_likeliest_tokens() -> None:
    ratings = {"1": 1, "2": 2, "3": 3, "4": 4, "5": 5}
    top = {"4": 0.3, " 4": 0.2, "5": 0.25, "3": 0.05, "four": 0.2}
    tokens = [token("Score"), token(": ", x=1.0), token("4", **top), token(".")]

    with Server(lambda request, number: completion("Score: 4.", tokens)) as server:
        scores = judge(server.url, ratings=ratings)(IMAGES[:1], PROMPTS[:1], METADATA[:1])
    assert scores.item() == pytest.approx((4 * 0.5 + 5 * 0.25 + 3 * 0.05) / 0.8)
    assert server.requests[0]["logprobs"] is True
    assert server.requests[0]["top_logprobs"] == 20

    words = [token("Good", **{"Good": 0.5, "excellent": 0.25, "Bad": 0.25})]
    value = expected_rating(words, 0, {"excellent": 5, "good": 4, "bad": 1})
    assert value == pytest.approx(0.5 * 4 + 0.25 * 5 + 0.25 * 1)


def test_expected_rating_needs_half_of_the_probability() -> None:
    with pytest.raises(ValueError, match="only 49% of the probability"):
        expected_rating([token("4", **{"4": 0.49, "so": 0.5})], 0, {"4": 4})
    with pytest.raises(ValueError, match="no token where"):
        expected_rating([token("ab")], 2, {"4": 4})


def test_numbers_are_read_from_text() -> None:
    assert by_pattern("Score: 3, Score: 4", re.compile(r"Score: (\d)")) == (3.0, 7)
    assert by_json('{"a": {"rating": 2}} {"rating": -1.5} {', "rating") == -1.5
    for text in ("", "{", '{"rating": true}', '{"rating": [3]}', '{"rating": "high"}', "{" * 2000):
        with pytest.raises(ValueError, match=r"rating|float"):
            by_json(text, "rating")


@pytest.mark.parametrize(
    "reply",
    [
        completion(None),
        completion(["Score: 3"]),
        completion(""),
        completion("Score: many"),
        completion("Score: 5.01"),
        completion("Score: 0"),
        {"choices": []},
        {"choices": "Score: 3"},
        {"error": {"message": "overloaded"}},
        [],
        7,
        *(f for f in FAULTS if f not in ("dripping", "slow")),
    ],
    ids=lambda reply: reply if isinstance(reply, str) else json.dumps(reply)[-40:],
)
@pytest.mark.parametrize("ratings", [None, {"3": 3}])
def test_no_rating_is_no_score(reply: Any, ratings: dict[str, float] | None) -> None:
    with Server(
        lambda request, number: (
            reply if number else completion("Score: 3", [token("Score: "), token("3", **{"3": 1.0})])
        )
    ) as server:
        scores = judge(server.url, concurrency=1, ratings=ratings)(IMAGES[:2], PROMPTS[:2], METADATA[:2])
    if ratings is None:
        assert scores[0] == 3
    assert scores[1].isnan()


def test_a_missing_log_probability_is_no_score() -> None:
    with Server(lambda request, number: completion("Score: 3")) as server:
        assert judge(server.url, ratings={"3": 3})(IMAGES[:1], PROMPTS[:1], METADATA[:1]).isnan().all()


def test_a_greedy_reply_without_a_rating_is_not_asked_for_again() -> None:
    with Server(lambda request, number: completion("well")) as server:
        judge(server.url, retries=3)(IMAGES[:1], PROMPTS[:1], METADATA[:1])
    assert len(server.requests) == 1


def test_stop_shows_what_the_judge_said() -> None:
    said = "I would not say.\n" + "x" * 300
    with Server(lambda request, number: completion(said)) as server:
        reward = judge(server.url, on_failure="stop")
        with pytest.raises(
            UserError,
            match=r"nothing matches .* in the judge's reply: I would not say. x+; pictures without a score: 1",
        ):
            reward(IMAGES, PROMPTS, METADATA)


def test_the_token_is_sent_and_an_unreachable_judge_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_KEY", "key-1")
    with Server(lambda request, number: completion("Score: 3")) as server:
        reward = judge(server.url, key_env="JUDGE_KEY")
        reward.check_prompts(PROMPTS)
        reward(IMAGES[:1], PROMPTS[:1], METADATA[:1])
    assert server.headers[0]["Authorization"] == "Bearer key-1"
    with pytest.raises(UserError, match="no reward server answers"):
        reward.check_prompts(PROMPTS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scale": 0}, "scale=0"),
        ({"low": 5, "high": 1}, "low must be below high"),
        ({"pattern": "("}, "no regular expression"),
        ({"pattern": r"\d"}, "needs a group"),
        ({"pattern": None}, "'pattern' or 'json_key'"),
        ({"ratings": {}}, "'ratings' are empty"),
        ({"ratings": {"1": 1}, "json_key": "x"}, "leave one out"),
        ({"template_file": "/no/such/file"}, "'/no/such/file' cannot be read"),
    ],
)
def test_options_that_cannot_be_are_one_line(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        judge("http://127.0.0.1:9", **options)
