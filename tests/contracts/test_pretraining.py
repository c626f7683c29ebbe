"""The data the embedded pipeline is trained on, and a pretraining run that goes on where it was."""

from __future__ import annotations

import copy
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from vmpo.errors import UserError
from vmpo.pretraining import glyphs, glyphs_ddim
from vmpo.pretraining.autoencoder import build_autoencoder
from vmpo.pretraining.captions import Pool, captioned, encode_pool, plain
from vmpo.pretraining.glyphs import Glyphs, pretrain_glyphs
from vmpo.pretraining.glyphs_ddim import GlyphsDDIM, autoencoder_without_shift, pretrain_glyphs_ddim
from vmpo.pretraining.run import Task, Trainer
from vmpo.pretraining.settings import Cycle, Pretraining
from vmpo.pretraining.words import KEYBOARD, LETTERS, MISSPELT_SHARE, misspell, neighbours, word_list

TINY = Pretraining(autoencoder_steps=1, pool=40, cycles=(Cycle(3), Cycle(1)), batch=8, warmup=2)


def test_every_letter_has_its_neighbours() -> None:
    assert sorted("".join(KEYBOARD)) == sorted(LETTERS)
    assert {letter: neighbours(letter) for letter in "QWPAMZ"} == {
        "Q": "W",
        "W": "QE",
        "P": "O",
        "A": "S",
        "M": "N",
        "Z": "X",
    }
    assert all(a in neighbours(b) for a in LETTERS for b in neighbours(a))


def test_slips_hit_a_neighbour_at_the_stated_rate() -> None:
    rng, rate, n, word = random.Random(0), 0.3, 4_000, "HOUSE"
    slips = [misspell(word, rate, rng) for _ in range(n)]
    wrong = [[a != b for a, b in zip(word, slip, strict=True)] for slip in slips]
    assert all(any(w) for w in wrong), "a misspelt word is not spelt right"
    assert all(b in neighbours(a) for s in slips for a, b in zip(word, s, strict=True) if a != b)
    expected = (1 + (len(word) - 1) * rate) / len(word)  # one letter is forced
    share = sum(map(sum, wrong)) / (n * len(word))
    assert abs(share - expected) < 4 * (expected * (1 - expected) / (n * len(word))) ** 0.5


def test_a_named_source_is_misspelt_as_often_as_it_says_and_no_caption_holds_a_test_word() -> None:
    rng, settings = random.Random(1), Pretraining()
    found: dict[str, list[bool]] = {"a": [], "printed": [], "handmade": []}
    held_out = set(word_list("test"))
    for _ in range(6_000):
        text, drawn = captioned(settings, rng)
        word = text.split('"')[1]
        found[text.split()[0]].append(drawn != word)
        assert word not in held_out
    handmade, named = settings.handmade_share, settings.named_share
    shares = {
        "printed": (MISSPELT_SHARE["printed"], (1 - handmade) * named),
        "handmade": (MISSPELT_SHARE["handmade"], handmade * named),
        "a": (handmade * MISSPELT_SHARE["handmade"] + (1 - handmade) * MISSPELT_SHARE["printed"], 1 - named),
    }
    for source, (misspelt, share) in shares.items():
        n = len(found[source])
        assert abs(sum(found[source]) / n - misspelt) < 4 * (misspelt * (1 - misspelt) / n) ** 0.5, source
        assert abs(n / 6_000 - share) < 4 * (share * (1 - share) / 6_000) ** 0.5, source


def tiny_task(name: str) -> Task:
    if name == "glyphs":
        return Glyphs(glyphs.build_pipeline(build_autoencoder(), seed=2, layers=1, width=32))
    vae = build_autoencoder()
    vae.register_to_config(shift_factor=0.1, scaling_factor=0.7)
    pipe = glyphs_ddim.build_pipeline(autoencoder_without_shift(vae), seed=2, widths=(16, 32, 32))
    return GlyphsDDIM(pipe, teacher=tiny_task("glyphs"))  # type: ignore[arg-type]


def tiny_trainer(name: str = "glyphs") -> Trainer:
    return Trainer(tiny_task(name), TINY)


