"""Tables of given scores against sums done by hand in plain Python, to the last digit; what they look like on paper."""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image

from vmpo.errors import UserError
from vmpo.evaluation.picture_folder import find_pictures, match_pictures, prompts_named_in
from vmpo.evaluation.score_log import ScoreLog
from vmpo.evaluation.score_pictures import prompt_diversity, read_picture
from vmpo.evaluation.score_table import ScoreTable, build_table
from vmpo.evaluation.training_strip import spread
from vmpo.prompts import PromptSet
from vmpo.reports.picture_grid import PictureGrid, _width, draw_grid, wrapped
from vmpo.reports.score_table import latex, markdown, write_tables
from vmpo.training.pictures import save_image

NAN = math.nan
# 3 prompts of 2 pictures; one picture of the second source has no score
HPS = {"base": [[0.21, 0.25], [0.3, 0.26], [0.19, 0.2]], "VMPO_Diff": [[0.27, 0.31], [0.3, NAN], [0.22, 0.28]]}
DREAMSIM = {"base": [0.41, 0.39, 0.46], "VMPO_Diff": [0.33, 0.25, 0.35]}
ERRORS = {"base": [[2.0, 4.0], [1.0, 0.0], [3.0, 3.0]], "VMPO_Diff": [[1.0, 1.0], [0.0, 2.0], [2.0, 2.0]]}


def table() -> ScoreTable:
    columns = {"hpsv2": HPS, "dreamsim": DREAMSIM, "my.module:spelling_errors": ERRORS}
    scores = {
        source: {metric: torch.tensor(column[source], dtype=torch.float64) for metric, column in columns.items()}
        for source in HPS
    }
    return build_table(scores, list(columns), ["my.module:spelling_errors"], 3, 2)


def by_hand(rows: list[list[float]] | list[float]) -> tuple[float, float]:
    """Mean of prompt means; their standard deviation over the root of their number."""
    means = [statistics.fmean([x for x in row if x == x]) if isinstance(row, list) else row for row in rows]
    return statistics.fmean(means), statistics.stdev(means) / math.sqrt(len(means))


def means_of(rows: list[list[float]] | list[float]) -> list[float]:
    return [statistics.fmean([x for x in row if x == x]) if isinstance(row, list) else row for row in rows]


@pytest.mark.parametrize(
    ("metric", "column"), [("hpsv2", HPS), ("dreamsim", DREAMSIM), ("my.module:spelling_errors", ERRORS)]
)
def test_every_figure_is_the_one_done_by_hand(metric: str, column: dict[str, list[list[float]]]) -> None:
    found, text = table(), markdown(table(), 4)
    for source, rows in column.items():
        mean, se = by_hand(rows)
        assert found.means[source][metric].mean == pytest.approx(mean, rel=1e-14)
        assert found.means[source][metric].se == pytest.approx(se, rel=1e-14)
        assert f"{mean:.4f} ± {se:.4f}" in text.replace("**", "")
    gains = [b - a for a, b in zip(means_of(column["base"]), means_of(column["VMPO_Diff"]), strict=True)]
    mean, se = by_hand(gains)
    estimate = found.differences["VMPO_Diff"][metric]
    assert (estimate.mean, estimate.se) == (pytest.approx(mean, rel=1e-13), pytest.approx(se, rel=1e-13))
    assert f"{mean:+.4f} ± {se:.4f}".replace("-", "−") in text
    unpaired = math.hypot(*(by_hand(rows)[1] for rows in column.values()))
    assert se != pytest.approx(unpaired, rel=0.05), "the errors of a difference are those of its pairs"


def test_the_whole_markdown_table() -> None:
    assert markdown(table(), 3).splitlines() == [
        "| Source | HPSv2 ↑ | DreamSim ↑ | spelling_errors ↓ |",
        "|---|---:|---:|---:|",
        "| base | 0.235 ± 0.025 | **0.420** ± 0.021 | 2.167 ± 0.833 |",
        "| VMPO_Diff | **0.280** ± 0.015 | 0.310 ± 0.031 | **1.333** ± 0.333 |",
        "",
        "3 prompts, 2 pictures each; mean ± standard error over prompts.",
        "Without a score, and left out, of VMPO_Diff: HPSv2 1.",
        "",
        "Differences to base, paired by prompt:",
        "",
        "| Source | HPSv2 ↑ | DreamSim ↑ | spelling_errors ↓ |",
        "|---|---:|---:|---:|",
        "| VMPO_Diff | +0.045 ± 0.013 | −0.110 ± 0.017 | −0.833 ± 0.726 |",
    ]


