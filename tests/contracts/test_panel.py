"""Reward hacking in sight: rises and gaps, the Pareto front, early stopping; and all of it after a kill."""

from __future__ import annotations

import json
import math
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor

from tests.cli.test_resume import read_adapter
from tests.cli.test_two_processes import torchrun
from vmpo.errors import UserError
from vmpo.evaluation.diversity import total_variances
from vmpo.evaluation.statistics import clustered_mean, paired_difference
from vmpo.reports.panel_section import panel_data, panel_section
from vmpo.reports.run_record import RunRecord
from vmpo.rollouts import rollout
from vmpo.training.adapters import adapter_folder
from vmpo.training.config import Config
from vmpo.training.held_out import HeldOut, measure_held_out
from vmpo.training.panel import Panel, Rises
from vmpo.training.pareto import Front, Point, best_of, dominates
from vmpo.training.recipes import load_config
from vmpo.training.setup import load_parts
from vmpo.training.stopping import Stopping

Run = Callable[..., tuple[int, list[str], str]]
TRAINED, OTHER = "tests.scenarios:brightness", "tests.contracts.test_panel:darkness"


def darkness(images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Tensor:
    """Falls as brightness rises; on another scale."""
    return -300 * images[:, 0].mean((1, 2))


def rises(trained: list[float], **held_out: list[float]) -> Rises:
    found = {name: torch.tensor(values, dtype=torch.float64) for name, values in held_out.items()}
    return Rises(torch.tensor(trained, dtype=torch.float64), found, None, found)


# --- the measurement ----------------------------------------------------------------------------------------------


def test_more_pictures_keep_the_first_and_measure_diversity(settings: list[str]) -> None:
    config = load_config("glyphs", settings)
    parts, accelerator = load_parts(config, "cpu"), Accelerator(cpu=True)
    rewards, prompts = {TRAINED: parts.rewards[TRAINED], OTHER: darkness}, parts.test.take([0, 1, 2, 3])

    def measured(images: int) -> HeldOut:
        return measure_held_out(
            parts.policy, parts.kernel, rewards, {TRAINED: 2.0}, prompts, accelerator, seed=7, batch=64, images=images
        )

    one, three = measured(1), measured(3)
    assert one.diversity is None
    assert "eval_diversity" not in one.metrics()
    torch.testing.assert_close(three.scores[OTHER][:, :1], one.scores[OTHER], rtol=1e-5, atol=0)
    torch.testing.assert_close(three.reward, 2 * three.scores[TRAINED])
    torch.testing.assert_close(three.images, one.images, rtol=0, atol=1e-4)

    seeds = [7 * 1_000_003 + m * 100_003 + p for p in range(4) for m in range(3)]
    repeated = parts.policy.encode([prompt for prompt in prompts.prompts for _ in range(3)])
    x_0 = rollout(parts.policy, parts.kernel, repeated, seeds).x_0.flatten(1).double()
    by_hand = total_variances(x_0.view(4, 3, -1) / x_0.shape[1] ** 0.5)
    torch.testing.assert_close(three.diversity, by_hand, rtol=1e-4, atol=0)
    found = three.metrics()
    for name, values in (("diversity", by_hand), (OTHER, three.scores[OTHER].double())):
        wanted = clustered_mean(values)
        mean = found["eval_diversity" if name == "diversity" else f"eval_{name}_mean"]
        assert (mean, found[f"eval_{name}_se"]) == pytest.approx((wanted.mean, wanted.se), rel=1e-4)


def held_out(scores: dict[str, Tensor]) -> HeldOut:
    return HeldOut(scores, scores["a"] + scores["b"], torch.zeros(5, 2), None, torch.zeros(0))


def test_rises_are_paired_and_in_standard_deviations_of_the_base() -> None:
    generator = torch.Generator().manual_seed(3)
    base = {name: scale * torch.randn(5, 2, generator=generator) for name, scale in (("a", 1), ("b", 2), ("h", 50))}
    now = {
        name: value + 0.3 * value.std() + 0.1 * torch.randn(5, 2, generator=generator) for name, value in base.items()
    }
    now["h"][2, 0] = torch.nan
    panel = Panel(["h"])
    first = panel.compare(held_out(base), held_out(base)).metrics()
    assert {first[f"eval_{name}"] for name in ("reward_rise", "h_rise", "gap_rewards", "gap_prompts")} == {0.0}

    fresh = Panel(["h"])
    fresh.load(panel.state())
    seen = held_out({name: value + 0.7 for name, value in base.items()})
    found = fresh.compare(held_out(now), seen).metrics()
    total = [x["a"] + x["b"] for x in (base, now)]
    spread = total[0].std().item()
    change = paired_difference(total[0], total[1])
    wanted = (change.mean / spread, change.se / spread)
    assert (found["eval_reward_rise"], found["eval_reward_rise_se"]) == pytest.approx(wanted)
    other = paired_difference(base["h"], now["h"])
    assert found["eval_h_rise"] == pytest.approx(other.mean / base["h"].std().item())
    gap = clustered_mean(
        (total[1] - total[0]).double().mean(1) / spread
        - (now["h"].double().nanmean(1) - base["h"].double().mean(1)) / base["h"].std().item()
    )
    assert (found["eval_gap_rewards"], found["eval_gap_rewards_se"]) == pytest.approx((gap.mean, gap.se), rel=1e-6)
    assert found["eval_gap_prompts"] == pytest.approx(1.4 / spread - found["eval_reward_rise"], rel=1e-5)
    assert found["eval_gap_prompts_se"] == pytest.approx(found["eval_reward_rise_se"], rel=1e-3)


def test_a_reward_that_does_not_vary_has_no_rise() -> None:
    flat = {name: torch.full((5, 2), value) for name, value in (("a", 1.0), ("b", 2.0), ("h", 3.0))}
    found = Panel(["h"]).compare(held_out(flat), None).metrics()
    assert math.isnan(found["eval_h_rise"])
    assert "eval_gap_prompts" not in found


def test_diversity_is_compared_with_the_base_by_prompt() -> None:
    generator = torch.Generator().manual_seed(2)
    before = 1 + torch.rand(5, generator=generator, dtype=torch.float64)
    now = 0.8 * before + 0.01 * torch.randn(5, generator=generator, dtype=torch.float64)
    scores = {"a": torch.randn(5, 2, generator=generator)}
    panel = Panel([])
    first = panel.compare(HeldOut(scores, scores["a"], torch.zeros(5, 2), before, torch.zeros(0)), None).metrics()
    assert (first["eval_diversity_ratio"], first["eval_diversity_ratio_se"]) == (1.0, 0.0)
    found = panel.compare(HeldOut(scores, scores["a"], torch.zeros(5, 2), now, torch.zeros(0)), None).metrics()
    ratio = now.mean() / before.mean()
    leave_one_out = torch.stack([now[keep].mean() / before[keep].mean() for keep in ~torch.eye(5, dtype=torch.bool)])
    jackknife = (4 / 5 * (leave_one_out - leave_one_out.mean()).square().sum()).sqrt()
    assert found["eval_diversity_ratio"] == pytest.approx(ratio.item())
    assert found["eval_diversity_ratio_se"] == pytest.approx(jackknife.item(), rel=0.15)
    spread = clustered_mean(now).se / before.mean().item()
    assert found["eval_diversity_ratio_se"] < 0.2 * spread, "what differs between prompts cancels"


# --- the Pareto front ---------------------------------------------------------------------------------------------


def points(number: int, seed: int, diversity: bool) -> list[Point]:
    generator = torch.Generator().manual_seed(seed)
    found = []
    for epoch in range(number):
        judged = torch.randn(6, generator=generator, dtype=torch.float64) + 0.1 * epoch
        kl, spread = (torch.rand(2, generator=generator, dtype=torch.float64) * (epoch > 0)).tolist()
        found.append(Point(epoch, judged, kl, spread if diversity else None, 0.1))
    return found


@pytest.mark.parametrize("diversity", [True, False])
@pytest.mark.parametrize("seed", range(4))
def test_the_front_is_what_no_point_dominates(seed: int, diversity: bool, tmp_path: Path) -> None:
    everything, front = points(30, seed, diversity), Front(tmp_path, most=100)
    for point in everything:
        front.add(point)

    def better(a: Point, b: Point) -> bool:
        worse = a.reward < b.reward or a.kl_ref > b.kl_ref or (diversity and (a.diversity or 0) < (b.diversity or 0))
        return not worse and (a.reward, a.kl_ref, a.diversity) != (b.reward, b.kl_ref, b.diversity)

    wanted = [p.epoch for p in everything if not any(better(q, p) for q in everything)]
    assert [p.epoch for p in front.points] == wanted
    assert 1 < len(wanted) < 30
    assert not any(dominates(p, p) for p in everything)
    bounded = Front(tmp_path, most=2)
    for point in everything:
        bounded.add(point)
        assert len(bounded.trained) <= 2


def test_the_best_costs_least_of_those_that_cannot_be_told_from_the_top() -> None:
    noise = torch.tensor([0.5, -0.5, 0.4, -0.4], dtype=torch.float64)
    top, near, far = (
        Point(e, m + noise * s, kl, None, 0.1) for e, m, s, kl in ((3, 1.0, 1, 9), (2, 0.9, -1, 5), (1, 0.2, 1, 1))
    )
    assert best_of([far, near, top]) is near  # 0.1 below, at a paired error of 0.52
    steady = Point(4, 0.9 + noise, 5, None, 0.1)
    assert best_of([far, steady, top]) is top  # 0.1 below at every prompt
    assert best_of([]) is None


def test_adapters_stay_until_a_checkpoint_no_longer_has_them(tmp_path: Path) -> None:
    def save(folder: Path) -> None:
        (folder / "pytorch_lora_weights.safetensors").write_bytes(b"w")

    front = Front(tmp_path / "pareto", most=3)
    front.tidy()
    assert not front.folder.exists(), "a run without evaluations has no front"
    made = [
        Point(e, torch.full((3,), r, dtype=torch.float64), kl, None, 0.1 * e)
        for e, r, kl in ((0, 0, 0), (2, 1, 5), (4, 2, 4))
    ]
    for point in made:
        if front.add(point):
            front.write(point, save)
    folders = lambda: sorted(p.name for p in front.folder.iterdir())  # noqa: E731
    assert folders() == ["epoch-000002", "epoch-000004"]
    (front.folder / ".epoch-000006.tmp").mkdir()  # what a kill may leave
    front.tidy()
    assert folders() == ["epoch-000004", "front.json"]
    facts = json.loads((front.folder / "front.json").read_text())
    assert facts["best"] == "epoch-000004"
    assert [point["epoch"] for point in facts["points"]] == [0, 4]
    assert json.loads((front.folder / "epoch-000004" / "point.json").read_text())["beta"] == pytest.approx(0.4)
    assert adapter_folder(tmp_path, "best") == adapter_folder(tmp_path, "pareto/epoch-000004")
    with pytest.raises(UserError, match="has no adapter 'pareto/epoch-000002'; it has pareto/epoch-000004"):
        adapter_folder(tmp_path, "pareto/epoch-000002")
    assert not Front(tmp_path, most=0).add(made[1])
    assert not front.add(Point(8, torch.full((3,), torch.nan), 1.0, None, 0.1)), "nothing was scored"


# --- stopping -----------------------------------------------------------------------------------------------------


def stopping(**evaluation: Any) -> Stopping:
    return Stopping(Config.model_validate({"evaluation": {"every": 5, **evaluation}}))


def reasons(watch: Stopping, seen: list[Rises], kl: float = 0.0) -> list[str | None]:
    found = []
    for index, one in enumerate(seen):
        watch.see(5 * index, one.trained.mean().item(), kl * index, one)
        found.append(watch.reason(5 * index))
    return found


NOISE = [0.1, -0.1, 0.05, -0.05]


def curve(trained: list[float], held: list[float]) -> list[Rises]:
    """Evaluations whose rewards differ by prompt, and not in the same way each time."""
    pairs = enumerate(zip(trained, held, strict=True))
    return [rises([t + n for n in NOISE], h=[h + n for n in NOISE[-i:] + NOISE[:-i]]) for i, (t, h) in pairs]


def test_stops_when_a_held_out_reward_falls_while_the_trained_one_rises() -> None:
    watch = stopping(stop_on="held_out", patience=2)
    found = reasons(watch, curve([0, 1, 2, 3, 4], [0, 1, 0.5, 0.4, 0.3]))
    assert found[:3] == [None] * 3
    assert found[3] is not None
    assert "held-out reward 'h' has fallen by 0.60 ± 0.03" in found[3]
    assert "since epoch 5 while the trained reward rose by 2.00, seen at 2 evaluations in a row" in found[3]
    assert watch.best == (pytest.approx(1.0), 5), "what is left is where the held-out reward was highest"
    again = stopping(stop_on="held_out", patience=2)
    again.load(watch.state())
    assert again.reason(15) == watch.reason(15)


@pytest.mark.parametrize(
    ("trained", "held"),
    [
        ([0, 1, 0.9, 0.8, 0.7], [0, 1, 0.5, 0.4, 0.3]),  # both fall: no hacking
        ([0, 1, 2, 3, 4], [0, 1, 0.5, 0.99, 0.5]),  # not two in a row
        ([0, 1, 2, 3, 4], [0, 0.1, 0.2, 0.3, 0.4]),
        ([0, 1, 2, 3, 4], [0, 1, 0.99, 0.96, 0.99]),  # within two standard errors
    ],
)
def test_goes_on_otherwise(trained: list[float], held: list[float]) -> None:
    assert reasons(stopping(stop_on="held_out", patience=2), curve(trained, held)) == [None] * 5


def test_budget_of_kl_and_patience_on_the_reward() -> None:
    watch = stopping(max_kl=2.5)
    found = reasons(watch, curve([0, 1, 2, 3], [0, 0, 0, 0]), kl=1.0)
    assert found == [None] * 3 + ["a KL of 3.00 nats a trajectory is above evaluation.max_kl=2.5"]
    assert watch.best == (10.0, 10), "the last within the budget"
    watch = stopping(patience=2)
    assert reasons(watch, curve([0, 3, 2, 1], [0] * 4)) == [None] * 3 + [
        "2 evaluations without a reward above 3, that of epoch 5"
    ]
    watch = stopping(patience=9, max_kl=1.5)
    reasons(watch, curve([0, 1, 9], [0] * 3), kl=1.0)
    assert watch.best == (1.0, 5), "the highest reward within the budget"


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["evaluation.stop_on=held_out", "evaluation.patience=1"], "set reward.held_out"),
        (["evaluation.stop_on=held_out", f"reward.held_out=[{TRAINED}]"], "needs evaluation.patience"),
        (["evaluation.max_kl=1"], "set evaluation.every above 0"),
    ],
)
def test_what_cannot_stop_is_refused(
    words: list[str], why: str, vmpo: Run, settings: list[str], tmp_path: Path
) -> None:
    code, errors, _ = vmpo("train", "glyphs", *settings, *words, "--run", tmp_path / "run")
    assert (code, len(errors)) == (2, 1)
    assert why in errors[0]


