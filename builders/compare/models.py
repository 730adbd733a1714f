"""Says which models of a build have something that can be compared."""

from __future__ import annotations

from builders.compress.source import Source
from builders.ranker.model import Ranker
from ensemble.errors import InvalidInput

MODELS = ("ranker", "user_encoder")
SETUP = 0.05  # share of a comparison's progress before its first row


def check_model(source: Source, model: str) -> None:
    """Raises InvalidInput for a model that is unknown, or whose network is off."""
    if model not in MODELS:
        raise InvalidInput(f"--model {model}: unknown; known: {', '.join(MODELS)}")
    ranker = source.modules[model]
    if isinstance(ranker, Ranker) and not float(ranker.deep_gate):
        raise InvalidInput(
            "the ranker of this build is recall's own order: its network did not help held-out users and is "
            "off, so nothing in it can be lost; cure: --model user_encoder, or more interactions"
        )
