"""Turns texts into tokens by a checkpoint's own tokenizer.json, padded to few lengths."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ensemble.arrays import Array
from ensemble.errors import ReleaseError

BUCKETS = (16, 32, 64, 128, 256, 512)  # lengths: few, so that plans and CUDA graphs can have them all
_LETTERS_A_TOKEN = 16  # more of a text than its tokens can hold is cut before it is read


class Tokenizer:
    """Holds an opened tokenizer; errors are ReleaseError, as it is part of a release."""

    def __init__(self, path: Path, max_tokens: int) -> None:
        try:
            from tokenizers import Tokenizer as Opened
        except ImportError:
            raise ReleaseError(
                "texts are encoded by the package tokenizers, which is not installed",
                'pip install "peregrine-recommender[encoders]"',
            ) from None
        try:
            self._opened = Opened.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise ReleaseError(f"{path} is no tokenizer.json: {error}", "build the release again") from None
        self._opened.no_padding()
        self._opened.enable_truncation(max_tokens)
        self.max_tokens = max_tokens

    @property
    def vocabulary_size(self) -> int:
        """Gives how many tokens there are: no token id is as large."""
        return int(self._opened.get_vocab_size())

    def tokens(self, texts: Sequence[str]) -> list[list[int]]:
        """Gives each text's token ids, special ones included, cut at max_tokens."""
        longest = self.max_tokens * _LETTERS_A_TOKEN
        # a lone surrogate, which JSON may hold, is no UTF-8
        whole = [text[:longest].encode("utf-8", "replace").decode() for text in texts]
        return [encoding.ids for encoding in self._opened.encode_batch(whole)]


def padded(tokens: Sequence[Sequence[int]], most: int) -> tuple[Array, Array]:
    """Lays tokens out as token_ids [n, L] int64 and token_mask [n, L] bool; L is the bucket that holds the
    longest, or `most`, the encoder's own limit, where that is less (CLIP has places for 77)."""
    longest = max(map(len, tokens))
    length = min(next((bucket for bucket in BUCKETS if bucket >= longest), longest), most)
    ids, mask = np.zeros((len(tokens), length), np.int64), np.zeros((len(tokens), length), bool)
    for row, one in enumerate(tokens):
        ids[row, : len(one)], mask[row, : len(one)] = one, True
    return ids, mask