# --- the report ---------------------------------------------------------------------------------------------------


def hacked_record(folder: Path, held_out: list[str]) -> RunRecord:
    rows: list[dict[str, Any]] = []
    for e in range(6):
        row = {"epoch": 10 * e, "eval_reward_rise": 0.4 * e, "eval_reward_rise_se": 0.05, "eval_kl_ref": 0.3 * e}
        row |= {f"eval_{name}_rise": 0.2 * e - 0.1 * e * e for name in held_out}
        row |= {"eval_gap_rewards": 0.2 * e + 0.1 * e * e, "eval_gap_rewards_se": 0.1} if held_out else {}
        rows.append(row | {"eval_diversity_ratio": 1 - 0.1 * e, "eval_diversity_ratio_se": 0.02})
    rows[2]["eval_kl_ref"] = math.nan
    rows.append({"epoch": 51, "reward_mean": 1.0})
    if held_out:
        rows[-1]["stopped"] = "held-out reward 'h' <fell>"
    front = {"best": "epoch-000010", "rule": "the least"}
    return RunRecord(folder, {"reward": {"held_out": held_out}}, rows, {}, {}, [], front)


@pytest.mark.parametrize("held_out", [[], ["h"], ["h", "i", "j", "k", "l"]])
def test_the_report_shows_the_panel(held_out: list[str], tmp_path: Path) -> None:
    data = panel_data(hacked_record(tmp_path, held_out))
    assert data is not None
    assert len(data.held_out) == len(held_out)
    assert (data.best, data.stopped) == (10.0, 51.0 if held_out else None)
    html = panel_section(hacked_record(tmp_path, held_out))
    assert "cannot be drawn" not in html
    assert html.count("data:image/svg+xml") == 2
    assert "+2.000 ± 0.050 base standard deviations" in html
    assert "Diversity is 50% of the base model" in html
    assert "Kept as best in pareto/: epoch 10" in html
    assert ("nothing else vouches" in html) == (not held_out)
    assert ("a gap of +3.50 ± 0.10" in html) == bool(held_out)
    assert ("&lt;fell&gt;" in html) == bool(held_out)


