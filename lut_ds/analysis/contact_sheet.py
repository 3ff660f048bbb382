"""What the model will see: originals, views, the patches that each view's encoder gets, and what it has to predict."""

import io
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lut_kernels import gather_patches
from matplotlib import get_data_path
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from lut_ds.analysis.figures import LIGHT, write_aside
from lut_ds.analysis.reconstruct import HIDDEN_GRAY, paste_patches
from lut_ds.config import Recipe
from lut_ds.data.loader import Batch
from lut_ds.data.outputs import writable_folder
from lut_ds.data.pipeline import decode_one
from lut_ds.data.sources import Source
from lut_ds.data.validity import image_hw
from lut_ds.data.views import BLUR, BRIGHTNESS, GRAY, HUE, SOLARIZE, ViewParams, view_params
from lut_ds.engine.reading import make_loader, open_source, sample_order, view_specs
from lut_ds.method.degradations import make_degradation
from lut_ds.method.masking import Masking, disjoint_masks
from lut_ds.method.pixels import IMAGENET_MEAN, IMAGENET_STD, normalised, unit_range

_TILE = 192  # pixels at least: smaller views are enlarged a whole number of times
_GAP, _MARGIN, _LINE = 8, 20, 18  # pixels
_BLANK = 232  # where nothing is predicted
_EPS = 1e-6  # of the loss's patch normalisation


@dataclass(frozen=True)
class Row:
    """One sample: titled pictures uint8 [H, W, 3], each with a line on how it came about."""

    name: str
    pictures: list[tuple[str, NDArray[np.uint8], str]]


def show_views(recipe: Recipe, count: int, path: Path) -> dict[str, Any]:
    """Draw the first `count` samples of epoch 0, exactly as training reads them, into a PNG.

    Returns:
        image (the path), samples (their names in order), views, patches, visible (patches each view's encoder sees).

    Raises:
        UserError: the recipe's data do not work, or the folder of `path` cannot be written.
        RunFault: an image cannot be read or decoded.
    """
    writable_folder(path.parent)
    source = open_source(recipe)
    count = min(count, len(source))
    order = sample_order(recipe, len(source))
    batch = _first_batch(recipe, source, count)
    masking = disjoint_masks(batch.noise, recipe.method.mask_ratio, recipe.method.views)
    rows = _rows(recipe, source, order.samples(0, np.arange(count)), batch, masking)
    visible = masking.ids_keep[0].shape[1]
    write_aside(path, _png(draw_sheet(rows, _heading(recipe, len(source), visible))))
    return {
        "image": str(path),
        "samples": [row.name for row in rows],
        "views": recipe.method.views,
        "patches": recipe.model.patches,
        "visible": visible,
    }


def _first_batch(recipe: Recipe, source: Source, count: int) -> Batch:
    """The first `count` positions of the order; sample, view and mask do not depend on the batch that they come in."""
    loader = make_loader(recipe, source, global_batch=count, micro_batch=count, device=torch.device("cpu"))
    with loader:
        return next(loader.batches(0, 1))


def _rows(recipe: Recipe, source: Source, drawn: NDArray[np.int64], batch: Batch, masking: Masking) -> list[Row]:
    """One row a sample of the batch; the views of a bad sample's replacement are those of the int64 `drawn` [b] one."""
    encoded = [source.read(sample) for sample in batch.samples.tolist()]
    sizes = np.array([image_hw(data, "") for data in encoded], np.int32)
    count, side = len(encoded), recipe.model.patch_size
    titles = ["view"] if len(batch.views) == 1 else [f"view {i + 1}" for i in range(len(batch.views))]
    columns: list[tuple[str, Tensor, list[str]]] = []
    for i, (spec, view, shown) in enumerate(zip(view_specs(recipe), batch.views, degraded(recipe, batch))):
        params = view_params(spec, recipe.view_side, recipe.run.seed, 0, drawn, i, sizes)
        columns.append((titles[i], view, [describe_view(params.row(k), recipe.view_side) for k in range(count)]))
        seen = visible_patches(shown, masking, i, side)
        columns.append((f"{titles[i]}: what the encoder sees", seen, [""] * count))
    if recipe.method.degradation == "none":
        target = prediction_target(batch.views[0], masking, side, recipe.method.norm_pix)
        said = "normalised patch by patch" if recipe.method.norm_pix else ""
        columns.append(("to be predicted" + (" of view 1" if len(titles) > 1 else ""), target, [said] * count))
    rows = []
    for k, sample in enumerate(batch.samples.tolist()):
        original = ("original", decode_one(encoded[k]), f"{sizes[k][1]} x {sizes[k][0]} pixels{_class(source, sample)}")
        pictures = [(title, pixels[k].numpy(), words[k]) for title, pixels, words in columns]
        rows.append(Row(source.name(sample), [original, *pictures]))
    return rows


