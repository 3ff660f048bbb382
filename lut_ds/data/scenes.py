"""A data set for segmentation that needs no download: drawn shapes on textured grounds, in ADE20K's folders."""

import colorsys
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from lut_ds.data.generated import write_set

CLASSES = ("ground", "disc", "square", "triangle", "ring", "cross")
_MOST = 4  # shapes of a scene
_HUES = (
    None,
    0.0,
    0.33,
    0.66,
    0.0,
    0.33,
)  # by class: two pairs share theirs, so that outlines have to be seen; the ground is gray
_HUE_SPREAD = 0.08


def write_scenes(path: Path, train: int = 240, val: int = 60, size: int = 64, seed: int = 0) -> Path:
    """Write path/images/{training,validation}/*.jpg and path/annotations/.../*.png of RGB scenes and masks; returns `path`.

    Mask values are 1 to 6 by `CLASSES`, so they are read as ADE20K's (`reduce_zero_label`); sides are `size` to 1.5 times
    that. The same arguments give the same files. See `generated.write_set`.

    Raises:
        UserError: `path` holds something else.
    """
    settings = {"version": 1, "train": train, "val": val, "size": size, "seed": seed}

    def write(folder: Path) -> list[str]:
        (folder / "classes.txt").write_text("".join(f"{name}\n" for name in CLASSES))
        names = ["classes.txt"]
        for stream, (split, count) in enumerate((("training", train), ("validation", val))):
            names += _write(folder, split, count, size, np.random.default_rng([seed, stream]))
        return names

    return write_set(path, "scenes", settings, write)


def _write(folder: Path, split: str, count: int, size: int, random: np.random.Generator) -> list[str]:
    """The images and masks of a split; their names below the folder."""
    images, masks = f"images/{split}", f"annotations/{split}"
    for name in (images, masks):
        (folder / name).mkdir(parents=True)
    names = []
    for number in range(count):
        height, width = random.integers(size, size + size // 2, 2, endpoint=True).tolist()
        image, mask = scene(height, width, random)
        names += [f"{images}/scene_{number:05d}.jpg", f"{masks}/scene_{number:05d}.png"]
        image.save(folder / names[-2], quality=92)
        mask.save(folder / names[-1])
    return names


def scene(height: int, width: int, random: np.random.Generator) -> tuple[Image.Image, Image.Image]:
    """An image (RGB) of 1 to 4 shapes and its mask (L, values from 1).

    Disc and ring have a hue in common, and so have square and cross; shapes hide each other.
    """
    pixels, mask = _texture(0, height, width, random), Image.new("L", (width, height), 1)
    for _ in range(int(random.integers(1, _MOST, endpoint=True))):
        kind = int(random.integers(1, len(CLASSES)))
        area = _shape(kind, height, width, random)
        fill = _texture(kind, height, width, random)
        pixels = np.where(np.asarray(area)[..., None] > 0, fill, pixels)
        mask.paste(kind + 1, mask=area)
    noisy = pixels + random.normal(0, 6, pixels.shape)
    return Image.fromarray(np.clip(noisy, 0, 255).astype(np.uint8)), mask


def _texture(kind: int, height: int, width: int, random: np.random.Generator) -> NDArray[np.float64]:
    """Stripes of any direction and width around a colour of the class: [H, W, 3]."""
    hue, light = _HUES[kind], random.uniform(0.35, 0.85)
    turned = 0.0 if hue is None else (hue + random.uniform(-_HUE_SPREAD, _HUE_SPREAD)) % 1.0
    strong = 0.0 if hue is None else random.uniform(0.4, 0.9)
    colour = 255 * np.array(colorsys.hsv_to_rgb(turned, strong, light))
    y, x = np.mgrid[0:height, 0:width]
    angle, period = random.uniform(0, np.pi), random.uniform(5, 20)
    wave = np.sin((np.cos(angle) * x + np.sin(angle) * y) * (2 * np.pi / period) + random.uniform(0, 2 * np.pi))
    return colour + wave[..., None] * random.uniform(5, 30, 3)


def _shape(kind: int, height: int, width: int, random: np.random.Generator) -> Image.Image:
    """The pixels of a shape: L, 0 or 255."""
    area = Image.new("L", (width, height))
    draw = ImageDraw.Draw(area)
    radius = random.uniform(0.2, 0.36) * min(height, width)
    x, y, turn = random.uniform(0.15, 0.85) * width, random.uniform(0.15, 0.85) * height, random.uniform(0, 2 * np.pi)

    def corners(angles: list[float], radii: list[float]) -> list[tuple[float, float]]:
        return [(x + radius * r * np.cos(a + turn), y + radius * r * np.sin(a + turn)) for a, r in zip(angles, radii)]

    if CLASSES[kind] in ("disc", "ring"):
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), 255)
        if CLASSES[kind] == "ring":
            inner = 0.5 * radius
            draw.ellipse((x - inner, y - inner, x + inner, y + inner), 0)
    elif CLASSES[kind] in ("square", "triangle"):
        sides = 4 if CLASSES[kind] == "square" else 3
        draw.polygon(corners([2 * np.pi * i / sides for i in range(sides)], [1.15] * sides), 255)
    else:
        for quarter in (0.0, np.pi / 2):
            angles = [quarter + a for a in (-0.3, 0.3, np.pi - 0.3, np.pi + 0.3)]
            draw.polygon(corners(angles, [1.1] * 4), 255)
    return area
