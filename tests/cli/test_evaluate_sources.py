"""`vmpo evaluate SOURCE… --out` of what is drawn: runs, their base and adapters; one process or several; the strip."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from torch import Tensor

from tests.cli.test_evaluate_folders import BRIGHT, COUNTED, Colour, Killed, Vmpo, count, folders, lines_of, ok
from vmpo.evaluation.benchmark_plan import choose_prompts
from vmpo.evaluation.draw_pictures import batches_of, draw_source, draw_states, load_source_policy
from vmpo.evaluation.evaluate import picture_seed
from vmpo.evaluation.picture_source import read_sources, with_sampler
from vmpo.evaluation.score_log import ScoreLog
from vmpo.evaluation.score_pictures import Scoring, score_diversity, score_rewards
from vmpo.rewards import load_reward
from vmpo.rollouts import rollout
from vmpo.training.setup import load_kernel_of

pytestmark = pytest.mark.timeout(600)
__all__ = ["count"]  # a fixture
SHARED: set[str] = set()


@pytest.fixture(scope="module")
def run(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained run; its evaluations have other steps than its training."""
    from rich.console import Console

    from tests.conftest import tiny_settings
    from vmpo.training.recipes import load_config
    from vmpo.training.run import train

    folder = tmp_path_factory.mktemp("runs") / "aligned"
    words = [*tiny_settings(tiny_model), "optimisation.lr=0.05", "evaluation.steps=3", f'reward.held_out=["{BRIGHT}"]']
    train(load_config("glyphs", words), folder, resume=False, console=Console(quiet=True))
    return folder


def test_sources_share_their_noises_and_a_run_draws_as_its_rollout(run: Path) -> None:
    base, aligned = read_sources(["base", f"A={run}"], None, None, None)
    assert (base.label, aligned.label) == ("base", "A")
    assert aligned.config is not None
    policy = load_source_policy(aligned, torch.device("cpu"))
    kernel = load_kernel_of(aligned.config, policy)
    assert kernel.num_steps == 3
    conditioning, seeds = policy.encode(['a sign that says "CAT"'] * 2), [picture_seed(5, 3, m) for m in range(2)]
    wanted = rollout(policy, kernel, conditioning, seeds)
    assert torch.equal(draw_states(policy, kernel, conditioning, seeds), wanted.x_0)
    with policy.reference():
        assert not torch.equal(draw_states(policy, kernel, conditioning, seeds), wanted.x_0)


