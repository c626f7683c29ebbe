"""Settings of a pretraining run."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Cycle:
    """`steps` batches; the learning rates rise to `peak` of the full ones and fall to 0 over the last `decay` share."""

    steps: int
    peak: float = 1.0
    decay: float = 0.5


@dataclass(frozen=True)
class Pretraining:
    """Settings of a pretraining run; one 'step' is one batch."""

    autoencoder_steps: int = 2_000
    pool: int = 80_000
    plain_steps: int = 0  # first, on words of five letters drawn in one style
    cycles: tuple[Cycle, ...] = (Cycle(14_000), Cycle(5_000, peak=0.5, decay=0.9))
    batch: int = 96
    lr: float = 2e-3
    muon_lr: float = 2e-2
    warmup: int = 200
    ema: float = 0.998
    caption_dropout: float = 0.1
    handmade_share: float = 0.5
    named_share: float = 0.6  # of the captions say the source
    misspelt_rate: float = 0.7
    seed: int = 0

    @property
    def steps(self) -> int:
        """Batches of all cycles."""
        return sum(cycle.steps for cycle in self.cycles)


def scaled(settings: Pretraining, scale: float) -> Pretraining:
    """The settings with every count shortened."""

    def shorter(count: int) -> int:
        return max(1, round(count * scale))

    return replace(
        settings,
        autoencoder_steps=shorter(settings.autoencoder_steps),
        pool=shorter(settings.pool),
        plain_steps=round(settings.plain_steps * scale),
        cycles=tuple(replace(cycle, steps=shorter(cycle.steps)) for cycle in settings.cycles),
    )
