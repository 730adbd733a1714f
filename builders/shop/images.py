"""Draws small pictures of the generated items: shade as colour, texture as surface, scene behind."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from ensemble.arrays import Array

SIDE = 48  # pixels
# One colour per shade of builders.shop.generate.SHADES, one background per scene (studio, vanity, outdoors).
SHADE_RGB = (
    (214, 176, 150),
    (226, 128, 150),
    (248, 120, 96),
    (190, 24, 40),
    (140, 20, 80),
    (88, 28, 92),
    (160, 104, 52),
    (225, 235, 240),
)
SCENE_RGB = (
    ((250, 250, 250), (225, 225, 230)),
    ((250, 226, 214), (196, 150, 140)),
    ((170, 210, 240), (110, 160, 90)),
)


def render_images(
    folder: Path,
    names: list[str],
    shade: Array,
    texture: Array,
    scene: Array,
    progress: Callable[[float], None],
) -> None:
    """Writes `folder`/images/NAME.png for every item; each name gives its own small variations."""
    from PIL import Image

    (folder / "images").mkdir()
    for at, name in enumerate(names):
        pixels = draw_item(int(shade[at]), int(texture[at]), int(scene[at]), np.random.default_rng(at))
        Image.fromarray(pixels).save(folder / "images" / f"{name}.png")
        if at % 200 == 0:
            progress(at / len(names))


def draw_item(shade: int, texture: int, scene: int, rng: np.random.Generator) -> Array:
    """Draws an ellipse of the shade before the scene's gradient: [SIDE, SIDE, 3] uint8."""
    y, x = np.mgrid[0:SIDE, 0:SIDE] / (SIDE - 1)
    top, bottom = (np.array(rgb, float) for rgb in SCENE_RGB[scene])
    picture = top + (bottom - top) * y[..., None]
    cx, cy = 0.5 + rng.uniform(-0.08, 0.08, 2)
    radius = rng.uniform(0.26, 0.36)
    inside = (((x - cx) / radius) ** 2 + ((y - cy) / (1.25 * radius)) ** 2) < 1
    surface = _surface(texture, x - cx, y - cy, rng)[..., None]
    colour = np.array(SHADE_RGB[shade], float) + rng.normal(0, 6, 3)
    picture = np.where(
        inside[..., None], colour * (1 + 0.25 * surface) + 60 * np.maximum(surface - 0.8, 0), picture
    )
    return np.clip(picture + rng.normal(0, 2, picture.shape), 0, 255).astype(np.uint8)


def _surface(texture: int, x: Array, y: Array, rng: np.random.Generator) -> Array:
    """Gives the brightness in [-1, 2] of matte, gloss, cream and powder, in generate.TEXTURES' order."""
    if texture == 0:
        return np.zeros_like(x)
    if texture == 1:
        return 2.0 * np.exp(-((x + 0.1) ** 2 + (y + 0.12) ** 2) / 0.006)
    if texture == 2:
        return 0.7 * np.sin(18 * (x + 0.6 * y) + rng.uniform(0, 6))
    return rng.normal(0, 0.8, x.shape).clip(-1, 1)
