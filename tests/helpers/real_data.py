"""Finds the real data that lies beside the source tree on some machines, and is no part of the product."""

from __future__ import annotations

from pathlib import Path

import pytest

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"


def real_data(name: str) -> Path:
    """Gives the folder that holds the folder `name` of real data; skips the test where it is not there."""
    if not (DATA / name).is_dir():
        pytest.skip(f"real data: {DATA / name} is not there")
    return DATA
