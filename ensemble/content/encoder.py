"""Encodes titles and pictures with a text_encoder or an image_encoder: the same code for a build and for
items that come later, so that both get the same vectors."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np

from ensemble.arrays import Array
from ensemble.content.pictures import PictureFaultError, pixels_from_picture
from ensemble.content.texts import Tokenizer, padded
from ensemble.contract import TEXT
from ensemble.engines import Engine, check_signature, open_engine
from ensemble.errors import ReleaseError
from ensemble.release.release import Release
from ensemble.spec import ModelSpec

TOKENIZER = "tokenizer.json"
_TEXTS_AT_ONCE, _PICTURES_AT_ONCE = 32, 8
EMPTY = "empty"  # the kind of fault of a text without words


@dataclass(frozen=True)
class EncoderFacts:
    """Says what an encoder is: MODEL.json of a release."""

    model: str  # TEXT or IMAGE
    source: str  # as shop.toml names it
    digest: str  # of its weights and settings
    width: int  # V, components of its vectors
    max_tokens: int = 0  # TEXT
    side: int = 0  # IMAGE: pixels
    space: str = ""  # the same of two encoders whose vectors share a space; "": it shares none

    def to_json(self) -> str:
        return json.dumps(vars(self), indent=1)


@dataclass(frozen=True)
class Encoded:
    """Holds vectors [n, V] float32, 0 where there is none, and why: faults by place, (kind, text)."""

    vectors: Array
    faults: dict[int, tuple[str, str]]


class ContentEncoder:
    """Holds one encoder, opened: its engine, and the tokenizer of a text_encoder."""

    def __init__(self, engine: Engine, facts: EncoderFacts, tokenizer: Path | None = None) -> None:
        self.engine, self.facts = engine, facts
        self.tokenizer = Tokenizer(tokenizer, facts.max_tokens) if tokenizer is not None else None

    def encode(
        self, inputs: Sequence[str] | Sequence[bytes], done: Callable[[int], None] = lambda count: None
    ) -> Encoded:
        """Encodes texts, or pictures as the bytes of their files; `done` is told how many are."""
        vectors = np.zeros((len(inputs), self.facts.width), np.float32)
        faults: dict[int, tuple[str, str]] = {}
        if self.tokenizer is not None:
            self._encode_texts(cast(Sequence[str], inputs), vectors, faults, done)
        else:
            self._encode_pictures(cast(Sequence[bytes], inputs), vectors, faults, done)
        bad = np.flatnonzero(~np.isfinite(vectors).all(axis=1))
        vectors[bad] = 0
        faults |= {int(place): ("not finite", f"{self.facts.model} gives NaN for it") for place in bad}
        return Encoded(vectors, faults)

    def _encode_texts(
        self,
        texts: Sequence[str],
        vectors: Array,
        faults: dict[int, tuple[str, str]],
        done: Callable[[int], None],
    ) -> None:
        """Encodes texts of like lengths together, in place."""
        assert self.tokenizer is not None
        faults |= {
            at: (EMPTY, "has no words") for at, text in enumerate(texts) if not text.strip("\0 \t\r\n")
        }
        kept = [at for at in range(len(texts)) if at not in faults]
        tokens = dict(zip(kept, self.tokenizer.tokens([texts[at] for at in kept]), strict=True))
        kept.sort(key=lambda at: len(tokens[at]))
        for start in range(0, len(kept), _TEXTS_AT_ONCE):
            part = kept[start : start + _TEXTS_AT_ONCE]
            ids, mask = padded([tokens[at] for at in part], self.facts.max_tokens)
            vectors[part] = self.engine.run({"token_ids": ids, "token_mask": mask})["text_embedding"]
            done(start + len(part))

    def _encode_pictures(
        self,
        pictures: Sequence[bytes],
        vectors: Array,
        faults: dict[int, tuple[str, str]],
        done: Callable[[int], None],
    ) -> None:
        """Decodes and encodes some pictures at a time, in place."""
        for start in range(0, len(pictures), _PICTURES_AT_ONCE):
            pixels, part = [], []
            for at, picture in enumerate(pictures[start : start + _PICTURES_AT_ONCE], start):
                try:
                    pixels.append(pixels_from_picture(picture, self.facts.side))
                    part.append(at)
                except PictureFaultError as fault:
                    faults[at] = fault.kind, str(fault)
            if part:
                vectors[part] = self.engine.run({"pixels": np.stack(pixels)})["image_embedding"]
            done(min(start + _PICTURES_AT_ONCE, len(pictures)))

    def of_pixels(self, pictures: Sequence[Array]) -> Array:
        """Encodes decoded pictures, [3, side, side] float32 each: vectors [n, V] float32, 0 where a vector is
        not finite."""
        starts = range(0, len(pictures), _PICTURES_AT_ONCE)
        parts = [np.stack(pictures[start : start + _PICTURES_AT_ONCE]) for start in starts]
        vectors = np.concatenate([self.engine.run({"pixels": part})["image_embedding"] for part in parts])
        return np.where(np.isfinite(vectors).all(axis=1, keepdims=True), vectors, 0)


def open_content_encoder(release: Release, model: ModelSpec) -> ContentEncoder:
    """Opens a release's text_encoder or image_encoder on the CPU; ReleaseError where a file is not what the
    manifest says, or the engine not what the contract says."""
    names = [f"{model.name}.json", *([TOKENIZER] if model.name == TEXT else [])]
    release.verify_data(*names)
    path = release.member_file(model.name, "model.onnx")
    release.verify([path])
    engine = open_engine(path)
    check_signature(engine, model, path)
    return ContentEncoder(
        engine,
        read_facts(release.path / names[0]),
        release.path / TOKENIZER if model.name == TEXT else None,
    )


def read_facts(path: Path) -> EncoderFacts:
    """Reads what EncoderFacts.to_json wrote."""
    try:
        return EncoderFacts(**json.loads(path.read_text("utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise ReleaseError(f"{path} cannot be read: {error}", "build the release again") from error
