"""The small head that turns an embedding into one score, of the LAION aesthetic predictor and of ImageReward."""

from __future__ import annotations

from torch import Tensor, nn

from vmpo.errors import UserError
from vmpo.features.strict_loading import load_strictly


class ScoreHead(nn.Module):
    """D → 1024 → 128 → 64 → 16 → 1, linear throughout: the published networks have no activations between.

    The dropouts of training keep the published numbering of the layers and do nothing here.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(width, 1024),
            nn.Dropout(0.2),
            nn.Linear(1024, 128),
            nn.Dropout(0.2),
            nn.Linear(128, 64),
            nn.Dropout(0.1),
            nn.Linear(64, 16),
            nn.Linear(16, 1),
        )

    def forward(self, features: Tensor) -> Tensor:
        """Score (B,) of embeddings (B, D)."""
        return self.layers(features).squeeze(-1)


def load_score_head(state: dict[str, Tensor], source: str) -> ScoreHead:
    """A frozen head in float32 with the tensors of a state dict.

    Raises:
        UserError: if they are not those of such a head.
    """
    if "layers.0.weight" not in state:
        raise UserError(f"'{source}' does not hold the weights of a ScoreHead: it has no layers.0.weight")
    head = ScoreHead(state["layers.0.weight"].shape[1])
    load_strictly(head, state, source)
    return head
