"""Models that train and export in a second, for builds that are not about the models."""

from __future__ import annotations

from pathlib import Path

FILE = "light_models.py"
OPTIONS = ("--user-encoder", "light_models:UserEncoder", "--ranker", "light_models:Ranker")
SOURCE = """\
import torch
from torch import nn

class Base(nn.Module):
    def __init__(self, schema):
        super().__init__()
        self.tasks = len(schema.tasks)
        self.scale = nn.Parameter(torch.ones(()))

class UserEncoder(Base):
    def forward(self, history_embeddings, history_mask, user_codes, user_values):
        mask = history_mask.unsqueeze(-1).float()
        return self.scale * ((history_embeddings * mask).sum(1) / mask.sum(1).clamp(min=1)).unsqueeze(1)

class Ranker(Base):
    def forward(
        self, history_features, history_mask, user_codes, user_values, user_features, user_state,
        candidate_features, candidate_state, candidate_scores,
    ):
        return torch.sigmoid(self.scale * candidate_scores[..., 2:] - 3).expand(-1, -1, self.tasks)
"""


def write_light_models(folder: Path) -> None:
    """Writes the module into the folder that a build is run from, where OPTIONS find it."""
    (folder / FILE).write_text(SOURCE)
