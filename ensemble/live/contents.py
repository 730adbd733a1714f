"""Encodes the texts and pictures of items that come while they are served, as the build did the others."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np

from ensemble.arrays import Array
from ensemble.content.encoder import EMPTY, ContentEncoder, open_content_encoder
from ensemble.content.pictures import PictureFaultError, pixels_from_picture
from ensemble.content.projection import PROJECTIONS, Projection, read_projections
from ensemble.contract import IMAGE, TEXT
from ensemble.live.catalogue import log_folder
from ensemble.live.pictures import is_logged, read_picture
from ensemble.release.release import Release
from ensemble.schema import Feature


class LiveContents:
    """Holds a release's encoders, each opened when the first item needs it."""

    def __init__(self, release: Release) -> None:
        self.release = release
        self._encoders: dict[str, ContentEncoder] = {}

    @cached_property
    def _projections(self) -> dict[str, Projection]:
        """Reads what makes an item's columns of a content vector."""
        self.release.verify_data(PROJECTIONS)
        return read_projections(self.release.path / PROJECTIONS)

    def _encoder(self, model: str) -> ContentEncoder:
        """Opens an encoder of the release."""
        if model not in self._encoders:
            self._encoders[model] = open_content_encoder(self.release, self.release.model(model))
        return self._encoders[model]

    def encoded(self, feature: Feature, said: Sequence[Any]) -> tuple[Array, dict[int, tuple[str, str]]]:
        """Encodes values [n] of a feature's column as the log has them: columns [n, width] float32, and what
        is wrong with those that have none, (kind, text) by place."""
        if not said:
            return np.zeros((0, feature.width), np.float32), {}
        encoder = self._encoder(feature.encoder)
        faults: dict[int, tuple[str, str]] = {}
        if feature.encoder == TEXT:
            inputs: Any = [value if isinstance(value, str) else "" for value in said]
            wrong = ((at, type(value).__name__) for at, value in enumerate(said))
            faults = {
                at: ("another type", f"must be text, got {name}")
                for at, name in wrong
                if name not in ("str", "NoneType")
            }
        else:
            inputs = [self._picture(value) for value in said]
            faults = {at: (EMPTY, "has no picture") for at, value in enumerate(said) if not value}
            foreign = "is a file of another shop's folder: pictures come with a change as bytes"
            faults |= {
                at: ("foreign", foreign) for at, value in enumerate(said) if value and not is_logged(value)
            }
        encoded = encoder.encode(inputs)
        faults = {**encoded.faults, **faults}
        present = np.ones(len(said), bool)
        present[list(faults)] = False
        return self._projections[feature.name].values(encoded.vectors, present), faults

    def check_picture(self, data: bytes) -> None:
        """Raises ValueError that says what is wrong with a picture, before it is kept."""
        try:
            pixels_from_picture(data, self._encoder(IMAGE).facts.side)
        except PictureFaultError as fault:
            raise ValueError(str(fault)) from None

    def _picture(self, value: Any) -> bytes:
        """Reads the picture that the log names; empty where there is none."""
        return read_picture(log_folder(self.release.home), value) if is_logged(value) else b""
