"""`vmpo evaluate SOURCE… --out`: folders of pictures and runs in one table; killed, gone on with, shared out."""

from __future__ import annotations

import json
import math
import os
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from torch import Tensor

pytestmark = pytest.mark.timeout(600)
Vmpo = Callable[..., tuple[int, list[str], str]]
THIS = "tests.cli.test_evaluate_folders"
BRIGHT, COUNTED = "tests.scenarios:brightness", f"{THIS}:counted"
COUNT = "VMPO_TEST_COUNT"
FATAL: dict[str, int] = {}


class Killed(BaseException):
    """What no handler of errors catches."""


def counted(images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Tensor:
    """Levels of green in the first pixel; every picture it is given is counted in a file, and one may be the last."""
    with open(os.environ[COUNT], "a") as file:
        file.writelines(f"{prompt}\n" for prompt in prompts)
    if FATAL and len(Path(os.environ[COUNT]).read_text().splitlines()) > FATAL["after"]:
        raise Killed
    return (images[:, 1, 0, 0] * 255).round()


class Colour:
    """The mean colour as an embedding."""

    name = "colour"
    distance = "cosine"

    def __call__(self, images: Tensor) -> Tensor:
        return images.mean((2, 3))


@pytest.fixture
def count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], int]]:
    """How many pictures `counted` has been given."""
    file = tmp_path / "count.txt"
    file.touch()
    monkeypatch.setenv(COUNT, str(file))
    yield lambda: len(file.read_text().splitlines())
    FATAL.clear()


GREEN = {"ours": [[10, 30], [200, 100], [7, 8]], "theirs": [[50, 50], [90, 230], [0, 255]]}
PROMPTS = ["a red cat", "two dogs", 'a sign "NO"']


def folders(tmp_path: Path) -> tuple[Path, Path, Path]:
    """Two folders of pictures in different layouts, and the prompts."""
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    for folder in (ours, theirs):
        folder.mkdir()
    lines = []
    for p, prompt in enumerate(PROMPTS):
        for m in (1, 0):  # the files' order is not the pictures'
            Image.new("RGB", (6, 4), (5, GREEN["ours"][p][m], 0)).save(ours / f"{p:05d}-{m}.png")
            size = (6, 4 + m)  # sizes differ
            Image.new("RGB", size, (9, GREEN["theirs"][p][m], 80)).save(theirs / f"x{p}{m}.png")
        lines += [json.dumps({"file_name": f"x{p}{m}.png", "prompt": prompt}) for m in range(2)]
    (theirs / "metadata.jsonl").write_text("\n".join(reversed([*lines[1::2], *lines[::2]])))
    set_file = tmp_path / "set.txt"
    set_file.write_text("\n".join(PROMPTS))
    return ours, theirs, set_file