def weights(trainer: Trainer) -> list[torch.Tensor]:
    return [*(p.detach().clone() for p in trainer.parameters), *(e.clone() for e in trainer.ema)]


@pytest.mark.parametrize("name", ["glyphs", "glyphs-ddim"])
def test_a_trainer_goes_on_from_its_state_bit_for_bit(name: str) -> None:
    alone = tiny_trainer(name)
    pool = Pool(
        torch.randn((40, 4, 6, 16), generator=torch.Generator().manual_seed(3)).half(),
        alone.empty.repeat(40, 1),
    )
    losses = [alone.step(pool) for _ in range(2)]
    kept = copy.deepcopy(alone.state())
    losses += [alone.step(pool) for _ in range(2)]
    other = tiny_trainer(name)
    other.load_state(kept)
    assert [other.step(pool) for _ in range(2)] == losses[2:]
    torch.testing.assert_close(weights(other), weights(alone), rtol=0, atol=0)
    assert alone.lr_scale() == 0, "the rates end at 0"


def test_the_rates_rise_stay_and_fall_in_every_cycle() -> None:
    trainer = tiny_trainer()
    cycles = (Cycle(100, decay=0.4), Cycle(50, peak=0.5, decay=0.8))
    trainer.settings = Pretraining(cycles=cycles, warmup=10)
    scales = []
    for done in (0, 4, 9, 30, 60, 80, 99, 104, 110, 130, 150):
        trainer.done = done
        scales.append(trainer.lr_scale())
    assert scales == pytest.approx([0.1, 0.5, 1, 1, 1, 0.5, 0.025, 0.25, 0.5, 0.25, 0])


def test_pretraining_ends_in_a_pipeline_and_is_taken_up_again(tmp_path: Path) -> None:
    log: list[str] = []
    first = pretrain_glyphs(tmp_path, settings=TINY, log=log.append)
    again = pretrain_glyphs(tmp_path, settings=TINY, log=log.append)
    assert "goes on at step 4" in log
    for one, other in zip(first.transformer.parameters(), again.transformer.parameters(), strict=True):
        assert torch.equal(one, other)
    with pytest.raises(UserError, match="other settings"):
        pretrain_glyphs(tmp_path, scale=0.5, settings=TINY)


def test_the_pool_is_the_size_asked_for() -> None:
    trainer = tiny_trainer()
    vae = build_autoencoder()
    vae.register_to_config(shift_factor=0.1, scaling_factor=0.7)
    pool = encode_pool(vae.eval(), trainer.task.tokenizer, TINY, lambda line: None)
    assert pool.latents.shape == (40, 4, 6, 16)
    assert pool.tokens.shape == (40, 14)


@torch.no_grad()
def test_the_autoencoder_without_shift_is_the_same_one() -> None:
    vae = build_autoencoder(seed=5)
    vae.register_to_config(shift_factor=0.37, scaling_factor=0.7)
    same = autoencoder_without_shift(vae.eval())
    pictures = torch.rand((3, 3, 24, 64), generator=torch.Generator().manual_seed(6)) * 2 - 1
    one, other = vae.encode(pictures).latent_dist, same.encode(pictures).latent_dist
    torch.testing.assert_close(other.mean, one.mean - 0.37)
    torch.testing.assert_close(other.std, one.std)
    torch.testing.assert_close(same.decode(other.mean).sample, vae.decode(one.mean).sample, rtol=0, atol=1e-5)
    assert same.config.shift_factor is None


def test_the_noise_loss_is_the_weighted_distance_to_the_teacher(monkeypatch: pytest.MonkeyPatch) -> None:
    """A network that answers 0 beside a teacher that knows ε: the mean of min(SNR, 5)/SNR·|ε|²/D over the draws."""
    task, x_0 = tiny_task("glyphs-ddim"), torch.randn((64, 4, 6, 16), generator=torch.Generator().manual_seed(7))
    again = torch.Generator().manual_seed(8)
    t = torch.randint(1000, (64,), generator=again)
    noise = torch.randn(x_0.shape, generator=again)
    monkeypatch.setattr(task, "teacher_noise", lambda x_t, alpha_bar, tokens: noise)
    tokens = torch.zeros((64, 14), dtype=torch.long)
    draws = torch.Generator().manual_seed(8)
    loss = task.loss(lambda x, t, states, return_dict: (torch.zeros_like(x),), x_0, tokens, draws)
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    alpha_bar = (1 - betas).cumprod(0)[t]
    snr = alpha_bar / (1 - alpha_bar)
    expected = (noise.double().square().mean((1, 2, 3)) * snr.clamp(max=5.0) / snr).mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)


