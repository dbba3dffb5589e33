"""Scenes and their pictures: coloured shapes on a 6 x 6 board with a noisy, blotchy background. Needs numpy only.

The order of the calls on `rng` is part of the data: the fixed evaluation set is whatever comes out of its seed.
"""
from typing import NamedTuple

import numpy as np

from vocabulary import CELLS, COLOURS, SHAPES

IMAGE = 96  # pixels per side
PATCH = 8  # pixels per side of what becomes one visual token
PATCHES = IMAGE // PATCH  # 12 patches per side
VISUAL_TOKENS = PATCHES * PATCHES  # 144
CELL = IMAGE // CELLS  # pixels per side of a cell: 2 x 2 patches

RGB = np.array(
    [
        (0.90, 0.12, 0.12),  # red
        (0.10, 0.75, 0.15),  # green
        (0.15, 0.25, 0.95),  # blue
        (0.95, 0.90, 0.10),  # yellow
        (0.90, 0.15, 0.85),  # magenta
        (0.10, 0.85, 0.90),  # cyan
        (0.98, 0.55, 0.05),  # orange
        (0.97, 0.97, 0.97),  # white
    ],
    np.float32,
)


class Object(NamedTuple):
    """One thing on the board. All four are indices; a colour occurs once per scene."""

    colour: int
    shape: int
    row: int
    column: int


def sample_scene(rng, fewest, most):
    """Objects in distinct cells, sorted by colour. In 60 % of the larger scenes half of them share one shape."""
    count = int(rng.integers(fewest, most + 1))
    cells = rng.permutation(CELLS * CELLS)[:count]
    colours = np.sort(rng.permutation(len(COLOURS))[:count])
    shapes = rng.integers(0, len(SHAPES), count)
    if count >= 3 and rng.random() < 0.6:
        shapes[rng.permutation(count)[: max(2, count // 2)]] = shapes[0]
    return [
        Object(int(colour), int(shape), int(cell // CELLS), int(cell % CELLS))
        for colour, shape, cell in zip(colours, shapes, cells)
    ]


def sample_scenes(rng, scenes, fewest, most):
    """Returns the scenes (a list of objects each) and their images, float32 [scenes, 96, 96, 3] in 0..1."""
    sampled = [sample_scene(rng, fewest, most) for _ in range(scenes)]
    return sampled, _render(rng, sampled)


def to_bytes(images):
    return np.rint(images * 255).astype(np.uint8)


def from_bytes(images):
    return images.astype(np.float32) / np.float32(255)


def to_patches(images):
    """Float images [n, 96, 96, 3] -> [n, 144, 192]: raster order of patches; inside one (y, x, channel); centred."""
    n = len(images)
    grid = images.reshape(n, PATCHES, PATCH, PATCHES, PATCH, 3).transpose(0, 1, 3, 2, 4, 5)
    return (grid.reshape(n, VISUAL_TOKENS, PATCH * PATCH * 3) - np.float32(0.4)) * np.float32(3)


def _uniform(rng, low, high, *shape):
    return rng.uniform(low, high, shape).astype(np.float32)


def _backgrounds(rng, n):
    """A colour, a gradient over it, and one blotch per patch."""
    line = np.linspace(-1, 1, IMAGE, dtype=np.float32)
    base = _uniform(rng, 0.15, 0.45, n, 1, 1, 3) + _uniform(rng, -0.05, 0.05, n, 1, 1, 3)
    down = _uniform(rng, -0.12, 0.12, n, 1, 1, 3)
    across = _uniform(rng, -0.12, 0.12, n, 1, 1, 3)
    images = base + down * line[None, :, None, None] + across * line[None, None, :, None]
    blotches = rng.normal(0, 0.05, (n, PATCHES, PATCHES, 3)).astype(np.float32)
    return images + blotches.repeat(PATCH, 1).repeat(PATCH, 2)


def _shape_masks(rng, shapes):
    """Which pixels of its cell an object covers, with jitter of size and place. bool [objects, 16, 16]."""
    n = len(shapes)
    y, x = np.mgrid[0:CELL, 0:CELL].astype(np.float32)
    middle = (CELL - 1) / 2
    radius = _uniform(rng, 5.0, 6.5, n)
    room = middle - radius
    dy = y[None] - (middle + _uniform(rng, -1, 1, n) * room)[:, None, None]
    dx = x[None] - (middle + _uniform(rng, -1, 1, n) * room)[:, None, None]
    r = radius[:, None, None]
    distance = np.sqrt(dy * dy + dx * dx)
    arm = r * 0.36

    masks = {
        "square": (np.abs(dy) <= r * 0.9) & (np.abs(dx) <= r * 0.9),
        "circle": distance <= r,
        "triangle": (dy >= -r) & (dy <= r) & (np.abs(dx) <= (dy + r) * 0.5 + 0.3),
        "plus": ((np.abs(dy) <= arm) & (np.abs(dx) <= r)) | ((np.abs(dx) <= arm) & (np.abs(dy) <= r)),
        "ring": (distance <= r) & (distance >= r * 0.55),
    }
    return np.stack([masks[SHAPES[shape]][i] for i, shape in enumerate(shapes)])


def _render(rng, scenes):
    placed = [(i, thing) for i, scene in enumerate(scenes) for thing in scene]
    images = _backgrounds(rng, len(scenes))
    masks = _shape_masks(rng, [thing.shape for _, thing in placed])
    colours = RGB[[thing.colour for _, thing in placed]] * _uniform(rng, 0.85, 1.0, len(placed), 1)
    for (i, thing), mask, colour in zip(placed, masks, colours):
        top, left = thing.row * CELL, thing.column * CELL
        images[i, top : top + CELL, left : left + CELL][mask] = colour
    images = images + rng.standard_normal(images.shape, dtype=np.float32) * 0.05
    return np.clip(images, 0, 1, out=images)
