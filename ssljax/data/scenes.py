"""Pictures of coloured shapes with exact captions, masks and keypoints, drawn on the fly: `Scenes`.

Sample i is a pure function of (seed, split, i), on any machine of one numpy and OpenCV. Everything that a method can
learn from is known, so the set tests representations, captions, segmentation and correspondence, and composition: some
combinations of shape, colour and place never occur in training (`held_out`) although each of their parts does.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

import cv2
import numpy as np

from ssljax.data.sources.base import Record, check_index

SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
COLORS = {
    "red": (215, 40, 40), "orange": (245, 140, 20), "yellow": (240, 220, 40), "green": (40, 160, 60),
    "cyan": (50, 205, 215), "blue": (40, 80, 215), "purple": (130, 50, 180), "pink": (245, 130, 190),
}  # fmt: skip
SIZES = {"small": 0.11, "medium": 0.155, "large": 0.2}  # radius / side of the picture
TEXTURES = ("plain", "striped", "dotted")
PLACES = ("top left", "top", "top right", "left", "middle", "right", "bottom left", "bottom", "bottom right")
CLASSES = tuple(f"{color} {shape}" for shape in SHAPES for color in COLORS)
"""Label = 8 * shape + color."""

_WHERE = (
    "in the top left", "at the top", "in the top right", "on the left", "in the middle", "on the right",
    "in the bottom left", "at the bottom", "in the bottom right",
)  # fmt: skip
_SUPER = 4  # drawn this much larger, then averaged: smooth edges
_SHIFT = 4  # fractional bits of OpenCV's coordinates


class Object(NamedTuple):
    """Indices into SHAPES, COLORS, SIZES, PLACES, TEXTURES."""

    shape: int
    color: int
    size: int
    place: int
    texture: int

    @property
    def label(self) -> int:
        return self.shape * len(COLORS) + self.color


def held_out(shape: int, color: int, place: int) -> bool:
    """True for the 72 of 432 combinations that training never shows: (shape + 2 color + place) mod 6 == 0.

    Each shape-colour pair is held out at one or two of nine places, so training shows every pair, every shape at every
    place, and every colour at every place.
    """
    return (shape + 2 * color + place) % 6 == 0


def caption(objects: Sequence[Object], template: int = 0) -> str:
    """`a small red circle in the top left and a large striped blue star at the bottom`. `template` picks one of
    `N_TEMPLATES` ways to say it; 0 is the plainest."""
    phrases = [_phrase(o) for o in objects]
    places = [_WHERE[o.place] for o in objects]
    plain = _join([f"{phrase} {place}" for phrase, place in zip(phrases, places, strict=True)])
    inverted = _join([f"{place} {phrase}" for phrase, place in zip(phrases, places, strict=True)])
    return _TEMPLATES[template % N_TEMPLATES].format(
        plain=plain, inverted=inverted, be="is" if len(objects) == 1 else "are"
    )


_TEMPLATES = (
    "{plain}",
    "a picture of {plain}",
    "there {be} {plain}",
    "{inverted}",
    "this shows {plain}",
    "we see {inverted}",
)
N_TEMPLATES = len(_TEMPLATES)


def _phrase(o: Object) -> str:
    words = ([] if o.texture == 0 else [TEXTURES[o.texture]]) + [list(COLORS)[o.color], SHAPES[o.shape]]
    size = list(SIZES)[o.size]
    return " ".join([*(["a"] if size == "medium" else ["a", size]), *words]).replace("a orange", "an orange")


def _join(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]


def prompts() -> tuple[tuple[str, ...], ...]:
    """For each of the 48 classes, in order, sentences that name it alone: the texts of a zero-shot classifier."""
    templates = ("{}", "a picture of {}", "this shows {}")
    names = [("an " if name.startswith("orange") else "a ") + name for name in CLASSES]
    return tuple(tuple(t.format(name) for t in templates) for name in names)


@dataclass(frozen=True)
class Scenes:
    """`count` scenes of `objects` shapes on a softly varying, noisy background.

    With `holdout`, split "train" shows only combinations that `held_out` lets through, "test" only the others, and
    "all" both; without it all splits show everything. Splits never share a picture.

    Record: `image` (uint8 `[size,size,3]`); `text`; `label` (class of the first object); `mask` (uint8 `[size,size]`: 0
    background, k the k-th object, the last drawn in front); `keypoints` (float32 `[objects,2]`: x, y of the centres in
    pixels, the corner of the picture being 0, 0); `attributes` (int32 `[objects,5]`: rows of `Object`); `key`.
    """

    count: int = 10_000
    split: Literal["train", "test", "all"] = "train"
    size: int = 32  # pixels
    seed: int = 0
    objects: int = 1  # 1..9, at different places
    holdout: bool = True
    paraphrase: bool = True  # False: always the plainest caption

    def __post_init__(self) -> None:
        if self.split not in ("train", "test", "all"):
            raise ValueError(f"there is no split {self.split!r}; choose 'train', 'test' or 'all'")
        if not 1 <= self.objects <= len(PLACES):
            raise ValueError(f"objects={self.objects}: a scene has 1 to {len(PLACES)} objects")
        if self.size < 16 or self.count < 1 or self.seed < 0:
            raise ValueError(
                f"size={self.size}, count={self.count}, seed={self.seed}: need size >= 16, count >= 1, seed >= 0"
            )

    @property
    def classes(self) -> tuple[str, ...]:
        return CLASSES

    @cached_property
    def _choices(self) -> tuple[tuple[tuple[int, int], ...], ...]:
        """(shape, colour) pairs that may stand at each place."""
        every = [(s, c) for s in range(len(SHAPES)) for c in range(len(COLORS))]
        free = self.split == "all" or not self.holdout
        wanted = self.split == "test"
        return tuple(
            tuple((s, c) for s, c in every if free or held_out(s, c, place) == wanted) for place in range(len(PLACES))
        )

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Record:
        i = check_index(index, self.count)
        rng = np.random.Generator(np.random.PCG64([self.seed, ("train", "test", "all").index(self.split), i]))
        objects = self._draw_objects(rng)
        image, mask, centres = render(objects, self.size, rng)
        template = int(rng.integers(N_TEMPLATES)) if self.paraphrase else 0
        return {
            "image": image,
            "text": caption(objects, template),
            "label": objects[0].label,
            "mask": mask,
            "keypoints": centres,
            "attributes": np.array(objects, np.int32),
            "key": f"scenes/{self.split}[{i}]",
        }

    def _draw_objects(self, rng: np.random.Generator) -> tuple[Object, ...]:
        objects = []
        for place in rng.permutation(len(PLACES))[: self.objects].tolist():
            pairs = self._choices[place]
            pair, size, texture = rng.integers((len(pairs), len(SIZES), len(TEXTURES))).tolist()
            shape, color = pairs[pair]
            objects.append(Object(shape, color, size, place, texture))
        return tuple(objects)


def render(objects: Sequence[Object], size: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draws objects: image uint8 `[size,size,3]`, mask uint8 `[size,size]`, centres float32 `[n,2]` (x, y in pixels).

    `rng` sets what captions leave out: background, noise, exact position, angle, tint and phase of the texture.
    """
    corners = rng.uniform(65, 200) + rng.uniform(-35, 35, (3, 3, 1)) + rng.uniform(-14, 14, (3, 3, 3))
    image: np.ndarray = cv2.resize(corners.astype(np.float32), (size, size), interpolation=cv2.INTER_CUBIC)
    mask = np.zeros((size, size), np.uint8)
    centres = np.zeros((len(objects), 2), np.float32)
    # Several objects are drawn smaller, so that neighbours hide little of each other.
    scale = 1.0 if len(objects) == 1 else 0.75
    for k, o in enumerate(objects):
        radius = list(SIZES.values())[o.size] * scale * rng.uniform(0.93, 1.07)
        cell = np.array([o.place % 3, o.place // 3])
        centre = np.clip(0.5 + 0.28 * (cell - 1) + rng.uniform(-0.035, 0.035, 2), radius + 0.01, 0.99 - radius)
        angle, pattern_angle, phase = rng.uniform((-0.3, 0.0, 0.0), (0.3, math.pi, 1.0)).tolist()
        tint = np.array(list(COLORS.values())[o.color], np.float32) + rng.uniform(-14, 14, 3).astype(np.float32)
        # Only the object's surroundings are drawn: rows and columns first..last of the picture, enlarged.
        first = np.maximum(np.floor((centre - radius) * size - 1), 0).astype(int)
        last = np.minimum(np.ceil((centre + radius) * size + 1), size).astype(int)
        window = np.s_[first[1] : last[1], first[0] : last[0]]
        middle, reach = (centre * size - first) * _SUPER, radius * size * _SUPER
        width, height = (last - first) * _SUPER
        shape = _shape_mask(SHAPES[o.shape], middle, reach, angle, height, width)
        alpha = _shrink(shape)
        image[window] += alpha * (tint - image[window])
        if o.texture:
            marks = _shrink(shape & _pattern(TEXTURES[o.texture], middle, reach, pattern_angle, phase, height, width))
            image[window] -= marks * (tint * np.float32(0.68))  # a darker tone of the same colour
        mask[window][alpha[..., 0] > 0.5] = k + 1
        centres[k] = centre * size
    image += rng.standard_normal(image.shape, dtype=np.float32) * np.float32(4)
    return np.clip(np.rint(image), 0, 255).astype(np.uint8), mask, centres


def _shrink(canvas: np.ndarray) -> np.ndarray:
    """An enlarged canvas of 0 and 255 as the covered share of each pixel, float32 `[h,w,1]` in 0..1."""
    size = (canvas.shape[1] // _SUPER, canvas.shape[0] // _SUPER)
    return cv2.resize(canvas, size, interpolation=cv2.INTER_AREA)[..., None] * np.float32(1 / 255)


def _fixed(points: np.ndarray) -> np.ndarray:
    """Pixel positions (0 = the picture's edge) in OpenCV's fixed-point, whose 0 is the first pixel's centre."""
    return np.rint((points - 0.5) * (1 << _SHIFT)).astype(np.int32)


def _polygon(name: str) -> np.ndarray:
    """Corners of a shape with circumradius 1 (float64 `[n,2]`, y down)."""
    if name == "cross":
        a, b = 0.34, 0.94
        return np.array(
            [(-a, -b), (a, -b), (a, -a), (b, -a), (b, a), (a, a), (a, b), (-a, b), (-a, a), (-b, a), (-b, -a), (-a, -a)]
        )
    turns, radii = {
        "square": (np.arange(4) / 4 + 1 / 8, np.full(4, 1.0)),
        "triangle": (np.arange(3) / 3, np.full(3, 1.0)),
        "star": (np.arange(10) / 10, np.where(np.arange(10) % 2, 0.42, 1.0)),
    }[name]
    return radii[:, None] * np.stack([np.sin(2 * np.pi * turns), -np.cos(2 * np.pi * turns)], 1)


_POLYGONS = {name: _polygon(name) for name in ("square", "triangle", "star", "cross")}


def _shape_mask(name: str, centre: np.ndarray, radius: float, angle: float, height: int, width: int) -> np.ndarray:
    canvas = np.zeros((height, width), np.uint8)
    if name in ("circle", "ring"):
        x, y = _fixed(centre).tolist()
        for r, value in ((0.9, 255), (0.48, 0))[: 2 if name == "ring" else 1]:
            cv2.circle(canvas, (x, y), round(radius * r * (1 << _SHIFT)), value, -1, cv2.LINE_8, _SHIFT)
    else:
        rotation = np.array([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]])
        points = centre + radius * _POLYGONS[name] @ rotation
        cv2.fillPoly(canvas, [_fixed(points)], 255, cv2.LINE_8, _SHIFT)
    return canvas


def _pattern(
    name: str, centre: np.ndarray, radius: float, angle: float, phase: float, height: int, width: int
) -> np.ndarray:
    """Stripes or dots, 255 on 0, with a period that follows the object's size."""
    period = max(radius * 0.62, 3.2 * _SUPER)  # not finer than about three pixels, or averaging wipes it out
    turn = 2 * math.pi / period
    c, s = np.float32(turn * math.cos(angle)), np.float32(turn * math.sin(angle))
    x = np.arange(width, dtype=np.float32) - np.float32(centre[0])
    y = np.arange(height, dtype=np.float32)[:, None] - np.float32(centre[1])
    wave = np.cos(c * x + s * y + np.float32(2 * math.pi * phase))
    if name == "dotted":
        wave += np.cos(c * y - s * x) - np.float32(0.55)
    return (wave > 0).astype(np.uint8) * np.uint8(255)
