"""Holds an encoder that is tuned: its inputs, its head, and its layers from the top down.

Axes: B batch, V the encoder's own components, D those of the space.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from builders.content.models import open_source
from builders.content.opened import Opened
from builders.content.sources import Source
from builders.content.tokenizer import copy_tokenizer
from builders.layers import narrow_products
from ensemble.arrays import Array
from ensemble.content.encoder import TOKENIZER
from ensemble.content.pictures import PictureFaultError, pixels_from_picture
from ensemble.content.texts import Tokenizer, padded
from ensemble.contract import TEXT
from ensemble.errors import InvalidInput

GROUPS = 4  # of layers, which are unfrozen one after the other
_DROPPED = 0.15  # of a text's words, in training
_MARGIN = 1.14  # a picture is read so much larger in training, and a square of it cut out
_AT_ONCE = 64


class Head(nn.Module):
    """Maps an encoder's vectors [B, V] into the space [B, D], standardized first: pooled vectors have a large
    mean, beside which a plain linear map learns badly."""

    mean: Tensor
    spread: Tensor

    def __init__(self, own: int, width: int) -> None:
        super().__init__()
        self.map = nn.Linear(own, width)
        self.register_buffer("mean", torch.zeros(own))
        self.register_buffer("spread", torch.ones(own))

    def forward(self, own: Tensor) -> Tensor:
        """Gives places in the space, of any length."""
        return self.map((own - self.mean) / self.spread)

    def folded(self) -> dict[str, Tensor]:
        """Gives weight [D, V] and bias [D] of the plain map that does the same."""
        weight, bias = self.map.weight.detach() / self.spread, self.map.bias.detach()
        return {"weight": weight.contiguous(), "bias": bias - weight @ self.mean}


class Tower:
    """Holds one encoder with its head, and makes tensors of what it reads."""

    def __init__(self, source: Source, width: int) -> None:
        opened = open_source(source)
        self.source, self.module = source, _module(opened)
        if self.module.head is not None:  # tuned before: its head is learned anew
            opened = replace(opened, width=self.module.head.in_features)
            self.module.head = None
        if source.model != TEXT:  # takes convolutions on a CPU a third less time
            self.module.to(memory_format=torch.channels_last)
        self.opened, self.side = opened, opened.side
        self.head = Head(opened.width, width)
        self.tokenizer = _open_tokenizer(source, self.opened) if source.model == TEXT else None

    @property
    def is_text(self) -> bool:
        return self.tokenizer is not None

    def tensors(self, inputs: Sequence[Any], rng: np.random.Generator | None = None) -> tuple[Tensor, ...]:
        """Makes what the module takes of texts, or of the bytes of pictures; with rng as in training: words
        are left out, pictures cut and mirrored."""
        if self.tokenizer is not None:
            texts = [one if rng is None else _some_words(one, rng) for one in inputs]
            ids, mask = padded(self.tokenizer.tokens(texts), self.tokenizer.max_tokens)
            return torch.from_numpy(ids), torch.from_numpy(mask)
        pixels = torch.from_numpy(np.stack([self._pixels(one, rng) for one in inputs]))
        return (pixels.contiguous(memory_format=torch.channels_last),)

    def _pixels(self, picture: bytes, rng: np.random.Generator | None) -> Array:
        if rng is None:
            return pixels_from_picture(picture, self.side)
        large = pixels_from_picture(picture, round(self.side * _MARGIN))
        top, left = rng.integers(0, large.shape[1] - self.side + 1, 2)
        cut = large[:, top : top + self.side, left : left + self.side]
        return np.ascontiguousarray(cut[:, :, ::-1] if rng.random() < 0.5 else cut)

    def vectors(
        self, inputs: Sequence[Any], rng: np.random.Generator | None = None, *, placed: bool = True
    ) -> Tensor:
        """Encodes inputs: [B, D] of length 1 in the space, or the encoder's own [B, V]."""
        tensors = self.tensors(inputs, rng)
        # convolutions gain nothing by bfloat16 on a CPU, and their gradients lose time
        with narrow_products(rng is not None and self.is_text):
            own = self.module(*tensors).float()
        return functional.normalize(self.head(own), dim=-1) if placed else own

    def encoded(
        self,
        read: Callable[[Sequence[int]], list[Any]],
        count: int,
        *,
        placed: bool = True,
        told: Callable[[int], bool] = lambda done: True,
    ) -> Array:
        """Encodes `count` inputs as they are served: [n, D] or [n, V] float32, 0 where one cannot be read;
        fewer where `told`, which hears how many are done, says to stop."""
        self.module.eval()
        parts: list[Array] = []
        for start in range(0, count, _AT_ONCE):
            inputs = read(range(start, min(start + _AT_ONCE, count)))
            good = [at for at, one in enumerate(inputs) if self.is_text or _is_picture(one, self.side)]
            width = self.head.map.out_features if placed else self.opened.width
            part = np.zeros((len(inputs), width), np.float32)
            if good:
                with torch.inference_mode():
                    part[good] = self.vectors([inputs[at] for at in good], placed=placed).numpy()
            parts.append(part)
            if not told(start + len(inputs)):
                break
        return np.concatenate(parts)

    def layers(self) -> list[list[nn.Parameter]]:
        """Gives the encoder's weights in at most GROUPS groups, the top one first."""
        return _layer_groups(self.module.inner)

    def train(self) -> None:
        """Prepares for training: what normalizes by batches keeps the pretrained statistics, as few steps of
        small batches estimate worse ones."""
        self.module.train()
        for part in self.module.modules():
            if isinstance(part, nn.modules.batchnorm._BatchNorm):
                part.eval()


def _module(opened: Opened) -> Any:
    """Gives the encoder's module; its class is one of models.py, which all have `inner` and `head`."""
    return opened.module


def _open_tokenizer(source: Source, opened: Opened) -> Tokenizer:
    with tempfile.TemporaryDirectory() as folder:
        copy_tokenizer(source, opened, Path(folder))
        return Tokenizer(Path(folder) / TOKENIZER, opened.max_tokens)


def _is_picture(data: bytes, side: int) -> bool:
    try:
        pixels_from_picture(data, side)
    except PictureFaultError:
        return False
    return True


def _some_words(text: str, rng: np.random.Generator) -> str:
    """Leaves out some words, never all."""
    words = text.split()
    kept = [word for word in words if rng.random() >= _DROPPED]
    return " ".join(kept) or text


def _layer_groups(inner: nn.Module) -> list[list[nn.Parameter]]:
    """Sorts weights by depth: what stands before the blocks, the blocks, what stands behind them; neighbours
    share a group."""
    lists = [one for one in inner.modules() if isinstance(one, nn.ModuleList) and len(one) > 1]
    if not lists:
        return [list(inner.parameters())]
    blocks = max(lists, key=lambda one: sum(p.numel() for p in one.parameters()))
    depths = {id(p): 1 + at for at, block in enumerate(blocks) for p in block.parameters()}
    groups: list[list[nn.Parameter]] = [[] for _ in range(min(GROUPS, len(blocks)))]
    depth, most = 0, len(blocks) + 1
    for parameter in inner.parameters():
        depth = depths.get(id(parameter), most if depth else 0)
        groups[len(groups) - 1 - depth * len(groups) // (most + 1)].append(parameter)
    return groups


def refuse_own(source: Source) -> None:
    """Raises InvalidInput for a module of the user's own."""
    if source.own:
        raise InvalidInput(
            f"encoder {source.name!r} is a module of your own, which only its own code can write again",
            "tune it there, or name a folder with a Hugging Face checkpoint",
        )
