"""The page comes out whole, of a full run folder and of every partial one, and needs nothing but itself."""

from __future__ import annotations

import json
import math
import random
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from vmpo.errors import UserError
from vmpo.pretraining.words import random_style, render
from vmpo.reports.frontier_section import run_path
from vmpo.reports.gallery import marked_reading
from vmpo.reports.page import write_report
from vmpo.reports.wording import number, plus_minus

VOID = {"meta", "img", "source", "br", "link", "input", "hr"}


class Page(HTMLParser):
    """Checks that tags close in order; gathers addresses and visible text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.addresses: list[str] = []
        self.text = ""
        self.tags: list[str] = []
        self.feed(html)
        self.close()
        assert not self.open, f"left open: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in VOID:
            self.open.append(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "srcset", "href", "data", "action")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text += data


def estimate(mean: float, se: float = 0.01) -> dict[str, float]:
    return {"mean": mean, "se": se, "n": 256}


def epochs(num: int) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for e in range(1, num + 1):
        row = {"epoch": e, "samples": 96 * e, "seconds": 8.0 * e, "reward_mean": 0.5 + 0.01 * e, "reward_std": 0.3}
        row |= {"zero_std_ratio": 0.1, "var_log_w": 300.0 / 3**e, "ess": 5.0 + e, "log_z": 1.0, "kl_ref": 0.2 * e}
        row |= {"kl_old": 0.1, "ratio_mean": 1.0, "clip_fraction": 0.0, "grad_norm": 0.4, "loss": 2.0 / e}
        row |= {"failed_rewards": 0.0, "time_rollout": 3.0, "time_rewards": 1.0, "time_update": 4.0}
        if e % 3 == 0:
            row |= {"eval_reward_mean": 0.5 + 0.009 * e, "eval_reward_se": 0.02, "eval_kl_ref": 0.19 * e}
        rows.append(row)
    return rows


def evaluation() -> dict[str, Any]:
    base = {"ocr": estimate(0.612), "exact_match": estimate(0.3), "diversity": estimate(8.0), "kl_ref": estimate(0, 0)}
    aligned = {
        "ocr": estimate(0.834),
        "exact_match": estimate(0.6),
        "diversity": estimate(7.0),
        "kl_ref": estimate(2.1),
    }
    kls = [0.0, 0.3, 0.8, 1.2]
    frontier = [
        {"beta": 1 / (k + 0.1), "kl": k, "kl_se": 0.02, "reward": 0.6 + 0.3 * k**0.5, "reward_se": 0.01} for k in kls
    ]
    shares = {
        "font": {"DejaVuSans-Bold": 0.4, "DejaVuSerif-Bold": 0.6},
        "ink": {"red": 1.0},
        "ground": {"paper": 0.7, "night": 0.3},
        "x": [0.2, 0.6, 0.2],
        "y": [0.5, 0.5],
    }
    gallery = [
        {
            "prompt": f'a sign that says "{word}" <&>',
            "word": word,
            "base": {"file": f"samples/{word}_base.png", "read": "CQT", "score": 0.67},
            "aligned": {"file": f"samples/{word}_aligned.png", "read": word, "score": 1.0},
        }
        for word in ("CAT", "CUT")
    ]
    return {
        "base": base,
        "aligned": aligned,
        "difference": {"ocr": {"mean": 0.222, "se": 0.019, "n": 256}},
        "truth": {
            "beta": 0.13,
            "log_z": estimate(5.0),
            "reward": estimate(0.9),
            "kl": estimate(0.9),
            "diversity": estimate(7.7),
            "ess": 21.0,
            "frontier": frontier,
            "gap": {"kl": 2.1, "frontier_reward": 0.93, "policy_reward": 0.834, "gap": 0.096, "se": 0.012},
        },
        "marginals": {"base": shares, "aligned": shares, "truth": shares},
        "settings": {"words": 256, "images_per_prompt": 4, "sampler": "flow_grpo", "seed": 7},
        "gallery": gallery,
    }


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    (folder / "samples").mkdir(parents=True)
    rng = random.Random(0)
    for word in ("CAT", "CUT"):
        for who in ("base", "aligned"):
            Image.fromarray(render(word, random_style(rng))).save(folder / "samples" / f"{word}_{who}.png")
    (folder / "config.yaml").write_text(yaml.safe_dump({"recipe": "glyphs_ocr", "beta": 0.13, "note": "<b>&"}))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in epochs(12)))
    (folder / "evaluation.json").write_text(json.dumps(evaluation()))
    provenance = {"versions": {"torch": "2.13.0"}, "seed": 7, "hours": 0.15, "hardware": "two cores", "mood": "calm"}
    (folder / "provenance.json").write_text(json.dumps(provenance))
    return folder


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures are composed but not rendered, for tests of what the page says."""
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda self, file, **_: file.write(b"<svg/>"))


