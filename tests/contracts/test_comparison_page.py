"""The page of a comparison: its numbers are those worked out by hand, and no result, however odd, stops it."""

from __future__ import annotations

import base64
import json
import math
import re
from html.parser import HTMLParser
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from vmpo.errors import UserError
from vmpo.reports.comparison_figures import course, families_of, ground_of, law
from vmpo.reports.comparison_page import read_results, write_comparison
from vmpo.reports.comparison_table import UNTRAINED, amount, markdown_table, over_seeds, print_table, rows

NAN = float("nan")
TRUTH = {"log_z": 1.5, "reward": 0.9, "kl": 0.6, "reward_ref": 0.2}
KLS = (0.01, 0.02, 0.06)  # mean 0.03, standard error √0.0007 / √3 = 0.015275


def result(objective: str, seed: int, kl: float, reward: float = 0.9, world: str = "plane", **over: Any) -> dict:
    """A run that ends at the given KL to the target (nats) and expected reward."""
    curve = [
        {"samples": n, "kl_target": 0.6 + (kl - 0.6) * n / 100, "kl_ref": 0.5 * n / 100, "ess": 0.5, "var_log_w": 1.0}
        | {"reward": 0.2 + (reward - 0.2) * n / 100, "log_z_error": -0.3}
        for n in (0, 50, 100)
    ]
    final = {"var_log_w": 2 * kl, "ess": 0.99, "log_z_error": -kl, "kl_target": kl, "reward": reward}
    final |= {"reward_se": 0.003, "distance": 0.1, "distance_kind": "energy distance"}
    made = {
        "world": world,
        "objective": objective,
        "seed": seed,
        "source": f"Paper on {objective}, Eq. <8>",
        "note": "",
    }
    made |= {"truth": TRUTH, "curve": curve, "final": final, "gradient_snr": 0.3}
    points = [[math.cos(i), math.sin(2 * i)] for i in range(40)]
    return made | {"seconds": 4.0 + seed, "samples": 100, "points": points, "probabilities": None} | over


def diverged(objective: str, seed: int, world: str = "plane") -> dict:
    """A run of which no final number is left."""
    run = result(objective, seed, 0.1, world=world, note="stopped: not finite", points=[])
    run["final"] = dict.fromkeys(run["final"], NAN)
    run["curve"][2] |= {"kl_target": NAN, "reward": None}
    return run


def folder_of(path: Path, results: list[dict], comparison: dict | None) -> Path:
    for one in results:
        place = path / "results" / one["world"]
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{one['objective']}-{one['seed']}.json").write_text(json.dumps(one))
    if comparison is not None:
        (path / "comparison.json").write_text(json.dumps(comparison))
    return path


PLANE: list[dict] = [
    *(
        result("vmpo_diff", seed, kl, reward)
        for seed, (kl, reward) in enumerate(zip(KLS, (0.8, 0.9, 0.85), strict=True))
    ),
    *(result("grpo", seed, 0.02, 0.9 + 0.001 * seed) for seed in range(3)),
    result("grpo_std", 0, 0.005, 1.0),
    *(diverged("dpo", seed) for seed in range(2)),
    result("awr", 0, 0.001),
    diverged("awr", 1),
]


