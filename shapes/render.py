"""The renderer: a scene and a seed to a picture. Deterministic, antialiased, Pillow only."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw

from .captions import BACKGROUNDS, COLOURS, Scene

SIZE = 64  # pixels, height and width
RADII = {"small": (6.5, 8.5), "large": (12.5, 15.0), None: (9.0, 11.0)}  # pixels; None: two things, no size said
ANCHORS = {  # centre of a thing, in pixels (x, y), before jitter
    "at the top left": (18, 18),
    "at the top right": (46, 18),
    "at the bottom left": (18, 46),
    "at the bottom right": (46, 46),
    "in the centre": (32, 32),
}
PAIRS = {"to the left of": ((17, 32), (47, 32)), "above": ((32, 17), (32, 47))}
JITTER = 2.0  # pixels, each axis
_OVERSAMPLE = 8


def mask(shape: str, centre: tuple[float, float], radius: float, size: int = SIZE) -> np.ndarray:
    """How much of every pixel a shape covers: (size, size) float32 in [0, 1]. Centre and radius in pixels."""
    scale = _OVERSAMPLE
    canvas = Image.new("L", (size * scale, size * scale), 0)
    draw = ImageDraw.Draw(canvas)
    x, y, r = centre[0] * scale, centre[1] * scale, radius * scale

    def polygon(*points: tuple[float, float]) -> None:
        draw.polygon([(x + r * px, y + r * py) for px, py in points], fill=255)

    if shape == "circle":
        draw.ellipse((x - r, y - r, x + r, y + r), fill=255)
    elif shape == "ring":
        draw.ellipse((x - r, y - r, x + r, y + r), fill=255)
        draw.ellipse((x - 0.55 * r, y - 0.55 * r, x + 0.55 * r, y + 0.55 * r), fill=0)
    elif shape == "square":
        draw.rectangle((x - 0.88 * r, y - 0.88 * r, x + 0.88 * r, y + 0.88 * r), fill=255)
    elif shape == "cross":
        draw.rectangle((x - r, y - 0.32 * r, x + r, y + 0.32 * r), fill=255)
        draw.rectangle((x - 0.32 * r, y - r, x + 0.32 * r, y + r), fill=255)
    elif shape == "diamond":
        polygon((0, -1), (1, 0), (0, 1), (-1, 0))
    elif shape == "triangle":
        polygon((0, -1), (1, 0.85), (-1, 0.85))
    else:
        raise ValueError(f"unknown shape {shape!r}")
    return np.asarray(canvas.reduce(scale), np.float32) / 255


def render(scene: Scene, seed: int) -> Image.Image:
    """The picture of a scene: 64 x 64 RGB. The seed decides the jitter of place and size, and nothing else does."""
    rng = np.random.default_rng(seed)
    picture = np.empty((SIZE, SIZE, 3), np.float32)
    picture[:] = BACKGROUNDS[scene.background]
    anchors = [ANCHORS[scene.place]] if scene.place else PAIRS[str(scene.relation)]
    for thing, (x, y) in zip(scene.things, anchors, strict=True):
        dx, dy = rng.uniform(-JITTER, JITTER, 2)
        radius = rng.uniform(*RADII[scene.size])
        cover = mask(thing.shape, (x + dx, y + dy), radius)[..., None]
        picture = picture * (1 - cover) + cover * np.float32(COLOURS[thing.colour])
    return Image.fromarray(np.round(picture).astype(np.uint8))
