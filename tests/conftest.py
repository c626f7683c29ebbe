"""One thread, no network, quiet libraries, and a pipeline small enough to train in a test."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parent.parent
for key, value in {
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "DIFFUSERS_VERBOSITY": "error",
}.items():
    os.environ[key] = value  # inherited by the processes that tests start
for folder in (ROOT / "src", ROOT):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT / "src"), str(ROOT), os.environ.get("PYTHONPATH", "")])

import pytest  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(1)
warnings.filterwarnings("ignore", message=".*torchvision.*")


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained StableDiffusion3Pipeline on disk: 24 x 64 pictures, 6 x 16 latents, captions of embedded words.

    Shift and scale of the autoencoder and the scheduler's shift are not neutral, so that a dropped one shows.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler

    from vmpo.pretraining.autoencoder import build_autoencoder
    from vmpo.pretraining.glyphs import build_pipeline
    from vmpo.training.run import silence_libraries

    silence_libraries()
    folder = tmp_path_factory.mktemp("tiny_model")
    vae = build_autoencoder(seed=3)
    vae.register_to_config(shift_factor=0.1, scaling_factor=0.7)
    pipe = build_pipeline(vae.eval(), seed=4, layers=2, width=32)
    pipe.register_modules(scheduler=FlowMatchEulerDiscreteScheduler(shift=2.0))
    pipe.save_pretrained(folder)
    return folder


@pytest.fixture
def settings(tiny_model: Path) -> list[str]:
    """Overrides of the embedded recipe that train the tiny model for three epochs of twelve pictures."""
    return tiny_settings(tiny_model)


def tiny_settings(model: Path) -> list[str]:
    """Alpha is not the rank, rows do not divide by the micro-batch, and the rollout serves two updates."""
    return [
        f"model.path={model}",
        "model.lora.rank=4",
        "model.lora.alpha=6",
        "sampler.steps=4",
        "sampler.window=null",
        'reward.weights={"tests.scenarios:brightness": 1.0}',
        "objective.name=vmpo_r2g",
        "objective.beta=0.2",
        "objective.kl_old=0.5",
        "optimisation.epochs=3",
        "optimisation.prompts=3",
        "optimisation.group=4",
        "optimisation.updates=2",
        "optimisation.micro_batch=5",
        "evaluation.every=0",
        "evaluation.prompts=4",
        "evaluation.final_prompts=4",
        "evaluation.final_images=2",
        "evaluation.truth_prompts=2",
        "evaluation.truth_images=8",
        "checkpoint_every=1",
        "trackers=[]",
    ]


@pytest.fixture
def vmpo(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, list[str], str]]:
    """Runs the command line in this process: exit code, lines on standard error, text on standard output."""

    def run(*words: object) -> tuple[int, list[str], str]:
        from vmpo.cli import main

        monkeypatch.chdir(ROOT)
        monkeypatch.setattr(sys, "argv", ["vmpo", *map(str, words)])
        capfd.readouterr()
        code = 0
        try:
            main()
        except SystemExit as end:
            code = int(end.code or 0)
        captured = capfd.readouterr()
        return code, captured.err.splitlines(), captured.out

    return run
