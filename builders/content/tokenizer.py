"""Reads a checkpoint's tokenizer: what a release has of it, and the token that pads."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from builders.content.sources import Source, read_config
from ensemble.content.encoder import TOKENIZER
from ensemble.content.texts import Tokenizer
from ensemble.errors import InvalidInput

if TYPE_CHECKING:
    from builders.content.opened import Opened


def copy_tokenizer(source: Source, opened: Opened, folder: Path) -> None:
    """Copies tokenizer.json; InvalidInput where it is none, or has tokens that the encoder does not know."""
    path = opened.tokenizer or source.folder / TOKENIZER
    try:
        (folder / TOKENIZER).write_bytes(path.read_bytes())
        tokenizer = Tokenizer(folder / TOKENIZER, opened.max_tokens)
        if opened.lowers:
            _lower(folder / TOKENIZER)
    except Exception as error:
        raise InvalidInput(f"encoder {source.name!r}: {path}: {error}") from None
    if opened.vocabulary and tokenizer.vocabulary_size > opened.vocabulary:
        raise InvalidInput(
            f"encoder {source.name!r}: {path} has {tokenizer.vocabulary_size} tokens, and the weights are of "
            f"{opened.vocabulary}",
            "use the tokenizer that the weights were trained with",
        )


def padding_of(source: Source, said: int | None, tokens: int) -> int:
    """Gives the token that texts were padded with, one of `tokens`: the tokenizer's own, as SigLIP 2's
    configuration (`said`) names another."""
    name = read_config(source, "tokenizer_config.json").get("pad_token")
    name = name.get("content") if isinstance(name, dict) else name
    tokenizer = read_config(source, TOKENIZER)
    words = tokenizer.get("model", {}).get("vocab", {})
    # a WordPiece or BPE has ids by word, a Unigram pairs in the order of their ids
    known = words if isinstance(words, dict) else {pair[0]: at for at, pair in enumerate(words)}
    known |= {token["content"]: token["id"] for token in tokenizer.get("added_tokens", [])}
    pad = known.get(name, said) if name else said
    if not isinstance(pad, int) or not 0 <= pad < tokens:
        raise InvalidInput(
            f"encoder {source.name!r}: the padding token {name or pad!r} is none of its {tokens}",
            f"name it as pad_token in {source.folder / 'tokenizer_config.json'}",
        )
    return pad


def _lower(path: Path) -> None:
    """Makes a tokenizer.json turn all letters into small ones first."""
    from tokenizers import Tokenizer as Opened
    from tokenizers import normalizers

    opened = Opened.from_file(str(path))
    then = [opened.normalizer] if opened.normalizer is not None else []
    opened.normalizer = normalizers.Sequence([normalizers.Lowercase(), *then])
    opened.save(str(path))
