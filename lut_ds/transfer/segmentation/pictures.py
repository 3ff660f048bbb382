"""Images beside their masks and predictions, as one PNG."""

import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from lut_ds.transfer.segmentation.folder import IGNORED, MaskedImages

_SIDE = 256  # of a tile, pixels
_GAP, _TITLE = 8, 20
_COLUMNS = ("image", "truth", "prediction")


def palette() -> NDArray[np.uint8]:
    """Colours of the values of a mask, [256, 3]: each far from those just before it, as in PASCAL VOC; no class is white."""
    values = np.arange(256)
    colours = np.zeros((256, 3), np.uint8)
    for bit in range(8):
        for channel in range(3):
            colours[:, channel] |= (((values >> (3 * bit + channel)) & 1) << (7 - bit)).astype(np.uint8)
    colours[IGNORED] = 255
    return colours


def write_predictions(path: Path, images: MaskedImages, predictions: Mapping[int, NDArray[np.uint8]]) -> None:
    """A row for each predicted image: itself, its mask and the prediction uint8 [H, W], in `palette`'s colours."""
    colours = palette()
    width = len(_COLUMNS) * (_SIDE + _GAP) + _GAP
    sheet = Image.new("RGB", (width, _TITLE + len(predictions) * (_SIDE + _GAP)), "white")
    draw = ImageDraw.Draw(sheet)
    for column, title in enumerate(_COLUMNS):
        draw.text((_GAP + column * (_SIDE + _GAP), 4), title, fill="black")
    for row, (i, prediction) in enumerate(sorted(predictions.items())):
        image, mask = images.load(i)
        masks = (Image.fromarray(colours[values]) for values in (np.asarray(mask), prediction))
        for column, picture in enumerate((image, *masks)):
            tile = _tile(picture, Image.Resampling.NEAREST if column else Image.Resampling.BICUBIC)
            sheet.paste(tile, (_GAP + column * (_SIDE + _GAP), _TITLE + row * (_SIDE + _GAP)))
    aside = path.with_name(f".{path.name}.partial")
    sheet.save(aside, format="PNG")
    os.replace(aside, path)


def _tile(picture: Image.Image, how: Image.Resampling) -> Image.Image:
    """The picture with its longer side as long as a tile's."""
    factor = _SIDE / max(picture.size)
    return picture.resize((max(1, round(picture.width * factor)), max(1, round(picture.height * factor))), how)