def read(folder: Path) -> tuple[Page, str]:
    path = write_report(folder)
    assert path == folder / "report.html"
    assert not list(folder.glob(".report*"))
    html = path.read_text(encoding="utf-8")
    page = Page(html)
    assert all(address.startswith("data:") for address in page.addresses)
    css = "".join(re.findall(r"<style>(.*?)</style>", html, flags=re.DOTALL))
    assert "url(" not in css
    assert "@import" not in css
    assert "script" not in page.tags
    return page, html


def test_full_report_states_gain_gap_and_origin(run: Path) -> None:
    page, html = read(run)
    assert "OCR score rose from 0.612 to 0.834" in page.text
    assert "+0.222 ± 0.019" in page.text
    assert "a gap of 0.096 ± 0.012" in page.text
    assert "base 0 of 2, aligned 2 of 2" in page.text
    assert "β = 0.13" in page.text
    for text in ("two cores", "2.13.0", "calm", "glyphs_ocr", "Time of an epoch"):
        assert text in page.text
    assert page.text.count("cannot be drawn") == 0
    assert html.count('class="pixel"') == 4
    assert "&lt;b&gt;&amp;" in html  # what a user wrote stays text
    assert "<picture>" in html
    assert "prefers-color-scheme: dark" in html


def test_wrong_letters_are_marked() -> None:
    assert marked_reading("CAT", "CAT") == "CAT"
    assert marked_reading("CQT", "CAT") == 'C<span class="wrong">Q</span>T'
    assert marked_reading("CATS", "CAT") == 'CAT<span class="wrong">S</span>'
    assert marked_reading("CT", "CAT") == 'C<span class="wrong">·</span>T'


@pytest.mark.usefixtures("quick")
def test_words_of_the_headline_follow_the_error(run: Path) -> None:
    content = evaluation()
    content["difference"]["ocr"] = {"mean": 0.01, "se": 0.02, "n": 256}
    (run / "evaluation.json").write_text(json.dumps(content))
    assert "OCR score did not measurably change" in read(run)[0].text
    content["difference"]["ocr"]["mean"] = -0.09
    (run / "evaluation.json").write_text(json.dumps(content))
    assert "OCR score fell" in read(run)[0].text


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("config.yaml", "settings of the run are unknown"),
        ("metrics.jsonl", "not finished an epoch"),
        ("evaluation.json", "Not evaluated yet"),
        ("provenance.json", "versions and hardware are unknown"),
    ],
)
@pytest.mark.parametrize("damage", ["missing", "cut", "other"])
def test_a_missing_or_damaged_file_gives_a_note(run: Path, name: str, told: str, damage: str) -> None:
    path = run / name
    if damage == "missing":
        path.unlink()
        assert told in read(run)[0].text
    else:
        path.write_text('{"a": [1, ' if damage == "cut" else "[1, 2]")
        text = read(run)[0].text
        assert f"{name} " in text or name in text


def test_an_empty_folder_and_one_that_is_not_there(tmp_path: Path) -> None:
    page, _ = read(tmp_path)
    assert "has not started" in page.text
    with pytest.raises(UserError, match="does not exist"):
        write_report(tmp_path / "nowhere")


