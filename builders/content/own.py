"""Opens a user's own text or image encoder, named as MODULE:CLASS in shop.toml.

CLASS() is a torch.nn.Module that takes the contract's tensors (`contract.content_encoder`) and says what it
is in attributes: `width` of its vectors, and `side` of its pictures, or `max_tokens` and `tokenizer`, a
tokenizer.json beside its module's file. Its vectors are made of length 1 here. It runs in a build alone: a
release has its ONNX model.
"""

from __future__ import annotations

import hashlib
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from builders.content.opened import Opened
from builders.own_model import check_own, example, own_module
from ensemble import contract
from ensemble.content.texts import BUCKETS, Tokenizer
from ensemble.contract import TEXT
from ensemble.errors import InvalidInput, ReleaseError
from ensemble.release.files import file_sha256
from ensemble.schema import EncoderSizes
from ensemble.spec import ModelSpec

_LIMITS = {"width": (1, 8192), "max_tokens": (2, BUCKETS[-1]), "side": (32, 512)}  # least and most
_SAID = {TEXT: ("width", "max_tokens"), contract.IMAGE: ("width", "side")}


class OwnTexts(nn.Module):
    """Makes the vectors of a user's own text encoder of length 1."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, token_ids: Tensor, token_mask: Tensor) -> Tensor:
        """Encodes token_ids [B, L] int64, token_mask [B, L] bool -> text_embedding [B, V] float32."""
        return functional.normalize(self.inner(token_ids=token_ids, token_mask=token_mask), dim=-1)


class OwnPictures(nn.Module):
    """Makes the vectors of a user's own image encoder of length 1."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, pixels: Tensor) -> Tensor:
        """Encodes pixels [B, 3, Y, X] float32 from 0 to 1 -> image_embedding [B, V] float32."""
        return functional.normalize(self.inner(pixels=pixels), dim=-1)


@dataclass(frozen=True)
class OwnEncoder:
    """Holds a user's own encoder, held against the contract, and the digest of all that makes its vectors."""

    opened: Opened
    digest: str


def open_own_encoder(where: str, source: str, model: str, shop: Path) -> OwnEncoder:
    """Opens "MODULE:CLASS", looked for in the shop's folder first; InvalidInput says what does not fit."""
    from builders.keys import own_key  # no code of a stage: see there

    with torch.random.fork_rng():
        torch.manual_seed(0)  # weights that a constructor draws are the same the next time
        module = own_module(where, source, shop)
    sizes = {name: _said(where, source, module, name) for name in _SAID[model]}
    tokenizer = _tokenizer(where, source, module, sizes["max_tokens"]) if model == TEXT else None
    check_own(where, module, *_tried(model, sizes, tokenizer))
    for parameter in module.parameters():
        parameter.requires_grad_(False)
    path = tokenizer and tokenizer[0]
    opened = Opened(
        (OwnTexts if model == TEXT else OwnPictures)(module.eval()),
        sizes["width"],
        max_tokens=sizes.get("max_tokens", 0),
        side=sizes.get("side", 0),
        vocabulary=tokenizer[1] if tokenizer else 0,
        tokenizer=path,
    )
    key = own_key(source, shop)
    facts = [source, key.digest if key else "", str(sizes), path and file_sha256(path), _weights(module)]
    return OwnEncoder(opened, hashlib.sha256(repr(facts).encode()).hexdigest())


def _said(where: str, source: str, module: nn.Module, name: str) -> int:
    least, most = _LIMITS[name]
    value = getattr(module, name, None)
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        attribute = source.partition(":")[2]
        raise InvalidInput(
            f"{where}: {attribute}.{name} is {value!r}, and has to be a number from {least} to {most}",
            f"write it into the class: {name} = {min(128, most)}",
        )
    return value


def _tokenizer(where: str, source: str, module: nn.Module, max_tokens: int) -> tuple[Path, int]:
    """Gives the path of the class's tokenizer.json and how many tokens it has."""
    name = getattr(module, "tokenizer", None)
    if not isinstance(name, (str, Path)):
        raise InvalidInput(
            f"{where}: {source.partition(':')[2]}.tokenizer is {name!r}, and has to name a tokenizer.json",
            'write it into the class: tokenizer = "tokenizer.json", a file beside the module\'s',
        )
    path = Path(str(sys.modules[source.partition(":")[0]].__file__)).resolve().parent / name
    if not path.is_file():
        raise InvalidInput(f"{where}: its tokenizer {path} is missing")
    try:
        return path, Tokenizer(path, max_tokens).vocabulary_size
    except ReleaseError as error:
        raise InvalidInput(f"{where}: {error}") from None


def _tried(
    model: str, sizes: dict[str, int], tokenizer: tuple[Path, int] | None
) -> tuple[ModelSpec, dict[str, Tensor]]:
    """Gives the contract and inputs at its limits: as many tokens as come at most, of the last number."""
    spec = contract.content_encoder(EncoderSizes(model, sizes["width"], sizes.get("side", 0)))
    if tokenizer is None:
        return spec, {one.name: example(one, 3) for one in spec.inputs}
    shape = 3, sizes["max_tokens"]
    return spec, {
        "token_ids": torch.full(shape, tokenizer[1] - 1, dtype=torch.int64),
        "token_mask": torch.ones(shape, dtype=torch.bool),
    }


def _weights(module: nn.Module) -> str:
    """Gives the digest of a module's weights: they may come from a file that the code only names."""
    digest = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        plain = tensor.detach().cpu().contiguous().flatten()
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(plain.view(torch.uint8).numpy().tobytes() if plain.numel() else b"")
    return digest.hexdigest()
