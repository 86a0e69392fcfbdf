"""The checker: reads a picture back without any network and says which attributes of a caption are right.

How it reads: the background is the palette colour nearest to the border's median; what differs from it falls into
connected blobs; each blob's colour is that of its core, and its shape is the one whose rendered mask, over a small
search of size, overlaps it best. Size and place follow from that mask.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image

from .captions import BACKGROUNDS, COLOURS, SHAPES, Scene
from .render import ANCHORS, SIZE, mask

_SMALLEST = 30.0  # pixels of cover: a blob below is noise
_LOWEST_OVERLAP = 0.72  # soft intersection over union below which a blob is no known shape
_SIZE_EDGE = 10.5  # pixels of radius between small and large


@dataclass(frozen=True)
class Seen:
    """One thing found in a picture; `shape` is None where no shape fits. Centre (x, y) and radius in pixels."""

    colour: str
    shape: str | None
    centre: tuple[float, float]
    radius: float


def look(picture: Image.Image) -> tuple[str, list[Seen]]:
    """The background's name and the things on it, largest first. `picture`: RGB, 64 x 64."""
    if picture.size != (SIZE, SIZE):
        raise ValueError(
            f"the checker reads {SIZE} x {SIZE} pictures, this one is {picture.size[0]} x {picture.size[1]}"
        )
    pixels = np.asarray(picture.convert("RGB"), np.float32)
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    background = _nearest(np.median(border, 0), BACKGROUNDS)
    distance = np.linalg.norm(pixels - np.median(border, 0), axis=-1)
    blobs = [_read(pixels, distance, blob) for blob in _blobs(distance > 50)]
    return background, sorted((seen for seen in blobs if seen), key=lambda seen: -seen.radius)


def check(picture: Image.Image, scene: Scene) -> dict[str, bool]:
    """For every attribute of the scene, whether the picture shows it. All False but the background if the number of
    things is wrong."""
    background, things = look(picture)
    right = dict.fromkeys(scene.attributes, False) | {"background": background == scene.background}
    if len(things) != len(scene.things):
        return right
    if scene.relation is None:
        thing = things[0]
        place = min(ANCHORS, key=lambda name: np.hypot(*np.subtract(ANCHORS[name], thing.centre)))
        return right | {
            "size": ("large" if thing.radius > _SIZE_EDGE else "small") == scene.size,
            "colour": thing.colour == scene.things[0].colour,
            "shape": thing.shape == scene.things[0].shape,
            "place": place == scene.place,
        }
    across, down = np.subtract(things[1].centre, things[0].centre)
    relation = "to the left of" if abs(across) > abs(down) else "above"
    first, second = things if max(across, down, key=abs) > 0 else things[::-1]
    return right | {
        "colour": first.colour == scene.things[0].colour,
        "shape": first.shape == scene.things[0].shape,
        "relation": relation == scene.relation,
        "second colour": second.colour == scene.things[1].colour,
        "second shape": second.shape == scene.things[1].shape,
    }


def accepts(picture: Image.Image, scene: Scene) -> bool:
    """True where every attribute of the caption is right."""
    return all(check(picture, scene).values())


def _nearest(colour: np.ndarray, palette: dict[str, tuple[int, int, int]]) -> str:
    return min(palette, key=lambda name: float(np.linalg.norm(colour - np.float32(palette[name]))))


def _blobs(foreground: np.ndarray) -> list[np.ndarray]:
    """Connected regions (4-neighbours) of a boolean picture, as boolean pictures."""
    left = {(int(y), int(x)) for y, x in np.argwhere(foreground)}
    found = []
    while left:
        blob = np.zeros_like(foreground)
        stack = [left.pop()]
        while stack:
            y, x = stack.pop()
            blob[y, x] = True
            near = {(y + 1, x), (y - 1, x), (y, x + 1), (y, x - 1)} & left
            left -= near
            stack.extend(near)
        found.append(blob)
    return found


def _read(pixels: np.ndarray, distance: np.ndarray, blob: np.ndarray) -> Seen | None:
    if blob.sum() < _SMALLEST:
        return None
    core = distance >= np.quantile(distance[blob], 0.5)
    colour = np.median(pixels[blob & core], 0)
    near = _grow(blob)
    cover = np.where(near, np.clip(distance / max(float(np.median(distance[blob & core])), 1.0), 0, 1), 0)
    rows, columns = np.flatnonzero((cover > 0.5).any(1)), np.flatnonzero((cover > 0.5).any(0))
    if not len(rows) or not len(columns):
        return None
    box = (float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1))
    shape, centre, radius, overlap = max((_fit(shape, cover, box) for shape in SHAPES), key=lambda fit: fit[3])
    return Seen(_nearest(colour, COLOURS), shape if overlap >= _LOWEST_OVERLAP else None, centre, radius)


def _grow(blob: np.ndarray) -> np.ndarray:
    """The blob and the pixels beside it, where antialiasing leaves a part of the cover."""
    grown = blob.copy()
    grown[1:] |= blob[:-1]
    grown[:-1] |= blob[1:]
    grown[:, 1:] |= blob[:, :-1]
    grown[:, :-1] |= blob[:, 1:]
    return grown


def _fit(
    shape: str, cover: np.ndarray, box: tuple[float, float, float, float]
) -> tuple[str, tuple[float, float], float, float]:
    """The best place and radius of one shape for a blob, and its soft intersection over union."""
    left, top, right, bottom = box
    half = (right - left + bottom - top) / 4
    radius = half / {"square": 0.88, "triangle": 0.9625}.get(shape, 1.0)
    drop = 0.075 * radius if shape == "triangle" else 0.0
    best: tuple[str, tuple[float, float], float, float] = (shape, (0.0, 0.0), radius, -1.0)
    for scale in (0.94, 1.0, 1.06):
        centre = ((left + right) / 2, (top + bottom) / 2 + drop)
        drawn = mask(shape, centre, radius * scale)
        overlap = float(np.minimum(drawn, cover).sum() / np.maximum(drawn, cover).sum())
        if overlap > best[3]:
            best = (shape, centre, radius * scale, overlap)
    return best