def degraded(recipe: Recipe, batch: Batch) -> list[Tensor]:
    """The views as the encoder gets them, before masking: uint8 [B, S, S, 3] each."""
    degradation = make_degradation(recipe.method.degradation, recipe.method.degradation_params)
    if degradation is None:
        return batch.views
    draws = torch.empty(len(batch.samples), 0) if batch.draws is None else batch.draws
    shares = draws.chunk(len(batch.views), dim=1) if draws.shape[1] else [draws] * len(batch.views)
    size = recipe.model.image_size
    changed = [degradation.degrade(normalised(view), share, size) for view, share in zip(batch.views, shares)]
    return [(unit_range(view) * 255).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1) for view in changed]


def visible_patches(pixels: Tensor, masking: Masking, view: int, side: int) -> Tensor:
    """uint8 `pixels` [B, S, S, 3] with all patches gray that the encoder of view `view` does not get."""
    hidden = masking.mask(view).bool().nonzero()[:, 1].view(len(pixels), -1)
    pixels = pixels.contiguous()
    gray = torch.full((*hidden.shape, side, side, 3), HIDDEN_GRAY, dtype=torch.uint8)
    return paste_patches(pixels, hidden, gray)


def prediction_target(pixels: Tensor, masking: Masking, side: int, normalised: bool) -> Tensor:
    """The hidden patches of view 1, uint8 [B, S, S, 3], as the decoder has to predict them; the others are blank.

    Normalised patches are drawn with their mean as mid-gray and two standard deviations as black and white.
    """
    hidden = masking.ids_hidden
    patches = gather_patches(pixels, hidden, side, IMAGENET_MEAN, IMAGENET_STD)
    if normalised:
        variance, mean = torch.var_mean(patches, dim=-1, keepdim=True)
        patches = 0.5 + 0.25 * (patches - mean) / (variance + _EPS).sqrt()
        patches = patches.unflatten(-1, (side, side, 3))
    else:
        patches = patches.unflatten(-1, (side, side, 3))
        patches = patches * patches.new_tensor(IMAGENET_STD) + patches.new_tensor(IMAGENET_MEAN)
    drawn = (patches * 255).round().clamp(0, 255).to(torch.uint8)
    return paste_patches(torch.full_like(pixels, _BLANK), hidden, drawn)


def describe_view(p: ViewParams, image_size: int) -> str:
    """One row of parameters in a few words, such as `jitter, blur 1.3 px, flipped`."""
    words = []
    if int(p.crop_hw[0]) != image_size or int(p.crop_hw[1]) != image_size:
        words.append(f"crop {int(p.crop_hw[1])} x {int(p.crop_hw[0])}")
    if p.jitter:
        shifts = [f"{factor:.2f}" for factor in p.factors[BRIGHTNESS:HUE]]
        words.append(f"jitter {' '.join(shifts)} {360 * p.factors[HUE]:+.0f}°")
    if p.choice >= 0:
        blur = f"blur {p.blur_sigma:.1f} px"
        words.append({GRAY: "gray", SOLARIZE: "solarized", BLUR: blur}[int(p.choice)])
    if p.flip:
        words.append("flipped")
    return ", ".join(words) or "not flipped"


