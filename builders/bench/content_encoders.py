"""Measures what 8 bits make of the encoders of texts and pictures: a table for BENCHMARKS.md.

    python -m builders.bench.content_encoders DATA_DIR --out DIR

The catalogue is DATA_DIR/mm_fashion_small; what is done and judged is what `build --compress` does
(builders/compress/contents.py). DIR keeps the encoders, their vectors and, as MODEL.int8.onnx, what came of
them.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np

from builders.bench.titles_and_pictures import kept_encoder, kept_vectors, pictures_of, products_of
from builders.compress.contents import Finding, SmallerEncoder, smaller
from builders.compress.recipe import ContentQuantize, Gate
from builders.content.features import WIDTH
from builders.content.samples import MOST
from builders.content.sources import EFFICIENTNET, MINILM
from ensemble.content.encoder import TOKENIZER
from ensemble.content.projection import fitted_projection
from ensemble.contract import IMAGE, TEXT
from ensemble.errors import PeregrineError
from ensemble.index.looks import unit_rows
from ensemble.json_text import json_text


def figures(source: Path, out: Path, model: str) -> dict[str, Any]:
    """Compresses one encoder, and gives its figures."""
    kind, name = {TEXT: ("text", MINILM), IMAGE: ("image", EFFICIENTNET)}[model]
    kept, rows = kept_encoder(kind, name, out / "encoded"), products_of(source)
    given = [row["title"].encode() for row in rows] if model == TEXT else pictures_of(source, rows)
    inputs, vectors = kept_vectors(kept, given)
    projection = fitted_projection(vectors, WIDTH)
    tokenizer = kept.folder / TOKENIZER if model == TEXT else None
    items = unit_rows(projection.values(vectors, np.ones(len(vectors), bool)))
    finding = Finding(kept.facts, tokenizer, projection, items, 0)
    drawn = np.random.default_rng(0).choice(len(inputs), min(MOST, len(inputs)), replace=False)
    samples = finding.read([inputs[at] for at in np.sort(drawn).tolist()])
    reference = (kept.folder / "model.onnx").read_bytes()
    found = smaller(finding, reference, samples, ContentQuantize(), Gate())
    assert isinstance(found, SmallerEncoder), found
    (out / f"{model}.int8.onnx").write_bytes(found.choice.model)
    return {
        "megabytes": [round(len(one) / 1e6, 1) for one in (reference, found.choice.model)],
        "milliseconds": {t.batch: [round(t.reference_ms, 2), round(t.ms, 2)] for t in found.timings},
        "gate": {row.figure: row.cells() for row in found.rows},
        "notes": found.choice.notes,
    }


def main() -> None:
    """Prints the figures as JSON."""
    parser = argparse.ArgumentParser(
        prog="builders.bench.content_encoders", description=__doc__.split("\n")[0]
    )
    parser.add_argument("data", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    asked = parser.parse_args()
    asked.out.mkdir(parents=True, exist_ok=True)
    print(json_text({model: figures(asked.data, asked.out, model) for model in (TEXT, IMAGE)}, indent=1))


if __name__ == "__main__":
    try:
        main()
    except PeregrineError as error:
        sys.exit(f"error: {error}")
