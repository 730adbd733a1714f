"""What an opened encoder is, whoever made it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import nn


@dataclass(frozen=True)
class Opened:
    """Holds an encoder as a module, and its sizes."""

    module: nn.Module
    width: int
    max_tokens: int = 0
    side: int = 0
    vocabulary: int = 0  # token ids that its table has
    tokenizer: Path | None = None  # the tokenizer.json of a user's own; else the folder's
    space: str = ""  # what two encoders have alike whose vectors can be compared; "": none has it
    lowers: bool = False  # was trained on small letters, whether its tokenizer makes them or not