def draw_sheet(rows: Sequence[Row], heading: Sequence[str]) -> Image.Image:
    """The contact sheet: a row a sample, the name above its pictures; pictures keep their pixels, or whole multiples."""
    size = rows[0].pictures[2][1].shape[0]
    tile = size * max(1, -(-_TILE // size))
    columns, step = len(rows[0].pictures), tile + 3 * _LINE + _GAP
    top = _MARGIN + (len(heading) + 2) * _LINE
    sheet = Image.new("RGB", (2 * _MARGIN + columns * (tile + _GAP) - _GAP, top + len(rows) * step), LIGHT.ground)
    draw = ImageDraw.Draw(sheet)
    bold, plain = _font("DejaVuSans-Bold.ttf", 13), _font("DejaVuSans.ttf", 11)
    for k, line in enumerate(heading):
        draw.text((_MARGIN, _MARGIN + k * _LINE), line, LIGHT.ink, plain if k else bold)
    for c, (title, _, _) in enumerate(rows[0].pictures):
        draw.text((_MARGIN + c * (tile + _GAP), top - _LINE), title, LIGHT.ink, _font("DejaVuSans-Bold.ttf", 11))
    for r, row in enumerate(rows):
        y = top + r * step
        draw.text((_MARGIN, y + 4), _shortened(row.name, plain, sheet.width - 2 * _MARGIN), LIGHT.faint, plain)
        for c, (_, pixels, words) in enumerate(row.pictures):
            x = _MARGIN + c * (tile + _GAP)
            sheet.paste(_fitted(pixels, tile), (x, y + _LINE + 4))
            draw.multiline_text((x, y + _LINE + tile + 6), _wrapped(words, plain, tile), LIGHT.faint, plain, spacing=2)
    return sheet


def _heading(recipe: Recipe, images: int, visible: int) -> list[str]:
    model, method = recipe.model, recipe.method
    changed = "" if method.degradation == "none" else f" of {method.degradation} views"
    apart = ", none of them in both views" if method.views > 1 and visible < model.patches else ""
    return [
        f"{recipe.data.path}: the first of {images:,} samples of epoch 0",
        f"{method.name}{changed}, {model.image_size} px, seed {recipe.run.seed}: the encoder sees {visible} of {model.patches} "
        f"patches of {model.patch_size} px{apart}",
    ]


def _class(source: Source, sample: int) -> str:
    label = source.label(sample)
    return f", class {source.classes[label]}" if 0 <= label < len(source.classes) else ""


def _fitted(pixels: NDArray[np.uint8], tile: int) -> Image.Image:
    """Enlarged by whole pixels, or made to fit on a white square."""
    image = Image.fromarray(pixels)
    if image.width == image.height and tile % image.width == 0:
        return image.resize((tile, tile), Image.Resampling.NEAREST)
    image.thumbnail((tile, tile), Image.Resampling.LANCZOS)
    if max(image.size) < tile:
        scale = tile / max(image.size)
        image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.NEAREST)
    square = Image.new("RGB", (tile, tile), LIGHT.grid)
    square.paste(image, ((tile - image.width) // 2, (tile - image.height) // 2))
    return square


def _shortened(text: str, font: Any, width: int) -> str:
    """The end of a text that is too wide, as it is what tells paths apart."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength("…" + text) > width:
        text = text[1:]
    return "…" + text


def _wrapped(text: str, font: Any, width: int) -> str:
    """A text in lines that fit, broken at its commas."""
    lines: list[str] = []
    for part in text.split(", "):
        if lines and font.getlength(f"{lines[-1]}, {part}") <= width:
            lines[-1] += f", {part}"
        else:
            lines.append(part)
    return "\n".join(_shortened(line, font, width) for line in lines)


def _font(name: str, size: int) -> Any:
    return ImageFont.truetype(os.path.join(get_data_path(), "fonts", "ttf", name), size)


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()