def test_the_whole_latex_table() -> None:
    found = table()
    assert latex(found, found.means, 3).splitlines() == [
        "% 3 prompts, 2 pictures each; mean ± standard error over prompts.",
        "% Without a score, and left out, of VMPO_Diff: HPSv2 1.",
        r"\begin{tabular}{lccc}",
        r"\toprule",
        r"Method & HPSv2 ($\uparrow$) & DreamSim ($\uparrow$) & spelling\_errors ($\downarrow$) \\",
        r"\midrule",
        r"base & $0.235 \pm 0.025$ & $\mathbf{0.420} \pm 0.021$ & $2.167 \pm 0.833$ \\",
        r"VMPO\_Diff & $\mathbf{0.280} \pm 0.015$ & $0.310 \pm 0.031$ & $\mathbf{1.333} \pm 0.333$ \\",
        r"\bottomrule",
        r"\end{tabular}",
    ]


def test_differences_in_latex_are_signed() -> None:
    found = table()
    lines = latex(found, found.differences, 3).splitlines()
    assert "% Differences to base, paired by prompt." in lines
    assert r"VMPO\_Diff & $+0.045 \pm 0.013$ & $-0.110 \pm 0.017$ & $-0.833 \pm 0.726$ \\" in lines


def test_one_prompt_has_no_error_and_a_source_without_scores_a_dash(tmp_path: Path) -> None:
    scores = {"a": {"ocr": torch.tensor([[0.5, 0.7]])}, "b": {"ocr": torch.tensor([[NAN, NAN]])}}
    found = build_table(scores, ["ocr"], [], 1, 2)
    assert markdown(found, 2).splitlines()[2:4] == ["| a | **0.60** |", "| b | – |"]
    write_tables(found, tmp_path, 2)
    written = json.loads((tmp_path / "table.json").read_text())
    assert written["means"]["a"]["ocr"]["se"] is None
    assert written["means"]["b"]["ocr"] == {"mean": None, "se": None, "n": 0}
    assert written["failed"] == {"b": {"ocr": 2}}


class Colour:
    """The mean colour as an embedding."""

    name = "colour"
    distance = "cosine"

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        return images.mean((2, 3))


def test_diversity_is_one_minus_the_mean_cosine_of_pairs_whatever_the_pictures_sizes() -> None:
    colours = [(0.2, 0.4, 0.4), (0.9, 0.3, 0.0), (0.0, 0.8, 0.6)]
    images = [torch.tensor(c).view(3, 1, 1).expand(3, 4, 5 + i) for i, c in enumerate(colours)]
    found = prompt_diversity("colour", Colour(), images)
    cosines = [
        sum(x * y for x, y in zip(a, b, strict=True)) / math.hypot(*a) / math.hypot(*b)
        for i, a in enumerate(colours)
        for b in colours[:i]
    ]
    assert found["colour"] == pytest.approx(1 - statistics.fmean(cosines), rel=1e-6)
    gram = np.eye(3)
    for (i, j), cosine in zip([(1, 0), (2, 0), (2, 1)], cosines, strict=True):
        gram[i, j] = gram[j, i] = cosine
    eigenvalues = np.linalg.eigvalsh(gram / 3)
    assert found["vendi_colour"] == pytest.approx(math.exp(-sum(x * math.log(x) for x in eigenvalues)), rel=1e-6)


class Brightness(Colour):
    """The mean brightness; two pictures differ by its square, as with LPIPS."""

    distance = "squared_euclidean"

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        return images.mean((1, 2, 3))[:, None]


def test_a_distance_that_is_no_cosine_has_no_vendi_score() -> None:
    images = [torch.full((3, 4, 4), value) for value in (0.0, 0.5, 0.75)]
    assert prompt_diversity("lpips", Brightness(), images) == {"lpips": (0.25 + 0.5625 + 0.0625) / 3}