def test_a_run_without_evaluations_has_no_panel(tmp_path: Path) -> None:
    record = RunRecord(tmp_path, {}, [{"epoch": 1, "eval_reward_mean": 1.0}], {}, {}, [])
    assert panel_section(record) == ""
    assert panel_section(RunRecord(tmp_path, {}, [], {}, {}, [])) == ""


# --- a run --------------------------------------------------------------------------------------------------------


@pytest.fixture
def watched(settings: list[str]) -> list[str]:
    """A reward that is bought with a held-out one, at a pace that makes it plain within a few epochs."""
    return [
        *settings,
        f'reward.held_out=["{OTHER}"]',
        "objective.kl_old=0",
        "objective.beta=0.05",
        "optimisation.lr=0.005",
        "optimisation.group=16",
        "optimisation.micro_batch=64",
        "optimisation.epochs=5",
        "optimisation.ema=0",
        "evaluation.every=1",
        "evaluation.images=2",
        "evaluation.prompts=8",
        "evaluation.train_prompts=3",
        "evaluation.pareto=3",
        "checkpoint_every=2",
    ]


def records(folder: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "seconds" and not k.startswith("time_")} for line in lines]


def kept(folder: Path) -> dict[str, Any]:
    """What lies in pareto/ and adapter/: weights to the last bit, and figures."""
    files = [f for name in ("pareto", "adapter") for f in (folder / name).rglob("*") if f.is_file()]
    return {
        str(f.relative_to(folder)): json.loads(f.read_text()) if f.suffix == ".json" else read_adapter(f) for f in files
    }


