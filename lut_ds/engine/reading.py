"""What a recipe reads: its source, its views, its order, and the loader that joins them."""

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from lut_ds.config import Recipe
from lut_ds.data import sources
from lut_ds.data.order import BlockOrder, Order, SampleOrder
from lut_ds.data.tuning import Loading, choose_loading
from lut_ds.data.views import Photometric, ViewSpec
from lut_ds.engine.launch import rank_cores
from lut_ds.errors import UserError
from lut_ds.method.degradations import make_degradation

if TYPE_CHECKING:
    from lut_ds.data.loader import PretrainLoader


def view_specs(recipe: Recipe) -> list[ViewSpec]:
    """The views a recipe reads."""
    data = recipe.data
    mild = ViewSpec(recipe.crop, pad=data.crop_pad, scale=data.crop_scale, hflip=data.hflip)
    if recipe.method.name == "mae":
        return [mild]
    brightness, contrast, saturation, hue = data.jitter
    photometric = Photometric(brightness, contrast, saturation, hue, p=data.jitter_prob) if data.photometric else None
    strong = replace(mild, photometric=photometric)
    return [strong if data.photometric == "both" else mild, strong]


def draws_per_sample(recipe: Recipe) -> int:
    """Uniform numbers that the degradation of a sample's views needs."""
    degradation = make_degradation(recipe.method.degradation, recipe.method.degradation_params)
    return degradation.draws * recipe.method.views if degradation is not None else 0


def open_source(recipe: Recipe) -> sources.Source:
    """The training images of `data.path`."""
    if recipe.data.path is None:
        raise UserError("data.path: no image folder given; add data.path=DIR, where DIR holds train/<class>/*.jpg")
    return sources.open_source(recipe.data.path, split="train")


def loading(recipe: Recipe, device: torch.device) -> Loading:
    """How this rank loads: the recipe's settings, and for those it leaves open the machine's tuning or a default."""
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    data = recipe.data
    return choose_loading(data.threads, data.prefetch, data.hw_decoder_load, rank_cores(), gpu, recipe.model.image_size)


def sample_order(recipe: Recipe, images: int) -> Order:
    """The order in which a recipe reads."""
    if recipe.data.shuffle == "blocks":
        return BlockOrder(images, recipe.run.seed, recipe.data.shuffle_block, recipe.data.shuffle_window)
    return SampleOrder(images, recipe.run.seed)


def make_loader(
    recipe: Recipe,
    source: sources.Source,
    *,
    global_batch: int,
    micro_batch: int,
    rank: int = 0,
    world_size: int = 1,
    device: torch.device,
    how: Loading | None = None,
) -> "PretrainLoader":
    """The loader of a recipe; what its samples, views and masks are does not depend on the batch sizes.

    Args:
        recipe, source: what is read; `source` is `open_source(recipe)`.
        global_batch, micro_batch, rank, world_size, device: see PretrainLoader.
        how: threads, prefetch and decoder; None takes what the recipe and the machine's tuning say.
    """
    from lut_ds.data.loader import PretrainLoader  # with DALI, which a step on ready images does without

    return PretrainLoader(
        source,
        view_specs(recipe),
        image_size=recipe.view_side,
        num_patches=recipe.model.patches,
        num_draws=draws_per_sample(recipe),
        seed=recipe.run.seed,
        global_batch=global_batch,
        micro_batch=micro_batch,
        rank=rank,
        world_size=world_size,
        device=device,
        **vars(how or loading(recipe, device)),
        order=sample_order(recipe, len(source)),
        retry_seconds=recipe.data.retry_seconds,
    )
