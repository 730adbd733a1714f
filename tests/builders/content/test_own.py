"""A user's own encoder of texts or pictures is one like any other; what does not fit is one exact line."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from checkpoints import write_tokenizer

from builders.content.cache import keep_encoder
from builders.content.sources import find_source
from builders.shop.shop_toml import FeatureColumn
from ensemble.errors import InvalidInput

pytest.importorskip("tokenizers", reason="tokenizers is not installed (extra encoders)")
CODE = """
import torch
from torch import nn

class Titles(nn.Module):
    width, max_tokens, tokenizer = 8, 20, "tokenizer.json"

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(68, self.width)

    def forward(self, token_ids, token_mask):
        return (self.table(token_ids) * token_mask[..., None].float()).sum(1)

class Shades(nn.Module):
    width, side = 3, 32

    def forward(self, pixels):
        return pixels.mean((2, 3))
"""
TITLE, IMAGE = "seen_here:Titles", "seen_here:Shades"


@pytest.fixture
def shop(tmp_path: Path) -> Iterator[Path]:
    """A shop's folder with a module of two encoders, which is nowhere else."""
    write_tokenizer(tmp_path)
    (tmp_path / "seen_here.py").write_text(CODE)
    _forget()
    yield tmp_path
    _forget()


def _forget() -> None:
    sys.modules.pop("seen_here", None)
    importlib.invalidate_caches()


def _changed(shop: Path, old: str, new: str) -> None:
    assert old in CODE
    (shop / "seen_here.py").write_text(CODE.replace(old, new))
    _forget()


def _feature(encoder: str) -> FeatureColumn:
    kind = "image" if encoder == IMAGE else "text"
    return FeatureColumn(name="title", kind=kind, encoder=encoder)


def _refusal(shop: Path, encoder: str) -> str:
    with pytest.raises(InvalidInput) as caught:
        find_source(_feature(encoder), shop)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_own_encoders_are_exported_and_encode(shop, tmp_path):
    texts = keep_encoder(find_source(_feature(TITLE), shop), tmp_path / "cache")
    vectors = texts.open(1).encode(["matte plum", "plum matte", "soft mask", "velvet " * 40, ""]).vectors
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), [1, 1, 1, 1, 0], atol=1e-5)
    np.testing.assert_allclose(vectors[0], vectors[1], atol=1e-6)
    assert np.abs(vectors[0] - vectors[2]).max() > 0.05
    pictures = keep_encoder(find_source(_feature(IMAGE), shop), tmp_path / "cache")
    pixels = np.broadcast_to(np.array([0.6, 0, 0.8], np.float32)[:, None, None], (3, 32, 32))
    np.testing.assert_allclose(pictures.open(1).of_pixels([pixels]), [[0.6, 0, 0.8]], atol=1e-5)


def test_its_code_its_weights_and_its_tokenizer_are_its_key(shop):
    digests = [find_source(_feature(TITLE), shop).digest]
    _forget()
    assert find_source(_feature(TITLE), shop).digest == digests[0], "drawn weights are drawn alike"
    _changed(shop, ".sum(1)", ".amax(1)")
    digests.append(find_source(_feature(TITLE), shop).digest)
    (shop / "weights").write_text("0.5")  # which no import statement names
    _changed(shop, "self.width)\n", "self.width).requires_grad_(False).mul_(float(WEIGHTS.read_text()))\n")
    code = (shop / "seen_here.py").read_text().replace(".mul_(", "; self.table.weight.mul_(")
    (shop / "seen_here.py").write_text(
        f"from pathlib import Path\nWEIGHTS = Path({str(shop / 'weights')!r})\n{code}"
    )
    digests.append(find_source(_feature(TITLE), shop).digest)
    (shop / "weights").write_text("0.25")
    _forget()
    digests.append(find_source(_feature(TITLE), shop).digest)
    path = shop / "tokenizer.json"
    path.write_text(path.read_text().replace('"lowercase": true', '"lowercase": false'))
    digests.append(find_source(_feature(TITLE), shop).digest)
    assert len(set(digests)) == 5


@pytest.mark.parametrize(
    ("encoder", "old", "new", "message"),
    [
        ("gone_from_here:Titles", "", "", "cannot import it (No module named 'gone_from_here'); give MODULE"),
        ("seen_here:Names", "", "", "cannot import it (module 'seen_here' has no attribute 'Names'); give"),
        (TITLE, "class Titles(nn", "class Titles((nn", "cannot import it ("),
        (TITLE, "super().__init__()", "raise OSError('no weights')", "Titles() fails: OSError: no weights"),
        (TITLE, "Titles(nn.Module)", "Titles(list)", "Titles() gives a Titles, not a torch.nn.Module"),
        (TITLE, "width, max_tokens, tokenizer = 8", "width, max_tokens, tokenizer = 0",
         "Titles.width is 0, and has to be a number from 1 to 8192; write it into the class: width = 128"),
        (IMAGE, "width, side =", "width, edge =",
         "Shades.side is None, and has to be a number from 32 to 512; write it into the class: side = 128"),
        (TITLE, '"tokenizer.json"', "None", "Titles.tokenizer is None, and has to name a tokenizer.json"),
        (TITLE, '"tokenizer.json"', '"gone.json"', "gone.json is missing"),
        (TITLE, '"tokenizer.json"', '"seen_here.py"', "seen_here.py is no tokenizer.json"),
        (TITLE, "forward(self, token_ids, token_mask)", "forward(self, ids, token_mask)",
         "forward(ids, token_mask) differs at token_ids; the contract wants token_ids [B, L] int64, "
         "token_mask [B, L] bool, in this order"),
        (IMAGE, "forward(self, pixels)", "forward(self, pictures)", "forward(pictures) differs at pixels"),
        (TITLE, ".sum(1)", ".sum(2)", "gives [3, 20] torch.float32 for text_embedding [B, V] float32; "
         "the contract wants [3, 8] float32"),
        (IMAGE, "(2, 3))", "(2, 3)).double()",
         "gives [3, 3] torch.float64 for image_embedding [B, V] float32"),
        (IMAGE, "return pixels.mean((2, 3))", "return [pixels]", "gives a list for image_embedding"),
        (TITLE, "Embedding(68,", "Embedding(60,", "forward fails on tensors of the contract: IndexError"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_one_exact_line(shop, encoder, old, new, message):
    if old:
        _changed(shop, old, new)
    said = _refusal(shop, encoder)
    assert said.startswith(f"the feature 'title': encoder {encoder!r}: ")
    assert message in said


def test_a_module_is_looked_for_in_the_shops_folder_and_the_current_one(shop, tmp_path, monkeypatch):
    assert f"importable from {shop} or {Path.cwd()}" in _refusal(shop, "gone_from_here:Titles")
    other = tmp_path / "empty"
    other.mkdir()
    monkeypatch.chdir(shop)
    assert find_source(_feature(IMAGE), other).own


def test_code_that_cannot_be_exported_is_refused_in_one_line(shop, tmp_path):
    _changed(shop, "pixels.mean((2, 3))", "pixels.mean((2, 3)) * (2 if pixels.sum() > 0 else 1)")
    with pytest.raises(InvalidInput) as caught:
        keep_encoder(find_source(_feature(IMAGE), shop), tmp_path / "cache")
    assert "encoder 'seen_here:Shades' cannot be exported as ONNX: " in str(caught.value)
    assert "\n" not in str(caught.value)
