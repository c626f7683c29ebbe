"""Rewards: plain functions (images (B, 3, H, W) in [0, 1], prompts, metadata) -> scores (B,), NaN where they failed."""

from __future__ import annotations

from vmpo.rewards.aesthetic import Aesthetic
from vmpo.rewards.clip_score import CLIPScore
from vmpo.rewards.deqa import DeQA
from vmpo.rewards.hps import HPSv2
from vmpo.rewards.image_reward import ImageReward
from vmpo.rewards.jpeg import JPEGCompressibility, JPEGIncompressibility, jpeg_kilobytes
from vmpo.rewards.judge import VLMJudge
from vmpo.rewards.loading import BUILT_IN, load_reward
from vmpo.rewards.ocr import OCRAccuracy, OCRLogLikelihood, spelling_score, target_text
from vmpo.rewards.pick_score import PickScore
from vmpo.rewards.remote import RemoteReward
from vmpo.rewards.scoring import Reward, RewardFunction, check_prompts, combine, score_images
from vmpo.rewards.unified_reward import UnifiedReward

__all__ = [
    "BUILT_IN",
    "Aesthetic",
    "CLIPScore",
    "DeQA",
    "HPSv2",
    "ImageReward",
    "JPEGCompressibility",
    "JPEGIncompressibility",
    "OCRAccuracy",
    "OCRLogLikelihood",
    "PickScore",
    "RemoteReward",
    "Reward",
    "RewardFunction",
    "UnifiedReward",
    "VLMJudge",
    "check_prompts",
    "combine",
    "jpeg_kilobytes",
    "load_reward",
    "score_images",
    "spelling_score",
    "target_text",
]
