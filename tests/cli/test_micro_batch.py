"""A micro-batch found by itself, and the line about memory before a run."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

import vmpo.training.memory as memory


@pytest.fixture
def automatic(settings: list[str]) -> list[str]:
    return [*settings, "optimisation.micro_batch=0", "optimisation.epochs=1"]


def test_the_largest_that_fits_is_found_kept_and_taken_up_again(
    automatic: list[str], vmpo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    code, lines, out = vmpo("train", "glyphs", *automatic, "--run", run)
    assert (code, lines) == (0, [])
    assert "memory: " in out
    assert "reward models are not counted" in out
    found = yaml.safe_load((run / "config.yaml").read_text())["optimisation"]["micro_batch"]
    assert found == 3 * 4 * 4, "all rows of an epoch fit beside such a model"
    monkeypatch.setattr(memory, "available_memory", lambda device: 1)
    code, lines, _ = vmpo("train", "glyphs", *automatic, "--run", run, "--resume")
    assert (code, lines) == (0, []), "a run that was begun keeps its number on a smaller machine"


def test_less_memory_means_a_smaller_one_and_none_an_error(
    automatic: list[str], vmpo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[memory.MemoryEstimate] = []
    estimate = memory.estimate_memory
    monkeypatch.setattr(memory, "estimate_memory", lambda *a: seen.append(estimate(*a)) or seen[-1])
    assert vmpo("train", "glyphs", *automatic, "--run", tmp_path / "first")[0] == 0
    need = seen[0]
    room = int((need.fixed + 5.5 * max(need.row, need.picture)) / memory.MARGIN)
    monkeypatch.setattr(memory, "available_memory", lambda device: room)
    assert vmpo("train", "glyphs", *automatic, "--run", tmp_path / "second")[0] == 0
    assert yaml.safe_load((tmp_path / "second/config.yaml").read_text())["optimisation"]["micro_batch"] == 5
    monkeypatch.setattr(memory, "available_memory", lambda device: need.fixed)
    code, lines, _ = vmpo("train", "glyphs", *automatic, "--run", tmp_path / "third")
    assert code == 2
    assert len(lines) == 1
    assert "not even one row fits" in lines[0]
    assert "model.checkpointing=true" in lines[0]