def lines_of(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def by_hand(values: list[float]) -> tuple[float, float]:
    return statistics.fmean(values), statistics.stdev(values) / math.sqrt(len(values))


def ok(result: tuple[int, list[str], str]) -> str:
    assert result[0] == 0, result[1]
    return result[2]


def test_folders_made_by_others_are_right_to_the_last_digit(
    vmpo: Vmpo, tmp_path: Path, count: Callable[[], int]
) -> None:
    ours, theirs, prompts = folders(tmp_path)
    out = tmp_path / "out"
    words = ["evaluate", ours, f"B=i_g={theirs}", "--prompts", prompts, "--out", out, "--rewards", COUNTED]
    code, errors, _ = vmpo(*words)
    assert code == 2
    assert "B=i_g=" not in errors[0] or "is not there" in errors[0]

    words[2] = f"Theirs, {theirs}".replace("Theirs, ", "Theirs=")
    text = ok(vmpo(*words, "--digits", 10))
    means = {name: [statistics.fmean(row) for row in rows] for name, rows in GREEN.items()}
    (a, a_se), (b, b_se) = by_hand(means["ours"]), by_hand(means["theirs"])
    gain, gain_se = by_hand([y - x for x, y in zip(means["ours"], means["theirs"], strict=True)])
    assert (out / "table.md").read_text().splitlines() == [
        "| Source | counted ↑ |",
        "|---|---:|",
        f"| ours | {a:.10f} ± {a_se:.10f} |",
        f"| Theirs | **{b:.10f}** ± {b_se:.10f} |",
        "",
        "3 prompts, 2 pictures each; mean ± standard error over prompts.",
        "",
        "Differences to ours, paired by prompt:",
        "",
        "| Source | counted ↑ |",
        "|---|---:|",
        f"| Theirs | {gain:+.10f} ± {gain_se:.10f} |",
    ]
    assert f"{a:.10f} ± {a_se:.10f}" in text
    found = {(r["source"], r["prompt"], r["image"]): r for r in lines_of(out / "scores.jsonl")}
    assert len(found) == 12 == count()
    for source, levels in (("ours", GREEN["ours"]), ("Theirs", GREEN["theirs"])):
        for p in range(3):
            assert sorted(found[source, p, m]["scores"][COUNTED] for m in range(2)) == sorted(levels[p]), (source, p)
    assert found["ours", 1, 0]["scores"] == {COUNTED: 200.0}
    per_prompt = {(r["source"], r["text"]): r["means"][COUNTED] for r in lines_of(out / "prompts.jsonl")}
    assert per_prompt == {
        (s, t): mean for s in ("ours", "Theirs") for t, mean in zip(PROMPTS, means[s.lower()], strict=True)
    }
    assert Path(found["ours", 1, 0]["file"]) == ours / "00001-0.png"
    with Image.open(out / "gallery.png") as gallery:
        assert gallery.width > 1000


def test_prompts_may_come_from_the_folder_and_diversity_is_the_hand_sum(vmpo: Vmpo, tmp_path: Path) -> None:
    _, theirs, _ = folders(tmp_path)
    out, name = tmp_path / "out", f"{THIS}:Colour"
    ok(vmpo("evaluate", theirs, "--out", out, "--distances", name, "--digits", 6))
    cosines = []
    for green in GREEN["theirs"]:
        x, y = ((9, green[m], 80) for m in range(2))
        cosines.append(sum(i * j for i, j in zip(x, y, strict=True)) / math.hypot(*x) / math.hypot(*y))
    table = json.loads((out / "table.json").read_text())
    mean, se = by_hand([1 - cosine for cosine in cosines])
    assert table["means"]["theirs"][name] == {
        "mean": pytest.approx(mean, rel=1e-5),
        "se": pytest.approx(se, rel=1e-5),
        "n": 3,
    }
    vendi = [math.exp(-sum(p * math.log(p) for p in ((1 + c) / 2, (1 - c) / 2) if p > 0)) for c in cosines]
    assert table["means"]["theirs"][f"vendi_{name}"]["mean"] == pytest.approx(statistics.fmean(vendi), rel=1e-5)
    per_prompt = {line["prompt"]: line["scores"][name] for line in lines_of(out / "prompts.jsonl")}
    assert sorted(per_prompt.values()) == pytest.approx(sorted(1 - c for c in cosines), rel=1e-4, abs=1e-7)


def test_nothing_is_scored_twice(vmpo: Vmpo, tmp_path: Path, count: Callable[[], int]) -> None:
    ours, theirs, prompts = folders(tmp_path)
    words = ["evaluate", ours, "--prompts", prompts, "--out", tmp_path / "out", "--rewards"]
    ok(vmpo(*words, COUNTED))
    ok(vmpo(*words, f"{COUNTED},{BRIGHT}"))
    assert count() == 6, "a new reward does not score the old one again"
    before = lines_of(tmp_path / "out" / "scores.jsonl")
    assert all(line["scores"].keys() == {COUNTED, BRIGHT} for line in before)
    ok(vmpo("evaluate", ours, theirs, *words[2:], f"{COUNTED},{BRIGHT}"))
    assert count() == 12, "a new source does not score the old one again"
    assert lines_of(tmp_path / "out" / "scores.jsonl")[:6] == before


def test_killed_while_scoring_it_goes_on(
    vmpo: Vmpo, tmp_path: Path, count: Callable[[], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, _, prompts = folders(tmp_path)
    monkeypatch.setattr("vmpo.evaluation.score_pictures.BATCH", 2)
    words = ["evaluate", ours, "--prompts", prompts, "--rewards", COUNTED, "--out"]
    FATAL["after"] = 3
    with pytest.raises(Killed):
        vmpo(*words, tmp_path / "out")
    FATAL.clear()
    assert count() == 4, "the second batch was not recorded"
    ok(vmpo(*words, tmp_path / "out"))
    assert count() == 4 + 4
    ok(vmpo(*words, tmp_path / "whole"))
    for name in ("scores.jsonl", "table.md", "table.json"):
        assert (tmp_path / "out" / name).read_text() == (tmp_path / "whole" / name).read_text(), name


def dimmed(images: Tensor, prompts: list[str], metadata: list[dict[str, Any]], by: float, scale: float = 1) -> Tensor:
    """Levels of green in the first pixel, less `by`, times `scale`."""
    return ((images[:, 1, 0, 0] * 255).round() - by) * scale


def test_scorers_take_options(vmpo: Vmpo, tmp_path: Path) -> None:
    ours, _, prompts = folders(tmp_path)
    words = ["evaluate", ours, "--prompts", prompts, "--out", tmp_path / "out", "--rewards", "a.b,a"]
    given = [f"a.b.use={THIS}:dimmed", "a.b.by=2", "a.b.scale=-0.5", f"a.use={THIS}:dimmed", "a.by=1"]
    ok(vmpo(*words, *(part for option in given for part in ("--option", option))))
    scores = {(r["prompt"], r["image"]): r["scores"] for r in lines_of(tmp_path / "out" / "scores.jsonl")}
    assert scores[1, 0] == {"a.b": -99.0, "a": 199.0}
    code, errors, _ = vmpo(*words, "--option", "c.by=1")
    assert code == 2
    assert "measured are a.b, a" in errors[0]


def test_failed_scores_are_counted_and_tried_again_only_when_asked(vmpo: Vmpo, tmp_path: Path) -> None:
    ours, _, prompts = folders(tmp_path)
    words = ["evaluate", ours, "--prompts", prompts, "--rewards", "tests.scenarios:some_nan", "--out", tmp_path / "out"]
    text = ok(vmpo(*words))
    assert "Without a score, and left out, of ours: some_nan 2." in text
    scores = [line["scores"]["tests.scenarios:some_nan"] for line in lines_of(tmp_path / "out" / "scores.jsonl")]
    assert [score is None for score in scores] == [False, True, False, False, False, True]
    assert "some_nan 2." in ok(vmpo(*words))
    text = ok(vmpo(*words, "--retry"))
    assert "some_nan 1." in text, "two were tried again, and every fourth of a batch from the second fails"