class Killed(BaseException):
    """Stands for the end of the process between two writes."""


STOP = ["evaluation.stop_on=held_out", "evaluation.patience=3"]


def test_a_hacked_run_stops_says_why_and_leaves_the_best(vmpo: Run, watched: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    code, errors, out = vmpo("train", "glyphs", *watched, *STOP, "--run", folder)
    assert (code, errors) == (0, [])
    last = records(folder)[-1]
    assert last["epoch"] < 5
    assert f"stopped after epoch {last['epoch']}: {last['stopped']}" in out
    assert f"held-out reward '{OTHER}' has fallen by" in last["stopped"]
    assert "stopped" not in records(folder)[-2]
    assert last["eval_gap_rewards"] == pytest.approx(2 * last["eval_reward_rise"], rel=1e-3), "each is the other's loss"
    assert last["eval_diversity"] > 0
    assert math.isfinite(last["eval_gap_prompts"])
    assert json.loads((folder / "adapter" / "point.json").read_text())["epoch"] == 0, "only the base was not hacked"


def test_another_adapter_of_a_run_can_be_drawn_with(vmpo: Run, watched: list[str], tmp_path: Path) -> None:
    run, drawn = tmp_path / "run", list[bytes]()
    words = [*watched, "reward.held_out=[]", "optimisation.epochs=3"]
    assert vmpo("train", "glyphs", *words, "--run", run)[0] == 0
    names = sorted(path.name for path in (run / "pareto").glob("epoch-*"))
    assert len(names) >= 2
    best = json.loads((run / "pareto" / "front.json").read_text())["best"]
    for index, name in enumerate([*(f"pareto/{name}" for name in names), "best"]):
        out = tmp_path / str(index)
        words = ["a sign", "--steps", "3", "--adapter", name, "--out", str(out)]
        assert vmpo("sample", run, *words)[0] == 0
        drawn.append((out / "a-sign-0.png").read_bytes())
    assert drawn[-1] == drawn[names.index(best)]
    assert len(set(drawn)) == len(names)
    code, errors, _ = vmpo("sample", run, "a sign", "--adapter", "pareto/epoch-000099")
    assert (code, len(errors)) == (2, 1)
    assert "it has adapter, pareto/" in errors[0]


@pytest.mark.parametrize("hacked", [True, False])
def test_a_killed_run_ends_with_the_same_front_best_and_reason(
    hacked: bool, vmpo: Run, watched: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [*watched, *(STOP if hacked else ["reward.held_out=[]", "evaluation.patience=2"])]
    alone, folder = tmp_path / "alone", tmp_path / "run"
    assert vmpo("train", "glyphs", *words, "--run", alone)[0] == 0
    assert hacked or len(kept(alone)) >= 6, "the front has adapters"
    writes, fatal, real = [0], [0], os.replace
    rng, kills = random.Random(5), list[int]()

    def replace(source: Any, target: Any) -> None:
        writes[0] += 1
        if writes[0] == fatal[0]:
            raise Killed
        real(source, target)

    monkeypatch.setattr(os, "replace", replace)
    for _ in range(3):
        writes[0], fatal[0] = 0, rng.randint(3, 8)
        try:
            vmpo("train", "glyphs", *words, "--run", folder, "--resume")
        except Killed:
            kills.append(json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])["epoch"])
    assert len(set(kills)) > 1, "killed at different places"
    fatal[0] = 0
    assert vmpo("train", "glyphs", *words, "--run", folder, "--resume")[0] == 0
    assert records(folder) == records(alone)
    assert kept(folder) == kept(alone)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_processes_measure_and_keep_what_one_does(vmpo: Run, watched: list[str], tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    words = [*watched, "objective.target_kl=0.03", "objective.kl_gain=0.9", "optimisation.epochs=2"]
    assert vmpo("train", "glyphs", *words, "--run", one)[0] == 0
    torchrun(["train", "glyphs", *words, "--folder", str(two)])
    for alone, shared in zip(records(one), records(two), strict=True):
        assert alone.keys() == shared.keys()
        for key in (k for k in alone if k.startswith("eval_") or k == "beta"):
            tight = key.endswith(("_mean", "beta", "diversity"))  # the others are differences of nearly equal pictures
            assert shared[key] == pytest.approx(alone[key], rel=1e-4 if tight else 0.02, abs=0 if tight else 2e-3), key
    assert alone["beta"] != 0.05
    assert kept(one).keys() == kept(two).keys()
