"""Holds the small layers that encoders and rankers share."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor, nn

from ensemble.schema import Table


@cache
def computes_bf16() -> bool:
    """Says whether this CPU multiplies matrices in bfloat16 by itself; where it does not, torch imitates it
    and a training takes five times as long as in float32."""
    known = torch.cpu.get_capabilities()
    return bool(known.get("avx512_bf16") or known.get("amx_bf16"))


def training_dtype(bf16: bool) -> torch.dtype:
    """Gives the dtype of a training's matrix products: bfloat16 where it is asked for and gains."""
    return torch.bfloat16 if bf16 and computes_bf16() else torch.float32


def narrow_products(bf16: bool) -> torch.autocast:
    """Runs what is under it with matrix products of `training_dtype`."""
    return torch.autocast("cpu", torch.bfloat16, enabled=training_dtype(bf16) == torch.bfloat16)


class Dropout(nn.Module):
    """Drops elements in steps of 1/256, by one random byte each: 5 times faster than torch's on a CPU."""

    def __init__(self, probability: float):
        super().__init__()
        self.threshold = round(256 * probability)

    def forward(self, states: Tensor) -> Tensor:
        """Drops and scales elements of any shape and dtype; gives them as they are unless training."""
        if not self.training or self.threshold == 0:
            return states
        words = torch.empty((states.numel() + 7) // 8, dtype=torch.int64, device=states.device)
        noise = words.random_(-(2**63), None).view(torch.uint8)[: states.numel()].view(states.shape)
        return states * ((noise >= self.threshold).to(states.dtype) * (256 / (256 - self.threshold)))


class CodeEmbedding(nn.Module):
    """Embeds all codes in one table: the mean of each slice's non-zero codes, a vector a feature."""

    def __init__(self, num_codes: int, slices: tuple[tuple[int, int], ...], dim: int):
        super().__init__()
        self.slices = slices
        self.table = nn.Embedding(max(num_codes, 1), dim)
        nn.init.normal_(self.table.weight, std=0.02)

    def forward(self, codes: Tensor) -> list[Tensor]:
        """Embeds codes [B, C] int32 (0 = padding): [B, D] float32 a slice, zero where the slice is empty."""
        if not self.slices:
            return []
        present = (codes != 0).unsqueeze(-1).to(self.table.weight.dtype)
        vectors = self.table(codes) * present
        return [
            vectors[:, start:stop].sum(1) / present[:, start:stop].sum(1).clamp(min=1.0)
            for start, stop in self.slices
        ]


def code_slices(table: Table) -> tuple[tuple[int, int], ...]:
    """Gives the (start, stop) columns of each code feature, as CodeEmbedding takes them."""
    return tuple((f.start, f.start + f.width) for f in table.features if f.is_code)


def content_slices(table: Table) -> tuple[tuple[int, int], ...]:
    """Gives the (start, stop) columns of values of each feature that a content encoder makes."""
    return tuple((f.start, f.start + f.width) for f in table.features if f.kind == "embedding")
