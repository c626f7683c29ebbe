"""Rewards: plain functions (images (B, 3, H, W) in [0, 1], prompts, metadata) -> scores (B,), NaN where they failed."""

from __future__ import annotations

from vmpo.rewards.jpeg import JPEGCompressibility, JPEGIncompressibility, jpeg_kilobytes
from vmpo.rewards.loading import BUILT_IN, load_reward
from vmpo.rewards.ocr import OCRAccuracy, OCRLogLikelihood, spelling_score, target_text
from vmpo.rewards.scoring import Reward, RewardFunction, check_prompts, combine, score_images

__all__ = [
    "BUILT_IN",
    "JPEGCompressibility",
    "JPEGIncompressibility",
    "OCRAccuracy",
    "OCRLogLikelihood",
    "Reward",
    "RewardFunction",
    "check_prompts",
    "combine",
    "jpeg_kilobytes",
    "load_reward",
    "score_images",
    "spelling_score",
    "target_text",
]