def test_a_table_of_base_run_adapter_and_folder(
    vmpo: Vmpo, run: Path, tmp_path: Path, count: Callable[[], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    drawn: list[Path] = []
    from vmpo.evaluation import draw_pictures

    def save(image: Tensor, path: Path) -> None:
        if len(drawn) == 9:
            raise Killed
        drawn.append(path)
        real(image, path)

    real = draw_pictures.save_image
    monkeypatch.setattr(draw_pictures, "save_image", save)
    words = ["evaluate", "base", run, "--limit", 3, "--images", 4, "--rewards", COUNTED, "--out"]
    with pytest.raises(Killed):
        vmpo(*words, out)
    monkeypatch.setattr(draw_pictures, "save_image", lambda image, path: (drawn.append(path), real(image, path)))
    ok(vmpo(*words, out))
    assert len(drawn) == 9 + 2 * 12 - 5, "micro_batch is 5: the first batch was on record, the second was not"
    assert count() == 24
    drawn.clear()
    # what the pictures are does not depend on the interruption
    ok(vmpo(*words, tmp_path / "whole"))
    assert len(drawn) == 24
    for file in sorted((out / "pictures").rglob("*.png")):
        other = tmp_path / "whole" / file.relative_to(out)
        assert file.read_bytes() == other.read_bytes(), file
    drawn.clear()

    records = lines_of(out / "scores.jsonl")
    seeds = {(r["prompt"], r["image"]): set() for r in records}
    for r in records:
        seeds[r["prompt"], r["image"]].add(r["seed"])
    assert all(len(group) == 1 for group in seeds.values()), "sources share their noises"
    assert len({min(group) for group in seeds.values()}) == 12

    # an adapter's folder is the run by another name, and so are the pictures drawn, taken as a folder
    ok(vmpo(*words[:3], f"LoRA={run / 'adapter'}", f"again={out / 'pictures' / 'aligned'}", *words[3:], out))
    assert len(drawn) == 12
    table = json.loads((out / "table.json").read_text())
    assert table["means"]["LoRA"] == table["means"]["aligned"] == table["means"]["again"]
    assert table["means"]["base"] != table["means"]["aligned"]
    assert table["differences"]["again"] == table["differences"]["aligned"]


def test_a_changed_source_or_question_is_not_mixed_with_old_scores(vmpo: Vmpo, run: Path, tmp_path: Path) -> None:
    ours, _, prompts = folders(tmp_path)
    words = ["evaluate", ours, "--prompts", prompts, "--rewards", BRIGHT, "--out", tmp_path / "out"]
    ok(vmpo(*words))
    for more, message in [
        (["--images", 1], "begun with images 2, not 1"),
        (["--limit", 2], "begun with prompts 3, not 2"),
        (["--seed", 3], "begun with seed 1234, not 3"),
    ]:
        code, errors, _ = vmpo(*words, *more)
        assert code == 2
        assert len(errors) == 1
        assert message in errors[0]
    Image.new("RGB", (6, 4), (1, 2, 3)).save(ours / "00001-0.png")
    code, errors, _ = vmpo(*words)
    assert code == 2
    assert "holds scores of another 'ours'" in errors[0]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["{ours}", "{theirs}"], "needs --out FOLDER"),
        (["{run}", "--images", "3"], "needs --out FOLDER"),
        (["{ours}", "--out", "{out}", "--rewards", BRIGHT], "pass --prompts with the set"),
        (["{ours}", "--out", "{out}", "--prompts", "{set}"], "nothing says what to measure"),
        (
            ["{ours}", "--out", "{out}", "--prompts", "{set}", "--rewards", BRIGHT, "--images", "3"],
            "--images 3 needs 3",
        ),
        (["a={ours}", "a={theirs}", "--out", "{out}"], "two sources have the label 'a'"),
        (["base", "{ours}", "--out", "{out}"], "nothing says how it is drawn"),
        (["nowhere", "--out", "{out}"], "source 'nowhere' is not there"),
        (["{run}@worst", "--out", "{out}"], "has no adapter 'worst'"),
        (["a/b={ours}", "--out", "{out}"], "is not there"),
        (["a|b={ours}", "--out", "{out}"], "letters, digits, spaces"),
        (["{ours}", "--out", "{out}", "--prompts", "{set}", "--rewards", "brigthness"], "unknown reward"),
        (["{ours}", "--out", "{out}", "--prompts", "{set}", "--rewards", BRIGHT, "--lower", "x"], "no such column"),
        (["{ours}", "--out", "{out}", "--prompts", "{set}", "--rewards", BRIGHT, "--gallery", "3"], "from 0 to 2"),
        (["{ours}", "--out", "{out}", "--prompts", "{set}", "--images", "1", "--distances", "clip"], "two pictures"),
    ],
)
def test_mistakes_are_one_line(vmpo: Vmpo, run: Path, tmp_path: Path, words: list[str], message: str) -> None:
    ours, theirs, prompts = folders(tmp_path)
    places = {"ours": ours, "theirs": theirs, "run": run, "out": tmp_path / "out", "set": prompts}
    code, errors, _ = vmpo("evaluate", *(word.format(**places) for word in words))
    assert code == 2
    assert len(errors) == 1
    assert message in errors[0]


def test_the_sampler_of_evaluations(run: Path) -> None:
    (source,) = read_sources([str(run)], None, None, None)
    assert source.config is not None
    own = source.config.model_copy(
        update={"sampler": source.config.sampler.model_copy(update={"steps": 8, "window": (1, 4)})}
    )
    assert with_sampler(own, 8, None).sampler.window == (1, 4)
    assert with_sampler(own, None, None).sampler.model_dump() == {
        **own.sampler.model_dump(),
        "steps": 3,
        "window": None,
    }
    assert with_sampler(own, 40, 0.0).sampler.eta == 0.0
    assert batches_of(2, 3, 4) == [[(0, 0), (0, 1), (0, 2), (1, 0)], [(1, 1), (1, 2)]]