def test_a_distance_of_pixels_refuses_pictures_of_several_sizes() -> None:
    class Pixels:
        name, distance = "pixels", "squared_euclidean"

        def __call__(self, images: torch.Tensor) -> torch.Tensor:
            return images.flatten(1)

    with pytest.raises(UserError, match="'pixels' compares pictures of one size; a prompt has pictures of 6x4, 8x4"):
        prompt_diversity("pixels", Pixels(), [torch.rand(3, 4, 8), torch.rand(3, 4, 6)])


def test_what_was_saved_is_what_is_read(tmp_path: Path) -> None:
    image = torch.rand(3, 5, 7, generator=torch.Generator().manual_seed(0))
    save_image(image, tmp_path / "a.png")
    assert torch.equal(read_picture(tmp_path / "a.png"), (image * 255).round() / 255)


# --- folders -----------------------------------------------------------------------------------------------------


def picture(path: Path, level: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 3), (level, 0, 0)).save(path)


def names(files: list[list[Path]], folder: Path) -> list[list[str]]:
    return [[str(file.relative_to(folder)) for file in row] for row in files]


PROMPTS = PromptSet(["a cat", "a dog"], [{}, {}])


def test_a_hugging_face_image_folder(tmp_path: Path) -> None:
    lines = [("x/1.png", "a dog"), ("2.jpg", "a cat"), ("3.png", "a cow"), ("4.png", " a dog")]
    for name, _ in lines:
        picture(tmp_path / name)
    records = [{"file_name": name, "prompt": prompt, "tag": name} for name, prompt in lines]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, records)))
    found = find_pictures(tmp_path)
    assert names(match_pictures(found, PROMPTS, tmp_path), tmp_path) == [["2.jpg"], ["x/1.png", "4.png"]]
    own = prompts_named_in(found, tmp_path)
    assert own.prompts == ["a dog", "a cat", "a cow"]
    assert own.metadata[1] == {"prompt": "a cat", "tag": "2.jpg"}, "what a reward may want to know of the prompt"

    (tmp_path / "metadata.jsonl").unlink()
    (tmp_path / "metadata.csv").write_text('file_name,text\n2.jpg,a cat\nx/1.png,"a dog"\n')
    assert names(match_pictures(find_pictures(tmp_path), PROMPTS, tmp_path), tmp_path) == [["2.jpg"], ["x/1.png"]]


def test_a_geneval_folder(tmp_path: Path) -> None:
    for index, prompt in enumerate(["a dog", "a cat"]):
        for m in (10, 9):
            picture(tmp_path / f"{index:05d}" / "samples" / f"{m:04d}.png")
        (tmp_path / f"{index:05d}" / "metadata.jsonl").write_text(json.dumps({"tag": "single", "prompt": prompt}))
    found = match_pictures(find_pictures(tmp_path), PROMPTS, tmp_path)
    assert names(found, tmp_path)[0] == ["00001/samples/0009.png", "00001/samples/0010.png"], "the text counts"


@pytest.mark.parametrize(
    ("files", "wanted"),
    [
        (["00000-1.png", "00000-0.png", "00001-10.png", "00001-2.png"], [[1, 0], [3, 2]]),
        (["1.webp", "0.jpeg"], [[1], [0]]),
        (["00001/0.png", "00000/0.png", "00000/1.png"], [[1, 2], [0]]),
    ],
)
def test_names_with_indices(tmp_path: Path, files: list[str], wanted: list[list[int]]) -> None:
    for name in [*files, "grid.png"]:
        picture(tmp_path / name)
    found = match_pictures(find_pictures(tmp_path), PROMPTS, tmp_path)
    assert names(found, tmp_path) == [[files[i] for i in row] for row in wanted]
    with pytest.raises(UserError, match="pass --prompts"):
        prompts_named_in(find_pictures(tmp_path), tmp_path)


