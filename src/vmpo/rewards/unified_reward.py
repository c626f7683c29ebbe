"""UnifiedReward: a judge trained on human preferences of generated pictures, served by SGLang or vLLM.

Weights: CodeGoat24/UnifiedReward-7b-v1.5 on the Hugging Face hub (LLaVA-OneVision 7B); see its card for the licence.

References:
    Wang et al., 2025, Unified Reward Model for Multimodal Understanding and Generation (arXiv:2503.05236).
    Flow-GRPO (Liu et al., 2025, arXiv:2505.05470) and its published code: 512 x 512 pixels, score / 5.
"""

from __future__ import annotations

from dataclasses import dataclass

from vmpo.rewards.judge import VLMJudge

TEMPLATE = """\
You see a picture that was generated from a text caption. Rate it by two criteria.
1. Alignment with the Caption: whether the objects, their attributes and their relations are those of the caption.
2. Overall Image Quality: clarity, detail, colours and overall aesthetic appeal.
Weigh both and give one score from 1 to 5 after 'Final Score:'.
Text Caption: [{prompt}]"""


@dataclass(frozen=True, kw_only=True)
class UnifiedReward(VLMJudge):
    """UnifiedReward's score of alignment and quality, 1 to 5, divided by 5: r in [0.2, 1].

    The criteria, the scale, the caption line and 'Final Score:' are those the model was published with, the sentences
    around them are vmpo's own; `template_file` takes the published wording from the model's page for exact comparisons.
    Flow-GRPO's code counts a reply without a score as 0; here it is NaN. Options: those of `VLMJudge`.

    References:
        Wang et al., 2025 (arXiv:2503.05236); Flow-GRPO (Liu et al., 2025, arXiv:2505.05470), published code.
    """

    model: str = "UnifiedReward-7b-v1.5"
    template: str = TEMPLATE
    pattern: str | None = r"Final Score:\s*([1-5](?:\.\d+)?)"
    scale: float = 5.0
    size: int | None = 512
