"""Writes tuned encoders as checkpoint folders, which shop.toml names."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file

from builders.content.sources import EFFICIENTNET, HEAD, READ, read_config
from builders.content.tuning.towers import Tower

NAMES = {True: "text", False: "image"}  # of the folders, by whether they read texts
_OWN = ("config.json", "model.safetensors", HEAD)  # written anew; the rest is copied


def write_towers(towers: Sequence[Tower], folder: Path) -> None:
    """Writes a folder each, `text` and `image`, whose heads name the space that they share."""
    digest = hashlib.sha256()
    for tower in towers:
        for of in tower.head.folded().values():
            digest.update(of.numpy().tobytes())
    for tower in towers:
        write_tower(tower, folder / NAMES[tower.is_text], digest.hexdigest())


def write_tower(tower: Tower, folder: Path, space: str = "") -> None:
    """Writes config.json, model.safetensors, head.safetensors, and copies what belongs to them."""
    folder.mkdir()
    source = tower.source
    tower.module.to(memory_format=torch.contiguous_format)  # as safetensors wants it
    if source.name == EFFICIENTNET or read_config(source).get("model_type") == EFFICIENTNET:
        config = {"model_type": EFFICIENTNET, "image_size": tower.side}
        (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
        weights = {
            name: of.contiguous()
            for name, of in tower.module.inner.state_dict().items()
            if not name.startswith("_fc.")  # tells ImageNet's classes apart, and is no part of a vector
        }
        save_file(weights, folder / "model.safetensors")
    else:
        tower.module.inner.save_pretrained(folder)
    save_file(tower.head.folded(), folder / HEAD, metadata={"space": space})
    for path in folder.glob("*.safetensors"):  # which are written for their owner alone
        path.chmod(0o644)
    for name in READ:
        if name not in _OWN and (source.folder / name).is_file():
            shutil.copyfile(source.folder / name, folder / name)
