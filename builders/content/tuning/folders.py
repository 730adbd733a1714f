"""Writes tuned encoders as checkpoint folders, which shop.toml names."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

from builders.content.sources import EFFICIENTNET, HEAD, READ, read_config
from builders.content.tuning.towers import Tower

_OWN = ("config.json", "model.safetensors", HEAD)  # written anew; the rest is copied


def write_tower(tower: Tower, folder: Path) -> None:
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
    save_file({name: of.contiguous() for name, of in tower.head.state_dict().items()}, folder / HEAD)
    for name in READ:
        if name not in _OWN and (source.folder / name).is_file():
            shutil.copyfile(source.folder / name, folder / name)
