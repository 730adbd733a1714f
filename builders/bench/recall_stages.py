"""Runs a build's stages up to the index, for benches that ask recall alone."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

import builders.data.stage as data
import builders.encoders.stage as encoders
import builders.index.stage as index
from builders.folders import new_folder
from builders.presets import Preset


def recall_parser(description: str | None) -> argparse.ArgumentParser:
    """Makes a parser of what these stages want: SHOP, --out, --preset, --set (`changes`) and --seed."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("shop", type=Path, metavar="SHOP")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--preset", default="base")
    parser.add_argument("--set", action="append", default=[], dest="changes", metavar="NAME=VALUE")
    parser.add_argument("--seed", type=int, default=0)
    return parser


def recall_stages(
    shop: Path, out: Path, chosen: Preset, seed: int, *, keep_encoders: bool = True
) -> dict[str, Path]:
    """Runs data, encoders and index in `out`, on one thread; gives their folders by name.

    keep_encoders takes the trained encoders that are there already, whatever they were trained with.
    """
    out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    (out / "none.jsonl").write_text("")
    folders = {name: out / name for name in ("data", "encoders", "index")}
    with new_folder(folders["data"], force=True) as folder:
        data.run({"shop": shop, "catalogue": out / "none.jsonl"}, chosen.sizes, folder, _tell)
    if not (keep_encoders and folders["encoders"].exists()):
        training = encoders.Options(chosen.encoders, None, seed)
        with new_folder(folders["encoders"], force=True) as folder:
            encoders.run({"data": folders["data"]}, training, folder, _tell)
    inputs = {name: folders[name] for name in ("data", "encoders")}
    with new_folder(folders["index"], force=True) as folder:
        index.run(inputs, index.Options(seed, None), folder, _tell)
    return folders


def _tell(share: float, text: str) -> None:
    print(f"{share:.0%} {text}", flush=True)