def test_folders_that_do_not_match_say_so(tmp_path: Path) -> None:
    picture(tmp_path / "cat.png")
    with pytest.raises(UserError, match=r"no picture in .* can be matched"):
        find_pictures(tmp_path)
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "cat.png", "prompt": "a cat"}\n')
    with pytest.raises(UserError, match="no picture of 1 of the 2 prompts; the first is number 1, 'a dog'"):
        match_pictures(find_pictures(tmp_path), PROMPTS, tmp_path)
    for line, message in [
        ('{"file_name": "gone.png", "prompt": "a cat"}', "line 1 names 'gone.png', which is not there"),
        ('{"file_name": "cat.png"}', "line 1 must have file_name and prompt"),
        ("cat.png a cat", "line 1 is no JSON"),
    ]:
        (tmp_path / "metadata.jsonl").write_text(line)
        with pytest.raises(UserError, match=message):
            find_pictures(tmp_path)


# --- the log -----------------------------------------------------------------------------------------------------


def record(image: int, **scores: float | None) -> dict[str, object]:
    return {"source": "a", "prompt": 0, "image": image, "file": f"{image}.png", "scores": scores}


def test_a_cut_off_line_is_no_record_and_later_scores_join_earlier_ones(tmp_path: Path) -> None:
    log = ScoreLog(tmp_path, Accelerator(cpu=True))
    log.append([record(0, ocr=0.5), record(1)])
    log.append([record(1, ocr=None), {"source": "a", "prompt": 0, "scores": {"dreamsim": 0.25}}])
    with log.part.open("a") as file:
        file.write('{"source": "a", "prompt": 0, "image": 2, "sco')  # the process was killed here
    again = ScoreLog(tmp_path, Accelerator(cpu=True))
    again.merge()
    again.append([{"source": "a", "prompt": 0, "image": 0, "scores": {"hpsv2": 0.125}}])
    again.merge()
    lines = [json.loads(line) for line in (tmp_path / "scores.jsonl").read_text().splitlines()]
    assert lines == [record(0, ocr=0.5, hpsv2=0.125), record(1, ocr=None)]
    assert json.loads((tmp_path / "prompts.jsonl").read_text())["scores"] == {"dreamsim": 0.25}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["prompts.jsonl", "scores.jsonl"]

    (tmp_path / "scores.jsonl").write_text("nonsense\n")
    with pytest.raises(UserError, match=r"scores.jsonl' line 1 is no record"):
        again.merge()


# --- figures -----------------------------------------------------------------------------------------------------


def test_epochs_of_a_strip_have_both_ends_and_no_epoch_twice() -> None:
    assert spread([5, 10], 5) == [5, 10]
    assert spread(list(range(1, 101)), 5) == [1, 26, 50, 75, 100]
    assert spread([1, 2, 90, 100], 3) in ([1, 2, 100], [1, 90, 100])


def test_a_grid_has_every_picture_in_its_place() -> None:
    colours = torch.tensor([[0.9, 0.1, 0.1], [0.1, 0.9, 0.1], [0.1, 0.1, 0.9], [0.9, 0.9, 0.1]])
    cells = [c.view(3, 1, 1).expand(3, 16, 16) for c in colours]
    figure = draw_grid(PictureGrid([cells[:2], cells[2:]], ["base", "aligned"], ["a cat", "a dog"]))
    shown = [axes.images[0].get_array()[0, 0] for axes in figure.axes]
    np.testing.assert_allclose(np.array(shown), colours.numpy())
    boxes = [axes.get_position() for axes in figure.axes]
    assert boxes[0].x1 < boxes[1].x0 and boxes[0].y0 > boxes[2].y1, "neither columns nor rows overlap"  # noqa: PT018
    texts = {text.get_text(): text.get_position() for text in figure.texts}
    assert boxes[1].x0 < texts["aligned"][0] < boxes[1].x1
    assert boxes[2].y0 < texts["a dog"][1] < boxes[2].y1


def test_a_long_prompt_is_cut_to_its_place() -> None:
    long = "a photograph of $5 " + "very WIDE " * 40 + "small cat $x_1$"
    lines = wrapped(long, 1.35, 6).split("\n")
    assert len(lines) == 6
    assert lines[-1].endswith("…")
    assert max(map(_width, lines)) <= 1.35 < _width(lines[0] + " photograph")
    assert wrapped("a cat", 1.35, 1) == "a cat"
    cell = torch.zeros(3, 16, 16)
    figure = draw_grid(PictureGrid([[cell]], ["$base"], [long]))
    figure.canvas.draw()
    edges = [text.get_window_extent().x0 for text in figure.texts]
    assert min(edges) >= 0, "no text is cut off at the edge"
