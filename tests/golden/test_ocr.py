"""The spelling score against Flow-GRPO's published values, and the reading of rendered words."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator
from typing import ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor

from vmpo.errors import UserError
from vmpo.pretraining.words import Style, random_style, render, word_list
from vmpo.rewards import OCRAccuracy, OCRLogLikelihood, check_prompts, spelling_score, target_text
from vmpo.rewards import ocr as ocr_module

pytest.importorskip("rapidocr")
pytest.importorskip("onnxruntime")


def pictures(words: list[str], seed: int = 0) -> Tensor:
    rng = random.Random(seed)
    arrays = np.stack([render(word, random_style(rng)) for word in words])
    return torch.from_numpy(arrays).permute(0, 3, 1, 2).float() / 255


def prompts_for(words: list[str]) -> list[str]:
    return [f'a sign that says "{word}"' for word in words]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize(
    ("recognised", "score"),
    [
        ("Hello World", 1.0),
        ("HELLO WORLD 2024", 1.0),
        ("Helo World", 0.9),
        ("Hello, World", 0.9),
        ("H3llo W0rld", 0.8),
        ("World Hello", 0.2),
        ("", 0.0),
        ("something far longer than the target it should be", 0.0),  # the distance is capped
    ],
)
def test_spelling_score_is_flow_grpos(recognised: str, score: float) -> None:
    assert spelling_score("Hello World", recognised) == pytest.approx(score, abs=1e-12)


def test_the_target_is_the_text_of_the_first_pair_of_quotes() -> None:
    assert target_text('a sign "Hello World" beside "Other"') == "Hello World"


@pytest.mark.parametrize("prompt", ["a sign that says 'HELLO'", 'a sign that says "HELLO', 'a sign that says " "'])
def test_a_prompt_without_a_target_is_named(prompt: str) -> None:
    with pytest.raises(UserError) as error:
        check_prompts({"ocr": OCRAccuracy()}, ['fine: "HELLO"', prompt])
    assert prompt in str(error.value)


def test_a_target_outside_the_alphabet_is_named() -> None:
    with pytest.raises(UserError, match=r"cannot read 3 .*H3LLO"):
        OCRAccuracy().check_prompts(['"HELLO"', '"H3LLO"'])
    OCRAccuracy(alphabet=None).check_prompts(['"H3LLO, World!"'])


def test_a_bad_alphabet_is_a_user_error() -> None:
    with pytest.raises(UserError, match="alphabet of the OCR reward is empty"):
        OCRAccuracy(alphabet=" ")
    with pytest.raises(UserError, match="knows no"):
        OCRAccuracy(alphabet="ab\u12d0")


def test_rendered_words_are_read() -> None:
    words = [word.upper() for word in word_list("test")[:30]]
    images = pictures(words)
    accuracy = OCRAccuracy()(images, prompts_for(words), [{}] * len(words))
    assert accuracy.shape == (30,)
    assert accuracy.mean() > 0.97
    wrong = OCRAccuracy()(images, prompts_for(words[1:] + words[:1]), [{}] * len(words))
    assert wrong.mean() < 0.5


def test_case_of_the_prompt_does_not_matter() -> None:
    images = pictures(["HELLO"])
    for reward in (OCRAccuracy(), OCRLogLikelihood()):
        upper, lower = (reward(images, [f'"{word}"'], [{}]) for word in ("HELLO", "hello"))
        assert torch.equal(upper, lower)


def test_log_likelihood_ranks_the_picture_and_is_dense() -> None:
    right, near, far = '"HOUSE"', '"MOUSE"', '"BRICK"'
    images = pictures(["HOUSE"]).expand(3, -1, -1, -1).contiguous()
    reward = OCRLogLikelihood()(images, [right, near, far], [{}] * 3)
    assert reward[0] > -0.1
    assert reward[0] > reward[1] + 0.5
    assert reward[1] > reward[2] + 0.5
    exp = OCRLogLikelihood(exp=True)(images, [right, near, far], [{}] * 3)
    torch.testing.assert_close(exp, reward.exp())
    assert ((exp > 0) & (exp <= 1)).all()


def test_log_likelihood_is_the_sum_over_alignments() -> None:
    """p(text) by enumeration of all class sequences that collapse to it, on a recogniser with made-up columns."""
    recogniser = ocr_module.LineRecogniser("ab")
    columns = torch.tensor([[[0.2, 0.5, 0.3], [0.6, 0.1, 0.3], [0.25, 0.35, 0.4]]])
    recogniser.log_probs = lambda images: columns.log()  # type: ignore[method-assign]

    def collapse(path: tuple[int, ...]) -> str:
        return "".join(recogniser.classes[k] for k, _ in itertools.groupby(path))

    for text in ("a", "ab", "aa", "bab"):
        p = sum(
            math.prod(float(columns[0, step, k]) for step, k in enumerate(path))
            for path in itertools.product(range(3), repeat=3)
            if collapse(path) == text
        )
        got = recogniser.log_likelihood(torch.zeros(1, 3, 4, 8), [text.upper()])
        torch.testing.assert_close(got, torch.tensor([p]).log(), rtol=1e-5, atol=1e-6)
    assert recogniser.read(torch.zeros(1, 3, 4, 8)) == ["ab"]
    assert recogniser.log_likelihood(torch.zeros(1, 3, 4, 8), ["aaaa"]).item() == -math.inf  # does not fit


def test_repeats_merge_and_blanks_separate() -> None:
    recogniser = ocr_module.LineRecogniser("ab")
    path = torch.tensor([[0, 1, 1, 0, 1, 2, 2, 0, 0]])
    recogniser.log_probs = lambda images: torch.nn.functional.one_hot(path).float()  # type: ignore[method-assign]
    assert recogniser.read(torch.zeros(1, 3, 4, 8)) == ["aab"]


class _TinySession:
    """A model that knows a, A and b; its classes are blank, a, A, b, space."""

    custom_metadata_map: ClassVar = {"character": "a\nA\nb"}
    name = "x"

    def get_modelmeta(self) -> _TinySession:
        return self

    def get_inputs(self) -> list[_TinySession]:
        return [self]

    def run(self, outputs: None, inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
        return [np.array([[[0.1, 0.2, 0.15, 0.05, 0.5]]], dtype=np.float32)]


def test_cases_are_summed_and_a_space_is_a_blank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ocr_module, "_session", lambda threads: _TinySession())
    image = torch.zeros(1, 3, 24, 64)
    only_a = ocr_module.LineRecogniser("A").log_probs(image).exp()
    torch.testing.assert_close(only_a, torch.tensor([[[0.6, 0.35]]]) / 0.95)
    everything = ocr_module.LineRecogniser(None).log_probs(image).exp()
    torch.testing.assert_close(everything, torch.tensor([[[0.6, 0.35, 0.05]]]))


def test_pictures_are_prepared_as_rapidocr_does() -> None:
    from rapidocr.ch_ppocr_rec.main import TextRecognizer

    theirs = TextRecognizer.__new__(TextRecognizer)  # its constructor would load the model again
    theirs.rec_image_shape = [3, 48, 320]
    images = pictures(["GREEN", "BLUE"])
    for image, ours in zip(images, ocr_module.LineRecogniser._resize(images), strict=True):
        bgr = (image.flip(0) * 255).round().byte().permute(1, 2, 0).contiguous().numpy()
        prepared = torch.from_numpy(theirs.resize_norm_img(bgr, 64 / 24))
        torch.testing.assert_close(ours, prepared, rtol=0, atol=1.5 * 2 / 255)  # theirs rounds to 8 bits


def test_a_square_picture_is_stretched() -> None:
    assert ocr_module.LineRecogniser._resize(torch.rand(2, 3, 32, 32)).shape == (2, 3, 48, 72)
    assert ocr_module.LineRecogniser._resize(torch.rand(2, 3, 64, 192)).shape == (2, 3, 48, 144)


def test_log_likelihood_is_clipped_below() -> None:
    images = pictures(["HI"])
    reward = OCRLogLikelihood()(images, [f'"{"AB" * 30}"'], [{}])  # longer than the columns: impossible
    assert reward.item() == -8.0


def test_columns_are_normalised_over_the_alphabet_and_blank() -> None:
    log_probs = ocr_module.LineRecogniser("abcXYZ").log_probs(pictures(["CAB", "ZOO"]))
    assert log_probs.shape == (2, 16, 7)
    torch.testing.assert_close(log_probs.exp().sum(2), torch.ones(2, 16))


def test_both_rewards_read_a_picture_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    recognise = ocr_module.LineRecogniser._recognise

    def counted(self: ocr_module.LineRecogniser, images: Tensor) -> Tensor:
        calls.append(len(images))
        return recognise(self, images)

    monkeypatch.setattr(ocr_module.LineRecogniser, "_recognise", counted)
    images, prompts = pictures(["TREE"]), ['"TREE"']
    first = [reward(images, prompts, [{}]) for reward in (OCRAccuracy(), OCRLogLikelihood())]
    assert len(calls) == 1
    assert first[0].item() == 1.0
    images.zero_()  # same tensor, other pictures: must be read anew
    assert OCRAccuracy()(images, prompts, [{}]).item() == 0.0
    assert len(calls) == 2


def test_a_non_finite_picture_is_nan_and_leaves_the_others_alone() -> None:
    images, prompts = pictures(["TREE", "STONE"]), ['"TREE"', '"STONE"']
    images[0, 1, 2, 3] = torch.nan
    for reward in (OCRAccuracy(), OCRLogLikelihood()):
        scores = reward(images, prompts, [{}] * 2)
        assert scores[0].isnan()
        torch.testing.assert_close(scores[1:], reward(images[1:].clone(), prompts[1:], [{}]), rtol=1e-4, atol=1e-4)


def test_batches_agree_with_single_pictures() -> None:
    words = [word.upper() for word in word_list("train")[:35]]  # more than one batch of the recogniser
    images = pictures(words, seed=5)
    reward = OCRLogLikelihood()
    together = reward(images, prompts_for(words), [{}] * 35)
    for i in (0, 31, 32, 34):
        alone = reward(images[i : i + 1].clone(), prompts_for(words[i : i + 1]), [{}])
        torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-3, atol=1e-3)


def test_the_whole_alphabet_reads_digits_and_spaces() -> None:
    style = Style(font="DejaVuSans-Bold", size=13, ink="black", ground="paper", x=0.0, y=0.0)
    images = torch.from_numpy(np.stack([render("A 42", style)])).permute(0, 3, 1, 2).float() / 255
    assert OCRAccuracy(alphabet=None)(images, ['"A 42"'], [{}]).item() == 1.0
    assert OCRLogLikelihood(alphabet=None)(images, ['"a42"'], [{}]).item() > -0.5
    assert OCRAccuracy()(images, ['"A 42"'], [{}]).item() < 1.0