@pytest.mark.usefixtures("quick")
def test_a_run_still_going(run: Path) -> None:
    (run / "evaluation.json").unlink()
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"epoch": 5, "reward_mean": 0.7}\n{"epoch": 13, "rewa')
    page, html = read(run)
    assert "Training, not evaluated yet" in page.text
    assert "cannot be read" not in page.text  # a half-written last line is no damage
    assert html.count("<figure>") == 4  # the samples of training are shown
    assert "frontier is not worked out yet" in page.text


def drop(content: dict[str, Any], *keys: str) -> None:
    for key in keys[:-1]:
        content = content[key]
    del content[keys[-1]]


@pytest.mark.parametrize(
    "change",
    [
        lambda e: drop(e, "difference"),
        lambda e: drop(e, "aligned"),
        lambda e: drop(e, "base"),
        lambda e: drop(e, "truth"),
        lambda e: drop(e, "truth", "frontier"),
        lambda e: drop(e, "truth", "gap"),
        lambda e: drop(e, "marginals", "truth"),
        lambda e: e["marginals"].update(aligned="none", base={"font": {}}),
        lambda e: e["gallery"].append({"prompt": None, "base": 3}),
        lambda e: e["gallery"][0]["base"].update(file="../../etc/passwd"),
        lambda e: e["base"].update(ocr={"mean": None, "se": math.nan, "n": 0}),
        lambda e: e["truth"]["gap"].update(gap=None, se=math.nan),
        lambda e: e["truth"].update(frontier=[{"kl": math.nan}, 7, {"kl": 1.0, "reward": 0.5}]),
        lambda e: e["aligned"].update(kl_ref=estimate(700.0)),
        lambda e: e["aligned"].update(kl_ref=estimate(20.0)),
        lambda e: e.update(base=5, settings=None, gallery={}),
    ],
)
def test_odd_evaluations_do_not_stop_the_page(run: Path, change: Callable[[dict[str, Any]], None]) -> None:
    content = evaluation()
    change(content)
    (run / "evaluation.json").write_text(json.dumps(content))
    (run / "metrics.jsonl").unlink()
    page, _ = read(run)
    assert "cannot be drawn" not in page.text


def test_odd_metrics_do_not_stop_the_page(run: Path) -> None:
    rows = [{"epoch": 1}, {"epoch": 2, "reward_mean": math.nan, "grad_norm": None, "time_rollout": "long"}]
    text = "".join(json.dumps(row) + "\n" for row in rows) + 'nonsense\n{"epoch": 3, "reward_mean": 0.4, "loss": 1}\n'
    (run / "metrics.jsonl").write_text(text)
    page, _ = read(run)
    assert "1 line of metrics.jsonl cannot be read" in page.text
    assert "Not recorded" in page.text
    assert "cannot be drawn" not in page.text


@pytest.mark.usefixtures("quick")
def test_an_unwritable_folder_is_one_clear_line(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (run / "report.html").write_text("the old one")

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(UserError, match="No space left"):
        write_report(run)
    assert (run / "report.html").read_text() == "the old one"
    assert not list(run.glob(".report.html*"))


def test_path_prefers_held_out_figures() -> None:
    rows = epochs(7)
    assert run_path(rows) == [(0.19 * 3, 0.5 + 0.009 * 3), (0.19 * 6, 0.5 + 0.009 * 6)]
    assert len(run_path(epochs(4))) == 4


def test_numbers_are_printed_to_their_error() -> None:
    assert plus_minus({"mean": 0.83449, "se": 0.0194}) == "0.834 ± 0.019"
    assert plus_minus({"mean": -123.456, "se": 2.34}, signed=True) == "−123.5 ± 2.3"
    assert plus_minus({"mean": 0.2, "se": math.nan}) == "0.200"
    assert plus_minus(None) == "–"
    assert number(1234.5) == "1,234"
