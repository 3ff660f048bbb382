"""What a segmentation starts from: checked images and masks, and a segmenter with a pre-trained encoder in it; and back from files."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file

from lut_ds.config import Model
from lut_ds.engine.launch import Ranks
from lut_ds.engine.train import on_all
from lut_ds.errors import UserError
from lut_ds.transfer.classifier import Loaded, load_encoder_weights
from lut_ds.transfer.models import Pretrained, load_model
from lut_ds.transfer.segmentation.config import SegmentRecipe, segment_folder
from lut_ds.transfer.segmentation.evaluate import own_share
from lut_ds.transfer.segmentation.folder import Labels, MaskedImages, class_names
from lut_ds.transfer.segmentation.upernet import PyramidViT, Segmenter, pyramid_layers

_SHIPPED = {(384, 12): "segment_vits16", (768, 12): "segment_vitb16", (1024, 24): "segment_vitl16"}
_REPLACED = ("norm", "fc_norm")  # parts of an encoder that have no place here


def open_masked(recipe: SegmentRecipe) -> tuple[MaskedImages, MaskedImages, list[str]]:
    """Training and validation images of `data.path`, and the names of the classes.

    Raises:
        UserError: no such folders, nothing in them, or images and masks that do not belong together.
    """
    path = recipe.data.path
    if path is None:
        raise UserError(
            "data.path: no images given; add data.path=DIR, where DIR holds images/ and annotations/ with training/ and validation/"
        )
    labels = Labels(recipe.data.classes, recipe.data.reduce_zero_label)
    train, val = MaskedImages(path, "train", labels), MaskedImages(path, "val", labels)
    if len(train) < recipe.train.global_batch:
        raise UserError(
            f"train.global_batch: expected at most the {len(train)} training images of data.path, found "
            f"{recipe.train.global_batch}; lower train.global_batch or add images"
        )
    return train, val, class_names(Path(path), recipe.data.classes)


def check_masks(sets: Sequence[MaskedImages], ranks: Ranks, threads: int) -> None:
    """Look at every header and every mask, each rank at its share; a collective.

    Raises:
        UserError: naming the first image or mask, on every rank alike, that cannot be used.
    """
    for images in sets:
        on_all(lambda images=images: images.check(own_share(len(images), ranks), threads))  # type: ignore[misc]
        every: list[bool] = [images.labelled] * ranks.world_size
        if ranks.world_size > 1:
            dist.all_gather_object(every, images.labelled)
        if not any(every):
            raise UserError(
                f"data.path: {images.root}/annotations: {images.split}: expected pixels of a class, found none in any mask; "
                "correct the masks, or data.reduce_zero_label"
            )


def start_model(recipe: SegmentRecipe, classes: int) -> tuple[Segmenter, Pretrained, Loaded]:
    """The segmenter with the weights of `model.source`, its heads drawn from `run.seed`: the same on every rank.

    Raises:
        UserError: no such source, one of another architecture, weights that are not finite, or a side that patches do not divide.
    """
    m = recipe.model
    if m.source is None:
        raise UserError("model.source: no checkpoint given; name the run, export or file to start from")
    found = load_model(m.source, m.weights, heads=m.source_heads)
    sizes = _expected_sizes(recipe, found)
    layers = m.layers or pyramid_layers(sizes.depth)
    if list(layers) != sorted(layers) or layers[0] < 0 or layers[-1] != sizes.depth - 1:
        raise UserError(
            f"model.layers: expected four rising blocks that end with the last, {sizes.depth - 1}, found {list(layers)}; correct them"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.run.seed)
        encoder = PyramidViT(sizes, layers, m.drop_path)
        model = Segmenter(encoder, classes, m.channels, m.aux_channels, m.dropout)
    state = found.model.state_dict()
    loaded = load_encoder_weights(encoder, state, m.source)
    if strange := [name for name in loaded.left_out if name.partition(".")[0] not in _REPLACED]:
        raise UserError(
            f"checkpoint: {m.source}: expected a plain ViT, found {strange[0]} in it too; name another checkpoint"
        )
    return model, found, replace(loaded, not_read=found.record["left_out"])


def _expected_sizes(recipe: SegmentRecipe, found: Pretrained) -> Model:
    """The encoder's at the side of the crops; UserError where the recipe expects others."""
    m, has = recipe.model, found.record["sizes"]
    for key in ("patch_size", "width", "depth"):
        expected = getattr(m, key)
        if expected is not None and expected != has[key]:
            raise UserError(
                f"checkpoint: {m.source}: expected model.{key} {expected} as in the recipe, found {has[key]}; use the recipe "
                f"of its size, or set model.{key}={has[key]}"
            )
    patch = has["patch_size"]
    if m.image_size % patch:
        near = max(patch, round(m.image_size / patch) * patch)
        raise UserError(
            f"model.image_size: {m.image_size} is not divisible by the checkpoint's patch side {patch}; set model.image_size={near}"
        )
    if found.record.get("positions") == "sinusoid_1d" and m.image_size != found.image_size:
        raise UserError(
            f"model.image_size: expected {found.image_size} as trained, because positions over the raster index (sinusoid_1d) "
            f"mean nothing on another grid, found {m.image_size}; set model.image_size={found.image_size}"
        )
    mlp_ratio = found.model.blocks[0].mlp.fc1.out_features / has["width"]
    return Model(image_size=m.image_size, mlp_ratio=mlp_ratio, **has)


def recipe_for(source: str, kind: Any) -> str:
    """The name of the shipped recipe for the size of a checkpoint; UserError where there is none."""
    sizes = load_model(source, kind).record["sizes"]
    name = _SHIPPED.get((sizes["width"], sizes["depth"])) if sizes["patch_size"] == 16 else None
    if name is None:
        known = ", ".join(sorted(path.stem for path in segment_folder().glob("*.yaml")))
        raise UserError(
            f"recipe: expected one for a ViT of width {sizes['width']}, depth {sizes['depth']}, patch {sizes['patch_size']}, "
            f"found none that is shipped; name one of {known}, or a .yaml file"
        )
    return name


def model_config(recipe: SegmentRecipe, model: Segmenter, found: Pretrained, names: list[str]) -> dict[str, Any]:
    """What `load_segmenter` needs beside the weights."""
    encoder, m = model.encoder, recipe.model
    sizes = {**found.record["sizes"], "mlp_ratio": encoder.blocks[0].mlp.fc1.out_features / encoder.embed_dim}
    return {
        "sizes": {**sizes, "image_size": m.image_size},
        "layers": encoder.layers,
        "heads": {"channels": m.channels, "aux_channels": m.aux_channels},
        "mean": list(found.mean),
        "std": list(found.std),
        "classes": names,
        "stride": recipe.stride,
    }


def build_segmenter(config: dict[str, Any]) -> Segmenter:
    """The segmenter that `model_config` describes, its weights not yet set."""
    encoder = PyramidViT(Model(**config["sizes"]), config["layers"])
    return Segmenter(encoder, len(config["classes"]), **config["heads"])


def load_segmenter(folder: str | Path) -> tuple[Segmenter, dict[str, Any]]:
    """A trained segmenter from best/ or last/ of a run folder, in eval mode, fp32, on the CPU; and its config.json.

    Raises:
        UserError: the folder holds none.
    """
    folder = Path(folder)
    try:
        config = json.loads((folder / "config.json").read_text())["segmenter"]
        model = build_segmenter(config)
        model.load_state_dict(load_file(folder / "model.safetensors"))
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:160]
        raise UserError(
            f"segmenter: {folder}: expected best/ or last/ of a segmentation run, found: {reason}"
        ) from error
    return model.eval(), config
