"""The caption grammar of the closed world: scenes, their sentences, and which of them no training run may see.

Knows nothing of pixels or networks. A one-object caption names size, colour, shape, place and background:

    a large red circle at the top left on a navy background

a two-object caption names two coloured shapes, how they stand to each other, and the background:

    a pink ring to the left of a green square on a white background
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

import numpy as np

SHAPES = ("circle", "square", "triangle", "ring", "cross", "diamond")
SIZES = ("small", "large")
PLACES = ("at the top left", "at the top right", "at the bottom left", "at the bottom right", "in the centre")
RELATIONS = ("to the left of", "above")
COLOURS = {
    "red": (220, 30, 40),
    "orange": (250, 140, 20),
    "yellow": (250, 230, 40),
    "green": (40, 170, 60),
    "cyan": (60, 215, 225),
    "blue": (40, 90, 240),
    "purple": (140, 40, 180),
    "pink": (250, 140, 190),
}
BACKGROUNDS = {"black": (0, 0, 0), "white": (255, 255, 255), "grey": (128, 128, 128), "navy": (15, 20, 75)}

# Colour and shape never meet in training for these; together with one scene in ten they are the held-out set.
HELD_OUT_PAIRS = frozenset({("red", "ring"), ("green", "triangle"), ("blue", "cross"), ("yellow", "diamond")})


@dataclass(frozen=True)
class Thing:
    """One coloured shape."""

    colour: str
    shape: str

    def __str__(self) -> str:
        return f"{self.colour} {self.shape}"


@dataclass(frozen=True)
class Scene:
    """What a caption says. One thing with `size` and `place`, or two with `relation`."""

    things: tuple[Thing, ...]
    background: str
    size: str | None = None
    place: str | None = None
    relation: str | None = None

    @property
    def caption(self) -> str:
        where = f"on {_with_article(self.background + ' background')}"
        if self.relation is None:
            return f"{_with_article(f'{self.size} {self.things[0]}')} {self.place} {where}"
        first, second = (_with_article(str(thing)) for thing in self.things)
        return f"{first} {self.relation} {second} {where}"

    @property
    def attributes(self) -> dict[str, str]:
        """Everything the caption promises, by name; the checker answers with the same names."""
        if self.relation is None:
            thing = self.things[0]
            named = {"size": self.size, "colour": thing.colour, "shape": thing.shape, "place": self.place}
        else:
            first, second = self.things
            named = {
                "colour": first.colour,
                "shape": first.shape,
                "relation": self.relation,
                "second colour": second.colour,
                "second shape": second.shape,
            }
        return {name: str(value) for name, value in named.items()} | {"background": self.background}

    @property
    def has_held_out_pair(self) -> bool:
        return any((thing.colour, thing.shape) in HELD_OUT_PAIRS for thing in self.things)

    @property
    def held_out(self) -> bool:
        """True for every scene that training must not see: a held-out pair, or one caption in ten by its hash."""
        return self.has_held_out_pair or hashlib.sha256(self.caption.encode()).digest()[0] < 26


def _with_article(words: str) -> str:
    return f"an {words}" if words[0] in "aeiou" else f"a {words}"


_THING = rf"an? ({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})"
_WHERE = rf"on an? ({'|'.join(BACKGROUNDS)}) background"
_ONE = re.compile(rf"an? ({'|'.join(SIZES)}) ({'|'.join(COLOURS)}) ({'|'.join(SHAPES)}) ({'|'.join(PLACES)}) {_WHERE}")
_TWO = re.compile(rf"{_THING} ({'|'.join(RELATIONS)}) {_THING} {_WHERE}")


def parse(caption: str) -> Scene:
    """The scene a caption describes.

    Raises
    ------
    ValueError
        If the sentence is not one of the grammar; the message shows one that is.
    """
    text = " ".join(caption.lower().split()).rstrip(".")
    if one := _ONE.fullmatch(text):
        size, colour, shape, place, background = one.groups()
        return Scene((Thing(colour, shape),), background, size=size, place=place)
    if two := _TWO.fullmatch(text):
        colour, shape, relation, second_colour, second_shape, background = two.groups()
        return Scene((Thing(colour, shape), Thing(second_colour, second_shape)), background, relation=relation)
    raise ValueError(f"not a caption of this world: {caption!r}; one is {next(scenes()).caption!r}")


def scenes() -> Iterator[Scene]:
    """Every scene of the world: 1,920 with one thing, 18,048 with two different ones."""
    things = [Thing(colour, shape) for colour, shape in product(COLOURS, SHAPES)]
    for size, thing, place, background in product(SIZES, things, PLACES, BACKGROUNDS):
        yield Scene((thing,), background, size=size, place=place)
    for first, relation, second, background in product(things, RELATIONS, things, BACKGROUNDS):
        if first != second:
            yield Scene((first, second), background, relation=relation)


def training_scenes(count: int, seed: int) -> list[Scene]:
    """`count` scenes drawn from those that are not held out, half with one thing and half with two."""
    return _draw([scene for scene in scenes() if not scene.held_out], count, seed)


def held_out_scenes(count: int, seed: int) -> list[Scene]:
    """`count` held-out scenes: half with one thing, half with two; half of each with a pair never trained on."""
    held_out = [scene for scene in scenes() if scene.held_out]
    with_pair = _draw([scene for scene in held_out if scene.has_held_out_pair], count - count // 2, seed)
    without = _draw([scene for scene in held_out if not scene.has_held_out_pair], count // 2, seed)
    return with_pair + without


def _draw(pool: list[Scene], count: int, seed: int) -> list[Scene]:
    rng = np.random.default_rng(seed)
    ones = [scene for scene in pool if len(scene.things) == 1]
    twos = [scene for scene in pool if len(scene.things) == 2]
    half = count // 2
    drawn = [ones[i] for i in rng.integers(len(ones), size=half)] + [
        twos[i] for i in rng.integers(len(twos), size=count - half)
    ]
    return [drawn[i] for i in rng.permutation(count)]


def vary_one(scene: Scene, rng: np.random.Generator) -> tuple[str, Scene]:
    """The scene with one attribute changed to another value, and that attribute's name."""
    name = str(rng.choice(list(scene.attributes)))
    choices = {
        "colour": tuple(COLOURS),
        "shape": SHAPES,
        "background": tuple(BACKGROUNDS),
        "size": SIZES,
        "place": PLACES,
        "relation": RELATIONS,
    }[name.removeprefix("second ")]
    value = str(rng.choice([choice for choice in choices if choice != scene.attributes[name]]))
    changed = scene.attributes | {name: value}
    things = [Thing(changed["colour"], changed["shape"])]
    if scene.relation is not None:
        things.append(Thing(changed["second colour"], changed["second shape"]))
    return name, Scene(
        tuple(things),
        changed["background"],
        size=changed.get("size"),
        place=changed.get("place"),
        relation=changed.get("relation"),
    )