def test_an_adapter_that_peft_saved_draws_as_the_run(vmpo: Vmpo, run: Path, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    (source,) = read_sources([str(run)], None, None, None)
    ours = load_source_policy(source, torch.device("cpu"))
    (bare,) = read_sources(["base"], str(run), None, None)
    fresh = load_source_policy(bare, torch.device("cpu"))
    config = ours.denoiser.peft_config["default"]
    plain = LoraConfig(r=config.r, lora_alpha=config.lora_alpha, target_modules=config.target_modules)
    model = get_peft_model(fresh.denoiser, plain)
    weights = {k: v for k, v in ours.denoiser.state_dict().items() if "lora_" in k}
    assert not model.base_model.model.load_state_dict(weights, strict=False).unexpected_keys
    model.save_pretrained(tmp_path / "peft")

    out = tmp_path / "out"
    ok(vmpo("evaluate", run, f"PEFT={tmp_path / 'peft'}", "--limit", 2, "--images", 2, "--out", out))
    for p, m in [(0, 0), (1, 1)]:
        pair = [(out / "pictures" / label / f"{p:05d}-{m}.png").read_bytes() for label in ("aligned", "PEFT")]
        assert pair[0] == pair[1]


class Process:
    """One of several processes, whose turns the test gives."""

    def __init__(self, index: int, total: int) -> None:
        self.process_index, self.num_processes = index, total
        self.is_main_process, self.device = index == 0, torch.device("cpu")

    def wait_for_everyone(self) -> None:
        pass


@pytest.mark.parametrize("total", [1, 3])
def test_shares_make_the_whole(run: Path, tmp_path: Path, total: int, count: Callable[[], int]) -> None:
    sources = read_sources(["base", str(run)], None, None, None)
    prompts = choose_prompts(sources, None, 3)
    logs = [ScoreLog(tmp_path, Process(i, total)) for i in range(total)]  # type: ignore[arg-type]
    for log in reversed(logs):
        for source in sources:
            draw_source(source, prompts, 4, 9, log, log.accelerator, lambda what, done, of: None)
    assert {p.name for p in tmp_path.glob("*.jsonl")} == {f"scores.rank-{i:05d}.jsonl" for i in range(total)}
    for log in logs:
        log.merge()
    for log in reversed(logs):
        for source in sources:
            job = Scoring(log, prompts, 4, torch.device("cpu"))
            score_rewards(job, source.label, COUNTED, lambda: load_reward(COUNTED))
            score_diversity(job, source.label, "colour", Colour)
    for log in logs:
        log.merge()
    assert count() == 24
    digest = hashlib.sha256()
    for file in sorted([*tmp_path.glob("*.jsonl"), *tmp_path.rglob("*.png")]):
        digest.update(str(file.relative_to(tmp_path)).encode() + file.read_bytes())
    SHARED.add(digest.hexdigest())
    assert len(SHARED) == 1, "scores and pictures do not depend on the number of processes"
    assert all(logs[0].records == log.records for log in logs)


@pytest.mark.slow
def test_two_processes_give_the_scores_of_one(vmpo: Vmpo, run: Path, tmp_path: Path) -> None:
    words = ["evaluate", "base", str(run), "--limit", "3", "--images", "3", "--rewards", BRIGHT, "--out"]
    ok(vmpo(*words, tmp_path / "one"))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "vmpo"]
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(
        [*launcher, *words, str(tmp_path / "two")], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for name in (
        "scores.jsonl",
        "prompts.jsonl",
        "table.json",
        "table.md",
        "table.tex",
        "differences.tex",
        "settings.json",
    ):
        assert (tmp_path / "one" / name).read_text() == (tmp_path / "two" / name).read_text(), name
    for file in (tmp_path / "one" / "pictures").rglob("*.png"):
        assert file.read_bytes() == (tmp_path / "two" / file.relative_to(tmp_path / "one")).read_bytes()
    assert not list((tmp_path / "two").glob("scores.rank-*"))


def test_strip(vmpo: Vmpo, run: Path, tmp_path: Path) -> None:
    from vmpo.evaluation.training_strip import adapters_by_epoch, draw_strip

    assert list(adapters_by_epoch(run)) == [2, 3], "the newest two checkpoints"
    strip = draw_strip(run, ['"CAT"', '"DOG"'], seed=7, columns=3, steps=None, eta=None)
    assert strip.epochs == [0, 2, 3]
    base, second, last = strip.pictures[1]
    assert not torch.equal(base, second)
    assert not torch.equal(second, last)
    (source,) = read_sources([str(run)], None, None, None)
    assert source.config is not None
    policy = load_source_policy(source, torch.device("cpu"))
    kernel = load_kernel_of(source.config, policy)
    again = policy.decode(draw_states(policy, kernel, policy.encode(['"DOG"']), [picture_seed(7, 1, 0)]))[0]
    assert torch.equal(last, again), "the last checkpoint's average is the run's adapter"

    text = ok(vmpo("strip", run, '"CAT"', "--columns", 2, "--out", tmp_path / "strip.png"))
    assert "strip.png" in text
    with Image.open(tmp_path / "strip.png") as picture:
        assert picture.width > 800


def test_a_recipe_whose_micro_batch_is_what_fits_can_be_drawn_by(vmpo: Vmpo, tiny_model: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "fits.yaml"
    own = {"extends": "glyphs", "model": {"path": str(tiny_model)}, "optimisation": {"micro_batch": 0}}
    recipe.write_text(yaml.safe_dump(own))
    words = ["--limit", 3, "--images", 3, "--rewards", BRIGHT, "--out", tmp_path / "out"]
    ok(vmpo("evaluate", "base", "--like", recipe, *words))
    assert len(list((tmp_path / "out" / "pictures").rglob("*.png"))) == 9