@torch.no_grad()
def test_the_teachers_noise_is_the_truth_where_its_velocity_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """v = x_1 − x_0 at x_s = (1−s)·x_0 + s·x_1 is the noise ε = x_1 at x_t = √ᾱ·x_0 + √(1−ᾱ)·ε, at every level."""
    task = tiny_task("glyphs-ddim")
    assert isinstance(task, GlyphsDDIM)
    generator = torch.Generator().manual_seed(9)
    x_0, noise = torch.randn((2, 5, 4, 6, 16), generator=generator)
    alpha_bar = torch.tensor([0.999, 0.7, 0.4, 0.1, 0.005]).view(-1, 1, 1, 1)
    seen: list[torch.Tensor] = []

    def velocity(predict: object, x_s: torch.Tensor, s: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        seen.append(x_s - (1 - s.view(-1, 1, 1, 1)) * x_0 - s.view(-1, 1, 1, 1) * noise)
        return noise - x_0

    monkeypatch.setattr(task.teacher, "velocity", velocity)
    found = task.teacher_noise(alpha_bar.sqrt() * x_0 + (1 - alpha_bar).sqrt() * noise, alpha_bar, torch.zeros(5, 14))
    torch.testing.assert_close(found, noise, rtol=0, atol=2e-6)
    assert seen[0].abs().max() < 2e-6, "the teacher sees its own kind of state"


def test_pretraining_the_second_pipeline_ends_in_one_that_draws(tmp_path: Path) -> None:
    from diffusers import StableDiffusionPipeline

    pretrain_glyphs_ddim(tmp_path, settings=TINY, log=lambda line: None)
    pipe = StableDiffusionPipeline.from_pretrained(tmp_path, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    drawn = pipe('a sign that says "AIR"', height=24, width=64, num_inference_steps=2, output_type="pt").images
    assert drawn.shape == (1, 3, 24, 64)


@pytest.mark.parametrize("name", ["glyphs", "glyphs-ddim"])
def test_a_network_whose_compiled_form_loses_gradients_is_not_compiled(name: str) -> None:
    trainer, log = tiny_trainer(name), list[str]()
    pool = Pool(torch.randn((8, 4, 6, 16)).half(), trainer.empty.repeat(8, 1))

    def sound(*args: object, **kwargs: object) -> object:
        return trainer.task.network(*args, **kwargs)

    def broken(*args: object, **kwargs: object) -> object:
        return tuple(output.detach() + 0 * p.sum() for output, p in zip(sound(*args, **kwargs), weights, strict=True))

    weights = [next(trainer.task.network.parameters())]
    trainer.predict = sound
    trainer.trust_compiler(pool, log.append)
    assert trainer.predict is sound
    assert log == []
    trainer.predict = broken
    trainer.trust_compiler(pool, log.append)
    assert trainer.predict is trainer.task.network
    assert "no gradient: not compiled" in log[0]
    assert all(p.grad is None for p in trainer.parameters)


def test_the_first_steps_are_on_plain_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = list[int]()
    step = Trainer.step

    def watched(trainer: Trainer, pool: Pool) -> float:
        seen.append(len(pool.latents))
        return step(trainer, pool)

    monkeypatch.setattr(Trainer, "step", watched)
    settings = replace(TINY, plain_steps=2)
    pretrain_glyphs_ddim(tmp_path, settings=settings, log=lambda line: None)
    assert seen == [4, 4, 40, 40], "a tenth of the pool is plain"
    rng = random.Random(3)
    for text, drawn in (plain(rng) for _ in range(200)):
        assert text.startswith("printed ")
        assert text.endswith(f'"{drawn}"')
        assert len(drawn) == 5