class Page(HTMLParser):
    """The cells of every table row, and the addresses of the page; checks that tags close in order."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.rows: list[list[str]] = []
        self.addresses: list[str] = []
        self.feed(html)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in ("meta", "img", "source", "wbr"):
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        self.addresses += [value or "" for name, value in attrs if name in ("src", "srcset", "href")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "td" in self.open or "th" in self.open:
            self.rows[-1][-1] += data


def test_the_page_holds_the_numbers_worked_out_by_hand(tmp_path: Path) -> None:
    comparison = {
        "date": "2026-05-04",
        "seeds": [0, 1, 2],
        "samples": 76800,
        "command": "vmpo compare --seeds 3",
        "worlds": {"plane": {"kind": "a plane", "frontier": {"kl": [0, 1], "reward": [0.2, 1.1]}, "density": None}},
        "equal_seconds": {"plane": {"grpo": {"seconds": 3.1, "kl_target": [0.05, 0.01], "reward": [0.8, 0.02]}}},
    }
    html = write_comparison(folder_of(tmp_path, PLANE, comparison)).read_text()
    page = Page(html)
    by_name = {row[0].removesuffix(" reached"): row for row in page.rows}
    # KL 0.03 ± 0.015; reward 0.85 − 0.9 = −0.05 ± 0.05/√3; seconds 5 ± 1/√3
    assert by_name["vmpo_diff"][1:6] == ["0.030± 0.015", "0.990± 0", "0.060± 0.031", "0.030± 0.015", "−0.050± 0.029"]
    assert by_name["vmpo_diff"][8] == "5.00± 0.58"
    assert [by_name["grpo_std"][i] for i in (1, 5)] == ["0.00500", "+0.100"], "one seed has no error"
    assert [row for row in page.rows if row[0] == "grpo"] == [["grpo", "0.050± 0.010", "−0.100± 0.020"]]
    assert "76,800 samples" in html
    assert "vmpo compare --seeds 3" in html
    assert "after 3.10 seconds" in html
    assert all(a.startswith(("data:image/svg+xml;base64,", "#")) for a in page.addresses)
    assert "cannot be drawn" not in html
    assert "&lt;8&gt;" in html


def test_rows_follow_the_kl_and_what_diverged_comes_last() -> None:
    table = {row.objective: row for row in rows(PLANE, "plane")}
    assert list(table) == ["grpo_std", "grpo", "vmpo_diff", UNTRAINED, "awr", "dpo"]
    assert table["awr"].notes == ("1 of 2 seeds diverged", "stopped: not finite")
    assert table["awr"].values["kl_target"] == (0.001, None), "the mean is over the seeds that are left"
    assert table["dpo"].values["kl_target"] == (None, None)
    assert table["dpo"].values["seconds"][0] == pytest.approx(4.5)
    assert table[UNTRAINED].values["kl_target"][0] == pytest.approx(0.6)
    assert table[UNTRAINED].values["reward_gap"][0] == pytest.approx(-0.7)


@pytest.mark.parametrize(
    ("reward", "ess", "expected"),
    # within two errors of the samples (2·0.003) or 1% of the gain of 0.7; beyond both; too small an ESS
    [(0.9055, 0.99, True), (0.8935, 0.99, True), (0.888, 0.99, False), (0.9, 0.97, False), (NAN, 0.99, False)],
)
def test_the_target_is_reached_within_the_error_and_with_even_weights(
    reward: float, ess: float, expected: bool
) -> None:
    run = result("grpo", 0, 0.01, reward)
    run["final"]["ess"] = ess
    assert rows([run], "plane")[0].reached is expected


def test_standard_errors_and_their_digits() -> None:
    mean, se = over_seeds(KLS)
    assert (mean, se) == pytest.approx((0.03, 0.0152753), rel=1e-5)
    assert over_seeds([2.0, None]) == (2.0, None)
    assert over_seeds([None]) == (None, None)
    assert amount(None, None) == ("–", "")
    assert amount(-0.0123456, 0.00123) == ("−0.0123", "0.0012")
    assert amount(1234.5, 56.0) == ("1,234", "56")
    assert amount(3e9, None) == ("3.0e+09", "")
    assert amount(-1e-9, 0.01, signed=True) == ("0.000", "0.010")
    assert amount(0.0, 0.0) == ("0.00", "0")


def test_markdown_and_terminal_show_the_same_rows() -> None:
    text = markdown_table(PLANE, "plane")
    lines = text.splitlines()
    assert lines[0].startswith("| objective | KL to target, nats | ESS, share |")
    assert "\\|log" in lines[0]
    assert len({len(re.findall(r"(?<!\\)\|", line)) for line in lines}) == 1
    assert "| `vmpo_diff` (reached) | 0.030 ± 0.015 |" in text
    assert "| `grpo` (reached) |" in text
    assert "| `dpo` | diverged | – |" in text
    buffer = StringIO()
    print_table(Console(file=buffer, width=200), PLANE)
    assert "E[r] − truth" in buffer.getvalue()
    assert "±0.015" in buffer.getvalue()
    assert "diverged" in buffer.getvalue()


def test_a_masked_world_is_drawn_as_laws_and_names_its_distance(tmp_path: Path) -> None:
    target, policy = [0.5, 0.3, 0.2], [0.1, 0.0, 0.9]
    run = result("vmpo_diff", 0, 0.02, world="words", points=[[0], [2]], probabilities=policy)
    run["final"]["distance_kind"] = "total variation"
    lost = diverged("grpo", 0, "words")
    worlds = {"words": {"kind": "masked", "target_probabilities": target, "labels": ["aa", "ab", "bb"]}}
    html = write_comparison(folder_of(tmp_path, [run, lost], {"worlds": worlds})).read_text()
    assert "Total variation" in html
    assert "largest: 90%" in html
    assert html.count("no samples") == 1
    assert "cannot be drawn" not in html
    drawn = base64.b64decode(law(target, policy, ["aa", "ab", "bb"]).light.partition(",")[2]).decode()
    assert "<!-- bb -->" in drawn
    assert "scale(0.0 " not in drawn, "labels shrunk to nothing"


def test_a_density_gives_the_frame_and_contours_of_the_samples() -> None:
    grid = [-2.0 + 0.1 * i for i in range(41)]
    p = [[math.exp(-8 * ((x - 1) ** 2 + (y / 2) ** 2)) for x in grid] for y in grid]
    ground = ground_of({"density": {"x": grid, "y": grid, "p": p}, "target_points": None}, [])
    assert ground.grid is not None
    assert (ground.low + ground.high) / 2 == pytest.approx([1.0, 0.0], abs=0.06), "p[y][x], so wide in y, not in x"
    assert ground.high[1] - ground.low[1] > 1.8 * (ground.high[0] - ground.low[0])
    assert ground_of({}, []).grid is None


@pytest.mark.parametrize("results", [[diverged("dpo", 0)], [result("a", 0, NAN, NAN, curve=[], points=None, final={})]])
def test_nothing_but_diverged_or_empty_runs_still_gives_a_page(results: list[dict], tmp_path: Path) -> None:
    html = write_comparison(folder_of(tmp_path, results, None)).read_text()
    assert "diverged" in html
    assert "comparison.json cannot be read" in html
    Page(html)


def test_a_damaged_result_is_named_and_an_empty_folder_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="vmpo compare"):
        write_comparison(tmp_path)
    folder_of(tmp_path, [result("grpo", 0, 0.1)], {"worlds": []})
    (tmp_path / "results" / "plane" / "half-0.json").write_text('{"world": "pl')
    assert len(read_results(tmp_path)) == 1
    assert "half-0.json cannot be read" in write_comparison(tmp_path).read_text()


def test_curves_are_means_where_every_seed_still_has_a_value() -> None:
    runs = [result("a", 0, 0.0), result("a", 1, 0.4)]
    assert course(runs, "kl_target")[100] == pytest.approx((0.2, 0.2))
    runs[1]["curve"][2]["kl_target"] = None
    assert list(course(runs, "kl_target")) == [0, 50]


def test_families_are_guessed_named_and_split() -> None:
    names = ["grpo_std", "log_variance", "vmpo_r2g", "grpo", "vmpo_diff", "dpo"]
    guessed = families_of(names)
    assert guessed == {
        "grpo": ["grpo", "grpo_std"],
        "vmpo": ["vmpo_diff", "vmpo_r2g"],
        "other": ["dpo", "log_variance"],
    }
    assert families_of(names, {"dpo": "pairs"})["pairs"] == ["dpo"]
    many = families_of([f"a_{i}" for i in range(10)])
    assert [len(members) for members in many.values()] == [5, 5]
    assert list(many) == ["a, 1 of 2", "a, 2 of 2"]
