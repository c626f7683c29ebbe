"""The documentation is true: what it names exists, what it shows runs, and its links lead somewhere."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)
ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "benchmarks").glob("*.md")])
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
LAST_EQUATION = 55
BLOCK = re.compile(r"<!-- (run|file: (?P<name>\S+)) -->\n```\w+\n(?P<code>.*?)```", re.DOTALL)


def equation_rows() -> list[list[str]]:
    """Cells of the table equation -> file -> test."""
    section = (ROOT / "docs/concepts.md").read_text().split("## Equation, file, test")[1].split("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("|")][2:]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]


def equations(cell: str) -> list[int]:
    found: list[int] = []
    for part in cell.split(","):
        first, _, last = part.strip().partition("–")
        found += range(int(first), int(last or first) + 1)
    return found


def functions(path: Path) -> set[str]:
    return {node.name for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)}


def prose(page: Path) -> str:
    return re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)


def headings(page: Path) -> set[str]:
    """Anchors of a page's headings, by GitHub's rule."""
    titles = re.findall(r"^#+ (.+)$", prose(page), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_every_equation_of_the_paper_has_one_row() -> None:
    assert sorted(e for row in equation_rows() for e in equations(row[0])) == list(range(1, LAST_EQUATION + 1))


@pytest.mark.parametrize("row", equation_rows(), ids=lambda row: row[0])
def test_files_and_tests_of_the_equation_table_exist(row: list[str]) -> None:
    _, what, file, test = row
    assert what
    if file == "not yet":
        assert not test
        return
    files, tests = re.findall(r"`([^`]+)`", file), re.findall(r"`([^`]+)`", test)
    assert files
    assert tests
    for name in files:
        assert name.startswith("src/")
        assert (ROOT / name).is_file(), name
    for name in tests:
        path, _, function = name.partition("::")
        assert (ROOT / path).is_file(), path
        assert function.startswith("test_")
        assert function in functions(ROOT / path), name


@pytest.mark.parametrize("name", NAMES)
def test_paths_named_in_the_text_exist(name: str) -> None:
    for path in re.findall(r"`((?:src|tests|docs|benchmarks)/[\w./-]+)", (ROOT / name).read_text()):
        assert (ROOT / path).exists(), path


@pytest.mark.parametrize("name", NAMES)
def test_links_resolve(name: str) -> None:
    page = ROOT / name
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if target.startswith(("http://", "https://", "mailto:")):
            continue
        path, _, anchor = target.partition("#")
        linked = page.parent / path if path else page
        assert linked.exists(), target
        if anchor:
            assert anchor in headings(linked), target


def test_code_marked_to_run_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    ran, scope = 0, {"__name__": "extending"}
    torch.manual_seed(0)
    for block in BLOCK.finditer((ROOT / "docs/extending.md").read_text()):
        if block["name"]:
            (tmp_path / block["name"]).write_text(block["code"])
        else:
            exec(compile(block["code"], f"docs/extending.md, block {ran + 1}", "exec"), scope)
            ran += 1
    assert ran == 6
    monkeypatch.delitem(sys.modules, "my_rewards")


def test_every_metric_of_a_run_is_explained() -> None:
    """Keys that the trainer, the update, the weights and the held-out measurement put into a line of metrics.jsonl."""
    writers = {"training/trainer.py": {"draw", "reward_metrics", "run_epoch"}, "training/update.py": {"step"}}
    writers |= {"training/held_out.py": {"metrics"}, "log_weights.py": {"summary"}}
    keys: set[str] = set()
    for file, names in writers.items():
        for function in ast.walk(ast.parse((ROOT / "src/vmpo" / file).read_text())):
            if not isinstance(function, ast.FunctionDef) or function.name not in names:
                continue
            for node in ast.walk(function):
                if isinstance(node, ast.Dict):
                    keys |= {k.value for k in node.keys if isinstance(k, ast.Constant)}
                elif isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store):
                    keys |= {node.slice.value} if isinstance(node.slice, ast.Constant) else set()
    assert {"reward_mean", "var_log_w", "grad_norm", "time_update", "eval_kl_ref", "step0_log_ratio"} <= keys
    text = (ROOT / "docs/run-folder.md").read_text()
    assert not {key for key in keys if f"`{key}`" not in text}
