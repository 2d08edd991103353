"""``streets``: small street scenes drawn by a seeded generator, the embedded default that needs no download.

A scene is a flat ground seen by a camera that looks along a street: walls of buildings in perspective, then
fences and hedges, then trees, poles, signs and road users, painted from far to near. It is drawn at three
times the size; the image is the average of each 3×3 block and the label its centre, so that poles and
markings are one or two pixels wide. What makes it hard is meant: materials are shared between classes (brick
houses and brick-red cars, olive hedges and olive fences, gray roads and pavements), light and shadow change
them, some classes are thin or rare, and dusk is three times as frequent in the test split. Ignored (255): the
bonnet of the camera's own car, and a band around some road users.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from PIL import Image
from pydantic import NonNegativeInt

from pipelines.config import Model, Positive, Size
from pipelines.datasets.folder import SPLITS, Meta
from pipelines.engine.seeds import derive

IGNORE = 255
SKY, BUILDING, ROAD, MARKING, PAVEMENT, VEGETATION, FENCE, POLE, SIGN, CAR, PEDESTRIAN, CYCLIST = range(12)
# Of each class: its colour in figures, and the contrast of its texture, fine (a pixel) and coarse (patches).
CLASSES = {
    "sky": ((70, 130, 180), (0.01, 0.03)),
    "building": ((128, 64, 0), (0.06, 0.10)),
    "road": ((128, 64, 128), (0.06, 0.10)),
    "lane marking": ((255, 255, 255), (0.08, 0.18)),
    "pavement": ((244, 35, 232), (0.08, 0.10)),
    "vegetation": ((107, 142, 35), (0.26, 0.24)),
    "fence": ((190, 153, 153), (0.14, 0.16)),
    "pole": ((153, 153, 153), (0.10, 0.08)),
    "sign": ((220, 220, 0), (0.10, 0.08)),
    "car": ((0, 0, 142), (0.05, 0.08)),
    "pedestrian": ((220, 20, 60), (0.12, 0.12)),
    "cyclist": ((0, 200, 200), (0.12, 0.12)),
}
META = Meta(
    name="streets",
    classes=tuple(CLASSES),
    palette=tuple(colour for colour, _ in CLASSES.values()),
    ignore_index=IGNORE,
)
TEXTURE = np.zeros((256, 2), np.float32)  # by label
TEXTURE[: len(CLASSES)] = [texture for _, texture in CLASSES.values()]

BANDS = 0.6  # share of the objects with a band of ignored pixels
SPREAD = 0.12  # of a material around its base colour
FINE = 3  # drawn pixels per pixel and axis; odd, so that a block has a centre
CAMERA = 1.8  # metres above the ground
DUSK = {"train": 0.12, "val": 0.12, "test": 0.36}  # share of the images

# Base colours by material. Several classes draw from the same ones: colour alone must not tell them apart.
BRICK, BEIGE, CONCRETE, SLATE, WHITE, STEEL, OLIVE, BROWN, LEAF, NAVY, RED, YELLOW, BLACK = (
    np.array(rgb, np.float32) / 255
    for rgb in (
        (142, 74, 58),
        (186, 164, 132),
        (142, 140, 136),
        (84, 86, 92),
        (214, 212, 206),
        (108, 126, 148),
        (98, 104, 60),
        (104, 80, 58),
        (72, 106, 50),
        (52, 64, 104),
        (176, 44, 40),
        (204, 170, 60),
        (38, 38, 42),
    )
)
MATERIALS = {
    BUILDING: (BRICK, BEIGE, CONCRETE, SLATE, WHITE, STEEL, OLIVE, BROWN),
    VEGETATION: (LEAF, LEAF, OLIVE, OLIVE, BROWN),
    FENCE: (OLIVE, BROWN, CONCRETE, SLATE, LEAF, WHITE),
    POLE: (SLATE, CONCRETE, BROWN, STEEL),
    SIGN: (RED, NAVY, WHITE, YELLOW, STEEL, LEAF),
    CAR: (BRICK, BEIGE, SLATE, WHITE, STEEL, NAVY, RED, BLACK, CONCRETE, OLIVE),
    PEDESTRIAN: (BRICK, NAVY, BLACK, SLATE, BEIGE, OLIVE, RED, BROWN, WHITE),
}

ABOUT = "generated street scenes, a test of the pipeline: they say little about real images"
NEEDS = "nothing, it is generated"
GIGABYTES = 0.0  # to fetch


class Config(Model):
    """``benchmarks.<name>.data``: ``size`` (height, width), images per split, and the seed of the scenes."""

    dataset: Literal["streets"]
    size: Size
    train: Positive
    val: Positive
    test: Positive
    seed: NonNegativeInt


def meta(config: Config) -> Meta:
    return META


def prepare(config: Config, target: Path, mirror: Path | None) -> None:
    """Draw the scenes into ``target``. Nothing is fetched: ``mirror`` is not used."""
    for split in SPLITS:
        (target / split).mkdir(parents=True)
        (target / f"{split}annot").mkdir()
        samples = [
            (f"{split}/{index:05d}.png", f"{split}annot/{index:05d}.png")
            for index in range(getattr(config, split))
        ]
        for index, paths in enumerate(samples):
            for path, array in zip(paths, scene(config.size, config.seed, split, index), strict=True):
                Image.fromarray(array).save(target / path)
        (target / f"{split}.txt").write_text(
            "".join(f"{image} {label}\n" for image, label in samples), encoding="utf-8"
        )


def scene(size: tuple[int, int], seed: int, split: str, index: int) -> tuple[np.ndarray, np.ndarray]:
    """One image (H, W, 3) uint8 and its labels (H, W) uint8: a pure function of the arguments."""
    rng = np.random.Generator(np.random.PCG64(derive(seed, "streets", split, index)))
    view = _View.draw(rng, size)
    light = _Light.draw(rng, DUSK[split])
    canvas = _Canvas(view, light)
    street = _Street.draw(rng)
    _sky(canvas, rng)
    walls = {side: _segments(rng, street.built) for side in (-1, 1)}
    _ground(canvas, rng, street, walls)
    _walls(canvas, rng, street, walls)
    _borders(canvas, rng, street)
    _objects(canvas, rng, street)
    _bonnet(canvas, rng)
    return canvas.finish(rng)


class _View(NamedTuple):
    """The camera, in drawn pixels. A ground point at depth z lies ``scale(z)·CAMERA`` below the horizon."""

    height: int
    width: int
    horizon: float
    centre: float  # column of the vanishing point
    focal: float

    @classmethod
    def draw(cls, rng: np.random.Generator, size: tuple[int, int]) -> _View:
        height, width = size[0] * FINE, size[1] * FINE
        horizon, centre = height * rng.uniform(0.38, 0.54), width * rng.uniform(0.3, 0.7)
        return cls(height, width, horizon, centre, height * rng.uniform(1.05, 1.4))

    def scale(self, z: float) -> float:
        """Pixels per metre at depth z."""
        return self.focal / z

    def point(self, x: float, up: float, z: float) -> tuple[float, float]:
        """Column and row of a point: x metres to the right, ``up`` above the ground, at depth z."""
        return self.centre + x * self.scale(z), self.horizon + (CAMERA - up) * self.scale(z)


class _Light(NamedTuple):
    """The light of a scene: its colour, that of the sky and the haze, the side of the sun, and how hard
    shadows are."""

    dusk: bool
    colour: np.ndarray
    zenith: np.ndarray
    haze: np.ndarray
    haze_depth: float  # metres to half haze
    sun: int
    shadow: float
    noise: float

    @classmethod
    def draw(cls, rng: np.random.Generator, dusk_share: float) -> _Light:
        dusk, overcast = bool(rng.random() < dusk_share), bool(rng.random() < 0.4)
        tint = np.array([rng.uniform(0.92, 1.1), 1.0, rng.uniform(0.88, 1.08)], np.float32)
        if dusk:
            level, sky = rng.uniform(0.38, 0.58), np.array([0.30, 0.34, 0.46]) * rng.uniform(0.6, 1.0)
            haze = np.array([0.62, 0.46, 0.40]) * rng.uniform(0.5, 1.0)
            tint = tint * np.array([0.9, 0.95, 1.15], np.float32)
        elif overcast:
            level, sky = rng.uniform(0.7, 0.95), np.full(3, rng.uniform(0.68, 0.92))
            haze = sky * rng.uniform(0.9, 1.05)
        else:
            level, sky = rng.uniform(0.85, 1.2), np.array([0.40, 0.58, 0.84]) * rng.uniform(0.8, 1.1)
            haze = np.array([0.78, 0.82, 0.88]) * rng.uniform(0.9, 1.1)
        return cls(
            dusk,
            (level * tint).astype(np.float32),
            sky.astype(np.float32),
            haze.astype(np.float32),
            rng.uniform(60, 250),
            int(rng.choice((-1, 1))),
            1.0 if overcast or dusk else rng.uniform(0.45, 0.7),
            rng.uniform(0.02, 0.04) if dusk else rng.uniform(0.008, 0.025),
        )


class _Street(NamedTuple):
    """The cross-section of a street, in metres from its middle, and how it is lived in."""

    offset: float  # of the camera from the middle
    road: float
    pavement: float
    wall: float
    built: float  # share of the walls that are buildings
    busy: float

    @classmethod
    def draw(cls, rng: np.random.Generator) -> _Street:
        road = rng.uniform(2.8, 4.6)
        pavement = road + rng.uniform(1.4, 3.2)
        wall = pavement + rng.uniform(0.2, 4.0)
        return cls(rng.uniform(0.2, 1.8), road, pavement, wall, rng.uniform(0.3, 0.95), rng.uniform(0.5, 1.5))


class _Segment(NamedTuple):
    """A stretch of the wall along one side of a street."""

    near: float
    far: float
    building: bool
    height: float
    colour: np.ndarray


class _Canvas:
    """Colours, labels and objects of a scene, painted in order; ``finish`` makes the image and its labels of
    them."""

    def __init__(self, view: _View, light: _Light) -> None:
        self.view, self.light = view, light
        shape = (view.height, view.width)
        self.colour = np.zeros((*shape, 3), np.float32)
        self.label = np.full(shape, SKY, np.uint8)
        self.item = np.zeros(
            shape, np.int16
        )  # number of the object that a band of ignored pixels surrounds, or 0
        self.items = 0

    def lit(self, colour: np.ndarray, z: float | np.ndarray = 0.0, gain: float = 1.0) -> np.ndarray:
        """A material as it looks under the light of the scene, in the haze of depth z."""
        haze = np.asarray(z / (z + self.light.haze_depth), np.float32)[..., None]
        return colour * self.light.colour * np.float32(gain) * (1 - haze) + self.light.haze * haze

    def box(self, left: float, top: float, right: float, bottom: float) -> tuple[slice, slice]:
        """The drawn pixels of a rectangle, at least one wide and high, cut to the canvas."""
        x0, y0 = round(left), round(top)
        x1, y1 = max(round(right), x0 + 1), max(round(bottom), y0 + 1)
        return slice(max(y0, 0), max(y1, 0)), slice(max(x0, 0), max(x1, 0))

    def paint(
        self, box: tuple[slice, slice], mask: np.ndarray | bool, label: int, colour: np.ndarray, item: int = 0
    ) -> None:
        """Paint ``mask`` within ``box``; ``colour`` is one, or one per pixel of the box."""
        where = ... if mask is True else mask
        self.label[box][where] = label
        self.item[box][where] = item
        self.colour[box][where] = colour[where] if colour.ndim == 3 else colour

    def rectangle(
        self,
        left: float,
        top: float,
        right: float,
        bottom: float,
        label: int,
        colour: np.ndarray,
        item: int = 0,
    ) -> None:
        self.paint(self.box(left, top, right, bottom), True, label, colour, item)

    def grid(self, box: tuple[slice, slice]) -> tuple[np.ndarray, np.ndarray]:
        """Rows (h, 1) and columns (1, w) of the pixel centres of a box."""
        rows = np.arange(box[0].start + 0.5, min(box[0].stop, self.view.height))
        columns = np.arange(box[1].start + 0.5, min(box[1].stop, self.view.width))
        return rows[:, None], columns

    def ellipse(
        self,
        x: float,
        y: float,
        rx: float,
        ry: float,
        label: int,
        colour: np.ndarray,
        item: int = 0,
        hole: float = 0.0,
    ) -> None:
        """An ellipse, or with a ``hole`` (share of the radius) a ring."""
        box = self.box(x - rx, y - ry, x + rx, y + ry)
        rows, columns = self.grid(box)
        radius = ((columns - x) / max(rx, 0.5)) ** 2 + ((rows - y) / max(ry, 0.5)) ** 2
        self.paint(box, (radius <= 1) & (radius >= hole**2), label, colour, item)

    def trapezium(
        self,
        x: float,
        top: float,
        bottom: float,
        above: float,
        below: float,
        label: int,
        colour: np.ndarray,
        item: int,
    ) -> None:
        """A trapezium around column x, ``above`` wide at its top and ``below`` at its bottom."""
        widest = max(above, below) / 2
        box = self.box(x - widest, top, x + widest, bottom)
        rows, columns = self.grid(box)
        half = (above + (below - above) * (rows - top) / max(bottom - top, 1.0)) / 2
        self.paint(box, np.abs(columns - x) <= half, label, colour, item)

    def new_item(self, rng: np.random.Generator) -> int:
        """A number for the next object if it is to get a band of ignored pixels, else 0."""
        self.items += 1
        return self.items if rng.random() < BANDS else 0

    def finish(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Texture, sensor and reduction to the final size: image (H, W, 3) uint8 and labels (H, W) uint8."""
        height, width = self.view.height // FINE, self.view.width // FINE
        colour = self.colour.reshape(height, FINE, width, FINE, 3).mean((1, 3), dtype=np.float32)
        label = self.label[FINE // 2 :: FINE, FINE // 2 :: FINE].copy()
        item = self.item[FINE // 2 :: FINE, FINE // 2 :: FINE]

        fine = rng.random((height, width), np.float32) + rng.random((height, width), np.float32) - 1
        coarse = _smooth(rng, height, width, 6)
        amount = TEXTURE[label]
        colour *= (1 + amount[..., 0] * 2 * fine + amount[..., 1] * 2 * coarse)[..., None]
        rows, columns = np.mgrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j]
        colour *= (1 - rng.uniform(0, 0.2) * (rows**2 + columns**2)).astype(np.float32)[..., None]
        noise = rng.random((3, height, width, 3), np.float32).sum(0) - 1.5
        colour = np.clip(
            colour * np.float32(rng.uniform(0.85, 1.15)) + 2 * np.float32(self.light.noise) * noise, 0, 1
        )

        padded = np.pad(item, 1)
        windows = [padded[y : y + height, x : x + width] for y in range(3) for x in range(3)]
        largest = np.maximum.reduce(windows)
        label[(largest > 0) & (largest != item) & (label != POLE) & (label != SIGN)] = IGNORE
        return np.rint(colour * 255).astype(np.uint8), label


class _Brush(NamedTuple):
    """Paints an object that stands on the ground: its shapes are in metres, to the right of column ``x`` and
    above row ``foot``."""

    canvas: _Canvas
    x: float
    foot: float
    scale: float  # pixels per metre
    label: int
    item: int = 0

    @classmethod
    def at(cls, canvas: _Canvas, across: float, z: float, label: int, item: int = 0) -> _Brush:
        return cls(canvas, *canvas.view.point(across, 0.0, z), canvas.view.scale(z), label, item)

    def rectangle(self, left: float, right: float, low: float, high: float, colour: np.ndarray) -> None:
        across = (self.x + left * self.scale, self.x + right * self.scale)
        top, bottom = self.foot - high * self.scale, self.foot - low * self.scale
        self.canvas.rectangle(across[0], top, across[1], bottom, self.label, colour, self.item)

    def ellipse(
        self, x: float, up: float, rx: float, ry: float, colour: np.ndarray, hole: float = 0.0
    ) -> None:
        middle = (self.x + x * self.scale, self.foot - up * self.scale)
        radii = (rx * self.scale, ry * self.scale)
        self.canvas.ellipse(*middle, *radii, self.label, colour, self.item, hole)

    def trapezium(
        self, x: float, low: float, high: float, above: float, below: float, colour: np.ndarray
    ) -> None:
        rows = (self.foot - high * self.scale, self.foot - low * self.scale)
        wide = (above * self.scale, below * self.scale)
        self.canvas.trapezium(self.x + x * self.scale, *rows, *wide, self.label, colour, self.item)


def _smooth(rng: np.random.Generator, height: int, width: int, cell: int) -> np.ndarray:
    """Smooth noise (height, width) in [−0.5, 0.5]: random values every ``cell`` pixels, bilinear between
    them."""
    values = rng.random((height // cell + 2, width // cell + 2), np.float32) - np.float32(0.5)
    for axis, length in ((0, height), (1, width)):
        place = np.arange(length) / cell
        low = place.astype(int)
        share = (place - low).astype(np.float32).reshape((-1, 1) if axis == 0 else (1, -1))
        values = values.take(low, axis) * (1 - share) + values.take(low + 1, axis) * share
    return values


def _pick(rng: np.random.Generator, label: int) -> np.ndarray:
    """A material of a class, a little off its base colour."""
    options = MATERIALS[label]
    return options[int(rng.integers(len(options)))] * rng.uniform(1 - SPREAD, 1 + SPREAD, 3).astype(
        np.float32
    )


def _sky(canvas: _Canvas, rng: np.random.Generator) -> None:
    """A gradient from zenith to haze, with clouds, and the far end of the street on the horizon."""
    view, light = canvas.view, canvas.light
    share = np.clip(np.arange(view.height, dtype=np.float32) / np.float32(view.horizon), 0, 1)[:, None, None]
    clouds = np.clip(
        _smooth(rng, view.height, view.width, max(view.height // 5, 2)) * rng.uniform(0, 1.6), 0, 1
    )[..., None]
    sky = light.zenith * (1 - share) + light.haze * share
    canvas.colour[:] = sky + (light.haze * np.float32(1.1) - sky) * clouds
    x = 0.0
    while x < view.width:  # a skyline of trees and houses, far away
        width, height = view.width * rng.uniform(0.05, 0.2), view.height * rng.uniform(0.01, 0.1)
        label = VEGETATION if rng.random() < 0.5 else BUILDING
        colour = canvas.lit(_pick(rng, label), 90.0)
        if label == VEGETATION:
            canvas.ellipse(x + width / 2, view.horizon, width * 0.7, height, label, colour)
        else:
            canvas.rectangle(x, view.horizon - height, x + width, view.horizon + 1, label, colour)
        x += width


def _segments(rng: np.random.Generator, built: float) -> list[_Segment]:
    """The wall along one side, from the camera to 90 metres."""
    segments, near = [], 1.0
    storeys = rng.uniform(2, 5)
    while near < 90:
        building = bool(rng.random() < built)
        far = near + (rng.uniform(6, 20) if building else rng.uniform(4, 14))
        height = 3.0 * max(1.3, storeys + rng.uniform(-1.2, 1.2))
        segments.append(_Segment(near, far, building, height, _pick(rng, BUILDING)))
        near = far
    return segments


def _ground(
    canvas: _Canvas, rng: np.random.Generator, street: _Street, walls: dict[int, list[_Segment]]
) -> None:
    """Road with its markings, pavements, grass beyond, and the shadows of the buildings."""
    view, light = canvas.view, canvas.light
    top = int(view.horizon) + 1
    box = (slice(top, view.height), slice(0, view.width))
    rows, columns = canvas.grid(box)
    z = view.focal * CAMERA / (rows - view.horizon)
    x = (columns - view.centre) * z / view.focal + street.offset  # metres right of the middle of the street
    across = np.abs(x)

    asphalt = np.float32(rng.uniform(0.26, 0.46)) * np.array(
        [1.0, rng.uniform(0.97, 1.02), rng.uniform(0.95, 1.06)], np.float32
    )
    slabs = (asphalt + np.float32(rng.uniform(-0.03, 0.2))) * np.array(
        [1.03, 1.0, rng.uniform(0.88, 1.0)], np.float32
    )
    paint = np.full(3, rng.uniform(0.55, 0.85), np.float32) if rng.random() < 0.8 else YELLOW
    grass = _pick(rng, VEGETATION)

    road, pavement = across < street.road, (across >= street.road) & (across < street.pavement)
    kerb = pavement & (across < street.road + 0.18)
    joints = pavement & ((z + 0 * x) % 1.6 < 0.12)
    dashes = (across < 0.09) & (z % 6.0 < rng.choice((3.0, 4.0, 6.0)))
    edge = np.abs(across - street.road + 0.35) < 0.07
    marking = dashes | (edge if rng.random() < 0.45 else False)
    if rng.random() < 0.3:  # a zebra crossing
        start = rng.uniform(6, 22)
        marking = marking | ((z > start) & (z < start + 3.2) & (x % 1.1 < 0.55))
    marking = marking & road

    label = np.where(road, np.where(marking, MARKING, ROAD), np.where(pavement, PAVEMENT, VEGETATION)).astype(
        np.uint8
    )
    colour = np.empty((*label.shape, 3), np.float32)
    colour[:] = grass
    colour[road] = asphalt
    for _ in range(int(rng.integers(0, 4))):  # repairs: patches of another asphalt
        left, start = rng.uniform(-street.road, street.road), rng.uniform(4, 25)
        patch = (
            road
            & (x > left)
            & (x < left + rng.uniform(0.5, 2))
            & (z > start)
            & (z < start + rng.uniform(1, 8))
        )
        colour[patch] = asphalt * np.float32(rng.uniform(0.7, 1.25))
    colour[marking] = paint * np.float32(rng.uniform(0.75, 1.0))
    colour[pavement] = slabs
    colour[kerb] = slabs * np.float32(rng.uniform(0.8, 1.3))
    colour[joints] *= np.float32(0.86)

    reach = rng.uniform(1, 11)  # of the shadows, metres from the wall on the side of the sun
    bounds = np.array([segment.far for segment in walls[light.sun]])
    built = np.array([segment.building for segment in walls[light.sun]] + [False])
    shadow = (light.sun * x > street.wall - reach) & built[np.searchsorted(bounds, z * rng.uniform(0.9, 1.1))]
    colour[shadow] *= np.float32(light.shadow)
    canvas.paint(box, True, 0, canvas.lit(colour, z))
    canvas.label[box] = label


def _walls(
    canvas: _Canvas, rng: np.random.Generator, street: _Street, walls: dict[int, list[_Segment]]
) -> None:
    """Buildings in perspective along both sides, trees in the gaps, from far to near."""
    for side in (-1, 1):
        for segment in reversed(walls[side]):
            if segment.building:
                _building(canvas, rng, street, segment, side)
            elif segment.far < 70:
                for _ in range(int(rng.integers(0, 4))):
                    across = side * (street.wall + rng.uniform(0, 5)) - street.offset
                    _tree(
                        canvas, rng, across, rng.uniform(segment.near + 2, segment.far), rng.uniform(3.5, 9)
                    )


def _building(
    canvas: _Canvas, rng: np.random.Generator, street: _Street, segment: _Segment, side: int
) -> None:
    """The front along the street with its windows, and the end wall that faces the camera."""
    view, dusk = canvas.view, canvas.light.dusk
    across = side * street.wall - street.offset
    gain = 0.72 if side == canvas.light.sun else rng.uniform(0.95, 1.1)
    glass = canvas.lit(
        np.array([0.25, 0.29, 0.34], np.float32) * np.float32(rng.uniform(0.5, 2.2)), segment.near
    )
    lamp = np.array([0.95, 0.78, 0.45], np.float32)
    share_lit = rng.uniform(0.1, 0.6) if dusk else 0.0
    windows = rng.random((64, 32)) < share_lit
    storey, bay = rng.uniform(2.7, 3.4), rng.uniform(1.8, 3.4)
    blind = rng.random() < 0.15

    # the end wall, at depth ``near``, outwards from the corner
    corner, top = view.point(across, segment.height, max(segment.near, 1.5))
    bottom = view.point(across, 0.0, max(segment.near, 1.5))[1]
    depth = rng.uniform(6, 12) * view.scale(max(segment.near, 1.5))
    left, right = sorted((corner, corner + side * depth))
    if right > 0 and left < view.width and segment.near > 1.5:
        canvas.rectangle(
            left, top, right, bottom, BUILDING, canvas.lit(segment.colour, segment.near, gain * 0.85)
        )

    # the front: every column of pixels is at its own depth
    ends = [view.point(across, 0.0, z)[0] for z in (max(segment.near, 0.5), segment.far)]
    box = canvas.box(min(ends), 0, max(ends), view.height)
    if box[1].start >= view.width or box[1].stop <= 0:
        return
    rows, columns = canvas.grid(box)
    away = np.maximum(side * (columns - view.centre), 0.5)
    z = view.focal * abs(across) / away
    up = CAMERA - (rows - view.horizon) * z / view.focal
    front = (up >= 0) & (up <= segment.height)
    colour = np.empty((*front.shape, 3), np.float32)
    colour[:] = canvas.lit(segment.colour, z, gain)
    along = z - segment.near
    pane = (
        (up % storey > 0.9)
        & (up % storey < 2.2)
        & (along % bay > 0.5)
        & (along % bay < 0.5 + 0.55 * bay)
        & (up < segment.height - 0.5)
    )
    if not blind:
        lit = windows[np.clip(along / bay, 0, 63).astype(int), np.clip(up / storey, 0, 31).astype(int)]
        colour[pane] = glass
        colour[pane & lit] = lamp
    ledge = (up < 0.5) | (up > segment.height - 0.35)
    colour[ledge & front] *= np.float32(0.78)
    canvas.paint(box, front, BUILDING, colour)


def _tree(canvas: _Canvas, rng: np.random.Generator, across: float, z: float, height: float) -> None:
    """A trunk and a crown of a few overlapping ellipses."""
    brush, base = _Brush.at(canvas, across, z, VEGETATION), _pick(rng, VEGETATION)
    trunk = rng.uniform(0.25, 0.4) * height
    brush.rectangle(-0.14, 0.14, 0.0, trunk + 0.5, canvas.lit(BROWN, z, 0.7))
    spread = rng.uniform(0.22, 0.36) * height
    for number in range(int(rng.integers(7, 13))):  # a core, then leaves around it, lighter and darker
        part = 0.0 if number == 0 else 1.0
        x = part * rng.uniform(-0.8, 0.8) * spread
        up = (trunk + height) / 2 + part * rng.uniform(-0.45, 0.45) * (height - trunk)
        radius = (rng.uniform(0.3, 0.55) if part else 0.8) * spread
        flat, gain = rng.uniform(0.7, 1.1), rng.uniform(0.55, 1.15)
        brush.ellipse(x, up, radius, radius * flat, canvas.lit(base, z, gain))


def _borders(canvas: _Canvas, rng: np.random.Generator, street: _Street) -> None:
    """Fences and hedges along the outer edge of the pavements."""
    view = canvas.view
    for side in (-1, 1):
        across = side * street.pavement - street.offset
        near = rng.uniform(1, 6)
        while near < 60:
            far = near + rng.uniform(4, 16)
            kind = rng.random()
            if kind < 0.42:
                ends = [view.point(across, 0.0, z)[0] for z in (near, far)]
                box = canvas.box(min(ends), 0, max(ends), view.height)
                height, fence = rng.uniform(0.7, 1.7), kind < 0.27
                base, gap = _pick(rng, FENCE if fence else VEGETATION), rng.uniform(0.35, 0.9)
                if box[1].start < view.width and box[1].stop > 0:
                    rows, columns = canvas.grid(box)
                    z = view.focal * abs(across) / np.maximum(side * (columns - view.centre), 0.5)
                    up = CAMERA - (rows - view.horizon) * z / view.focal
                    mask = (up >= 0) & (up <= height + (0 if fence else 0.2 * ((z * 7) % 1)))
                    gain = 0.8 if side == canvas.light.sun else 1.0
                    colour = np.broadcast_to(canvas.lit(base, z, gain), (*mask.shape, 3)).copy()
                    if fence:  # between bars and rails one sees what is behind
                        open_ = (
                            (z % gap > 0.45 * gap)
                            & (np.abs(up - height + 0.12) > 0.1)
                            & (np.abs(up - 0.25) > 0.1)
                        )
                        colour[open_] = 0.35 * colour[open_] + 0.65 * canvas.colour[box][open_]
                    canvas.paint(box, mask, FENCE if fence else VEGETATION, colour)
            near = far


def _objects(canvas: _Canvas, rng: np.random.Generator, street: _Street) -> None:
    """Trees, poles, signs and road users between the walls, from far to near."""
    things: list[tuple[float, str, float]] = []

    def place(kind: str, count: float, low: float, high: float, near: float, far: float) -> None:
        for _ in range(int(rng.poisson(count))):
            z = near * (far / near) ** rng.random()
            things.append((z, kind, rng.choice((-1, 1)) * rng.uniform(low, high) - street.offset))

    kerb, road, pavement = street.road + 0.3, street.road, street.pavement
    place("tree", rng.choice((0.0, 0.5, 2.0)), kerb, pavement, 7, 45)
    place("lamp", 2.2, kerb, kerb + 0.3, 5, 40)
    place("sign", 1.3, kerb, kerb + 0.5, 5, 24)
    place("car", 1.6 * street.busy, road * 0.35, road * 0.6, 7, 45)
    place("parked", 1.8 * street.busy, road - 1.0, road - 0.7, 5, 35)
    place("pedestrian", 1.8 * street.busy, kerb, pavement, 5, 25)
    place("pedestrian", 0.25, 0, road, 7, 20)
    place("cyclist", 0.32, road * 0.5, road - 0.4, 5, 20)
    for z, kind, across in sorted(things, reverse=True):
        if kind == "tree":
            _tree(canvas, rng, across, z, rng.uniform(3.5, 7))
        elif kind in ("lamp", "sign"):
            _pole(canvas, rng, across, z, kind == "sign")
        elif kind in ("car", "parked"):
            _car(canvas, rng, across, z)
        else:
            _person(canvas, rng, across, z, kind == "cyclist")


def _pole(canvas: _Canvas, rng: np.random.Generator, across: float, z: float, sign: bool) -> None:
    """A lamp post, or a post with a sign of some shape."""
    post = _Brush.at(canvas, across, z, POLE)
    pixel = FINE / post.scale  # metres of one of the final image, of which nothing is thinner
    height = rng.uniform(2.3, 3.2) if sign else rng.uniform(4.5, 7.5)
    half = max(rng.uniform(0.05, 0.09), pixel * 0.5)
    colour = canvas.lit(_pick(rng, POLE), z, rng.uniform(0.6, 1.0))
    post.rectangle(-half, half, 0.0, height, colour)
    if not sign:
        arm = rng.choice((-1, 1)) * rng.uniform(0.5, 1.5)
        post.rectangle(min(0.0, arm), max(0.0, arm), height - max(0.1, pixel * 0.8), height, colour)
        if canvas.light.dusk:
            post.ellipse(arm, height - 0.1, 0.25, 0.15, np.array([1.0, 0.9, 0.65], np.float32))
        return
    board = post._replace(label=SIGN)
    size, face = rng.uniform(0.32, 0.5), canvas.lit(_pick(rng, SIGN), z, rng.uniform(0.8, 1.15))
    inner = canvas.lit(_pick(rng, SIGN), z)
    up, shape = height - 0.3, rng.integers(3)
    if shape == 0:
        board.ellipse(0.0, up, size, size, face)
        board.ellipse(0.0, up, size * 0.6, size * 0.6, inner)
    elif shape == 1:
        board.trapezium(0.0, up - size, up + size, 0.0, 2 * size, face)
    else:
        wide = size * rng.uniform(0.8, 1.8)
        board.rectangle(-wide, wide, up - size, up + size, face)
        board.rectangle(-wide * 0.7, wide * 0.7, up - size * 0.3, up + size * 0.3, inner)


def _car(canvas: _Canvas, rng: np.random.Generator, across: float, z: float) -> None:
    """A car or a van from behind or in front: shadow, wheels, body, cabin, window, lights."""
    brush = _Brush.at(canvas, across, z, CAR, canvas.new_item(rng))
    van = rng.random() < 0.2
    width, height = rng.uniform(1.6, 1.95), (rng.uniform(1.9, 2.5) if van else rng.uniform(1.35, 1.65))
    body = canvas.lit(_pick(rng, CAR), z, rng.uniform(0.75, 1.1))
    dark = canvas.lit(BLACK, z, 0.7)
    glass = canvas.lit(np.array([0.3, 0.34, 0.38], np.float32), z, rng.uniform(0.5, 1.4))
    # the side one sees, towards the middle
    flank = -np.sign(across) * min(abs(across) * 3.8 / (z + 3.8), 0.7 * width)
    ground, reach = 0.12 * brush.scale, width * 0.6 * brush.scale
    shade = canvas.box(brush.x - reach, brush.foot - ground, brush.x + reach, brush.foot + ground)
    canvas.colour[shade] *= np.float32(0.5)
    waist = (0.62 if van else 0.58) * height
    side = body * np.float32(0.75)
    brush.rectangle(min(0.0, flank), max(0.0, flank), 0.2 + abs(flank) * 0.08, waist - 0.05 * height, side)
    for end in (-0.36, 0.36):
        brush.rectangle((end - 0.1) * width, (end + 0.1) * width, 0.0, 0.3, dark)
    wide, roof = width * (0.9 if van else 0.62), body * np.float32(0.92)
    brush.trapezium(flank * 0.3, waist, height, wide, width * 0.94, roof)
    brush.trapezium(flank * 0.1, waist, 0.92 * height, width * (0.8 if van else 0.56), width * 0.82, glass)
    brush.rectangle(-width / 2, width / 2, 0.18, waist, body)
    front = rng.random() < 0.5
    lamp = np.array([1.0, 0.95, 0.8] if front else [0.75, 0.12, 0.1], np.float32)
    lamp = lamp if canvas.light.dusk else canvas.lit(lamp, z)
    for end in (-0.39, 0.39):
        brush.ellipse(end * width, waist - 0.22, 0.12, 0.08, lamp)
    brush.rectangle(-0.2 * width, 0.2 * width, 0.3, 0.42, dark if front else canvas.lit(WHITE, z))


def _person(canvas: _Canvas, rng: np.random.Generator, across: float, z: float, cycling: bool) -> None:
    """A pedestrian, or a rider on a bicycle seen at an angle."""
    brush = _Brush.at(canvas, across, z, CYCLIST if cycling else PEDESTRIAN, canvas.new_item(rng))
    coat, trousers = (canvas.lit(_pick(rng, PEDESTRIAN), z, rng.uniform(0.7, 1.05)) for _ in range(2))
    skin = canvas.lit(np.array([0.72, 0.54, 0.43], np.float32) * np.float32(rng.uniform(0.5, 1.15)), z)
    tall = rng.uniform(1.45, 1.9)
    if cycling:
        frame, angle = canvas.lit(_pick(rng, CAR), z, 0.6), rng.uniform(0.25, 1.0)
        half = 0.5 * angle
        for end in (-half, half):
            brush.ellipse(end, 0.34, max(0.34 * angle, FINE * 0.5 / brush.scale), 0.34, frame, 0.62)
        brush.rectangle(-half, half, 0.52, 0.66, frame)
        brush.trapezium(0.0, 0.2, 0.95, 0.4, 0.28, trousers)
        brush.trapezium(0.1 * angle, 0.85, 1.55, 0.46, 0.36, coat)
        brush.ellipse(0.2 * angle, 1.68, 0.13, 0.15, skin)
        return
    stride = rng.uniform(0.04, 0.2)
    for foot in (-stride, stride):
        brush.rectangle(foot - 0.09, foot + 0.09, 0.0, 0.48 * tall, trousers)
    brush.trapezium(0.0, 0.42 * tall, 0.86 * tall, 0.42, rng.uniform(0.36, 0.6), coat)
    brush.ellipse(0.0, 0.93 * tall, 0.12, 0.08 * tall, skin if rng.random() < 0.6 else coat)


def _bonnet(canvas: _Canvas, rng: np.random.Generator) -> None:
    """The bonnet of the camera's own car, ignored, at the bottom of four images in five."""
    view = canvas.view
    rise, base = view.height * rng.uniform(0.05, 0.11), _pick(rng, CAR)
    if rng.random() < 0.8:
        colour = canvas.lit(base, 0.0, 0.5)
        canvas.ellipse(
            view.width * rng.uniform(0.42, 0.58),
            view.height,
            view.width * rng.uniform(0.45, 0.7),
            rise,
            IGNORE,
            colour,
        )
