"""The trained adapter loads in plain diffusers and draws the picture that `vmpo sample` draws."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

PROMPT = 'a sign that says "ACTOR"'
SEED, STEPS, RANK, ALPHA = 7, 5, 4, 10
SCRIPT = """
import sys
import torch
from diffusers import StableDiffusion3Pipeline

model, adapter, out, prompt, seed, steps, lost = sys.argv[1:]
pipe = StableDiffusion3Pipeline.from_pretrained(model, text_encoder_3=None, tokenizer_3=None)
pipe.set_progress_bar_config(disable=True)


def draw(name):
    image = pipe(
        prompt, height=24, width=64, num_inference_steps=int(steps), guidance_scale=1.0, max_sequence_length=0,
        generator=torch.Generator().manual_seed(int(seed)),
    ).images[0]
    image.save(f"{out}/{name}.png")


draw("base")
pipe.load_lora_weights(adapter)
draw("aligned")
pipe.set_adapters(pipe.get_active_adapters(), float(lost))
draw("alpha_lost")
assert not any(name.startswith("vmpo") for name in sys.modules)
"""


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path)).astype(int)


def test_same_picture(
    vmpo: Callable[..., tuple[int, list[str], str]], settings: list[str], tiny_model: Path, tmp_path: Path
) -> None:
    run, plain, ours = tmp_path / "run", tmp_path / "plain", tmp_path / "ours"
    more = [f"model.lora.rank={RANK}", f"model.lora.alpha={ALPHA}", "optimisation.epochs=1", "optimisation.lr=0.1"]
    code, lines, _ = vmpo("train", "glyphs", *settings, *more, "--run", run)
    assert code == 0, lines
    words = ["sample", run, PROMPT, "--seed", SEED, "--steps", STEPS, "--images", 1, "--out"]
    code, lines, out = vmpo(*words, ours)
    assert code == 0, lines
    drawn = Path(out.strip())
    assert vmpo(*words, tmp_path / "base", "--base")[0] == 0

    plain.mkdir()
    (tmp_path / "draw.py").write_text(SCRIPT)
    arguments = [tiny_model, run / "adapter", plain, PROMPT, SEED, STEPS, RANK / ALPHA]
    done = subprocess.run(
        [sys.executable, tmp_path / "draw.py", *map(str, arguments)], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr

    base, aligned = pixels(plain / "base.png"), pixels(plain / "aligned.png")
    assert pixels(drawn).shape == (24, 64, 3)
    assert np.abs(pixels(drawn) - aligned).max() <= 1
    assert np.abs(pixels(tmp_path / "base" / drawn.name) - base).max() <= 1
    assert np.abs(aligned - base).max() > 8, "the adapter must be seen, or its loss would not be"
    assert np.abs(aligned - pixels(plain / "alpha_lost.png")).max() > 4, "and so must its alpha"


def test_pictures_of_one_call_follow_the_seed(
    vmpo: Callable[..., tuple[int, list[str], str]], tiny_model: Path, tmp_path: Path, settings: list[str]
) -> None:
    run = tmp_path / "run"
    assert vmpo("train", "glyphs", *settings, "optimisation.epochs=1", "--run", run)[0] == 0
    words = ["sample", run, PROMPT, "--steps", 3, "--out"]
    together = vmpo(*words, tmp_path / "a", "--seed", 4, "--images", 2)[2].split()
    alone = vmpo(*words, tmp_path / "b", "--seed", 5)[2].split()
    assert len(together) == 2
    assert np.abs(pixels(Path(together[1])) - pixels(Path(alone[0]))).max() <= 1
    assert np.abs(pixels(Path(together[0])) - pixels(Path(alone[0]))).max() > 8


def test_the_adapter_file_names_rank_and_alpha(
    vmpo: Callable[..., tuple[int, list[str], str]], tmp_path: Path, settings: list[str]
) -> None:
    import json

    from safetensors import safe_open

    run = tmp_path / "run"
    words = [*settings, f"model.lora.rank={RANK}", f"model.lora.alpha={ALPHA}", "optimisation.epochs=1"]
    assert vmpo("train", "glyphs", *words, "--run", run)[0] == 0
    with safe_open(run / "adapter" / "pytorch_lora_weights.safetensors", "pt") as file:
        metadata, keys = file.metadata(), list(file.keys())
    facts = json.loads(metadata["lora_adapter_metadata"])
    assert facts["transformer.r"] == RANK
    assert facts["transformer.lora_alpha"] == pytest.approx(ALPHA)
    assert keys
    assert all(key.startswith("transformer.") for key in keys)
